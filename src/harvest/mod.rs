//! Prompts in, recorded answers out.
//!
//! ```text
//! prompts --plan--> rows that the cache does not hold --queue, limiter--> teacher (one attempt)
//!   --retry (what does the reply mean?)--> record -> cache | back into the queue | failed
//! ```
//!
//! `dispatch` is the one task that decides; everything around it is pure (`request`, `wire`,
//! `logprobs`, `retry`, `cost`, `record`, `plan`, `queue`, `health`) or does one thing (`teacher`
//! sends, `limiter` paces). It knows nothing of tensors.

mod cost;
mod dispatch;
mod failures;
mod health;
mod limiter;
mod logprobs;
mod plan;
mod progress;
mod queue;
mod record;
mod request;
mod retry;
mod summary;
mod teacher;
mod wire;

pub use plan::Estimate;
pub use summary::{SUMMARY_VERSION, Summary};

use std::collections::HashSet;
use std::path::Path;

use anyhow::Result;

use crate::cache::{self, Cache};
use crate::config::Config;
use crate::prompt::{self, Prompt};
use crate::signal::Signals;
use dispatch::Dispatcher;
use plan::Plan;
use teacher::Teacher;

#[derive(Debug, Clone, Copy, Default)]
pub struct HarvestOptions {
    /// Plan only: send nothing, write nothing.
    pub dry_run: bool,
    /// Use only the first so many prompts.
    pub limit: Option<usize>,
    /// Show no progress.
    pub quiet: bool,
}

/// Asks the teacher for every answer that the run's cache does not hold.
///
/// An error means that nothing could be begun, or that an answer could not be recorded. A run that
/// began ends with a summary, whose `error` says what, if anything, went wrong; see
/// [`Summary::into_result`].
pub async fn run(config: &Config, options: HarvestOptions) -> Result<Summary> {
    match options.dry_run {
        true => dry_run(config, options),
        false => run_until(config, options, Signals::listen()?).await,
    }
}

/// As [`run`], stopped by the given signals rather than by those of this process.
pub async fn run_until(
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
) -> Result<Summary> {
    let prompts = prompts(config, options)?;
    let teacher = Teacher::new(&config.teacher)?;
    let cache = Cache::open(&config.own_cache(), config.cache.durability)?;
    let plan = Plan::new(prompts, config, |key| cache.contains(key));
    if plan.repeated > 0 {
        tracing::warn!(
            "{} requests ask word for word what another one asks: each such answer is bought once",
            plan.repeated
        );
    }
    Dispatcher::new(config, &plan, &cache, teacher, options.quiet)?
        .run(signals)
        .await
}

fn dry_run(config: &Config, options: HarvestOptions) -> Result<Summary> {
    let prompts = prompts(config, options)?;
    let keys = cached_keys(&cache::file(&config.own_cache()))?;
    let plan = Plan::new(prompts, config, |key| keys.contains(key));
    Ok(Summary {
        version: SUMMARY_VERSION,
        total: plan.total,
        cached: plan.cached,
        pending: plan.rows.len() as u64,
        estimate: Some(plan.estimate(config)),
        ..Summary::default()
    })
}

fn prompts(config: &Config, options: HarvestOptions) -> Result<Vec<Prompt>> {
    request::check(config)?;
    let mut prompts = prompt::load(&config.prompts)?;
    prompts.truncate(options.limit.unwrap_or(usize::MAX));
    Ok(prompts)
}

/// Read without the lock, so that a dry run may look over the shoulder of a running harvest.
fn cached_keys(file: &Path) -> Result<HashSet<String>> {
    if !file.exists() {
        return Ok(HashSet::new());
    }
    cache::read(file)?
        .map(|record| record.map(|record| record.key))
        .collect()
}
