//! `distill demo`.

use anyhow::Result;

use crate::cli::{DemoArgs, Global};
use crate::demo::{self, Options};

/// Runs the demo and prints its table.
pub fn run(args: &DemoArgs, global: &Global) -> Result<()> {
    let options = Options {
        dir: args.dir.clone(),
        prompts: args.prompts,
        heldout: args.heldout,
        steps: args.steps,
        port: args.port,
    };
    let outcome = demo::run(&options, global.json)?;
    if global.json {
        return super::print_json(&outcome);
    }
    super::print(&outcome.to_string())
}
