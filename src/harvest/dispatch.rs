//! The one task that decides what is sent, and what becomes of the replies.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::failures::{self, FailedRow};
use super::health::Health;
use super::limiter::Limiter;
use super::plan::Plan;
use super::progress::Rates;
use super::queue::{Entry, Queue};
use super::record::record;
use super::retry::{self, Failure, Outcome};
use super::summary::{SUMMARY_VERSION, Summary};
use super::teacher::{self, Teacher};
use super::wire::Completion;
use crate::cache::Cache;
use crate::cache::record::{Record, Status, Timing};
use crate::config::Config;
use crate::exit::Exit;
use crate::signal::Signals;
use crate::terminal::{Progress, format_duration};

/// Attempts of one row after which an address at which nothing has ever answered is given up.
const FIRST_CONTACT_ATTEMPTS: u32 = 3;

/// A wait that is worth telling.
const LONG_WAIT: Duration = Duration::from_secs(5);

/// What a request task brings back.
struct Finished {
    entry: Entry,
    body: Value,
    outcome: Outcome,
    timing: Timing,
}

pub struct Dispatcher<'a> {
    config: &'a Config,
    plan: &'a Plan,
    cache: &'a Cache,
    teacher: Arc<Teacher>,
    limiter: Limiter,
    queue: Queue,
    health: Health,
    in_flight: JoinSet<Finished>,
    failed: Vec<FailedRow>,
    summary: Summary,
    /// Why nothing is sent any more; what is in flight is still waited for.
    stop: Option<anyhow::Error>,
    /// A signal has come: the next one stops at once.
    signalled: bool,
    started: Instant,
    rates: Rates,
    progress: Progress,
}

impl<'a> Dispatcher<'a> {
    pub fn new(
        config: &'a Config,
        plan: &'a Plan,
        cache: &'a Cache,
        teacher: Teacher,
        quiet: bool,
    ) -> Result<Self> {
        let now = Instant::now();
        let summary = Summary {
            version: SUMMARY_VERSION,
            total: plan.total,
            cached: plan.cached,
            ..Summary::default()
        };
        Ok(Self {
            config,
            plan,
            cache,
            teacher: Arc::new(teacher),
            limiter: Limiter::new(&config.limits, plan.largest())?,
            queue: Queue::new(plan.rows.len()),
            health: Health::new(config.limits.concurrency, now),
            in_flight: JoinSet::new(),
            failed: Vec::new(),
            stop: None,
            signalled: false,
            started: now,
            rates: Rates::new(now, &summary),
            progress: Progress::new("harvest", plan.total, quiet),
            summary,
        })
    }

    /// Runs until every row has ended, or until something stops it and what was in flight is
    /// recorded.
    pub async fn run(mut self, mut signals: Signals) -> Result<Summary> {
        let mut seconds = interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            let wake = self.send_what_may_leave();
            if self.in_flight.is_empty() && (self.stop.is_some() || self.queue.is_empty()) {
                break;
            }
            tokio::select! {
                Some(number) = signals.next() => {
                    if self.signalled(number) {
                        break;
                    }
                }
                Some(finished) = self.in_flight.join_next() => {
                    self.settle(finished.context("a request task failed")?)?;
                }
                () = sleep_until(wake.unwrap_or(self.started)), if wake.is_some() => {}
                _ = seconds.tick() => self.show(),
            }
        }
        self.finish()
    }

    /// Starts requests until the queue, the concurrency or a limit says no. Returns when to try
    /// again; None: when something has come back.
    fn send_what_may_leave(&mut self) -> Option<Instant> {
        while self.stop.is_none() && self.in_flight.len() < self.health.room() {
            let entry = match self.queue.peek(Instant::now()) {
                Ok(entry) => entry,
                Err(wake) => return wake,
            };
            if let Err(until) = self.limiter.admit(self.plan.rows[entry.row].tokens) {
                return Some(until);
            }
            self.queue.take(entry);
            self.send(entry);
        }
        None
    }

    fn send(&mut self, entry: Entry) {
        self.summary.requests += 1;
        let row = &self.plan.rows[entry.row];
        let body = self.plan.body(self.config, row.prompt, row.sample);
        let teacher = Arc::clone(&self.teacher);
        self.in_flight.spawn(async move {
            let sent_at = jiff::Timestamp::now();
            let started = Instant::now();
            let result = teacher.ask(&body).await;
            let timing = Timing {
                sent_at: Timing::stamp(sent_at),
                latency_ms: started.elapsed().as_millis() as u64,
                attempts: entry.failed + 1,
            };
            // Here rather than in the dispatcher: top-k logprobs are megabytes of JSON a second.
            let outcome = retry::classify(result, SystemTime::now());
            Finished {
                entry,
                body,
                outcome,
                timing,
            }
        });
    }

    fn settle(&mut self, finished: Finished) -> Result<()> {
        let Finished {
            entry,
            body,
            outcome,
            timing,
        } = finished;
        match outcome {
            Outcome::Answer(completion) => self.record(entry, body, *completion, timing)?,
            Outcome::Refused(failure) => self.refused(entry, failure),
            Outcome::Throttled { wait, message } => self.throttled(entry, wait, &message),
            Outcome::Transient { failure, wait } => self.transient(entry, failure, wait),
            Outcome::Stop(reason, message) => {
                self.queue.delay(entry, Instant::now());
                let error = anyhow!(retry::advice(reason, &message, &self.config.teacher));
                self.stop.get_or_insert(error);
            }
        }
        Ok(())
    }

    fn record(
        &mut self,
        entry: Entry,
        body: Value,
        completion: Completion,
        timing: Timing,
    ) -> Result<()> {
        self.health.success(Instant::now());
        let row = &self.plan.rows[entry.row];
        let record = record(
            row,
            &self.plan.prompts[row.prompt],
            teacher::identity(&self.config.teacher),
            body,
            completion,
            timing,
            &self.config.price,
        );
        self.cache
            .append(&record)
            .context("an answer could not be recorded, so nothing more is asked")?;
        self.count(&record);
        Ok(())
    }

    fn count(&mut self, record: &Record) {
        let summary = &mut self.summary;
        match record.status {
            Status::Ok => summary.ok += 1,
            Status::Quarantined => {
                summary.quarantined += 1;
                *summary
                    .quarantines
                    .entry(record.reason.clone())
                    .or_default() += 1;
            }
        }
        if let Some(usage) = &record.usage {
            summary.prompt_tokens += usage.prompt_tokens;
            summary.completion_tokens += usage.completion_tokens;
        }
        if let Some(cost) = record.cost_usd {
            *summary.cost_usd.get_or_insert_default() += cost;
        }
        if record.logprobs.is_none() && self.config.sampling.top_logprobs > 0 {
            summary.without_logprobs += 1;
        }
    }

    /// The endpoint asks everybody to wait: the row costs no attempt, and the gate closes.
    fn throttled(&mut self, mut entry: Entry, wait: Option<Duration>, message: &str) {
        self.health.throttled();
        entry.throttled += 1;
        let wait = wait.unwrap_or_else(|| self.firm_pause(entry.throttled));
        self.close_gate(wait, message);
        self.queue.delay(entry, Instant::now());
        self.stop_after_long_silence(message);
    }

    fn transient(&mut self, mut entry: Entry, failure: Failure, wait: Duration) {
        self.health.failure(entry.row, failure.unreachable);
        if self.health.is_outage() && !self.health.never_answered() {
            // No row is to blame: it costs no attempt, and one probe at a time goes out.
            let pause = self.firm_pause(self.health.probes());
            self.close_gate(pause, &failure.message);
            self.queue.delay(entry, Instant::now() + wait);
            return self.stop_after_long_silence(&failure.message);
        }
        entry.failed += 1;
        let max_attempts = self.config.retry.max_attempts;
        if self.health.never_answered() && entry.failed >= FIRST_CONTACT_ATTEMPTS.min(max_attempts)
        {
            let url = &self.config.teacher.base_url;
            let error = anyhow!(
                "nothing answers at {url} ({}): check `teacher.base_url`, and that the endpoint \
                 is running",
                failure.message
            );
            self.stop.get_or_insert(error);
        } else if entry.failed >= max_attempts {
            return self.fail(entry, failure);
        }
        let pause = retry::backoff(entry.failed, &self.config.retry, fastrand::f64()).max(wait);
        self.queue.delay(entry, Instant::now() + pause);
        self.stop_after_long_silence(&failure.message);
    }

    fn refused(&mut self, mut entry: Entry, failure: Failure) {
        entry.failed += 1;
        if self.health.refused(&failure.message) {
            let error = anyhow!(
                "the endpoint refuses every request ({}): nothing more is asked; change what it \
                 names in `[sampling]` or `[teacher]` and run the same command",
                failure.message
            );
            self.stop.get_or_insert(error);
        }
        self.fail(entry, failure);
    }

    /// The row ends without an answer.
    fn fail(&mut self, entry: Entry, failure: Failure) {
        let row = &self.plan.rows[entry.row];
        self.summary.failed += 1;
        *self
            .summary
            .failures
            .entry(failure.class.clone())
            .or_default() += 1;
        self.failed.push(FailedRow {
            prompt_id: self.plan.prompts[row.prompt].id.clone(),
            sample: row.sample,
            key: row.key.clone(),
            class: failure.class,
            message: failure.message,
            attempts: entry.failed,
        });
    }

    /// A pause for everybody, at least half of which is certain.
    fn firm_pause(&self, attempt: u32) -> Duration {
        retry::backoff(attempt, &self.config.retry, 0.5 + fastrand::f64() / 2.0)
    }

    fn close_gate(&mut self, wait: Duration, message: &str) {
        let was_open = self.limiter.close_until(Instant::now() + wait);
        // Everything in flight may say the same; once is enough.
        if was_open && wait >= LONG_WAIT {
            let wait = format_duration(wait);
            self.progress
                .note(&format!("waiting {wait}: the endpoint says {message}"));
        }
    }

    /// Judged when something has failed and not by a timer, so that a wait that the endpoint asked
    /// for is waited to its end.
    fn stop_after_long_silence(&mut self, message: &str) {
        let silence = self.health.silence(Instant::now());
        if silence.as_secs_f64() >= self.config.retry.max_outage_s {
            let silence = format_duration(silence);
            let message = format!(
                "nothing has succeeded for {silence} ({message}): stopped; run the same command \
                 to go on"
            );
            self.stop.get_or_insert(Exit::Resumable(message).into());
        }
    }

    /// True for the second signal.
    fn signalled(&mut self, number: u8) -> bool {
        let is_second = std::mem::replace(&mut self.signalled, true);
        let in_flight = self.in_flight.len();
        if is_second {
            self.progress.note(&format!(
                "stopped; {in_flight} requests were in flight, and may be billed without an answer"
            ));
        } else {
            let error = anyhow::Error::from(Exit::Signal(number));
            let advice = "every answer is recorded, and the same command goes on";
            self.stop.get_or_insert(error.context(advice));
            self.progress.note(&format!(
                "waiting for the {in_flight} answers in flight; once more to stop at once"
            ));
        }
        is_second
    }

    fn show(&mut self) {
        self.rates.note(Instant::now(), &self.summary);
        let (rates, summary) = (&self.rates, &self.summary);
        self.progress.update(summary.done(), || rates.line(summary));
    }

    fn finish(mut self) -> Result<Summary> {
        self.cache.sync()?;
        failures::write(&self.config.run_dir, &self.failed)?;
        self.summary.pending = self.summary.total - self.summary.done();
        self.summary.seconds = self.started.elapsed().as_secs_f64();
        self.summary.error = self.stop.or_else(|| {
            (!self.failed.is_empty()).then(|| {
                let message = format!(
                    "{} of {} answers failed for good: see {}",
                    self.summary.failed,
                    self.summary.total,
                    failures::file(&self.config.run_dir).display()
                );
                Exit::SomeFailed(message).into()
            })
        });
        Ok(self.summary)
    }
}
