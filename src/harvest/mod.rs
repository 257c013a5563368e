//! Collects the teacher's answers to the planned prompts and records them in the cache.
//!
//! ```text
//! plan --rows that the cache does not hold--> upstream (queue, pacer, health) --> attempt
//!   attempt: request body -> teacher -> classify the reply -> cache record
//!   dispatch: append to the cache | return the row to the queue | fail the row --> summary
//! ```
//!
//! | file | content |
//! |---|---|
//! | `options` | command-line options of a harvest |
//! | `dry_run` | `--dry-run`: estimate of the run, and its checks |
//! | `dispatch/` | the task that sends requests and decides about the row of each reply |
//! | `attempt`, `record` | one request in its own task; the cache record of its answer |
//! | `upstream/`, `health`, `backoff` | live state of an endpoint; whether a row or the endpoint is failing; pauses between attempts |
//! | `answer_monitor` | detects answers that training cannot use |
//! | `batch/` | the same rows through OpenAI's Batch API, into the same cache under the same keys |
//! | `scorer` | teacher logprobs of texts that the student wrote, for on-policy training |
//! | `run_files`, `unreadable_bodies` | budget account and unanswered rows; response bodies that cannot be parsed |
//! | `disk_full` | answers held in memory while the disk is full |
//! | `window`, `run_error` | time window and deadline; errors that end a run |
//!
//! Invariants: one task (`dispatch` or `batch`) makes all decisions; attempts share only the plan. The budget is
//! reserved on disk before a request is sent, so its limit holds after a kill. The request of a recorded answer
//! is not sent again, except with `--again`. This module does not use tensors.
//!
//! The layers below have their own modules: `plan`, `client`, `budget`, `rate_limit`, `probe` and `report`.

pub(crate) mod answer_monitor;
pub(crate) mod attempt;
pub(crate) mod backoff;
pub(crate) mod batch;
pub(crate) mod disk_full;
pub(crate) mod dispatch;
pub(crate) mod dry_run;
#[doc(hidden)]
pub mod fuzz;
pub(crate) mod health;
pub mod options;
pub(crate) mod record;
pub(crate) mod run_error;
pub(crate) mod run_files;
pub mod scorer;
pub(crate) mod unreadable_bodies;
pub(crate) mod upstream;
pub(crate) mod window;

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::Notify;

use crate::cache::storage::WrapFile;
use crate::cache::writer::Cache;
use crate::client::http::HttpTeacher;
use crate::client::transport::Transport;
use crate::clock::WallClock;
use crate::config::{Config, RequestMode};
use crate::exit::Exit;
use crate::harvest::options::HarvestOptions;
use crate::harvest::run_files::RunFiles;
use crate::harvest::upstream::Upstream;
use crate::harvest::window::RequestWindow;
use crate::ops::process;
use crate::plan::again;
use crate::plan::prepare::{
    check_endpoints, check_money, open_cache, prompts, request_templates, unused_answers,
};
use crate::plan::run_settings::RunSettings;
use crate::plan::shard::RequestShard;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::probe::findings::ProbedEndpoints;
use crate::prompt::Prompt;
use crate::rate_limit::redis::SharedLimits;
use crate::report::summary::{self, HarvestSummary};
use crate::signal::{Signals, StopFlag};
use crate::terminal::progress::Progress;
use batch::journal;
use batch::{BatchOutcome, BatchRun};
use dispatch::Dispatcher;

/// Requests every answer that the cache of the run folder does not hold.
///
/// Once the first request is sent, failures are reported in the summary's `error`; see
/// [`HarvestSummary::into_result`].
///
/// # Errors
/// If the run cannot start, or an answer cannot be recorded.
pub async fn run(config: &Config, options: HarvestOptions) -> Result<HarvestSummary> {
    if options.dry_run {
        let mut summary = dry_run::run(RunSettings::new(config)?, &options)?;
        // Reported in the summary, so that the estimate is shown too.
        summary.error = dry_run::check_student(&config.student, config.file.as_deref()).err();
        Ok(summary)
    } else {
        run_until(config, options, Signals::listen()?).await
    }
}

/// Runs like [`run`], but stops on the given signals instead of those of this process, and ignores
/// [`HarvestOptions::dry_run`].
pub async fn run_until(
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
) -> Result<HarvestSummary> {
    let mut settings = RunSettings::new(config)?;
    cap_concurrency(&mut settings);
    let teachers = settings.endpoints.iter().map(|upstream| {
        let teacher: Arc<dyn Transport> = Arc::new(HttpTeacher::new(&upstream.teacher)?);
        Ok(teacher)
    });
    let transports = teachers.collect::<Result<_>>()?;
    let environment = Environment {
        transports,
        clock: WallClock::system(),
        storage: crate::cache::storage::plain_storage(),
    };
    harvest(environment, &settings, options, signals).await
}

/// Caps the concurrency to the number of connections that this process may open.
fn cap_concurrency(settings: &mut RunSettings) {
    let concurrency = settings.concurrency();
    let Some(max_connections) = process::max_connections().filter(|max| *max < concurrency) else {
        return;
    };
    tracing::warn!(
        "`limits.concurrency` = {concurrency} needs as many connections, but this process may open only \
         {max_connections}: at most {max_connections} requests are in flight; raise `ulimit -n` for more"
    );
    settings.limit_concurrency(max_connections);
}

/// Network, clock and disk of a run; tests replace them with simulated ones.
pub struct Environment {
    /// One transport per teacher, in the order of the config.
    pub transports: Vec<Arc<dyn Transport>>,
    pub clock: WallClock,
    pub storage: WrapFile,
}

/// Runs like [`run_until`], in the given environment.
pub async fn run_in(
    environment: Environment,
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
) -> Result<HarvestSummary> {
    harvest(environment, &RunSettings::new(config)?, options, signals).await
}

async fn harvest(
    environment: Environment,
    settings: &RunSettings,
    options: HarvestOptions,
    signals: Signals,
) -> Result<HarvestSummary> {
    let Environment {
        transports,
        clock,
        storage,
    } = environment;
    let prompts = prompts(&settings.prompts, options.limit, signals.flag())?;
    let probes = check_endpoints(&settings.run_dir, &settings.endpoints)?;
    check_money(settings, options.shard, clock.now())?;
    let mut unanswered = Unanswered::load(&settings.run_dir)?;
    let is_batch = settings.schedule.mode == RequestMode::Batch;
    let again = if options.again.is_empty() {
        None
    } else if is_batch && journal::is_under_way(&settings.run_dir)? {
        tracing::warn!(
            "batches are under way: this run waits for them, and `--again` removes nothing from the cache"
        );
        None
    } else {
        journal::check_none_under_way(&settings.run_dir)?;
        RequestWindow::new(&settings.schedule, clock.now())?.check_not_over(clock.now())?;
        // An account without a ledger counts the cost of the cache, so it is opened before records are removed.
        let cached_usd = crate::cache::open::peek(&settings.cache_dir)?.cost_usd
            + scorer::scoring_cost_usd(&settings.run_dir)?;
        let (_, left_in_flight) =
            RunFiles::open(settings, cached_usd, Unanswered::default(), clock.clone())?;
        left_in_flight.warn();
        let selected = again::select(
            settings,
            &options.again,
            options.shard,
            &prompts,
            &unanswered,
        )?;
        let selectors = &options.again;
        Some(again::remove_from_cache(
            settings,
            selectors,
            selected,
            &mut unanswered,
        )?)
    };
    let cache = open_cache(settings, options.quiet, storage, signals.flag())?;
    if again.is_none() {
        summary::warn_of_empty_cache(&settings.run_dir, &settings.cache_dir, cache.len());
    }
    let run = Run {
        settings,
        shard: options.shard,
        quiet: options.quiet,
        cache: &cache,
        probes,
        transports,
        unanswered,
        again,
        stop: signals.flag().clone(),
        clock,
    };
    let summary = match settings.schedule.mode {
        RequestMode::Realtime => run.realtime(prompts, signals).await,
        RequestMode::Batch => run.batch(prompts, signals).await,
    }?;
    let covers_all_rows =
        !options.again.is_empty() || options.limit.is_none() && options.shard.is_none();
    if summary.pending == 0 && covers_all_rows {
        again::finish(&settings.run_dir)?;
    }
    Ok(summary)
}

/// Inputs shared by real-time and batch mode.
struct Run<'a> {
    settings: &'a RunSettings,
    shard: Option<RequestShard>,
    quiet: bool,
    cache: &'a Cache,
    /// Hash of the probe findings of each teacher.
    probes: Vec<String>,
    transports: Vec<Arc<dyn Transport>>,
    unanswered: Unanswered,
    /// Rows selected by `--again`; if set, only these rows are requested.
    again: Option<again::RowKeys>,
    /// Stops long steps that run before the first request.
    stop: StopFlag,
    clock: WallClock,
}

impl Run<'_> {
    async fn realtime(mut self, prompts: Vec<Prompt>, signals: Signals) -> Result<HarvestSummary> {
        journal::check_none_under_way(&self.settings.run_dir)?;
        journal::drop_uncreated(&self.settings.run_dir)?;
        let plan = self.plan(self.settings, prompts, |key| self.row_status(key))?;
        let run_files = self.open_run_files()?;
        let dispatcher = self.dispatcher(self.settings, plan, run_files).await?;
        dispatcher.run(signals).await
    }

    async fn batch(mut self, prompts: Vec<Prompt>, mut signals: Signals) -> Result<HarvestSummary> {
        let at_batch_prices = self.settings.at_batch_prices();
        let plan = self.plan(&at_batch_prices, prompts, |key| self.row_status(key))?;
        let run_files = self.open_run_files()?;
        for upstream in 0..plan.rows_by_endpoint.len() {
            run_files.check_largest(&plan, upstream)?;
            // Rows that the batches leave over are sent in real time: check their limits before the batches run.
            self.shared_limits(&plan, upstream, &Arc::default()).await?;
        }
        let transports = &self.transports;
        let clock = self.clock.clone();
        let batches = BatchRun::new(
            &at_batch_prices,
            plan,
            self.cache,
            transports,
            run_files,
            clock,
            self.quiet,
        )?;
        let remaining = match batches.run(&mut signals).await? {
            BatchOutcome::Finished(summary) => return Ok(*summary),
            BatchOutcome::Remaining(remaining) => *remaining,
        };
        // The deadline applied to the batches only.
        let mut settings = self.settings.clone();
        settings.schedule.deadline = None;
        let max_attempts = settings.retry.max_attempts;
        let plan = self.plan(&settings, remaining.prompts, |key| {
            if remaining.excluded_keys.contains(key) {
                return Ok(RowStatus::Answered);
            }
            let unanswered = &remaining.run_files.unanswered;
            Ok(unanswered.row_status(key, self.cache.contains(key), max_attempts))
        })?;
        let dispatcher = self
            .dispatcher(&settings, plan, remaining.run_files)
            .await?;
        let dispatcher = dispatcher.after(remaining.summary, remaining.started);
        let mut summary = dispatcher.run(signals).await?;
        if remaining.uncancelled_batches > 0 && summary.error.is_none() {
            let message = format!(
                "{} batches are still being cancelled: rerun the command to collect them",
                remaining.uncancelled_batches
            );
            summary.error = Some(Exit::Resumable(message).into());
            crate::report::write(&mut summary, &settings.run_dir)?;
        }
        Ok(summary)
    }

    fn plan(
        &self,
        settings: &RunSettings,
        prompts: Vec<Prompt>,
        row_status: impl Fn(&str) -> Result<RowStatus>,
    ) -> Result<Plan> {
        let templates = request_templates(&settings.endpoints, &self.probes)?;
        let mut key_variants = self.cache.key_variants();
        // Rows of earlier batches have the keys of the version that submitted them.
        key_variants.has_schema_1 |=
            journal::is_under_way(&self.settings.run_dir)? || !self.unanswered.is_empty();
        let scope = PlanScope {
            shard: self.shard,
            only: self.again.as_ref(),
        };
        let plan = Plan::new(
            prompts,
            templates,
            &settings.prompts,
            scope,
            &key_variants,
            row_status,
        )?;
        if let Some(warning) = plan.repeats_warning() {
            tracing::warn!("{warning}");
        }
        if self.again.is_none() {
            let dir = &settings.cache_dir;
            let cached_keys = self.cache.len();
            let unused = unused_answers(dir, &plan, cached_keys, &self.stop)?;
            if let Some(advice) = unused.advice(&settings.arguments) {
                tracing::warn!("{advice}");
            }
        }
        Ok(plan)
    }

    fn row_status(&self, key: &str) -> Result<RowStatus> {
        self.stop.check()?;
        let max_attempts = self.settings.retry.max_attempts;
        let is_cached = self.cache.contains(key);
        Ok(self.unanswered.row_status(key, is_cached, max_attempts))
    }

    /// Opens the run files, and moves `self.unanswered` into them.
    fn open_run_files(&mut self) -> Result<RunFiles> {
        let settings = self.settings;
        let scoring_usd = scorer::scoring_cost_usd(&settings.run_dir)?;
        let cached_usd = self.cache.cost_when_opened() + scoring_usd;
        let unanswered = std::mem::take(&mut self.unanswered);
        let (run_files, left_in_flight) =
            RunFiles::open(settings, cached_usd, unanswered, self.clock.clone())?;
        left_in_flight.warn();
        Ok(run_files)
    }

    async fn dispatcher<'b>(
        &'b self,
        settings: &'b RunSettings,
        plan: Plan,
        mut run_files: RunFiles,
    ) -> Result<Dispatcher<'b>> {
        let wake = Arc::default();
        let mut upstreams = Vec::new();
        for (index, transport) in self.transports.iter().enumerate() {
            run_files.check_largest(&plan, index)?;
            let daily_limit = run_files.daily_limit(&plan.templates[index].endpoint);
            let shared = self.shared_limits(&plan, index, &wake).await?;
            let transport = Arc::clone(transport);
            let upstream = Upstream::new(&plan, index, transport, daily_limit, shared, settings)?;
            upstreams.push(upstream);
        }
        let progress = Progress::new("harvest", plan.total, self.quiet);
        let plan = Arc::new(plan);
        let clock = self.clock.clone();
        let dispatcher = Dispatcher::new(
            settings, plan, self.cache, upstreams, run_files, clock, progress,
        )?;
        Ok(dispatcher.with_waker(wake))
    }

    /// Connects to the limits that an upstream shares with other processes. None if the upstream has no rows.
    async fn shared_limits(
        &self,
        plan: &Plan,
        upstream: usize,
        wake: &Arc<Notify>,
    ) -> Result<Option<SharedLimits>> {
        if plan.rows_by_endpoint[upstream].is_empty() {
            return Ok(None);
        }
        let max_outage = self.settings.retry.max_outage;
        let settings = &plan.templates[upstream].endpoint;
        SharedLimits::connect(settings, plan.largest(upstream), max_outage, wake).await
    }
}

/// Sends 11 to 19 cheap requests, not counting retries, to each endpoint of the config and saves the findings in the
/// run folder.
///
/// # Errors
/// If an endpoint does not answer a plain prompt or throttles for several minutes, the budget is exhausted, or a file
/// of the run folder cannot be written. Then no findings are saved.
pub async fn probe(config: &Config) -> Result<ProbedEndpoints> {
    let settings = &RunSettings::new(config)?;
    let clock = WallClock::system();
    check_money(settings, None, clock.now())?;
    let upstreams = settings.endpoints.iter().cloned();
    let upstreams =
        upstreams.map(|upstream| Ok((Arc::new(HttpTeacher::new(&upstream.teacher)?), upstream)));
    let upstreams = upstreams.collect::<Result<Vec<_>>>()?;
    let scoring_usd = scorer::scoring_cost_usd(&settings.run_dir)?;
    let cached_usd = crate::cache::open::peek(&settings.cache_dir)?.cost_usd + scoring_usd;
    let (mut run_files, left_in_flight) =
        RunFiles::open(settings, cached_usd, Unanswered::default(), clock.clone())?;
    left_in_flight.warn();
    run_files.hold_for_batches(journal::reserved_usd(&settings.run_dir)?);
    let mut endpoints = Vec::new();
    for (teacher, upstream) in upstreams {
        let findings =
            crate::probe::run(upstream, teacher, &mut run_files.account, clock.now()).await;
        if findings.is_err() {
            // The requests sent so far cost money.
            run_files.close(&mut [], 0)?;
        }
        endpoints.push(findings?);
    }
    run_files.close(&mut [], 0)?;
    let endpoints = ProbedEndpoints {
        version: crate::probe::findings::ENDPOINT_VERSION,
        endpoints,
    };
    let text = serde_json::to_vec_pretty(&endpoints)?;
    crate::fs::create_dir_all(&settings.run_dir)?;
    crate::fs::write_atomic(&crate::probe::findings::file(&settings.run_dir), &text)?;
    Ok(endpoints)
}
