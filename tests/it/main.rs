//! One file per verb or promise.

mod cache;
mod cache_faults;
mod cache_properties;
mod cache_samples;
mod cli;
mod config;
mod data;
mod export;
mod fault_server;
mod fs;
mod generate;
mod gradients;
mod harvest;
mod house;
mod mock;
mod model;
mod serve;
mod tiny;
mod train;
