//! Loading and checks that a run and a dry run share, before the first request.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::Result;
use tokio::time::Instant;

use crate::budget::dollars::Dollars;
use crate::budget::price::TokenBound;
use crate::cache;
use crate::cache::question;
use crate::cache::stats::CacheStats;
use crate::cache::storage::WrapFile;
use crate::cache::unused_answers::{self, UnusedAnswers};
use crate::cache::writer::Cache;
use crate::client::request::RequestTemplate;
use crate::client::structured_output::StructuredOutput;
use crate::config::{self, Config};
use crate::exit::Exit;
use crate::plan::Plan;
use crate::plan::shard::Shard;
use crate::probe::findings;
use crate::prompt::{self, Prompt};
use crate::rate_limit::daily::DailyLimit;
use crate::rate_limit::pacer::Pacer;
use crate::signal::StopFlag;
use crate::terminal::format_dollars;
use crate::terminal::progress::ReadProgress;

/// Request template of each teacher; `probes` are the hashes of their probe results.
pub(crate) fn request_templates(
    config: &Config,
    probes: &[String],
) -> Result<Vec<RequestTemplate>> {
    let endpoints = config.endpoints().into_iter().enumerate();
    let asking = |(index, endpoint): (usize, config::EndpointConfig)| {
        let schema = endpoint.sampling.schema.as_deref();
        Ok(RequestTemplate {
            structured: schema.map(StructuredOutput::load).transpose()?,
            probe: probes.get(index).cloned().unwrap_or_default(),
            scoring: None,
            endpoint,
        })
    };
    endpoints.map(asking).collect()
}

/// Advice after the run: changes to the config without which it cannot train on the answers.
pub(crate) fn before_training(config: &Config) -> &'static str {
    if config.data.cache.is_some() {
        "unset data.cache, which is the cache of another run, and then "
    } else if !config.student.path.join("tokenizer.json").exists() {
        "set student.path to a model folder, and then "
    } else {
        ""
    }
}

/// Refuses what no limit and no budget will ever let go.
///
/// # Errors
/// [`Exit::Usage`] where a row of the endpoint could never be sent.
pub(crate) fn check_fits(config: &Config, plan: &Plan, endpoint: usize) -> Result<()> {
    if plan.rows_by_endpoint[endpoint].is_empty() {
        return Ok(());
    }
    let settings = &plan.templates[endpoint].endpoint;
    let day = DailyLimit::new(settings.limits.own().requests_per_day, &[], Instant::now());
    Pacer::new(&settings.limits.own(), plan.largest(endpoint), day, None)?;
    let cost = |bound: &TokenBound| {
        bound
            .cost(&settings.price)
            .map_or(Dollars::ZERO, Dollars::at_least)
    };
    check_budget(
        plan,
        endpoint,
        config.budget.usd.map(Dollars::at_most),
        cost,
    )
}

/// Refuses a budget that the most expensive request does not fit into.
///
/// # Errors
/// [`Exit::Usage`].
pub(crate) fn check_budget(
    plan: &Plan,
    endpoint: usize,
    cap: Option<Dollars>,
    cost: impl Fn(&TokenBound) -> Dollars,
) -> Result<()> {
    let rows = plan.rows_by_endpoint[endpoint].clone();
    let most = rows.map(|row| cost(&plan.bound(endpoint, row))).max();
    match (most, cap) {
        (Some(most), Some(cap)) if most > cap => Err(Exit::Usage(format!(
            "one request to {} may cost {most}, more than `budget.usd` = {}: lower `sampling.max_tokens` or \
             raise the budget",
            plan.templates[endpoint].endpoint.teacher.label(),
            cap.usd()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Counts the answers of a cache with `known` keys that the plan does not use. Reads the cache only if
/// it holds more keys than the plan's answered rows, and then at most `limit` records.
pub(crate) fn unused_answers(
    dir: &Path,
    plan: &Plan,
    known: usize,
    limit: u64,
    stop: &StopFlag,
) -> Result<UnusedAnswers> {
    let of_ours: u64 = plan.answered.iter().sum();
    if plan.rows.is_empty() || known as u64 <= of_ours {
        return Ok(UnusedAnswers::default());
    }
    let mut open = HashMap::new();
    for (asking, rows) in plan.templates.iter().zip(&plan.rows_by_endpoint) {
        for row in &plan.rows[rows.clone()] {
            let half = question::question_fingerprint(&row.key);
            open.insert(half, asking.endpoint.sampling.max_tokens);
        }
    }
    let ids: HashSet<&str> = plan
        .prompts
        .iter()
        .map(|prompt| prompt.id.as_str())
        .collect();
    let is_prompt = |id: &str| ids.contains(id);
    let check = || stop.check();
    unused_answers::count_unused(
        dir,
        &plan.keys,
        &plan.questions,
        &open,
        is_prompt,
        limit,
        check,
    )
}

/// Compares the config with what `distill probe` found. Returns the hash of that, for each endpoint.
pub(crate) fn check_endpoints(config: &Config) -> Result<Vec<String>> {
    let known = findings::load(&config.run_dir)?;
    let mut hashes = Vec::new();
    for endpoint in config.endpoints() {
        let found = known.as_ref().and_then(|known| known.find(&endpoint));
        let warnings = match found {
            Some(found) => found.check(&endpoint)?,
            None => findings::check_unprobed(&endpoint).into_iter().collect(),
        };
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        hashes.push(
            found
                .map(findings::ProbedEndpoint::hash)
                .transpose()?
                .unwrap_or_default(),
        );
    }
    Ok(hashes)
}

pub(crate) fn prompts(
    settings: &config::PromptsConfig,
    limit: Option<usize>,
    stop: &StopFlag,
) -> Result<Vec<Prompt>> {
    let mut prompts = prompt::load(settings, || stop.check())?;
    prompts.truncate(limit.unwrap_or(usize::MAX));
    Ok(prompts)
}

pub(crate) fn open_cache(
    config: &Config,
    quiet: bool,
    storage: WrapFile,
    stop: &StopFlag,
) -> Result<Cache> {
    let mut reading = ReadProgress::new("opening the cache", quiet);
    let (dir, settings) = (config.own_cache(), &config.cache);
    cache::open_file::check_nothing_displaced(&dir)?;
    cache::open_file::remove_move_note(&dir)?;
    Cache::open_with(&dir, settings, storage, &mut |done, total| {
        reading.update(done, total);
        stop.check()
    })
}

/// A budget holds by the prices: without them, or with old ones, it says nothing.
pub(crate) fn check_money(
    config: &Config,
    shard: Option<Shard>,
    now: jiff::Timestamp,
) -> Result<()> {
    let Some(usd) = config.budget.usd else {
        return Ok(());
    };
    if let Some(shard) = shard {
        tracing::warn!(
            "the budget of {} is that of shard {shard} alone: each shard keeps its own books",
            format_dollars(usd)
        );
    }
    let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
    for endpoint in config.endpoints() {
        let label = endpoint.teacher.label();
        if endpoint.price.input.is_none() || endpoint.price.output.is_none() {
            let message = format!(
                "`budget.usd` is set, but {label} has no price: set `price.input` and \
                 `price.output`, in dollars per million tokens (0 if it is free)"
            );
            return Err(Exit::Usage(message).into());
        }
        if let Some(warning) = crate::budget::price::price_warning(&endpoint.price, label, today) {
            tracing::warn!("{warning}");
        }
    }
    Ok(())
}

/// The first records of a cache in numbers, for a guess at those to come. Read without the lock, so that a
/// dry run may look over the shoulder of a running harvest.
pub(crate) fn sample_stats(dir: &Path) -> Result<CacheStats> {
    const ENOUGH: usize = 1_000;
    let mut stats = CacheStats::default();
    if cache::exists(dir) {
        for record in crate::cache::reader::read(dir)?.take(ENOUGH) {
            stats.add(&record?);
        }
    }
    Ok(stats)
}
