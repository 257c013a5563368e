//! `distill harvest`: requests the teacher's answers.

use anyhow::{Context, Result};

use crate::cli::{GlobalArgs, HarvestArgs};
use crate::harvest;
use crate::harvest::options::HarvestOptions;

/// Runs the harvest and prints its summary.
///
/// # Errors
/// If the harvest fails, or its summary is not a success: some rows failed, or it stopped early.
pub fn run(args: &HarvestArgs, global: &GlobalArgs) -> Result<()> {
    let config = super::load_config(&args.config)?.config;
    let options = HarvestOptions {
        dry_run: args.dry_run,
        limit: args.limit,
        again: args.again.clone(),
        shard: args.shard,
        quiet: global.json,
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    // Spawned, because `block_on` alone would run the dispatcher on this thread, and not on the worker threads with the
    // request tasks.
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
