//! Loading and checks before the first request, shared by runs and dry runs.

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
use crate::config::{self, EndpointConfig};
use crate::exit::Exit;
use crate::plan::Plan;
use crate::plan::run_settings::RunSettings;
use crate::plan::shard::RequestShard;
use crate::probe::findings;
use crate::prompt::{self, Prompt};
use crate::rate_limit::daily::DailyLimit;
use crate::rate_limit::pacer::Pacer;
use crate::signal::StopFlag;
use crate::terminal::format_dollars;
use crate::terminal::progress::ReadProgress;

/// Builds the request template of each endpoint. `probe_hashes` has the hash of each endpoint's probe findings, in the
/// order of the endpoints; an endpoint without an entry gets the empty hash.
///
/// # Errors
/// If a JSON schema cannot be loaded.
pub(crate) fn request_templates(
    endpoints: &[EndpointConfig],
    probe_hashes: &[String],
) -> Result<Vec<RequestTemplate>> {
    let template = |(index, endpoint): (usize, &EndpointConfig)| {
        let schema = endpoint.sampling.schema.as_deref();
        Ok(RequestTemplate {
            structured: schema.map(StructuredOutput::load).transpose()?,
            probe: probe_hashes.get(index).cloned().unwrap_or_default(),
            scoring: None,
            endpoint: endpoint.clone(),
        })
    };
    endpoints.iter().enumerate().map(template).collect()
}

/// Checks that every row of the endpoint fits its limits and the budget.
///
/// # Errors
/// [`Exit::Usage`] if a row of the endpoint can never be sent.
pub(crate) fn check_fits(budget_usd: Option<f64>, plan: &Plan, endpoint: usize) -> Result<()> {
    if plan.rows_by_endpoint[endpoint].is_empty() {
        return Ok(());
    }
    let settings = &plan.templates[endpoint].endpoint;
    let daily = DailyLimit::new(settings.limits.own().requests_per_day, &[], Instant::now());
    Pacer::new(&settings.limits.own(), plan.largest(endpoint), daily, None)?;
    let cost = |bound: &TokenBound| {
        bound
            .cost(&settings.price)
            .map_or(Dollars::ZERO, Dollars::at_least)
    };
    check_budget(plan, endpoint, budget_usd.map(Dollars::at_most), cost)
}

/// Checks that the most expensive request fits the budget.
///
/// # Errors
/// [`Exit::Usage`] if it does not.
pub(crate) fn check_budget(
    plan: &Plan,
    endpoint: usize,
    cap: Option<Dollars>,
    cost: impl Fn(&TokenBound) -> Dollars,
) -> Result<()> {
    let rows = plan.rows_by_endpoint[endpoint].clone();
    let max_cost = rows.map(|row| cost(&plan.bound(endpoint, row))).max();
    match (max_cost, cap) {
        (Some(max_cost), Some(cap)) if max_cost > cap => Err(Exit::Usage(format!(
            "one request to {} may cost {max_cost}, more than `budget.usd` = {}: lower `sampling.max_tokens` or \
             raise the budget",
            plan.templates[endpoint].endpoint.teacher.label(),
            cap.usd()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Maximum number of records that are read to find unused answers. Reading them takes about 0.2 s.
const MAX_UNUSED_SEARCHED: u64 = 20_000;

/// Counts the cached answers that the plan does not use. Reads at most [`MAX_UNUSED_SEARCHED`] records, and none if
/// the plan has no open rows, or at least as many answered rows as the cache has keys (`cached_keys`).
pub(crate) fn unused_answers(
    dir: &Path,
    plan: &Plan,
    cached_keys: usize,
    stop: &StopFlag,
) -> Result<UnusedAnswers> {
    let answered: u64 = plan.answered.iter().sum();
    if plan.rows.is_empty() || cached_keys as u64 <= answered {
        return Ok(UnusedAnswers::default());
    }
    // `max_tokens` of each open row, by its question.
    let mut open = HashMap::new();
    for (template, rows) in plan.templates.iter().zip(&plan.rows_by_endpoint) {
        for row in &plan.rows[rows.clone()] {
            let question = question::question_fingerprint(&row.key);
            open.insert(question, template.endpoint.sampling.max_tokens);
        }
    }
    let ids: HashSet<&str> = plan
        .prompts
        .iter()
        .map(|prompt| prompt.id.as_str())
        .collect();
    let is_prompt = |id: &str| ids.contains(id);
    let check_stop = || stop.check();
    unused_answers::count_unused(
        dir,
        &plan.keys,
        &plan.questions,
        &open,
        is_prompt,
        MAX_UNUSED_SEARCHED,
        check_stop,
    )
}

/// Compares the config with the findings of `distill probe`, and logs warnings. Returns the hash of each endpoint's
/// findings; it is empty for an endpoint that was not probed.
///
/// # Errors
/// [`Exit::Usage`] if an endpoint would refuse the requests or return unusable answers.
pub(crate) fn check_endpoints(run_dir: &Path, endpoints: &[EndpointConfig]) -> Result<Vec<String>> {
    let findings = findings::load(run_dir)?;
    let mut hashes = Vec::new();
    for endpoint in endpoints {
        let probed = findings
            .as_ref()
            .and_then(|findings| findings.find(endpoint));
        let warnings = match probed {
            Some(probed) => probed.check(endpoint)?,
            None => findings::check_unprobed(endpoint).into_iter().collect(),
        };
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        hashes.push(
            probed
                .map(findings::ProbedEndpoint::hash)
                .transpose()?
                .unwrap_or_default(),
        );
    }
    Ok(hashes)
}

/// Loads the first `limit` prompts, or all with `None`.
pub(crate) fn prompts(
    settings: &config::PromptsConfig,
    limit: Option<usize>,
    stop: &StopFlag,
) -> Result<Vec<Prompt>> {
    let mut prompts = prompt::load(settings, || stop.check())?;
    prompts.truncate(limit.unwrap_or(usize::MAX));
    Ok(prompts)
}

/// Opens the cache of the run folder; shows progress on the terminal unless `quiet`.
pub(crate) fn open_cache(
    settings: &RunSettings,
    quiet: bool,
    storage: WrapFile,
    stop: &StopFlag,
) -> Result<Cache> {
    let mut reading = ReadProgress::new("opening the cache", quiet);
    let dir = &settings.cache_dir;
    cache::open_file::check_nothing_displaced(dir)?;
    cache::open_file::remove_move_note(dir)?;
    Cache::open_with(dir, &settings.cache, storage, &mut |done, total| {
        reading.update(done, total);
        stop.check()
    })
}

/// Checks that every endpoint has prices if a budget is set. Logs warnings about outdated prices, and about a budget
/// that applies to one of several shards alone.
///
/// # Errors
/// [`Exit::Usage`] if a budget is set and an endpoint has no price.
pub(crate) fn check_money(
    settings: &RunSettings,
    shard: Option<RequestShard>,
    now: jiff::Timestamp,
) -> Result<()> {
    let Some(usd) = settings.budget_usd else {
        return Ok(());
    };
    if let Some(shard) = shard {
        tracing::warn!(
            "the budget of {} applies to shard {shard} alone: each shard has its own ledger",
            format_dollars(usd)
        );
    }
    let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
    for endpoint in &settings.endpoints {
        let label = endpoint.teacher.label();
        let missing = match (endpoint.price.input, endpoint.price.output) {
            (Some(_), Some(_)) => None,
            (Some(_), None) => Some("`price.output`"),
            (None, Some(_)) => Some("`price.input`"),
            (None, None) => Some("`price.input` and `price.output`"),
        };
        if let Some(missing) = missing {
            let message = format!(
                "`budget.usd` is set, but {label} has no price: set {missing}, in dollars per million tokens (0 if it is free)"
            );
            return Err(Exit::Usage(message).into());
        }
        if let Some(warning) = crate::budget::price::price_warning(&endpoint.price, label, today) {
            tracing::warn!("{warning}");
        }
    }
    Ok(())
}

/// Sums up the first 1,000 records of a cache, as a sample for estimates. Takes no lock: a dry run may read the cache
/// of a running harvest.
pub(crate) fn sample_stats(dir: &Path) -> Result<CacheStats> {
    const SAMPLE_RECORDS: usize = 1_000;
    let mut stats = CacheStats::default();
    if cache::exists(dir) {
        for record in crate::cache::reader::read(dir)?.take(SAMPLE_RECORDS) {
            stats.add(&record?);
        }
    }
    Ok(stats)
}
