//! One thin file per verb: arguments in, library called, result printed.

pub mod cache;
pub mod completions;
pub mod config;
pub mod data;
pub mod demo;
pub mod eval;
pub(crate) mod export;
pub mod generate;
pub mod harvest;
pub mod probe;
pub mod serve;
pub mod tokenize;
pub mod train;

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::cli::ConfigFile;
use crate::config::load;
use crate::config::load::LoadedConfig;
use crate::terminal::escape_unsafe;

/// Reads the config that the flags name.
fn load_config(file: &ConfigFile) -> Result<LoadedConfig> {
    load(&file.file, std::env::vars(), &file.set)
}

/// Prints a result as one JSON object, whose version is a promise to scripts.
fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!(
        "{}\n",
        escape_unsafe(&serde_json::to_string(value)?)
    ))
}

/// Prints to stdout; a closed pipe is an error that `main` forgives, not a panic.
fn print(text: &str) -> Result<()> {
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}
