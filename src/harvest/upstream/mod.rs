//! One teacher in a run: its rows, its limits, its health.
//!
//! What a reply means for its row and for the run is decided here, by the reply (`retry`) and by what was
//! answered before (`health`). The first request goes alone: a wrong key, model or address costs one.
//! `refusals` holds what follows from a refusal.

pub(crate) mod refusals;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use crate::cache::usage::Usage;
use crate::client::attempt_error::RowFailure;
use crate::client::outcome;
use crate::client::transport::Transport;
use crate::config;
use crate::config::Config;
use crate::harvest::health::EndpointHealth;
use crate::harvest::run_error;
use crate::plan::queue::{QueuedRow, RowQueue};

use crate::harvest::answer_monitor::AnswerMonitor;
use crate::plan::Plan;
use crate::rate_limit::concurrency::ConcurrencyLimit;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::daily::DailyLimit;
use crate::rate_limit::headers::LimitReport;
use crate::rate_limit::pacer::Pacer;
use crate::rate_limit::redis::{LimiterEvent, SharedLimits};
use crate::rate_limit::send_ticket::SendTicket;
use crate::terminal::format_duration;

/// Failures after which an address at which nothing has ever answered is given up.
const FIRST_CONTACT_ATTEMPTS: u32 = 3;

/// The longest pause between the probes of an outage, as a multiple of `retry.max_s`.
const OUTAGE_PAUSE_FACTOR: f64 = 5.0;

/// If no more rows than these are left, they may be the rows that always fail.
const LAST_ROWS: usize = 50;

/// Time in which all of them are tried once, and the part of `retry.max_outage_s` that it is at most.
const LAST_ROWS_WITHIN: Duration = Duration::from_secs(60);
const LAST_ROWS_OUTAGE_FRACTION: f64 = 0.25;

/// Time between two notes about the requests of the day.
const DAILY_LIMIT_NOTICE_INTERVAL: Duration = Duration::from_secs(3_600);

/// For how long the first request goes alone, where it is not answered. With a budget there is no such
/// bound: its answer shows whether the endpoint keeps to `max_tokens`.
const FIRST_REQUEST_ALONE: Duration = Duration::from_secs(10);

pub(crate) struct Upstream {
    pub settings: config::EndpointConfig,
    pub transport: Arc<dyn Transport>,
    pub limiter: Pacer,
    pub queue: RowQueue,
    health: EndpointHealth,
    concurrency: ConcurrencyLimit,
    retry: config::RetryConfig,
    in_flight: usize,
    /// When the request left that alone finds out whether the endpoint is back.
    probe: Option<Instant>,
    /// When the request left that goes before all others.
    first: Option<Instant>,
    /// Rows of it have been answered in earlier runs.
    is_known: bool,
    /// Some of its rows failed in an earlier run, or were the last ones there.
    has_suspects: bool,
    has_budget: bool,
    /// Monitors the usefulness of its answers.
    pub monitor: AnswerMonitor,
    /// Why nothing more is sent to it; the other upstreams go on.
    stopped: Option<anyhow::Error>,
    /// When the user was last told that the requests of the day are used up.
    daily_limit_noted_at: Option<Instant>,
}

/// The rows of a upstream, those last that an earlier run has failed at.
fn queue(plan: &Plan, index: usize, now: Instant) -> RowQueue {
    let rows = plan.rows_by_endpoint[index].clone();
    let first_suspect = rows.end - plan.suspects[index];
    let mut queue = RowQueue::new(rows.start..first_suspect);
    for row in first_suspect..rows.end {
        let entry = QueuedRow {
            claimed: 1,
            ..QueuedRow::fresh(row)
        };
        queue.delay(entry, now);
    }
    queue
}

/// What a failed attempt leads to.
pub(crate) enum RetryDecision {
    /// The row is in the queue again; it, or the whole upstream, waits this long.
    Again { pause: Duration },
    /// The row ends without an answer.
    Failed(QueuedRow, RowFailure),
    /// The endpoint is there again only after this long; the row is in the queue again.
    LongWait(Duration),
}

impl RetryDecision {
    /// The row is in the queue again.
    const AGAIN: RetryDecision = RetryDecision::Again {
        pause: Duration::ZERO,
    };
}

impl Upstream {
    pub(crate) fn new(
        plan: &Plan,
        index: usize,
        transport: Arc<dyn Transport>,
        day: DailyLimit,
        shared: Option<SharedLimits>,
        config: &Config,
    ) -> Result<Upstream> {
        let settings = plan.templates[index].endpoint.clone();
        let now = Instant::now();
        let concurrency = settings.limits.concurrency;
        Ok(Upstream {
            limiter: Pacer::new(&settings.limits, plan.largest(index), day, shared)?,
            queue: queue(plan, index, now),
            health: EndpointHealth::new(now),
            concurrency: ConcurrencyLimit::new(concurrency),
            retry: config.retry.clone(),
            in_flight: 0,
            probe: None,
            first: None,
            is_known: plan.answered[index] > 0,
            has_suspects: plan.suspects[index] > 0,
            has_budget: config.budget.usd.is_some(),
            monitor: AnswerMonitor::from_config(&settings, config),
            stopped: None,
            daily_limit_noted_at: None,
            settings,
            transport,
        })
    }

    /// Goes on with the rows of another plan.
    ///
    /// # Errors
    /// Where a request could never leave.
    pub(crate) fn resume_with(&mut self, plan: &Plan, index: usize) -> Result<()> {
        self.limiter.allow_request_of(plan.largest(index))?;
        self.queue = queue(plan, index, Instant::now());
        (self.in_flight, self.probe, self.first) = (0, None, None);
        Ok(())
    }

    /// Nothing more is to be sent.
    pub(crate) fn is_done(&self) -> bool {
        self.queue.is_empty() || self.stopped.is_some()
    }

    /// Is there room for one more request? After a closed gate, in an outage and before the first answer,
    /// for one alone. If not, the instant at which there may be (None: not before a reply).
    pub(crate) fn free_slots(&self) -> Result<(), Option<Instant>> {
        if self.is_probing() {
            return if self.probe.is_none() {
                Ok(())
            } else {
                Err(None)
            };
        }
        let now = Instant::now();
        if let Some(first) = self.first.filter(|_| !self.health.is_proven()) {
            if self.has_budget {
                return Err(None);
            }
            if now < first + FIRST_REQUEST_ALONE {
                return Err(Some(first + FIRST_REQUEST_ALONE));
            }
        }
        let must_drain = self.health.is_forbidding() && self.in_flight > 0;
        if !must_drain && self.in_flight < self.concurrency.free_slots() {
            Ok(())
        } else {
            Err(None)
        }
    }

    /// The row to send next, or when there may be one.
    pub(crate) fn next_row(&self) -> Result<QueuedRow, Option<Instant>> {
        let now = Instant::now();
        if self.is_probing() || !self.health.has_succeeded() || self.health.is_in_doubt() {
            // One that has not failed since shows whether it is the endpoint.
            let is_failing = |row| self.health.is_failing(row);
            let is_far = self.health.is_in_doubt();
            self.queue.peek_least_suspect(now, is_failing, is_far)
        } else {
            self.queue.peek(now)
        }
    }

    fn is_probing(&self) -> bool {
        self.health.is_outage() || self.limiter.is_half_open()
    }

    /// Lets a request out, or says when to ask again.
    pub(crate) fn admit(&mut self, cost: RequestCost) -> Result<SendTicket, Instant> {
        let slots = if self.is_probing() || !self.health.is_proven() {
            1
        } else {
            self.concurrency.free_slots().saturating_sub(self.in_flight)
        };
        self.limiter.admit(cost, slots.min(self.queue.len()))
    }

    /// Limit of requests a day and the wait for the next one, where the user is to be told of it now.
    pub(crate) fn daily_limit_notice(&mut self) -> Option<(u64, Duration)> {
        let now = Instant::now();
        let (limit, until) = self.limiter.day.used_up(now)?;
        if self
            .daily_limit_noted_at
            .is_some_and(|noted_at| now < noted_at + DAILY_LIMIT_NOTICE_INTERVAL)
        {
            return None;
        }
        self.daily_limit_noted_at = Some(now);
        Some((limit, until - now))
    }

    /// Returns true if there is something to send, and the requests of the day are not used up.
    pub(crate) fn may_send(&self) -> bool {
        !self.is_done() && self.limiter.day.used_up(Instant::now()).is_none()
    }

    /// What the user is to know of the limits that are shared.
    pub(crate) fn poll_limiter_event(&mut self) -> Option<String> {
        match self.limiter.poll_event()? {
            LimiterEvent::Silent(reason) => Some(format!(
                "waiting: nothing leaves while the limits that are shared cannot be asked for \
                 ({reason})"
            )),
            LimiterEvent::Back(silence) => {
                self.health.exclude_wait(silence);
                let silence = format_duration(silence);
                Some(format!(
                    "the limits that are shared can be asked for again, after {silence}"
                ))
            }
            LimiterEvent::Over(silence, reason) => {
                self.stop(run_error::no_shared_limits(silence, &reason));
                None
            }
        }
    }

    pub(crate) fn request_sent(&mut self, ticket: &SendTicket) {
        self.in_flight += 1;
        if !self.health.is_proven() {
            self.first.get_or_insert(ticket.at);
        }
        if self.is_probing() {
            self.probe = Some(ticket.at);
        }
    }

    /// A reply, or the lack of one, has come.
    pub(crate) fn reply_received(&mut self, ticket: &SendTicket, reports: &[LimitReport]) {
        self.in_flight -= 1;
        if self.probe == Some(ticket.at) {
            self.probe = None;
        }
        if self.first == Some(ticket.at) {
            self.first = None;
        }
        if self.limiter.update_from_headers(reports, ticket) {
            self.concurrency.follow_limits();
        }
    }

    pub(crate) fn answered(
        &mut self,
        ticket: &SendTicket,
        reports: &[LimitReport],
        usage: Option<&Usage>,
    ) {
        let now = Instant::now();
        self.health.success(ticket.at, now);
        if self.settings.limits.adapt {
            let is_full = self.in_flight + 1 >= self.concurrency.free_slots();
            self.concurrency.answered(ticket.at, now, is_full);
        }
        let used = usage.map(|usage| RequestCost {
            input_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
        });
        self.limiter.answered(reports, ticket, used);
    }

    /// Rows that the next run tries last, though they have not failed: see [`Health::suspects`].
    pub(crate) fn suspects(&self) -> Vec<usize> {
        self.health.suspects().collect()
    }

    /// Has anything been answered in this run?
    pub(crate) fn has_succeeded(&self) -> bool {
        self.health.has_succeeded()
    }

    /// The content of the row is refused: the endpoint is in order.
    pub(crate) fn filtered(&mut self, ticket: &SendTicket) {
        self.health.success(ticket.at, Instant::now());
        self.limiter.answered(&[], ticket, None);
    }

    /// The row is to be asked again with a new key, at once.
    pub(crate) fn key_renewed(&mut self, entry: QueuedRow) {
        self.queue.delay(entry, Instant::now());
    }

    /// The attempt failed in a way that may pass.
    pub(crate) fn transient(
        &mut self,
        mut entry: QueuedRow,
        failure: RowFailure,
        wait: Duration,
    ) -> RetryDecision {
        let now = Instant::now();
        // A server cannot know that an error lasts for hours: a longer wait is ignored.
        let wait = if wait > LONGEST_WAIT {
            Duration::ZERO
        } else {
            wait
        };
        self.health
            .failure(entry.row, failure.unreachable, self.in_flight + 1, now);
        // Itself, what waits, and what is on its way.
        let remaining = 1 + self.queue.len() + self.in_flight;
        let is_in_order = self.health.has_succeeded() || self.is_known;
        let is_the_rows = is_in_order && !self.health.has_others(remaining);
        if self.health.is_outage() && !self.health.never_answered() && !is_the_rows {
            // No row is to blame: it costs no attempt, and one probe at a time goes out.
            let mut pause = self.firm_pause(self.health.probes(), OUTAGE_PAUSE_FACTOR);
            if is_in_order && remaining <= LAST_ROWS && failure.may_be_row_specific() {
                pause = pause.min(self.pause_of_last(remaining));
            }
            let pause = pause.max(wait);
            let was_open = self.limiter.close_until(now + pause);
            self.queue.delay(entry, now + wait);
            self.stop_if_hopeless(&failure);
            return RetryDecision::Again {
                pause: if was_open { pause } else { Duration::ZERO },
            };
        }
        entry.failed += 1;
        let max_attempts = self.retry.max_attempts;
        let contacts = self.health.failures() as u32;
        if self.health.never_answered() && contacts >= FIRST_CONTACT_ATTEMPTS.min(max_attempts) {
            self.stop(run_error::nothing_answers(
                &self.settings.teacher,
                &failure.message,
            ));
        } else if entry.failed >= max_attempts {
            if is_the_rows || !self.health.may_be_the_endpoint(entry.failed, remaining) {
                return RetryDecision::Failed(entry, failure);
            }
            // Half of its attempts come back: once the endpoint is in order again, one more accident
            // must not end the row.
            entry.failed = (entry.failed - 1).min(max_attempts.div_ceil(2));
        }
        let pause = outcome::backoff(entry.failed, &self.retry, fastrand::f64()).max(wait);
        self.queue.delay(entry, now + pause);
        if !self.health.has_succeeded() && !is_the_rows {
            // The first requests go one by one, and not one after the other at once.
            let pause = self.firm_pause(contacts, 1.0);
            self.limiter.close_until(now + pause);
        }
        self.stop_if_hopeless(&failure);
        let holds_up = self.in_flight == 0 && self.queue.peek(now).is_err();
        RetryDecision::Again {
            pause: if holds_up { wait } else { Duration::ZERO },
        }
    }

    /// The longest pause between the last rows in an outage, so that all of them are tried soon.
    fn pause_of_last(&self, remaining: usize) -> Duration {
        let part = Duration::try_from_secs_f64(self.retry.max_outage_s * LAST_ROWS_OUTAGE_FRACTION);
        let within = part.unwrap_or(LAST_ROWS_WITHIN).min(LAST_ROWS_WITHIN);
        within / remaining.max(1) as u32
    }

    /// The row has ended without an answer.
    pub(crate) fn row_given_up(&mut self, row: usize) {
        self.health.gave_up(row);
    }

    /// Sends nothing more to this endpoint; its rows stay pending.
    pub(crate) fn stop(&mut self, error: anyhow::Error) {
        self.stopped.get_or_insert(error);
    }

    pub(crate) fn take_error(&mut self) -> Option<anyhow::Error> {
        self.stopped.take()
    }

    /// A pause for everybody, at least half of which is certain.
    fn firm_pause(&self, attempt: u32, stretch: f64) -> Duration {
        let retry = config::RetryConfig {
            max_s: self.retry.max_s * stretch,
            ..self.retry.clone()
        };
        outcome::backoff(attempt, &retry, 0.5 + fastrand::f64() / 2.0)
    }

    /// Stops where the server fails at everything alike, and after a long silence.
    fn stop_if_hopeless(&mut self, failure: &RowFailure) {
        // A server that is starting up, or overloaded, has statuses of its own.
        let is_error = failure.class == "http 500" && !failure.is_bodyless && !self.is_known;
        if is_error && self.health.failed_alike(&failure.message) {
            self.stop(run_error::failed_alike(&failure.message));
        }
        self.stop_after_outage(&failure.message);
    }

    /// Judged when something has failed and not by a timer, so that a wait that the endpoint asked
    /// for is waited to its end.
    fn stop_after_outage(&mut self, message: &str) {
        let silence = self.health.time_without_success(Instant::now());
        if silence.as_secs_f64() >= self.retry.max_outage_s {
            self.stop(run_error::outage(silence, message));
        }
    }

    /// Is the endpoint out of order, or has it asked for a pause?
    pub(crate) fn is_waiting(&self) -> bool {
        self.health.is_outage() || self.limiter.is_closed(Instant::now())
    }
}

/// A wait that is longer is not sat out: the run ends, and says until when.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(3_600);
