//! Prompts in, recorded answers out.
//!
//! ```text
//! prompts --plan--> rows that the cache does not hold --upstream: queue, limiter, budget--> attempt
//!   (body -> teacher -> retry: what does the reply mean? -> record)
//!   --dispatch--> cache | back into the queue | failed --> summary
//! ```
//!
//! `batch` is another way: the same rows as files of OpenAI's Batch API, into the same cache under the
//! same keys.
//!
//! A `judge` is asked about texts instead: what the teacher would have said in place of what a student
//! wrote (`scoring`). It goes the way of the rows.
//!
//! `dispatch` is the one task that decides; an `attempt` runs in a task of its own. Each teacher has
//! a `upstream`: its queue, its `limiter` (whose ceilings may be shared with other processes), its
//! `health`, its decisions after a refusal (`crate::harvest::upstream::refusals`), and a `watch` over what its answers are
//! worth. `books` keeps the account (`budget`), whose cap holds over kills, and the rows without an answer;
//! in `room` answers wait while the disk is full. A body is read by `reply`; what it means is for `retry` and `refusal` to say. A `teacher` sends, by way of
//! `exchange`, over a `connection`, with `credentials` that may be renewed, and `secrets` are taken out
//! of whatever comes back. `prepare` opens and checks what a night and a `dry_run` begin with; `again` and
//! `adopt` change what the cache is taken to answer, and `questions` selects its records for training. Everything else is pure (`request`, `record`, `plan`,
//! `shard`, `estimate`, `queue`, `schedule`, `advice`, `stop`) or does one thing. It knows nothing of tensors.

pub(crate) mod answer_monitor;
pub(crate) mod attempt;
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

use crate::harvest::options::HarvestOptions;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Notify;

use crate::cache::storage::WrapFile;
use crate::cache::writer::Cache;
use crate::client::http::HttpTeacher;
use crate::client::transport::Transport;
use crate::clock::WallClock;
use crate::config::{Config, RequestMode};
use crate::exit::Exit;
use crate::harvest::run_files::RunFiles;
use crate::harvest::upstream::Upstream;
use crate::harvest::window::RequestWindow;
use crate::ops::process;
use crate::plan::prepare::{
    check_endpoints, check_money, open_cache, prompts, request_templates, unused_answers,
    warn_of_empty_cache,
};
use crate::plan::shard::Shard;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::probe::findings::ProbedEndpoints;
use crate::prompt::Prompt;
use crate::rate_limit::redis::SharedLimits;
use crate::report::summary::HarvestSummary;
use crate::signal::{Signals, StopFlag};
use crate::terminal::progress::Progress;
use batch::{BatchOutcome, Batches};
use dispatch::Dispatcher;

/// Records in which a run looks for answers from other endpoints; a dry run looks at all of them.
const UNUSED_LOOKED_AT: u64 = 20_000;

/// Asks the teacher for every answer that the run's cache does not hold.
///
/// An error means that nothing could be begun, or that an answer could not be recorded. A run that
/// began ends with a summary, whose `error` says what, if anything, went wrong; see
/// [`Summary::into_result`].
pub async fn run(config: &Config, options: HarvestOptions) -> Result<HarvestSummary> {
    if options.dry_run {
        dry_run::run(config, &options)
    } else {
        run_until(config, options, Signals::listen()?).await
    }
}

/// As [`run`], stopped by the given signals rather than by those of this process.
pub async fn run_until(
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
) -> Result<HarvestSummary> {
    crate::client::request::check(config)?;
    let config = &within_descriptors(config);
    let upstreams = config.endpoints();
    let teachers = upstreams.iter().map(|upstream| {
        let teacher: Arc<dyn Transport> = Arc::new(HttpTeacher::new(&upstream.teacher)?);
        Ok(teacher)
    });
    let transports = teachers.collect::<Result<_>>()?;
    let world = Environment {
        transports,
        clock: WallClock::system(),
        storage: crate::cache::storage::plain_storage(),
    };
    run_in(world, config, options, signals).await
}

/// The same settings, with no more requests in flight than this process may hold connections open.
fn within_descriptors(config: &Config) -> Config {
    let wanted: usize = config
        .endpoints()
        .iter()
        .map(|upstream| upstream.limits.concurrency)
        .sum();
    let Some(most) = process::max_connections().filter(|most| *most < wanted) else {
        return config.clone();
    };
    tracing::warn!(
        "`limits.concurrency` of {wanted} needs as many connections, and this process may hold {most} \
         open: {most} requests are in flight at most; raise `ulimit -n` for more"
    );
    config.with_at_most_in_flight(most)
}

/// The seams at which a simulated night takes the place of the network, the clock and the disk.
pub struct Environment {
    /// The ways to the teachers, one for each.
    pub transports: Vec<Arc<dyn Transport>>,
    pub clock: WallClock,
    pub storage: WrapFile,
}

/// As [`run_until`], in another world.
pub async fn run_in(
    world: Environment,
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
) -> Result<HarvestSummary> {
    let Environment {
        transports,
        clock,
        storage,
    } = world;
    let prompts = prompts(&config.prompts, options.limit, signals.flag())?;
    let probes = check_endpoints(config)?;
    check_money(config, options.shard, clock.now())?;
    let mut unanswered = Unanswered::load(&config.run_dir)?;
    let again = match options.again.is_empty() {
        true => None,
        // What was asked again goes on in the batches.
        false
            if config.schedule.mode == RequestMode::Batch
                && crate::harvest::batch::journal::is_under_way(&config.run_dir)? =>
        {
            tracing::warn!(
                "batches are under way: they are waited for, and nothing leaves the cache"
            );
            None
        }
        false => {
            crate::harvest::batch::journal::check_none_under_way(&config.run_dir)?;
            RequestWindow::new(&config.schedule, clock.now())?.check_not_over(clock.now())?;
            // The account of an earlier version takes over from the cache what was spent: before records leave it.
            let cached = crate::cache::open::peek(&config.own_cache())?.cost_usd
                + crate::harvest::scorer::scoring_cost_usd(config)?;
            RunFiles::open(config, cached, Unanswered::default(), clock.clone())?
                .1
                .warn();
            let asked = crate::plan::again::select(
                config,
                &options.again,
                options.shard,
                &prompts,
                &unanswered,
            )?;
            let words = &options.again;
            Some(crate::plan::again::remove_from_cache(
                config,
                words,
                asked,
                &mut unanswered,
            )?)
        }
    };
    let cache = open_cache(config, options.quiet, storage, signals.flag())?;
    warn_of_empty_cache(config, cache.len());
    let run = Run {
        config,
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
    let summary = match config.schedule.mode {
        RequestMode::Realtime => run.realtime(prompts, signals).await,
        RequestMode::Batch => run.batch(prompts, signals).await,
    }?;
    let is_all = !options.again.is_empty() || options.limit.is_none() && options.shard.is_none();
    if summary.pending == 0 && is_all {
        crate::plan::again::finish(&config.run_dir)?;
    }
    Ok(summary)
}

/// What both ways of asking begin with.
struct Run<'a> {
    config: &'a Config,
    shard: Option<Shard>,
    quiet: bool,
    cache: &'a Cache,
    /// By teacher; see [`Asking::probe`].
    probes: Vec<String>,
    transports: Vec<Arc<dyn Transport>>,
    unanswered: Unanswered,
    /// Nothing else is to be asked.
    again: Option<crate::plan::again::RowKeys>,
    /// For what takes long before anything is asked.
    stop: StopFlag,
    clock: WallClock,
}

impl Run<'_> {
    async fn realtime(mut self, prompts: Vec<Prompt>, signals: Signals) -> Result<HarvestSummary> {
        crate::harvest::batch::journal::check_none_under_way(&self.config.run_dir)?;
        crate::harvest::batch::journal::drop_uncreated(&self.config.run_dir)?;
        let plan = self.plan(self.config, prompts, |key| self.standing(key))?;
        let books = self.books()?;
        let dispatcher = self.dispatcher(self.config, plan, books).await?;
        dispatcher.run(signals).await
    }

    async fn batch(mut self, prompts: Vec<Prompt>, mut signals: Signals) -> Result<HarvestSummary> {
        let config = self.config.at_batch_prices();
        let plan = self.plan(&config, prompts, |key| self.standing(key))?;
        let books = self.books()?;
        for upstream in 0..plan.rows_by_endpoint.len() {
            books.check_largest(&plan, upstream)?;
            // For the rest, which is asked one by one: what is wrong with it shall not be found out
            // at the end of the night.
            self.shared(&plan, upstream, &Arc::default()).await?;
        }
        let (transports, clock) = (&self.transports, self.clock.clone());
        let batches = Batches::new(
            &config, plan, self.cache, transports, books, clock, self.quiet,
        )?;
        let rest = match batches.run(&mut signals).await? {
            BatchOutcome::Finished(summary) => return Ok(*summary),
            BatchOutcome::Rest(rest) => *rest,
        };
        // The deadline was that of the batches.
        let mut config = self.config.clone();
        config.schedule.deadline = None;
        let max_attempts = config.retry.max_attempts;
        let plan = self.plan(&config, rest.prompts, |key| {
            if rest.not_to_ask.contains(key) {
                return Ok(RowStatus::Answered);
            }
            let unanswered = &rest.books.unanswered;
            Ok(unanswered.row_status(key, self.cache.contains(key), max_attempts))
        })?;
        let dispatcher = self.dispatcher(&config, plan, rest.books).await?;
        let dispatcher = dispatcher.after(rest.summary, rest.started);
        let mut summary = dispatcher.run(signals).await?;
        if rest.under_way > 0 && summary.error.is_none() {
            let message = format!(
                "{} batches are still being cancelled: rerun the command to collect them",
                rest.under_way
            );
            summary.error = Some(Exit::Resumable(message).into());
            crate::report::write(&mut summary, &config.run_dir)?;
        }
        Ok(summary)
    }

    fn plan(
        &self,
        config: &Config,
        prompts: Vec<Prompt>,
        standing: impl Fn(&str) -> Result<RowStatus>,
    ) -> Result<Plan> {
        let askings = request_templates(config, &self.probes)?;
        let mut past = self.cache.past();
        // Their rows have the keys of the version that submitted them.
        past.has_schema_1 |= crate::harvest::batch::journal::is_under_way(&self.config.run_dir)?
            || !self.unanswered.is_empty();
        let scope = PlanScope {
            shard: self.shard,
            only: self.again.as_ref(),
        };
        let plan = Plan::new(prompts, askings, &config.prompts, scope, &past, standing)?;
        if let Some(told) = plan.repeats_warning() {
            tracing::warn!("{told}");
        }
        if self.again.is_none() {
            let (dir, known) = (config.own_cache(), self.cache.len());
            let unused = unused_answers(&dir, &plan, known, UNUSED_LOOKED_AT, &self.stop)?;
            if let Some(advice) = unused.advice(&config.arguments()) {
                tracing::warn!("{advice}");
            }
        }
        Ok(plan)
    }

    fn standing(&self, key: &str) -> Result<RowStatus> {
        self.stop.check()?;
        let max_attempts = self.config.retry.max_attempts;
        let is_cached = self.cache.contains(key);
        Ok(self.unanswered.row_status(key, is_cached, max_attempts))
    }

    /// Opens the books, once.
    fn books(&mut self) -> Result<RunFiles> {
        let config = self.config;
        let cached =
            self.cache.cost_when_opened() + crate::harvest::scorer::scoring_cost_usd(config)?;
        let unanswered = std::mem::take(&mut self.unanswered);
        let (books, lost) = RunFiles::open(config, cached, unanswered, self.clock.clone())?;
        lost.warn();
        Ok(books)
    }

    async fn dispatcher<'b>(
        &'b self,
        config: &'b Config,
        plan: Plan,
        mut books: RunFiles,
    ) -> Result<Dispatcher<'b>> {
        let (wake, mut upstreams) = (Arc::default(), Vec::new());
        for (index, transport) in self.transports.iter().enumerate() {
            books.check_largest(&plan, index)?;
            let day = books.day(&plan.templates[index].endpoint);
            let shared = self.shared(&plan, index, &wake).await?;
            let transport = Arc::clone(transport);
            let upstream = Upstream::new(&plan, index, transport, day, shared, config)?;
            upstreams.push(upstream);
        }
        let progress = Progress::new("harvest", plan.total, self.quiet);
        let (plan, clock) = (Arc::new(plan), self.clock.clone());
        let dispatcher =
            Dispatcher::new(config, plan, self.cache, upstreams, books, clock, progress)?;
        Ok(dispatcher.with_waker(wake))
    }

    /// The limits that a teacher's upstream shares with other processes, if there is anything to ask.
    async fn shared(
        &self,
        plan: &Plan,
        upstream: usize,
        wake: &Arc<Notify>,
    ) -> Result<Option<SharedLimits>> {
        if plan.rows_by_endpoint[upstream].is_empty() {
            return Ok(None);
        }
        let patience = Duration::try_from_secs_f64(self.config.retry.max_outage_s)?;
        let settings = &plan.templates[upstream].endpoint;
        SharedLimits::connect(settings, plan.largest(upstream), patience, wake).await
    }
}

/// Asks each endpoint of the config about twenty cheap questions, and keeps what they tell in the
/// run folder.
///
/// # Errors
/// Where an endpoint does not answer.
pub async fn probe(config: &Config) -> Result<ProbedEndpoints> {
    crate::client::request::check(config)?;
    let clock = WallClock::system();
    check_money(config, None, clock.now())?;
    let upstreams = config.endpoints().into_iter();
    let upstreams =
        upstreams.map(|upstream| Ok((Arc::new(HttpTeacher::new(&upstream.teacher)?), upstream)));
    let upstreams = upstreams.collect::<Result<Vec<_>>>()?;
    let cached = crate::cache::open::peek(&config.own_cache())?.cost_usd
        + crate::harvest::scorer::scoring_cost_usd(config)?;
    let (mut books, lost) = RunFiles::open(config, cached, Unanswered::default(), clock.clone())?;
    lost.warn();
    let mut endpoints = Vec::new();
    for (teacher, upstream) in upstreams {
        let found = crate::probe::run(upstream, teacher, &mut books.account, clock.now()).await;
        if found.is_err() {
            // What was asked was asked.
            books.close(&mut [], 0)?;
        }
        endpoints.push(found?);
    }
    books.close(&mut [], 0)?;
    let endpoints = ProbedEndpoints {
        version: crate::probe::findings::ENDPOINT_VERSION,
        endpoints,
    };
    let text = serde_json::to_vec_pretty(&endpoints)?;
    crate::fs::create_dir_all(&config.run_dir)?;
    crate::fs::write_atomic(&crate::probe::findings::file(&config.run_dir), &text)?;
    Ok(endpoints)
}
