//! One file per verb or promise.

// A test fails by panicking.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod budget;
mod cache;
mod cache_compressed;
mod cache_crashes;
mod cache_faults;
mod cache_mending;
mod cache_opening;
mod cache_properties;
mod cache_samples;
#[cfg(feature = "candle-transformers")]
mod candle_transformers;
mod cli;
mod config;
mod data;
mod export;
mod fault_server;
mod folders;
mod fs;
mod fuzz;
mod generate;
mod gradients;
mod harvest;
mod hostile_models;
mod house;
mod imports;
mod kills;
mod mock;
mod model;
mod moved;
mod serve;
mod stage;
mod tiny;
mod train;

/// Are the larger sizes of `tests/nightly.sh` wanted? Not by a `DISTILL_` variable: those are settings.
fn nightly() -> bool {
    std::env::var_os("NIGHTLY").is_some()
}
