//! One file per verb or promise.

mod cache;
mod cache_faults;
mod cache_properties;
mod cache_samples;
mod config;
mod fs;
mod gradients;
mod model;
