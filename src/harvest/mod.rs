//! Prompts in, recorded answers out.
//!
//! ```text
//! prompts --plan--> rows that the cache does not hold --lane: queue, limiter, budget--> attempt
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
//! a `lane`: its queue, its `limiter` (whose ceilings may be shared with other processes), its
//! `health`, its decisions after a refusal (`crate::harvest::upstream::refusals`), and a `watch` over what its answers are
//! worth. `books` keeps the account (`budget`), whose cap holds over kills, and the rows without an answer;
//! in `room` answers wait while the disk is full. A body is read by `reply`; what it means is for `retry` and `refusal` to say. A `teacher` sends, by way of
//! `exchange`, over a `connection`, with `credentials` that may be renewed, and `secrets` are taken out
//! of whatever comes back. `prepare` opens and checks what a night and a `dry_run` begin with; `again` and
//! `adopt` change what the cache is taken to answer, and `questions` selects its records for training. Everything else is pure (`request`, `record`, `plan`,
//! `shard`, `estimate`, `queue`, `schedule`, `advice`, `stop`) or does one thing. It knows nothing of tensors.

pub(crate) mod attempt;
pub(crate) mod batch;
pub(crate) mod books;
pub(crate) mod disk_full;
pub(crate) mod dispatch;
pub(crate) mod dry_run;
#[doc(hidden)]
pub mod fuzz;
pub(crate) mod health;
pub mod judge;
pub mod options;
pub(crate) mod record;
pub(crate) mod stop;
pub(crate) mod unreadable;
pub(crate) mod upstream;
pub(crate) mod watch;
pub(crate) mod window;

use crate::harvest::options::HarvestOptions;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Notify;

use crate::cache::storage::WrapFile;
use crate::cache::writer::Cache;
use crate::client::http::Teacher;
use crate::client::transport::Transport;
use crate::clock::WallClock;
use crate::config::{Config, Mode};
use crate::exit::Exit;
use crate::harvest::upstream::Lane;
use crate::harvest::window::Schedule;
use crate::ops::process;
use crate::plan::prepare::{
    askings, census_of, check_endpoints, check_money, open_cache, prompts, warn_of_empty_cache,
};
use crate::plan::shard::Shard;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, Scope, Standing};
use crate::probe::findings::Endpoints;
use crate::prompt::Prompt;
use crate::rate_limit::redis::Shared;
use crate::report::summary::Summary;
use crate::signal::{Signals, StopFlag};
use crate::terminal::progress::Progress;
use batch::{Batches, Outcome};
use books::Books;
use dispatch::Dispatcher;

/// Records in which a run looks for answers from other endpoints; a dry run looks at all of them.
const UNUSED_LOOKED_AT: u64 = 20_000;

/// Asks the teacher for every answer that the run's cache does not hold.
///
/// An error means that nothing could be begun, or that an answer could not be recorded. A run that
/// began ends with a summary, whose `error` says what, if anything, went wrong; see
/// [`Summary::into_result`].
pub async fn run(config: &Config, options: HarvestOptions) -> Result<Summary> {
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
) -> Result<Summary> {
    crate::client::request::check(config)?;
    let config = &within_descriptors(config);
    let lanes = config.lanes();
    let teachers = lanes.iter().map(|lane| {
        let teacher: Arc<dyn Transport> = Arc::new(Teacher::new(&lane.teacher)?);
        Ok(teacher)
    });
    let transports = teachers.collect::<Result<_>>()?;
    let world = World {
        transports,
        clock: WallClock::system(),
        storage: crate::cache::storage::plain_storage(),
    };
    run_in(world, config, options, signals).await
}

/// The same settings, with no more requests in flight than this process may hold connections open.
fn within_descriptors(config: &Config) -> Config {
    let wanted: usize = config
        .lanes()
        .iter()
        .map(|lane| lane.limits.concurrency)
        .sum();
    let Some(most) = process::connections().filter(|most| *most < wanted) else {
        return config.clone();
    };
    tracing::warn!(
        "`limits.concurrency` of {wanted} needs as many connections, and this process may hold {most} \
         open: {most} requests are in flight at most; raise `ulimit -n` for more"
    );
    config.with_at_most_in_flight(most)
}

/// The seams at which a simulated night takes the place of the network, the clock and the disk.
pub struct World {
    /// The ways to the teachers, one for each.
    pub transports: Vec<Arc<dyn Transport>>,
    pub clock: WallClock,
    pub storage: WrapFile,
}

/// As [`run_until`], in another world.
pub async fn run_in(
    world: World,
    config: &Config,
    options: HarvestOptions,
    signals: Signals,
) -> Result<Summary> {
    let World {
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
            if config.schedule.mode == Mode::Batch
                && crate::harvest::batch::journal::is_under_way(&config.run_dir)? =>
        {
            tracing::warn!(
                "batches are under way: they are waited for, and nothing leaves the cache"
            );
            None
        }
        false => {
            crate::harvest::batch::journal::check_none_under_way(&config.run_dir)?;
            Schedule::new(&config.schedule, clock.now())?.check_not_over(clock.now())?;
            // The account of an earlier version takes over from the cache what was spent: before records leave it.
            let cached =
                crate::cache::open::peek(&config.own_cache())?.cost_usd + judge::cost_usd(config)?;
            Books::open(config, cached, Unanswered::default(), clock.clone())?
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
            Some(crate::plan::again::take_out(
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
        Mode::Realtime => run.realtime(prompts, signals).await,
        Mode::Batch => run.batch(prompts, signals).await,
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
    again: Option<crate::plan::again::Wanted>,
    /// For what takes long before anything is asked.
    stop: StopFlag,
    clock: WallClock,
}

impl Run<'_> {
    async fn realtime(mut self, prompts: Vec<Prompt>, signals: Signals) -> Result<Summary> {
        crate::harvest::batch::journal::check_none_under_way(&self.config.run_dir)?;
        crate::harvest::batch::journal::drop_uncreated(&self.config.run_dir)?;
        let plan = self.plan(self.config, prompts, |key| self.standing(key))?;
        let books = self.books()?;
        let dispatcher = self.dispatcher(self.config, plan, books).await?;
        dispatcher.run(signals).await
    }

    async fn batch(mut self, prompts: Vec<Prompt>, mut signals: Signals) -> Result<Summary> {
        let config = self.config.at_batch_prices();
        let plan = self.plan(&config, prompts, |key| self.standing(key))?;
        let books = self.books()?;
        for lane in 0..plan.lanes.len() {
            books.check_largest(&plan, lane)?;
            // For the rest, which is asked one by one: what is wrong with it shall not be found out
            // at the end of the night.
            self.shared(&plan, lane, &Arc::default()).await?;
        }
        let (transports, clock) = (&self.transports, self.clock.clone());
        let batches = Batches::new(
            &config, plan, self.cache, transports, books, clock, self.quiet,
        )?;
        let rest = match batches.run(&mut signals).await? {
            Outcome::Finished(summary) => return Ok(*summary),
            Outcome::Rest(rest) => *rest,
        };
        // The deadline was that of the batches.
        let mut config = self.config.clone();
        config.schedule.deadline = None;
        let max_attempts = config.retry.max_attempts;
        let plan = self.plan(&config, rest.prompts, |key| {
            if rest.not_to_ask.contains(key) {
                return Ok(Standing::Answered);
            }
            let unanswered = &rest.books.unanswered;
            Ok(unanswered.standing(key, self.cache.contains(key), max_attempts))
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
        standing: impl Fn(&str) -> Result<Standing>,
    ) -> Result<Plan> {
        let askings = askings(config, &self.probes)?;
        let mut past = self.cache.past();
        // Their rows have the keys of the version that submitted them.
        past.has_schema_1 |= crate::harvest::batch::journal::is_under_way(&self.config.run_dir)?
            || !self.unanswered.is_empty();
        let scope = Scope {
            shard: self.shard,
            only: self.again.as_ref(),
        };
        let plan = Plan::new(prompts, askings, &config.prompts, scope, &past, standing)?;
        if let Some(told) = plan.told_of_repeats() {
            tracing::warn!("{told}");
        }
        if self.again.is_none() {
            let (dir, known) = (config.own_cache(), self.cache.len());
            let unused = census_of(&dir, &plan, known, UNUSED_LOOKED_AT, &self.stop)?;
            if let Some(advice) = unused.advice(&config.arguments()) {
                tracing::warn!("{advice}");
            }
        }
        Ok(plan)
    }

    fn standing(&self, key: &str) -> Result<Standing> {
        self.stop.check()?;
        let max_attempts = self.config.retry.max_attempts;
        let is_cached = self.cache.contains(key);
        Ok(self.unanswered.standing(key, is_cached, max_attempts))
    }

    /// Opens the books, once.
    fn books(&mut self) -> Result<Books> {
        let config = self.config;
        let cached = self.cache.cost_when_opened() + judge::cost_usd(config)?;
        let unanswered = std::mem::take(&mut self.unanswered);
        let (books, lost) = Books::open(config, cached, unanswered, self.clock.clone())?;
        lost.warn();
        Ok(books)
    }

    async fn dispatcher<'b>(
        &'b self,
        config: &'b Config,
        plan: Plan,
        mut books: Books,
    ) -> Result<Dispatcher<'b>> {
        let (wake, mut lanes) = (Arc::default(), Vec::new());
        for (index, transport) in self.transports.iter().enumerate() {
            books.check_largest(&plan, index)?;
            let day = books.day(&plan.askings[index].lane);
            let shared = self.shared(&plan, index, &wake).await?;
            let transport = Arc::clone(transport);
            let lane = Lane::new(&plan, index, transport, day, shared, config)?;
            lanes.push(lane);
        }
        let progress = Progress::new("harvest", plan.total, self.quiet);
        let (plan, clock) = (Arc::new(plan), self.clock.clone());
        let dispatcher = Dispatcher::new(config, plan, self.cache, lanes, books, clock, progress)?;
        Ok(dispatcher.woken_by(wake))
    }

    /// The limits that a teacher's lane shares with other processes, if there is anything to ask.
    async fn shared(&self, plan: &Plan, lane: usize, wake: &Arc<Notify>) -> Result<Option<Shared>> {
        if plan.lanes[lane].is_empty() {
            return Ok(None);
        }
        let patience = Duration::try_from_secs_f64(self.config.retry.max_outage_s)?;
        let settings = &plan.askings[lane].lane;
        Shared::connect(settings, plan.largest(lane), patience, wake).await
    }
}

/// Asks each endpoint of the config about twenty cheap questions, and keeps what they tell in the
/// run folder.
///
/// # Errors
/// Where an endpoint does not answer.
pub async fn probe(config: &Config) -> Result<Endpoints> {
    crate::client::request::check(config)?;
    let clock = WallClock::system();
    check_money(config, None, clock.now())?;
    let lanes = config.lanes().into_iter();
    let lanes = lanes.map(|lane| Ok((Arc::new(Teacher::new(&lane.teacher)?), lane)));
    let lanes = lanes.collect::<Result<Vec<_>>>()?;
    let cached = crate::cache::open::peek(&config.own_cache())?.cost_usd + judge::cost_usd(config)?;
    let (mut books, lost) = Books::open(config, cached, Unanswered::default(), clock.clone())?;
    lost.warn();
    let mut endpoints = Vec::new();
    for (teacher, lane) in lanes {
        let found = crate::probe::run(lane, teacher, &mut books.account, clock.now()).await;
        if found.is_err() {
            // What was asked was asked.
            books.close(&mut [], 0)?;
        }
        endpoints.push(found?);
    }
    books.close(&mut [], 0)?;
    let endpoints = Endpoints {
        version: crate::probe::findings::ENDPOINT_VERSION,
        endpoints,
    };
    let text = serde_json::to_vec_pretty(&endpoints)?;
    crate::fs::create_dir_all(&config.run_dir)?;
    crate::fs::write_atomic(&crate::probe::findings::file(&config.run_dir), &text)?;
    Ok(endpoints)
}
