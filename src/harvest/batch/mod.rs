//! Batch mode: rows go to the endpoint as files, and come back within a day for half the price.
//!
//! ```text
//! rows --parts: how many fit--> part (journal) --submit: upload, create or adopt--> batch
//!   --collect: poll, both files row by row, results--> cache | a later part | failed
//! ```
//!
//! One loop moves every part as far as it goes, then sleeps until the next look. What has been done
//! is in the `journal` before the next step begins, so the loop can be dropped at any await: by a
//! signal, which leaves the batches to go on at the endpoint, or by a kill. `api` is the way to the
//! endpoint (`http`, or a test's own), and what it says; `outlook` is for a dry run.

pub(crate) mod braces;
pub(crate) mod closing;
pub(crate) mod collect;
pub(crate) mod download;
pub(crate) mod failed;
pub(crate) mod journal;
pub(crate) mod outlook;
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
use crate::config::Config;
use crate::exit::Exit;
use crate::harvest::run_files::RunFiles;
use crate::harvest::unreadable_bodies::UnreadableBodies;
use crate::harvest::window::{RequestWindow, WindowState as Time};
use crate::plan::Plan;
use crate::plan::queue::QueuedRow;
use crate::prompt::Prompt;
use crate::report::failures::FailedRow;
use crate::report::summary::HarvestSummary;
use crate::signal::Signals;
use crate::terminal::format_duration;
use crate::terminal::progress::Progress;
use journal::BatchJournal;
use upstream::BatchUpstream;

/// A wait that is worth telling.
const LONG_WAIT: Duration = Duration::from_secs(5);

/// The wall clock is looked at so often: a window opens, a deadline comes.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(60);

/// How long a batch may take to be cancelled; endpoints speak of ten minutes.
const LONGEST_CANCEL: Duration = Duration::from_secs(1_200);

pub(crate) struct Batches<'a> {
    config: &'a Config,
    plan: Plan,
    cache: &'a Cache,
    upstreams: Vec<BatchUpstream>,
    journal: BatchJournal,
    books: RunFiles,
    unreadable: UnreadableBodies,
    schedule: RequestWindow,
    clock: WallClock,
    summary: HarvestSummary,
    tally: BatchCounts,
    started: Instant,
    /// Since when the deadline has passed.
    over: Option<Instant>,
    progress: Progress,
}

/// What is left when batches have had their time.
pub(crate) enum BatchOutcome {
    Finished(Box<HarvestSummary>),
    /// The deadline came first: the rest is for real time.
    Rest(Box<RemainingRows>),
}

pub(crate) struct RemainingRows {
    pub prompts: Vec<Prompt>,
    /// Keys of rows that have failed, and of those in batches that would not be cancelled.
    pub not_to_ask: HashSet<String>,
    /// Batches that would not be cancelled.
    pub under_way: usize,
    pub summary: HarvestSummary,
    pub books: RunFiles,
    pub started: Instant,
}

enum BatchRunEnd {
    AllDone,
    Deadline,
    Signal(u8),
}

/// Why a step was not done.
enum BatchStepError {
    /// The endpoint is in the way; the step comes again.
    Trouble(AttemptError),
    /// Nothing can go on.
    Fatal(anyhow::Error),
}

impl From<AttemptError> for BatchStepError {
    fn from(trouble: AttemptError) -> BatchStepError {
        BatchStepError::Trouble(trouble)
    }
}

impl From<anyhow::Error> for BatchStepError {
    fn from(error: anyhow::Error) -> BatchStepError {
        BatchStepError::Fatal(error)
    }
}

impl<'a> Batches<'a> {
    /// `config` has the prices of a batch.
    pub(crate) fn new(
        config: &'a Config,
        plan: Plan,
        cache: &'a Cache,
        transports: &[Arc<dyn Transport>],
        books: RunFiles,
        clock: WallClock,
        quiet: bool,
    ) -> Result<Self> {
        let upstreams = transports.iter().enumerate().map(|(index, transport)| {
            BatchUpstream::new(&plan, index, Arc::clone(transport), config)
        });
        Ok(Self {
            upstreams: upstreams.collect(),
            journal: BatchJournal::load(&config.run_dir)?,
            schedule: RequestWindow::new(&config.schedule, clock.now())?,
            summary: HarvestSummary {
                arguments: config.arguments(),
                before_training: crate::plan::prepare::before_training(config),
                ..HarvestSummary::from_plan(&plan, &books.unanswered)
            },
            tally: BatchCounts::default(),
            started: Instant::now(),
            over: None,
            progress: Progress::new("harvest", plan.total, quiet),
            unreadable: UnreadableBodies::new(&config.run_dir),
            config,
            plan,
            cache,
            books,
            clock,
        })
    }

    /// Runs until every row has ended, until the deadline, or until something stops it.
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

    async fn work(&mut self) -> Result<BatchRunEnd> {
        loop {
            self.summary.turns += 1;
            let time = self.schedule.state(self.clock.now());
            if time == Time::Over && self.over.is_none() {
                self.over = Some(Instant::now());
                self.progress
                    .note("the deadline has come: batches under way are cancelled");
            }
            for upstream in 0..self.upstreams.len() {
                match self.advance(upstream, time == Time::Open).await {
                    Ok(()) => {}
                    Err(BatchStepError::Fatal(error)) => return Err(error),
                    Err(BatchStepError::Trouble(trouble)) => self.step_failed(upstream, trouble),
                }
            }
            self.cache.check()?;
            self.books.account.tick()?;
            self.show();
            if let Some(ended) = self.end() {
                return Ok(ended);
            }
            sleep_until(self.wake()).await;
        }
    }

    /// Moves every part of a upstream as far as it goes.
    async fn advance(&mut self, upstream: usize, may_send: bool) -> Result<(), BatchStepError> {
        let now = Instant::now();
        if self.upstreams[upstream].is_stopped() || self.upstreams[upstream].not_before > now {
            return Ok(());
        }
        let is_due = self.upstreams[upstream].next_poll <= now;
        if is_due {
            let jitter = 0.75 + fastrand::f64() / 2.0;
            let pause = Duration::from_secs_f64(self.config.batch.poll_s * jitter);
            self.upstreams[upstream].next_poll = now + pause;
        }
        // One part's trouble keeps no other from going on.
        let mut halt: Result<(), BatchStepError> = Ok(());
        for index in self.parts_of(upstream) {
            let step = match self.journal.parts[index].batch().is_some() {
                true if is_due => self.poll(index).await,
                true => Ok(()),
                // The window is for what leaves; what may be a batch already is found out at once.
                false => self.submit(index, may_send).await,
            };
            match step {
                Err(BatchStepError::Trouble(trouble)) if halt.is_ok() => halt = Err(trouble.into()),
                Err(BatchStepError::Fatal(error)) => return Err(error.into()),
                _ => {}
            }
        }
        halt?;
        while may_send && self.over.is_none() && self.may_plan(upstream) {
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

    /// Its parts that have not ended.
    fn parts_of(&self, upstream: usize) -> Vec<usize> {
        let parts = self.journal.parts.iter().enumerate();
        let own = parts.filter(|(_, part)| !part.is_done() && part.live.upstream == Some(upstream));
        own.map(|(index, _)| index).collect()
    }

    fn step_failed(&mut self, upstream: usize, trouble: AttemptError) {
        let (pause, message) = self.upstreams[upstream].call_failed(trouble, &self.config.retry);
        if pause >= LONG_WAIT {
            let pause = format_duration(pause);
            self.progress
                .note(&format!("waiting {pause}: the endpoint says {message}"));
        }
    }

    /// Is there nothing left to wait for?
    fn end(&self) -> Option<BatchRunEnd> {
        let open = |upstream: &&BatchUpstream| !upstream.is_stopped();
        let is_under_way = |upstream: &BatchUpstream| !self.parts_of(upstream.index).is_empty();
        let under_way = self.upstreams.iter().filter(open).any(is_under_way);
        if let Some(since) = self.over {
            let is_enough = since.elapsed() >= LONGEST_CANCEL;
            return (!under_way || is_enough).then_some(BatchRunEnd::Deadline);
        }
        let waiting = self
            .upstreams
            .iter()
            .filter(open)
            .any(|upstream| !upstream.waiting.is_empty());
        (!under_way && !waiting).then_some(BatchRunEnd::AllDone)
    }

    /// When there is something to do again, at the latest.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let upstreams = self
            .upstreams
            .iter()
            .filter(|upstream| !upstream.is_stopped());
        let times = upstreams.map(|upstream| {
            let parts = self.parts_of(upstream.index).into_iter();
            let parts = parts.filter_map(|index| self.journal.parts[index].live.not_before);
            let next = parts
                .filter(|at| *at > now)
                .chain([upstream.next_poll])
                .min()
                .unwrap_or(now);
            match upstream.not_before > now {
                true => next.max(upstream.not_before),
                false => next,
            }
        });
        let least = now + Duration::from_millis(10);
        times.min().unwrap_or(now).clamp(least, now + LOOK_AT_CLOCK)
    }

    /// The row ends without an answer.
    fn fail(&mut self, upstream: usize, entry: QueuedRow, failure: RowFailure) {
        let row = FailedRow::new(&self.plan, upstream, entry, failure);
        self.summary.fail(row);
    }

    fn finish(mut self, ended: BatchRunEnd) -> Result<BatchOutcome> {
        self.cache.sync()?;
        self.books.summarise(self.is_priced(), &mut self.summary);
        let under_way = self.parts_under_way();
        let count: u64 = under_way.values().sum();
        for (status, count) in under_way {
            *self.tally.parts.entry(status).or_default() += count;
        }
        self.summary.batches = Some(self.tally.clone());
        if matches!(ended, BatchRunEnd::Deadline) {
            return self.leave_rest();
        }
        self.books.close(&mut [], 0)?;
        let mut summary = self.summary;
        summary.pending = summary.total - summary.done();
        let max_attempts = self.config.retry.max_attempts;
        summary.given_up = self.books.given_up(&summary.failed_rows, max_attempts);
        summary.seconds = self.started.elapsed().as_secs_f64();
        let of_a_lane = self
            .upstreams
            .iter_mut()
            .find_map(BatchUpstream::take_error);
        summary.error = match ended {
            BatchRunEnd::Signal(number) => {
                let advice = format!(
                    "{count} batches go on at the endpoint; rerun the command to collect them"
                );
                let advice = match count {
                    0 => "every answer is recorded; run the same command to resume".into(),
                    _ => advice,
                };
                Some(anyhow::Error::from(Exit::Signal(number)).context(advice))
            }
            _ => of_a_lane.or(summary.failed_rows_error(&self.config.run_dir)),
        };
        crate::report::write(&mut summary, &self.config.run_dir)?;
        Ok(BatchOutcome::Finished(Box::new(summary)))
    }

    fn leave_rest(self) -> Result<BatchOutcome> {
        let failed = self.summary.failed_rows.iter().map(|row| row.key.clone());
        let mut not_to_ask: HashSet<String> = failed.collect();
        let mut under_way = 0;
        for part in self.journal.parts.iter().filter(|part| !part.is_done()) {
            under_way += 1;
            let members = self.journal.members(&part.nonce)?;
            not_to_ask.extend(members.into_iter().map(|member| member.key));
        }
        Ok(BatchOutcome::Rest(Box::new(RemainingRows {
            prompts: self.plan.prompts,
            not_to_ask,
            under_way,
            summary: self.summary,
            books: self.books,
            started: self.started,
        })))
    }
}
