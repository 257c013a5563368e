//! `distill completions`: prints the completion script of a shell.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::{Shell, generate};

use crate::cli::Cli;

/// Prints the completion script.
pub fn run(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "distill", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}
