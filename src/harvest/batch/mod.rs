//! Batch mode: uploads requests as files; the endpoint usually answers within a day, for half the price. A *part* is
//! the rows that are sent as one batch.
//!
//! ```text
//! waiting rows --parts: how many fit--> part (journal) --submit: upload, create or adopt--> batch
//!   --collect: poll, read both result files row by row--> cache | a later part | failed
//! ```
//!
//! | file | content |
//! |---|---|
//! | `mod` | main loop over the parts of every upstream |
//! | `parts`, `estimate` | number of rows that fit into a part; estimate for a dry run |
//! | `journal`, `recover` | `batches.json` and the rows of each part; resumes the parts of earlier runs |
//! | `submit` | uploads a part and creates its batch; after a lost reply, searches for the batch |
//! | `collect`, `download`, `rows`, `results`, `braces` | polls a batch; reads, splits and parses its result files |
//! | `failed`, `closing` | a batch that failed as a whole; the outcome of every row when a part ends |
//! | `upstream`, `show` | live state of an endpoint; progress text |
//!
//! Invariants: the journal records each step before the next one begins, so a signal or a kill may stop the loop at any
//! await: the batches continue at the endpoint, and the next run collects them. When a part ends, each of its rows has
//! been answered, has failed or returns to the queue.

pub(crate) mod braces;
pub(crate) mod closing;
pub(crate) mod collect;
pub(crate) mod download;
pub(crate) mod estimate;
pub(crate) mod failed;
pub(crate) mod journal;
pub(crate) mod parts;
pub(crate) mod recover;
pub(crate) mod results;
pub(crate) mod rows;
pub(crate) mod show;
pub(crate) mod submit;
pub(crate) mod upstream;

pub(crate) use crate::report::batch_counts::BatchCounts;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::time::{Instant, sleep_until};

use crate::cache::writer::Cache;
use crate::client::attempt_error::{AttemptError, RowFailure};
use crate::client::transport::Transport;
use crate::clock::WallClock;
use crate::exit::Exit;
use crate::harvest::run_files::RunFiles;
use crate::harvest::unreadable_bodies::UnreadableBodies;
use crate::harvest::window::{CLOCK_CHECK_INTERVAL, RequestWindow, WindowState};
use crate::plan::Plan;
use crate::plan::queue::QueuedRow;
use crate::plan::run_settings::RunSettings;
use crate::prompt::Prompt;
use crate::report::failures::FailedRow;
use crate::report::summary::HarvestSummary;
use crate::signal::Signals;
use crate::terminal::format_duration;
use crate::terminal::progress::{Progress, SHORTEST_SHOWN_WAIT};
use journal::BatchJournal;
use upstream::BatchUpstream;

/// Maximum time to wait for cancelled batches to end; endpoints document up to ten minutes.
const MAX_CANCEL_TIME: Duration = Duration::from_secs(1_200);

/// State of a run in batch mode.
pub(crate) struct BatchRun<'a> {
    settings: &'a RunSettings,
    plan: Plan,
    cache: &'a Cache,
    upstreams: Vec<BatchUpstream>,
    journal: BatchJournal,
    run_files: RunFiles,
    unreadable: UnreadableBodies,
    schedule: RequestWindow,
    clock: WallClock,
    summary: HarvestSummary,
    counts: BatchCounts,
    started: Instant,
    /// Time at which the main loop detected that the deadline has passed.
    deadline_passed_at: Option<Instant>,
    progress: Progress,
}

/// Result of a run in batch mode.
pub(crate) enum BatchOutcome {
    Finished(Box<HarvestSummary>),
    /// The deadline passed: the remaining rows are sent in real time.
    Remaining(Box<RemainingRows>),
}

/// Rows that the batches did not answer before the deadline.
pub(crate) struct RemainingRows {
    pub prompts: Vec<Prompt>,
    /// Keys of the rows that must not be sent: rows that have failed, and rows in parts that have not ended.
    pub excluded_keys: HashSet<String>,
    /// Number of parts that have not ended: the cancellation did not finish, or the upstream has stopped or is not in
    /// the config.
    pub uncancelled_batches: usize,
    pub summary: HarvestSummary,
    pub run_files: RunFiles,
    pub started: Instant,
}

/// Reason why the main loop ended.
enum BatchRunEnd {
    /// Every row has ended, or its upstream has stopped.
    AllDone,
    Deadline,
    Signal(u8),
}

/// Error of a step of a part, such as an upload or a poll.
enum BatchStepError {
    /// A call to the endpoint failed; the step is tried again.
    Attempt(AttemptError),
    /// The run ends.
    Fatal(anyhow::Error),
}

impl From<AttemptError> for BatchStepError {
    fn from(error: AttemptError) -> BatchStepError {
        BatchStepError::Attempt(error)
    }
}

impl From<anyhow::Error> for BatchStepError {
    fn from(error: anyhow::Error) -> BatchStepError {
        BatchStepError::Fatal(error)
    }
}

impl<'a> BatchRun<'a> {
    /// Creates the state of a run. The prices in `settings` are those of batch mode.
    pub(crate) fn new(
        settings: &'a RunSettings,
        plan: Plan,
        cache: &'a Cache,
        transports: &[Arc<dyn Transport>],
        run_files: RunFiles,
        clock: WallClock,
        quiet: bool,
    ) -> Result<Self> {
        let upstreams = transports.iter().enumerate().map(|(index, transport)| {
            BatchUpstream::new(&plan, index, Arc::clone(transport), settings)
        });
        Ok(Self {
            upstreams: upstreams.collect(),
            journal: BatchJournal::load(&settings.run_dir)?,
            schedule: RequestWindow::new(&settings.schedule, clock.now())?,
            summary: HarvestSummary {
                arguments: settings.arguments.clone(),
                before_training: settings.before_training,
                ..HarvestSummary::from_plan(&plan, &run_files.unanswered)
            },
            counts: BatchCounts::default(),
            started: Instant::now(),
            deadline_passed_at: None,
            progress: Progress::new("harvest", plan.total, quiet),
            unreadable: UnreadableBodies::new(&settings.run_dir),
            settings,
            plan,
            cache,
            run_files,
            clock,
        })
    }

    /// Runs until every row has ended or its upstream has stopped, the deadline passes, or a signal arrives.
    pub(crate) async fn run(mut self, signals: &mut Signals) -> Result<BatchOutcome> {
        self.recover()?;
        let signal = async {
            match signals.next().await {
                Some(number) => number,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            biased;
            number = signal => {
                self.cache.stop_compressing();
                BatchRunEnd::Signal(number)
            }
            ended = self.work() => ended?,
        };
        self.finish(ended)
    }

    /// Runs the main loop.
    async fn work(&mut self) -> Result<BatchRunEnd> {
        loop {
            self.summary.turns += 1;
            let window = self.schedule.state(self.clock.now());
            if window == WindowState::Over && self.deadline_passed_at.is_none() {
                let now = Instant::now();
                self.deadline_passed_at = Some(now);
                // Batches are cancelled immediately, even during a pause after a failed call.
                for upstream in &mut self.upstreams {
                    upstream.not_before = now;
                    upstream.next_poll = now;
                }
                self.progress
                    .note("the deadline has passed: batches under way are cancelled");
            }
            for upstream in 0..self.upstreams.len() {
                match self.advance(upstream, window == WindowState::Open).await {
                    Ok(()) => {}
                    Err(BatchStepError::Fatal(error)) => return Err(error),
                    Err(BatchStepError::Attempt(error)) => self.step_failed(upstream, error),
                }
            }
            self.cache.check()?;
            self.run_files.account.tick()?;
            self.show_progress();
            if let Some(ended) = self.run_end() {
                return Ok(ended);
            }
            let paused_at = Instant::now();
            sleep_until(self.wake()).await;
            if window != WindowState::Open {
                self.exclude_closed_window(paused_at);
            }
        }
    }

    /// Excludes the time since `paused_at`, in which the request window was closed, from the outage of each upstream
    /// that makes no calls outside the window.
    fn exclude_closed_window(&mut self, paused_at: Instant) {
        for upstream in 0..self.upstreams.len() {
            let makes_calls = self.parts_of(upstream).into_iter().any(|index| {
                let part = &self.journal.parts[index];
                part.batch().is_some() || part.progress.is_creation_unconfirmed
            });
            let upstream = &mut self.upstreams[upstream];
            if !makes_calls && upstream.not_before <= paused_at {
                upstream.exclude_wait(paused_at.elapsed());
            }
        }
    }

    /// Advances every part of an upstream, then submits new parts while rows wait and limits allow it.
    async fn advance(&mut self, upstream: usize, may_send: bool) -> Result<(), BatchStepError> {
        let now = Instant::now();
        if self.upstreams[upstream].is_stopped() || self.upstreams[upstream].not_before > now {
            return Ok(());
        }
        let is_due = self.upstreams[upstream].next_poll <= now;
        if is_due {
            // From 0.75 to 1.25, so that processes do not poll together.
            let jitter = 0.75 + fastrand::f64() / 2.0;
            let pause = self.settings.batch.poll.mul_f64(jitter);
            self.upstreams[upstream].next_poll = now + pause;
        }
        // A failed call for one part does not delay the other parts.
        let mut result: Result<(), BatchStepError> = Ok(());
        for index in self.parts_of(upstream) {
            let step = if self.journal.parts[index].batch().is_none() {
                // Outside the window no batch is created, but a creation without a reply is still looked up.
                self.submit(index, may_send).await
            } else if is_due {
                self.poll(index).await
            } else {
                Ok(())
            };
            match step {
                Err(BatchStepError::Attempt(error)) if result.is_ok() => result = Err(error.into()),
                Err(BatchStepError::Fatal(error)) => return Err(error.into()),
                _ => {}
            }
        }
        result?;
        while may_send && self.deadline_passed_at.is_none() && self.may_plan(upstream) {
            let Some(index) = self.plan_part(upstream)? else {
                break;
            };
            self.submit(index, may_send).await?;
        }
        Ok(())
    }

    fn may_plan(&self, upstream: usize) -> bool {
        let upstream = &self.upstreams[upstream];
        !upstream.is_stopped()
            && upstream.not_before <= Instant::now()
            && !upstream.waiting.is_empty()
    }

    /// Returns the indices of the upstream's parts that have not ended.
    fn parts_of(&self, upstream: usize) -> Vec<usize> {
        let parts = self.journal.parts.iter().enumerate();
        let unfinished =
            parts.filter(|(_, part)| !part.is_done() && part.progress.upstream == Some(upstream));
        unfinished.map(|(index, _)| index).collect()
    }

    /// Handles a failed call to the endpoint: the upstream pauses or stops.
    fn step_failed(&mut self, upstream: usize, error: AttemptError) {
        let (pause, message) = self.upstreams[upstream].call_failed(error, &self.settings.retry);
        if pause >= SHORTEST_SHOWN_WAIT {
            let pause = format_duration(pause);
            self.progress.note(&format!("waiting {pause}: {message}"));
        }
    }

    /// Returns the reason why the main loop ends; None while parts or waiting rows remain.
    fn run_end(&self) -> Option<BatchRunEnd> {
        let running = || {
            let upstreams = self.upstreams.iter();
            upstreams.filter(|upstream| !upstream.is_stopped())
        };
        let has_parts = running().any(|upstream| !self.parts_of(upstream.index).is_empty());
        if let Some(since) = self.deadline_passed_at {
            let has_timed_out = since.elapsed() >= MAX_CANCEL_TIME;
            return (!has_parts || has_timed_out).then_some(BatchRunEnd::Deadline);
        }
        let has_waiting_rows = running().any(|upstream| !upstream.waiting.is_empty());
        (!has_parts && !has_waiting_rows).then_some(BatchRunEnd::AllDone)
    }

    /// Returns the time of the next iteration of the main loop.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let upstreams = self
            .upstreams
            .iter()
            .filter(|upstream| !upstream.is_stopped());
        let times = upstreams.map(|upstream| {
            let parts = self.parts_of(upstream.index).into_iter();
            let parts = parts.filter_map(|index| self.journal.parts[index].progress.not_before);
            let next = parts
                .filter(|not_before| *not_before > now)
                .chain([upstream.next_poll])
                .min()
                .unwrap_or(now);
            if upstream.not_before > now {
                next.max(upstream.not_before)
            } else {
                next
            }
        });
        let earliest = now + Duration::from_millis(10);
        times
            .min()
            .unwrap_or(now)
            .clamp(earliest, now + CLOCK_CHECK_INTERVAL)
    }

    /// Records a row as failed.
    fn fail(&mut self, upstream: usize, entry: QueuedRow, failure: RowFailure) {
        let row = FailedRow::new(&self.plan, upstream, entry, failure);
        self.summary.fail(row);
    }

    fn finish(mut self, ended: BatchRunEnd) -> Result<BatchOutcome> {
        self.cache.sync()?;
        let prices = self
            .upstreams
            .iter()
            .map(|upstream| &upstream.settings.price);
        self.run_files.summarise(prices, &mut self.summary);
        let count_by_status = self.parts_under_way();
        let under_way: u64 = count_by_status.values().sum();
        for (status, count) in count_by_status {
            *self.counts.parts.entry(status).or_default() += count;
        }
        self.summary.batches = Some(self.counts.clone());
        if matches!(ended, BatchRunEnd::Deadline) {
            return self.into_remaining_rows();
        }
        self.run_files.close(&mut [], 0)?;
        let ignored_rows_error = self.ignored_rows_error();
        let mut summary = self.summary;
        summary.pending = summary.total - summary.done();
        let max_attempts = self.settings.retry.max_attempts;
        summary.given_up = self.run_files.given_up(&summary.failed_rows, max_attempts);
        summary.seconds = self.started.elapsed().as_secs_f64();
        let upstream_error = self
            .upstreams
            .iter_mut()
            .find_map(BatchUpstream::take_error);
        summary.error = match ended {
            BatchRunEnd::Signal(number) => {
                let advice = match under_way {
                    0 => "every answer is recorded; rerun the command to resume".into(),
                    1 => {
                        "1 batch continues at the endpoint; rerun the command to collect it".into()
                    }
                    count => format!(
                        "{count} batches continue at the endpoint; rerun the command to collect them"
                    ),
                };
                Some(anyhow::Error::from(Exit::Signal(number)).context(advice))
            }
            _ => upstream_error
                .or(ignored_rows_error)
                .or(summary.failed_rows_error(&self.settings.run_dir)),
        };
        crate::report::write(&mut summary, &self.settings.run_dir)?;
        Ok(BatchOutcome::Finished(Box::new(summary)))
    }

    fn into_remaining_rows(self) -> Result<BatchOutcome> {
        let failed = self.summary.failed_rows.iter().map(|row| row.key.clone());
        let mut excluded_keys: HashSet<String> = failed.collect();
        let mut uncancelled_batches = 0;
        for part in self.journal.parts.iter().filter(|part| !part.is_done()) {
            uncancelled_batches += 1;
            let members = self.journal.members(&part.nonce)?;
            excluded_keys.extend(members.into_iter().map(|member| member.key));
        }
        Ok(BatchOutcome::Remaining(Box::new(RemainingRows {
            prompts: self.plan.prompts,
            excluded_keys,
            uncancelled_batches,
            summary: self.summary,
            run_files: self.run_files,
            started: self.started,
        })))
    }
}
