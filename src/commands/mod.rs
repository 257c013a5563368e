//! The commands, one thin file each: a command reads its arguments, calls the library and prints the result.
//!
//! | file | content |
//! |---|---|
//! | `demo` | the whole pipeline on this machine |
//! | `harvest`, `probe` | requests to the teacher |
//! | `train`, `eval` | training and evaluation of the student |
//! | `serve`, `generate` | a local model behind the OpenAI API, and on the terminal |
//! | `cache`, `export`, `data` | inspection and conversion of answers and examples |
//! | `config`, `tokenize`, `completions` | small tools |
//!
//! Invariants: a file here only connects the command line to the library, so a program that uses the library does not
//! need it; a result goes to stdout, everything else to stderr; with `--json`, the result is one JSON object in one
//! line (`serve` prints its address as such an object when it is ready, and a mock then the statistics as another).

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

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cli::ConfigFile;
use crate::config::load;
use crate::config::load::LoadedConfig;
use crate::terminal::escape_unsafe;

/// Loads the config that the flags select.
fn load_config(file: &ConfigFile) -> Result<LoadedConfig> {
    load(&file.file, std::env::vars_os(), &file.set)
}

/// Prints a result as one JSON object in one line. Its field `version` is the version of its format.
fn print_json(value: &impl Serialize) -> Result<()> {
    print(&json_line(value)?)
}

/// Serialises to one line of JSON without characters that a terminal interprets.
fn json_line(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(value)?;
    Ok(format!("{}\n", escape_unsafe(&text)))
}

/// Prints to stdout. If the reader of stdout has closed it, the text is discarded, so that the exit status shows whether
/// the command itself succeeded.
fn print(text: &str) -> Result<()> {
    print_if_open(text).map(|_| ())
}

/// Prints to stdout. Returns false if the reader of stdout has closed it, as in `distill cache show | head`.
fn print_if_open(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        Ok(()) => Ok(true),
        // A closed terminal gives EIO.
        Err(error)
            if error.kind() == ErrorKind::BrokenPipe || error.raw_os_error() == Some(libc::EIO) =>
        {
            Ok(false)
        }
        Err(error) => Err(error).context("cannot write to stdout"),
    }
}
