//! `distill demo`: harvests, trains and evaluates with a local model as the teacher.

use anyhow::Result;

use crate::cli::{DemoArgs, GlobalArgs};
use crate::demo::{self, DemoOptions};

/// Runs the demo and prints its table.
pub fn run(args: &DemoArgs, global: &GlobalArgs) -> Result<()> {
    let options = DemoOptions {
        dir: args.dir.clone(),
        prompts: args.prompts as usize,
        heldout: args.heldout as usize,
        steps: args.steps,
        port: args.port,
    };
    let summary = demo::run(&options, global.json)?;
    if global.json {
        return super::print_json(&summary);
    }
    super::print(&summary.to_string())
}
