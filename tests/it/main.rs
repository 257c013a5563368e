//! One file per verb or promise.

mod config;
mod gradients;
mod model;
