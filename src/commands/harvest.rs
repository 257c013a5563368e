//! `distill harvest`: collect the teacher's answers.

use anyhow::{Context, Result};

use crate::cli::{Global, HarvestArgs};
use crate::harvest;
use crate::harvest::options::HarvestOptions;

/// Runs the harvest, prints its summary, and returns the error of the summary.
pub fn run(args: &HarvestArgs, global: &Global) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let options = HarvestOptions {
        dry_run: args.dry_run,
        limit: args.limit,
        again: args.again.clone(),
        shard: args.shard,
        quiet: global.json,
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    // Spawned, so that it runs on the worker threads next to the request tasks.
    let harvest = runtime.spawn(async move { harvest::run(&config, options).await });
    let summary = runtime.block_on(harvest).context("the harvest failed")??;
    if global.json {
        super::print_json(&summary)?;
    } else {
        super::print(&summary.to_table())?;
    }
    summary.into_result()?;
    Ok(())
}
