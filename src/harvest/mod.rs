//! Prompts in, recorded answers out.
//!
//! ```text
//! prompts --plan--> rows that the cache does not hold --lane: queue, limiter, budget--> attempt
//!   (body -> teacher -> retry: what does the reply mean? -> record)
//!   --dispatch--> cache | back into the queue | failed --> summary
//! ```
//!
//! `dispatch` is the one task that decides; an `attempt` runs in a task of its own. Each teacher has
//! a `lane`: its queue, its `limiter`, its `health`. `purse` keeps the `budget` and the `ledger`,
//! which make the cap hold over kills. Everything else is pure (`request`, `wire`, `logprobs`,
//! `retry`, `cost`, `budget`, `record`, `plan`, `estimate`, `queue`, `schedule`, `advice`) or does
//! one thing (`teacher` sends). It knows nothing of tensors.

mod advice;
mod attempt;
mod budget;
mod clock;
mod cost;
mod dispatch;
pub mod endpoint;
mod estimate;
mod failures;
mod health;
mod lane;
mod ledger;
mod limiter;
mod logprobs;
mod plan;
mod probe;
mod progress;
mod purse;
mod queue;
mod record;
mod request;
mod retry;
mod schedule;
mod structured;
mod summary;
mod teacher;
mod timeline;
mod wire;

pub use clock::WallClock;
pub use estimate::Estimate;
pub use summary::{SUMMARY_VERSION, Summary};
pub use teacher::{Fault, Reply, Transport};

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use crate::cache::stats::Stats;
use crate::cache::{self, Cache};
use crate::config::Config;
use crate::exit::Exit;
use crate::prompt::{self, Prompt};
use crate::signal::Signals;
use dispatch::Dispatcher;
use endpoint::Endpoints;
use lane::Lane;
use plan::Plan;
use purse::Purse;
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
    request::check(config)?;
    let lanes = config.lanes();
    let teachers = lanes.iter().map(|lane| {
        let teacher: Arc<dyn Transport> = Arc::new(Teacher::new(&lane.teacher)?);
        Ok(teacher)
    });
    let transports = teachers.collect::<Result<_>>()?;
    run_over(config, options, signals, transports, WallClock::system()).await
}

/// As [`run_until`], over other ways to the teachers (one for each), and by another wall clock: the
/// seam at which a simulated night takes the place of the network.
pub async fn run_over(
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
    transports: Vec<Arc<dyn Transport>>,
    clock: WallClock,
) -> Result<Summary> {
    let prompts = prompts(config, options)?;
    let probes = check_endpoints(config)?;
    let cache = Cache::open(&config.own_cache(), config.cache.durability)?;
    let mut plan = Plan::new(prompts, config, |key| cache.contains(key))?;
    for (asking, probe) in plan.askings.iter_mut().zip(probes) {
        asking.probe = probe;
    }
    if plan.repeated > 0 {
        tracing::warn!(
            "{} requests ask word for word what another one asks: each such answer is bought once",
            plan.repeated
        );
    }
    let settings = config.lanes();
    check_money(config)?;
    let measured = match config.budget.usd {
        Some(_) => cache::cost(&cache::file(&config.own_cache()))?,
        None => 0.0,
    };
    let most_in_flight = settings.iter().map(|lane| lane.limits.concurrency as u64);
    let (purse, lost) = Purse::open(
        &config.run_dir,
        config.budget.usd,
        measured,
        most_in_flight.sum(),
        clock.clone(),
    )?;
    if lost.requests > 0 {
        tracing::warn!(
            "the last run was killed: at most {} requests were in flight, and may be billed \
             without an answer",
            lost.requests
        );
    }
    let mut lanes = Vec::new();
    for (index, transport) in transports.into_iter().enumerate() {
        let day = purse.day(&settings[index]);
        lanes.push(Lane::new(&plan, index, transport, day, &config.retry)?);
    }
    for lane in &lanes {
        purse.check_largest(&plan, lane)?;
    }
    let plan = Arc::new(plan);
    Dispatcher::new(config, plan, &cache, lanes, purse, clock, options.quiet)?
        .run(signals)
        .await
}

/// Asks each endpoint of the config about twenty cheap questions, and keeps what they tell in the
/// run folder.
///
/// # Errors
/// Where an endpoint does not answer.
pub async fn probe(config: &Config) -> Result<Endpoints> {
    request::check(config)?;
    let mut endpoints = Vec::new();
    for lane in config.lanes() {
        let teacher = Arc::new(Teacher::new(&lane.teacher)?);
        endpoints.push(probe::run(lane, teacher, WallClock::system().now()).await?);
    }
    let endpoints = Endpoints {
        version: endpoint::ENDPOINT_VERSION,
        endpoints,
    };
    let text = serde_json::to_vec_pretty(&endpoints)?;
    crate::fs::create_dir_all(&config.run_dir)?;
    crate::fs::write_atomic(&endpoint::file(&config.run_dir), &text)?;
    Ok(endpoints)
}

/// Compares the config with what `distill probe` found. Returns the hash of that, for each lane.
fn check_endpoints(config: &Config) -> Result<Vec<String>> {
    let known = endpoint::load(&config.run_dir)?;
    let mut hashes = Vec::new();
    for lane in config.lanes() {
        let found = known.as_ref().and_then(|known| known.of(&lane));
        let warnings = match found {
            Some(found) => found.check(&lane)?,
            None => endpoint::check_unprobed(&lane).into_iter().collect(),
        };
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        hashes.push(
            found
                .map(endpoint::Endpoint::hash)
                .transpose()?
                .unwrap_or_default(),
        );
    }
    Ok(hashes)
}

fn dry_run(config: &Config, options: HarvestOptions) -> Result<Summary> {
    request::check(config)?;
    let prompts = prompts(config, options)?;
    let file = cache::file(&config.own_cache());
    let (keys, stats) = look_into(&file)?;
    let plan = Plan::new(prompts, config, |key| keys.contains(key))?;
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    Ok(Summary {
        total: plan.total,
        cached: plan.cached,
        pending: plan.rows.len() as u64,
        estimate: Some(Estimate::new(&plan, &stats, bytes)),
        ..Summary::default()
    })
}

fn prompts(config: &Config, options: HarvestOptions) -> Result<Vec<Prompt>> {
    let mut prompts = prompt::load(&config.prompts)?;
    prompts.truncate(options.limit.unwrap_or(usize::MAX));
    Ok(prompts)
}

/// A budget holds by the prices: without them, or with old ones, it says nothing.
fn check_money(config: &Config) -> Result<()> {
    if config.budget.usd.is_none() {
        return Ok(());
    }
    for lane in config.lanes() {
        let label = lane.teacher.label();
        if lane.price.input.is_none() || lane.price.output.is_none() {
            let message = format!(
                "`budget.usd` is set, but {label} has no price: set `price.input` and \
                 `price.output`, in dollars per million tokens (0 if it is free)"
            );
            return Err(Exit::Usage(message).into());
        }
        if lane.price.as_of.is_none() {
            tracing::warn!(
                "the prices of {label} have no date: set `price.as_of` to the day on which they \
                 were read"
            );
        }
    }
    Ok(())
}

/// Read without the lock, so that a dry run may look over the shoulder of a running harvest.
fn look_into(file: &Path) -> Result<(HashSet<String>, Stats)> {
    let (mut keys, mut stats) = (HashSet::new(), Stats::default());
    if file.exists() {
        for record in cache::read(file)? {
            let record = record?;
            stats.add(&record)?;
            keys.insert(record.key);
        }
    }
    Ok((keys, stats))
}
