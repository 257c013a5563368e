//! Integration tests: one file or folder per command or guarantee.
//!
//! `cache_samples`, `fault_server`, `harvest_process` and `tiny` are helpers.

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
mod harvest_process;
mod hostile_models;
mod house;
mod imports;
mod kills;
mod mock;
mod model;
mod moved;
mod serve;
mod t5;
mod tiny;
mod train;

/// Returns true if the tests run with larger sizes, as in the first step of `tests/nightly.sh`. The variable has no
/// prefix `DISTILL_`, because the binary, which inherits it, reads such variables as settings.
fn nightly() -> bool {
    std::env::var_os("NIGHTLY").is_some()
}
