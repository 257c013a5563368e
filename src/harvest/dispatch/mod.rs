//! The one task that decides what is sent, and what becomes of the replies.

pub(crate) mod ending;
pub(crate) mod recording;
pub(crate) mod settling;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::Notify;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::cache::open_file::DisplacedFile;
use crate::cache::writer::Cache;
use crate::clock::WallClock;
use crate::config::Config;
use crate::exit::Exit;
use crate::harvest::attempt::{self, Attempt, FinishedAttempt};
use crate::harvest::disk_full;
use crate::harvest::disk_full::HeldAnswers;
use crate::harvest::run_error;
use crate::harvest::run_files::RunFiles;
use crate::harvest::unreadable_bodies::UnreadableBodies;
use crate::harvest::upstream::Upstream;
use crate::harvest::window;
use crate::harvest::window::{RequestWindow, WindowState};
use crate::plan::Plan;
use crate::report::progress::Rates;
use crate::report::summary::HarvestSummary;
use crate::report::timeline::{LimitUse, Timeline};
use crate::signal::Signals;
use crate::terminal::progress::Progress;
pub(crate) use ending::DispatchEnd;

/// Answers that are recorded by one write, at most.
const LARGEST_GROUP: usize = 64;

/// While the window is closed the wall clock is looked at so often: it may be set.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(60);

pub(crate) struct Dispatcher<'a> {
    config: &'a Config,
    plan: Arc<Plan>,
    cache: &'a Cache,
    upstreams: Vec<Upstream>,
    books: RunFiles,
    unreadable: UnreadableBodies,
    schedule: RequestWindow,
    clock: WallClock,
    in_flight: JoinSet<Result<FinishedAttempt>>,
    room: HeldAnswers,
    /// A limit that is shared has something to tell.
    wake: Arc<Notify>,
    summary: HarvestSummary,
    timeline: Timeline,
    /// Why nothing is sent any more; what is in flight is still waited for.
    stop: Option<anyhow::Error>,
    /// A signal has come: the next one stops at once.
    signalled: bool,
    /// Files of the cache were moved or changed by somebody else.
    is_displaced: bool,
    /// The window was closed when last looked at.
    is_closed: bool,
    started: Instant,
    rates: Rates,
    progress: Progress,
}

/// What a request task has come to.
type TaskResult = Result<Result<FinishedAttempt>, JoinError>;

/// What came of trying to send one more request.
enum SendOutcome {
    Sent,
    /// A limit says: not before then.
    NotBefore(Instant),
    /// Something has to come back first.
    Full,
    /// The budget does not cover it, unless something in flight turns out cheaper.
    NoMoney,
}

impl<'a> Dispatcher<'a> {
    pub(crate) fn new(
        config: &'a Config,
        plan: Arc<Plan>,
        cache: &'a Cache,
        upstreams: Vec<Upstream>,
        books: RunFiles,
        clock: WallClock,
        progress: Progress,
    ) -> Result<Self> {
        let now = Instant::now();
        let used = upstreams.iter().map(|upstream| LimitUse {
            teacher: upstream.settings.teacher.label().into(),
            ..LimitUse::default()
        });
        let summary = HarvestSummary {
            used: used.collect(),
            arguments: config.arguments(),
            before_training: crate::plan::prepare::before_training(config),
            ..HarvestSummary::from_plan(&plan, &books.unanswered)
        };
        Ok(Self {
            config,
            cache,
            upstreams,
            books,
            unreadable: UnreadableBodies::new(&config.run_dir),
            schedule: RequestWindow::new(&config.schedule, clock.now())?,
            in_flight: JoinSet::new(),
            room: HeldAnswers::default(),
            wake: Arc::default(),
            timeline: Timeline::new(now, clock.now()),
            stop: None,
            signalled: false,
            is_displaced: false,
            is_closed: false,
            started: now,
            rates: Rates::new(now, &summary),
            progress,
            summary,
            plan,
            clock,
        })
    }

    /// Hears of the limits that are shared when it is woken by `wake`.
    pub(crate) fn with_waker(mut self, wake: Arc<Notify>) -> Self {
        self.wake = wake;
        self
    }

    /// Goes on with what an earlier part of the run, begun then, has left.
    pub(crate) fn after(mut self, summary: HarvestSummary, started: Instant) -> Self {
        let used = std::mem::take(&mut self.summary.used);
        self.summary = HarvestSummary { used, ..summary };
        self.started = started;
        self.rates = Rates::new(Instant::now(), &self.summary);
        self
    }

    /// Runs until every row has ended, or until something stops it and what was in flight is
    /// recorded.
    pub(crate) async fn run(self, signals: Signals) -> Result<HarvestSummary> {
        Ok(self.run_to_end(signals).await?.summary)
    }

    /// As [`Dispatcher::run`], of whose parts another one is to be made.
    pub(crate) async fn run_to_end(mut self, mut signals: Signals) -> Result<DispatchEnd> {
        let upstreams = self.upstreams.iter();
        let most_in_flight = upstreams.map(|upstream| upstream.settings.limits.concurrency as u64);
        self.books.account.expect_in_flight(most_in_flight.sum())?;
        let mut seconds = interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            self.summary.turns += 1;
            let wake = self.send_what_may_leave()?;
            let is_over = self.stop.is_some() || self.is_done();
            if is_over && self.in_flight.is_empty() && !self.room.is_waiting() {
                break;
            }
            tokio::select! {
                Some(number) = signals.next() => {
                    // Whoever stops it does not want to wait for compression.
                    self.cache.stop_compressing();
                    if self.signalled(number) {
                        break;
                    }
                }
                Some(finished) = self.in_flight.join_next() => {
                    let group = self.group(finished).await;
                    self.handle_result(group)?;
                }
                () = sleep_until(wake.unwrap_or(self.started)), if wake.is_some() => {}
                () = self.wake.notified() => self.poll_limiter_events(),
                _ = seconds.tick() => self.tick()?,
            }
        }
        self.finish()
    }

    fn is_done(&self) -> bool {
        self.upstreams.iter().all(Upstream::is_done)
    }

    /// Starts requests until the queues, the concurrency, the limits or the budget say no. Returns
    /// when to try again; None: when something has come back.
    fn send_what_may_leave(&mut self) -> Result<Option<Instant>> {
        if let Some(until) = self.wait_for_room()? {
            return Ok(Some(until));
        }
        if let Some(until) = self.check_clock() {
            return Ok(Some(until));
        }
        if self.stop.is_some() {
            return Ok(None);
        }
        let mut wake: Option<Instant> = None;
        let mut is_short_of_money = false;
        for index in 0..self.upstreams.len() {
            loop {
                match self.send_next(index)? {
                    SendOutcome::Sent => {}
                    SendOutcome::NotBefore(until) => {
                        wake = Some(wake.map_or(until, |wake| wake.min(until)));
                        break;
                    }
                    SendOutcome::Full => break,
                    SendOutcome::NoMoney => {
                        is_short_of_money = true;
                        break;
                    }
                }
            }
        }
        if is_short_of_money && self.in_flight.is_empty() && wake.is_none() {
            self.stop
                .get_or_insert(crate::budget::account::out_of_money(&self.books.account));
        }
        Ok(wake)
    }

    /// When to look again, while the window is closed. A deadline that has passed stops the run.
    fn check_clock(&mut self) -> Option<Instant> {
        let now = self.clock.now();
        let state = self.schedule.state(now);
        let was_closed =
            std::mem::replace(&mut self.is_closed, matches!(state, WindowState::Closed(_)));
        match state {
            WindowState::Open => None,
            WindowState::Over if self.is_done() => None,
            WindowState::Over => {
                self.stop.get_or_insert_with(window::over);
                None
            }
            WindowState::Closed(_) if self.stop.is_some() || self.is_done() => None,
            WindowState::Closed(until) => {
                if !was_closed {
                    self.progress.note(&format!(
                        "outside the window: waiting until {}",
                        self.schedule.show(until)
                    ));
                }
                let left = Duration::try_from(until - now).unwrap_or_default();
                let least = Duration::from_millis(10);
                Some(Instant::now() + left.clamp(least, LOOK_AT_CLOCK))
            }
        }
    }

    fn send_next(&mut self, index: usize) -> Result<SendOutcome> {
        let upstream = &mut self.upstreams[index];
        if upstream.is_done() {
            return Ok(SendOutcome::Full);
        }
        let entry = match upstream.free_slots().and_then(|()| upstream.next_row()) {
            Ok(entry) => entry,
            Err(wake) => return Ok(wake.map_or(SendOutcome::Full, SendOutcome::NotBefore)),
        };
        let bound = self.plan.bound(index, entry.row);
        let reserved = self.books.account.bound(&bound, &upstream.settings.price);
        match self.books.reserve(&reserved, upstream) {
            Ok(true) => {}
            Ok(false) => return Ok(SendOutcome::NoMoney),
            Err(error) if disk_full::is_full(&error) => {
                self.note_full_disk(&error);
                return Ok(SendOutcome::Full);
            }
            Err(error) => return Err(error),
        }
        let cost = self.plan.cost(index, entry.row);
        let departure = match upstream.admit(cost) {
            Ok(departure) => departure,
            Err(until) => {
                self.books.account.release(&reserved);
                self.note_day(index);
                return Ok(SendOutcome::NotBefore(until));
            }
        };
        upstream.queue.take(entry);
        upstream.request_sent(&departure);
        self.summary.requests += 1;
        let used = &mut self.summary.used[index];
        used.requests += 1;
        used.tokens += cost.tokens();
        self.timeline.hour(departure.at).requests += 1;
        self.in_flight.spawn(attempt::run(
            Arc::clone(&self.plan),
            Arc::clone(&upstream.transport),
            self.clock.clone(),
            self.unreadable.clone(),
            Attempt {
                upstream: index,
                entry,
                departure,
                reserved,
            },
        ));
        Ok(SendOutcome::Sent)
    }

    fn note_day(&mut self, index: usize) {
        let Some((limit, wait)) = self.upstreams[index].daily_limit_notice() else {
            return;
        };
        let now = self.clock.now();
        let until = now.checked_add(wait).unwrap_or(jiff::Timestamp::MAX);
        self.progress.note(&format!(
            "waiting until {}: `limits.requests_per_day` = {limit} is used up for {}",
            self.schedule.show(until),
            self.upstreams[index].settings.teacher.label()
        ));
    }

    /// The request that has ended, and those that end as soon as they are let: under a full load
    /// each would otherwise be recorded by a write of its own.
    async fn group(&mut self, first: TaskResult) -> Vec<TaskResult> {
        let mut group = vec![first];
        let mut is_growing = true;
        while std::mem::take(&mut is_growing) {
            tokio::task::yield_now().await;
            while group.len() < LARGEST_GROUP
                && let Some(ended) = self.in_flight.try_join_next()
            {
                group.push(ended);
                is_growing = true;
            }
        }
        group
    }

    /// Records the answers that have come, by one write, and decides about the other replies.
    fn handle_result(&mut self, group: Vec<TaskResult>) -> Result<()> {
        self.check_cache()?;
        let (mut finished, mut fault) = (Vec::with_capacity(group.len()), None);
        for ended in group {
            match ended.context("a request task failed").flatten() {
                Ok(request) => finished.push(request),
                Err(error) => fault = Some(error),
            }
        }
        match self.room.is_waiting() {
            true => self.room.hold(finished),
            false => self.record(finished)?,
        }
        self.unless_disk_full(|books| books.account.flush())?;
        self.check_cache()?;
        fault.map_or(Ok(()), Err)
    }

    /// Nothing more is asked where the cache is not what this run has made of it, and nothing at all can go
    /// on where it cannot be written.
    pub(super) fn check_cache(&mut self) -> Result<()> {
        let Err(error) = self.cache.check() else {
            return Ok(());
        };
        if error.is::<DisplacedFile>() {
            self.stop_displaced(error);
            return Ok(());
        }
        Err(run_error::not_recorded(error, self.cache.safe_len()))
    }

    fn stop_displaced(&mut self, error: anyhow::Error) {
        if !self.is_displaced {
            self.is_displaced = true;
            self.progress.note(&format!("{error:#}"));
            self.stop = Some(error);
        }
    }

    fn tick_account(&mut self) -> Result<()> {
        self.unless_disk_full(|books| books.account.tick())
    }

    /// Writes to the books. A full disk is met again by the next request, which must not be sent then;
    /// until then what was written before is on the safe side.
    fn unless_disk_full(&mut self, write: impl FnOnce(&mut RunFiles) -> Result<()>) -> Result<()> {
        match write(&mut self.books) {
            Err(error) if disk_full::is_full(&error) => Ok(()),
            // The whole folder may have been moved. What was written ahead there covers what is in flight.
            Err(_) if self.is_displaced => Ok(()),
            other => other,
        }
    }

    /// True for the second signal.
    fn signalled(&mut self, number: u8) -> bool {
        let is_second = std::mem::replace(&mut self.signalled, true);
        let in_flight = self.in_flight.len();
        if is_second {
            let told = format!(
                "stopped at once: {in_flight} requests were in flight, and may be billed without an answer; \
                 run the same command to resume"
            );
            self.stop = Some(anyhow::Error::from(Exit::Signal(number)).context(told));
        } else {
            let error = anyhow::Error::from(Exit::Signal(number));
            let advice = "every answer is recorded; run the same command to resume";
            self.stop.get_or_insert(error.context(advice));
            self.progress.note(&format!(
                "waiting for the {in_flight} answers in flight; press Ctrl-C again after a second to stop at once"
            ));
        }
        is_second
    }

    fn poll_limiter_events(&mut self) {
        for line in self
            .upstreams
            .iter_mut()
            .filter_map(Upstream::poll_limiter_event)
        {
            self.progress.note(&line);
        }
    }

    fn tick(&mut self) -> Result<()> {
        self.poll_limiter_events();
        self.pass_time();
        self.check_cache()?;
        self.tick_account()?;
        self.note_dollars();
        self.rates.note(Instant::now(), &self.summary);
        let (rates, summary) = (&self.rates, &self.summary);
        self.progress.update(summary.done(), || rates.line(summary));
        Ok(())
    }

    fn pass_time(&mut self) {
        let now = Instant::now();
        let seconds = self.timeline.advance(now);
        let is_waiting = self.upstreams.iter().any(Upstream::is_waiting);
        let hour = self.timeline.hour(now);
        if self.is_closed {
            hour.closed_s += seconds;
            return;
        }
        if is_waiting {
            hour.waiting_s += seconds;
        }
        if self.stop.is_some() {
            return;
        }
        for (upstream, used) in self.upstreams.iter().zip(&mut self.summary.used) {
            if upstream.may_send() {
                used.advance(seconds, upstream.limiter.per_minute());
            }
        }
    }

    fn note_dollars(&mut self) {
        let is_priced = self.upstreams.iter().any(|upstream| {
            upstream.settings.price.input.is_some() && upstream.settings.price.output.is_some()
        });
        self.books.summarise(is_priced, &mut self.summary);
    }
}
