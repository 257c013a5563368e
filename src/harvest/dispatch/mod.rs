//! Real-time mode: the single task that decides which requests are sent, and whether the row of each reply is answered,
//! retried or failed.
//!
//! | file | content |
//! |---|---|
//! | `mod` | main loop: send, wait for a reply, a signal, a timer or a limiter event |
//! | `recording` | writes answers to the cache, or holds them while the disk is full |
//! | `settling` | settles the budget of a reply and decides about its row |
//! | `ending` | closes the run files and writes the summary |
//!
//! Invariants: only this task changes queues, budget and summary. The budget is reserved before a request
//! leaves, and a reply is settled only after its answer is in the cache.

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
use crate::exit::Exit;
use crate::harvest::attempt::{self, Attempt, FinishedAttempt};
use crate::harvest::disk_full;
use crate::harvest::disk_full::HeldAnswers;
use crate::harvest::run_error;
use crate::harvest::run_files::RunFiles;
use crate::harvest::unreadable_bodies::UnreadableBodies;
use crate::harvest::upstream::Upstream;
use crate::harvest::window;
use crate::harvest::window::{CLOCK_CHECK_INTERVAL, RequestWindow, WindowState};
use crate::plan::Plan;
use crate::plan::run_settings::RunSettings;
use crate::report::progress::Rates;
use crate::report::summary::HarvestSummary;
use crate::report::timeline::{LimitUse, Timeline};
use crate::signal::Signals;
use crate::terminal::progress::Progress;
pub(crate) use ending::DispatchEnd;

/// Maximum number of answers recorded by one write, unless they were held while the disk was full.
const MAX_GROUP: usize = 64;

/// State of a real-time run.
pub(crate) struct Dispatcher<'a> {
    settings: &'a RunSettings,
    plan: Arc<Plan>,
    cache: &'a Cache,
    upstreams: Vec<Upstream>,
    run_files: RunFiles,
    unreadable: UnreadableBodies,
    schedule: RequestWindow,
    clock: WallClock,
    in_flight: JoinSet<Result<FinishedAttempt>>,
    /// Replies that wait for disk space.
    held_answers: HeldAnswers,
    /// Notified when a shared limit has an event.
    wake: Arc<Notify>,
    summary: HarvestSummary,
    timeline: Timeline,
    /// Error that ends the run: no more requests are sent, and the requests in flight finish.
    stop: Option<anyhow::Error>,
    /// True once a signal has arrived; the next signal stops the run immediately.
    has_signal: bool,
    /// True once another process has moved or changed the files of the cache.
    is_displaced: bool,
    /// True if the request window was closed at the last check.
    is_closed: bool,
    started: Instant,
    rates: Rates,
    progress: Progress,
}

/// Result of a request task, or the panic that ended it.
type TaskResult = Result<Result<FinishedAttempt>, JoinError>;

/// Outcome of an attempt to send the next request of an upstream.
enum SendOutcome {
    Sent,
    /// The next request may be sent at this time.
    NotBefore(Instant),
    /// No request can be sent before another event: no row is waiting, all slots are in use, the upstream has stopped,
    /// or the disk is full.
    Blocked,
    /// The budget does not cover the request now. It may cover the request later, if requests in flight cost less than
    /// reserved.
    NoBudget,
}

impl<'a> Dispatcher<'a> {
    pub(crate) fn new(
        settings: &'a RunSettings,
        plan: Arc<Plan>,
        cache: &'a Cache,
        upstreams: Vec<Upstream>,
        run_files: RunFiles,
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
            arguments: settings.arguments.clone(),
            before_training: settings.before_training,
            ..HarvestSummary::from_plan(&plan, &run_files.unanswered)
        };
        Ok(Self {
            settings,
            cache,
            upstreams,
            run_files,
            unreadable: UnreadableBodies::new(&settings.run_dir),
            schedule: RequestWindow::new(&settings.schedule, clock.now())?,
            in_flight: JoinSet::new(),
            held_answers: HeldAnswers::default(),
            wake: Arc::default(),
            timeline: Timeline::new(now, clock.now()),
            stop: None,
            has_signal: false,
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

    /// Sets the notifier that shared limits use to wake the main loop.
    pub(crate) fn with_waker(mut self, wake: Arc<Notify>) -> Self {
        self.wake = wake;
        self
    }

    /// Continues the summary of batch mode in a run that started at `started`.
    pub(crate) fn after(mut self, summary: HarvestSummary, started: Instant) -> Self {
        let used = std::mem::take(&mut self.summary.used);
        self.summary = HarvestSummary { used, ..summary };
        self.started = started;
        self.rates = Rates::new(Instant::now(), &self.summary);
        self
    }

    /// Runs until every row has ended, or until the run is stopped and the requests in flight have finished.
    pub(crate) async fn run(self, signals: Signals) -> Result<HarvestSummary> {
        Ok(self.run_to_end(signals).await?.summary)
    }

    /// Runs like [`Dispatcher::run`], and also returns the state that another dispatcher can reuse.
    pub(crate) async fn run_to_end(mut self, mut signals: Signals) -> Result<DispatchEnd> {
        let upstreams = self.upstreams.iter();
        let max_in_flight = upstreams.map(|upstream| upstream.settings.limits.concurrency as u64);
        self.run_files
            .account
            .expect_in_flight(max_in_flight.sum())?;
        let mut every_second = interval(Duration::from_secs(1));
        every_second.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            self.summary.turns += 1;
            let wake = self.send_ready_rows()?;
            let is_ending = self.stop.is_some() || self.is_done();
            if is_ending && self.in_flight.is_empty() && !self.held_answers.is_waiting() {
                break;
            }
            tokio::select! {
                Some(number) = signals.next() => {
                    // Do not delay the exit by compression.
                    self.cache.stop_compressing();
                    if self.handle_signal(number) {
                        break;
                    }
                }
                Some(finished) = self.in_flight.join_next() => {
                    let group = self.collect_group(finished).await;
                    self.handle_group(group)?;
                }
                () = sleep_until(wake.unwrap_or(self.started)), if wake.is_some() => {}
                () = self.wake.notified() => self.poll_limiter_events(),
                _ = every_second.tick() => self.tick()?,
            }
        }
        self.finish()
    }

    fn is_done(&self) -> bool {
        self.upstreams.iter().all(Upstream::is_done)
    }

    /// Sends requests until the rows, the concurrency, the limits or the budget are used up. Returns the time at which
    /// to try again; None if another event must come first.
    fn send_ready_rows(&mut self) -> Result<Option<Instant>> {
        if let Some(until) = self.wait_for_disk_space()? {
            return Ok(Some(until));
        }
        if let Some(until) = self.check_clock() {
            return Ok(Some(until));
        }
        if self.stop.is_some() {
            return Ok(None);
        }
        let mut wake: Option<Instant> = None;
        let mut is_budget_short = false;
        for index in 0..self.upstreams.len() {
            loop {
                match self.send_next(index)? {
                    SendOutcome::Sent => {}
                    SendOutcome::NotBefore(until) => {
                        wake = Some(wake.map_or(until, |wake| wake.min(until)));
                        break;
                    }
                    SendOutcome::Blocked => break,
                    SendOutcome::NoBudget => {
                        is_budget_short = true;
                        break;
                    }
                }
            }
        }
        if is_budget_short && self.in_flight.is_empty() && wake.is_none() {
            self.stop
                .get_or_insert(crate::budget::account::budget_exhausted(
                    &self.run_files.account,
                ));
        }
        Ok(wake)
    }

    /// Returns the time of the next check if the request window is closed. Stops the run after the deadline.
    fn check_clock(&mut self) -> Option<Instant> {
        let now = self.clock.now();
        let state = self.schedule.state(now);
        let was_closed =
            std::mem::replace(&mut self.is_closed, matches!(state, WindowState::Closed(_)));
        match state {
            WindowState::Open => None,
            WindowState::Over if self.is_done() => None,
            WindowState::Over => {
                self.stop.get_or_insert_with(window::deadline_passed);
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
                let wait = Duration::try_from(until - now).unwrap_or_default();
                let min_wait = Duration::from_millis(10);
                Some(Instant::now() + wait.clamp(min_wait, CLOCK_CHECK_INTERVAL))
            }
        }
    }

    /// Sends the next row of an upstream, if its limits and the budget allow it.
    fn send_next(&mut self, index: usize) -> Result<SendOutcome> {
        let upstream = &mut self.upstreams[index];
        if upstream.is_done() {
            return Ok(SendOutcome::Blocked);
        }
        let next_row = upstream
            .check_free_slot()
            .and_then(|()| upstream.next_row());
        let entry = match next_row {
            Ok(entry) => entry,
            Err(wake) => return Ok(wake.map_or(SendOutcome::Blocked, SendOutcome::NotBefore)),
        };
        let bound = self.plan.bound(index, entry.row);
        let reserved = self
            .run_files
            .account
            .bound(&bound, &upstream.settings.price);
        match self.run_files.reserve(&reserved, upstream) {
            Ok(true) => {}
            Ok(false) => return Ok(SendOutcome::NoBudget),
            Err(error) if disk_full::is_full(&error) => {
                self.note_full_disk(&error);
                return Ok(SendOutcome::Blocked);
            }
            Err(error) => return Err(error),
        }
        let cost = self.plan.cost(index, entry.row);
        let ticket = match upstream.admit(cost) {
            Ok(ticket) => ticket,
            Err(until) => {
                self.run_files.account.release(&reserved);
                self.note_daily_limit(index);
                return Ok(SendOutcome::NotBefore(until));
            }
        };
        upstream.queue.take(entry);
        upstream.request_sent(&ticket);
        self.summary.requests += 1;
        let used = &mut self.summary.used[index];
        used.requests += 1;
        used.tokens += cost.tokens();
        self.timeline.hour(ticket.sent_at).requests += 1;
        self.in_flight.spawn(attempt::run(
            Arc::clone(&self.plan),
            Arc::clone(&upstream.transport),
            self.clock.clone(),
            self.unreadable.clone(),
            Attempt {
                upstream: index,
                entry,
                ticket,
                reserved,
            },
        ));
        Ok(SendOutcome::Sent)
    }

    fn note_daily_limit(&mut self, index: usize) {
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

    /// Collects the finished request and all others that are ready, up to [`MAX_GROUP`], so that one write records
    /// them all.
    async fn collect_group(&mut self, first: TaskResult) -> Vec<TaskResult> {
        let mut group = vec![first];
        let mut is_growing = true;
        while std::mem::take(&mut is_growing) {
            tokio::task::yield_now().await;
            while group.len() < MAX_GROUP
                && let Some(ended) = self.in_flight.try_join_next()
            {
                group.push(ended);
                is_growing = true;
            }
        }
        group
    }

    /// Records the answers of a group by one write and settles every reply. While the disk is full, holds the replies.
    ///
    /// # Errors
    /// If a task failed or a file cannot be written.
    fn handle_group(&mut self, group: Vec<TaskResult>) -> Result<()> {
        self.check_cache()?;
        let mut finished = Vec::with_capacity(group.len());
        let mut task_error = None;
        for ended in group {
            match ended.context("a request task failed").flatten() {
                Ok(request) => finished.push(request),
                Err(error) => task_error = Some(error),
            }
        }
        if self.held_answers.is_waiting() {
            self.held_answers.hold(finished)
        } else {
            self.record(finished)?
        }
        self.unless_disk_full(|run_files| run_files.account.flush())?;
        self.check_cache()?;
        task_error.map_or(Ok(()), Err)
    }

    /// Stops sending if another process changed the cache.
    ///
    /// # Errors
    /// If the cache cannot be written.
    pub(super) fn check_cache(&mut self) -> Result<()> {
        let Err(error) = self.cache.check() else {
            return Ok(());
        };
        if error.is::<DisplacedFile>() {
            self.stop_displaced(error);
            return Ok(());
        }
        Err(run_error::not_recorded(error, self.cache.intact_len()))
    }

    fn stop_displaced(&mut self, error: anyhow::Error) {
        if !self.is_displaced {
            self.is_displaced = true;
            self.progress.note(&format!("{error:#}"));
            self.stop = Some(error);
        }
    }

    /// Writes to the run files and ignores a full disk: the next reservation fails before a request is sent, and until
    /// then the amounts on disk are upper bounds.
    fn unless_disk_full(&mut self, write: impl FnOnce(&mut RunFiles) -> Result<()>) -> Result<()> {
        match write(&mut self.run_files) {
            Err(error) if disk_full::is_full(&error) => Ok(()),
            // The whole run folder may have been moved. The reservations in its ledger cover the requests in flight.
            Err(_) if self.is_displaced => Ok(()),
            other => other,
        }
    }

    /// Handles a signal. Returns true for the second signal, which stops the run immediately.
    fn handle_signal(&mut self, number: u8) -> bool {
        let is_second = std::mem::replace(&mut self.has_signal, true);
        let in_flight = match self.in_flight.len() {
            1 => "1 request".to_owned(),
            count => format!("{count} requests"),
        };
        if is_second {
            let message = format!(
                "stopped immediately: {in_flight} in flight may be billed without an answer; \
                 rerun the command to resume"
            );
            self.stop = Some(anyhow::Error::from(Exit::Signal(number)).context(message));
        } else {
            let error = anyhow::Error::from(Exit::Signal(number));
            let advice = "every answer is recorded; rerun the command to resume";
            self.stop.get_or_insert(error.context(advice));
            self.progress.note(&format!(
                "waiting for {in_flight} in flight; press Ctrl-C again after a second to stop immediately"
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

    /// Updates the timeline, the account and the progress text, once a second.
    fn tick(&mut self) -> Result<()> {
        self.poll_limiter_events();
        self.record_time();
        self.check_cache()?;
        self.unless_disk_full(|run_files| run_files.account.tick())?;
        self.update_costs();
        self.rates.note(Instant::now(), &self.summary);
        let rates = &self.rates;
        let summary = &self.summary;
        self.progress.update(summary.done(), || rates.line(summary));
        Ok(())
    }

    /// Adds the time since the last call to the timeline. Time outside the window, or without disk space, is not an
    /// outage of an endpoint.
    fn record_time(&mut self) {
        let now = Instant::now();
        let seconds = self.timeline.advance(now);
        let elapsed = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let is_paused = self.is_closed || self.held_answers.is_waiting();
        for upstream in &mut self.upstreams {
            upstream.exclude_held_back(elapsed, is_paused);
        }
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

    fn update_costs(&mut self) {
        let prices = self
            .upstreams
            .iter()
            .map(|upstream| &upstream.settings.price);
        self.run_files.summarise(prices, &mut self.summary);
    }
}
