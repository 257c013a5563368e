//! Live state of one endpoint in a real-time run: its queue of rows, its limits and its health.
//!
//! | file | content |
//! |---|---|
//! | `mod` | admission of requests, transient failures, outages |
//! | `refusals` | decisions after a refusal: wait, try another row, fail the row or stop |
//!
//! A decision depends on the reply (`client::outcome`) and on earlier replies (`health`). The first request is sent
//! alone, so a wrong key, model or address costs one request. During an outage requests are sent one at a time, as
//! probes, and their failures do not count as attempts of the rows.

pub(crate) mod refusals;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use crate::cache::usage::Usage;
use crate::client::attempt_error::RowFailure;
use crate::client::transport::Transport;
use crate::config;
use crate::harvest::answer_monitor::AnswerMonitor;
use crate::harvest::backoff::backoff;
use crate::harvest::health::EndpointHealth;
use crate::harvest::run_error;
use crate::plan::Plan;
use crate::plan::queue::{QueuedRow, RowQueue};
use crate::plan::run_settings::RunSettings;
use crate::rate_limit::concurrency::ConcurrencyLimit;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::daily::DailyLimit;
use crate::rate_limit::headers::LimitReport;
use crate::rate_limit::pacer::Pacer;
use crate::rate_limit::redis::{LimiterEvent, SharedLimits};
use crate::rate_limit::send_ticket::SendTicket;
use crate::terminal::format_duration;

/// Longest requested wait that a run accepts. Repeated longer waits of a rate limit stop the endpoint, with the time to
/// resume in the error; longer waits after other errors are ignored.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// Number of failed requests after which an endpoint stops if its address has never replied.
const FIRST_CONTACT_ATTEMPTS: u32 = 3;

/// Longest pause between two probes of an outage, as a multiple of `retry.max_s`.
const OUTAGE_PAUSE_FACTOR: f64 = 5.0;

/// Maximum number of remaining rows at which all of them may be rows that always fail. In an outage such rows are tried
/// at shorter intervals.
const LAST_ROWS: usize = 50;

/// Maximum time in which each of the last rows is tried once during an outage.
const LAST_ROWS_TRIAL_TIME: Duration = Duration::from_secs(60);

/// Maximum of the same time as a fraction of `retry.max_outage_s`. The smaller maximum applies.
const LAST_ROWS_OUTAGE_FRACTION: f64 = 0.25;

/// Interval between two notices that the daily limit is used up.
const DAILY_LIMIT_NOTICE_INTERVAL: Duration = Duration::from_secs(3_600);

/// Maximum time that other requests wait for the reply to the first one. With a budget they wait without a limit,
/// because the first answer shows whether the endpoint respects `max_tokens`.
const FIRST_REQUEST_ALONE: Duration = Duration::from_secs(10);

/// Live state of an endpoint.
pub(crate) struct Upstream {
    pub settings: config::EndpointConfig,
    pub transport: Arc<dyn Transport>,
    pub limiter: Pacer,
    pub queue: RowQueue,
    health: EndpointHealth,
    concurrency: ConcurrencyLimit,
    retry: config::RetryConfig,
    in_flight: usize,
    /// Send time of the probe in flight during an outage.
    probe_sent_at: Option<Instant>,
    /// Send time of the first request, while it has no reply.
    first_sent_at: Option<Instant>,
    /// Rows of this endpoint were answered before this run.
    has_earlier_answers: bool,
    /// Rows of this endpoint have the status [`RowStatus::Suspect`](crate::plan::RowStatus::Suspect).
    has_suspects: bool,
    has_budget: bool,
    /// Detects answers that training cannot use.
    pub monitor: AnswerMonitor,
    /// Error that stopped this endpoint; other endpoints continue.
    stopped: Option<anyhow::Error>,
    /// Time of the last notice that the daily limit is used up.
    daily_limit_noted_at: Option<Instant>,
}

/// Builds the queue of an upstream; rows with the status [`RowStatus::Suspect`](crate::plan::RowStatus::Suspect) come
/// last.
fn build_queue(plan: &Plan, index: usize, now: Instant) -> RowQueue {
    let rows = plan.rows_by_endpoint[index].clone();
    let first_suspect = rows.end - plan.suspects[index];
    let mut queue = RowQueue::new(rows.start..first_suspect);
    for row in first_suspect..rows.end {
        let entry = QueuedRow {
            endpoint_refusals: 1,
            ..QueuedRow::fresh(row)
        };
        queue.delay(entry, now);
    }
    queue
}

/// Decision after a failed attempt.
pub(crate) enum RetryDecision {
    /// The row is back in the queue. `pause` is reported to the user as the time during which no row is sent; zero if
    /// there is nothing to report.
    Retry { pause: Duration },
    /// The row ends without an answer.
    Failed(QueuedRow, RowFailure),
    /// The endpoint asks for a wait longer than [`LONGEST_WAIT`]; the row is back in the queue.
    LongWait(Duration),
}

impl RetryDecision {
    /// The row is back in the queue, and no pause is reported.
    const RETRY: RetryDecision = RetryDecision::Retry {
        pause: Duration::ZERO,
    };
}

impl Upstream {
    pub(crate) fn new(
        plan: &Plan,
        index: usize,
        transport: Arc<dyn Transport>,
        daily_limit: DailyLimit,
        shared: Option<SharedLimits>,
        run: &RunSettings,
    ) -> Result<Upstream> {
        let settings = plan.templates[index].endpoint.clone();
        let now = Instant::now();
        let concurrency = settings.limits.concurrency;
        Ok(Upstream {
            limiter: Pacer::new(&settings.limits, plan.largest(index), daily_limit, shared)?,
            queue: build_queue(plan, index, now),
            health: EndpointHealth::new(now),
            concurrency: ConcurrencyLimit::new(concurrency),
            retry: run.retry.clone(),
            in_flight: 0,
            probe_sent_at: None,
            first_sent_at: None,
            has_earlier_answers: plan.answered[index] > 0,
            has_suspects: plan.suspects[index] > 0,
            has_budget: run.budget_usd.is_some(),
            monitor: AnswerMonitor::from_settings(&settings, run),
            stopped: None,
            daily_limit_noted_at: None,
            settings,
            transport,
        })
    }

    /// Replaces the queue by the rows of another plan. Keeps the limits and the health of the endpoint, except its
    /// failures since the last success.
    ///
    /// # Errors
    /// If a request exceeds a limit.
    pub(crate) fn resume_with(&mut self, plan: &Plan, index: usize) -> Result<()> {
        self.limiter.allow_request_of(plan.largest(index))?;
        let now = Instant::now();
        self.queue = build_queue(plan, index, now);
        self.health.begin_plan(now);
        self.has_suspects = plan.suspects[index] > 0;
        self.in_flight = 0;
        self.probe_sent_at = None;
        self.first_sent_at = None;
        Ok(())
    }

    /// Returns true if no row has to be sent, or the upstream is stopped.
    pub(crate) fn is_done(&self) -> bool {
        self.queue.is_empty() || self.stopped.is_some()
    }

    /// Checks that one more request may be in flight. At most one request is in flight during an outage, between a
    /// pause and the next answer, and before the first answer (without a budget, only for [`FIRST_REQUEST_ALONE`]).
    ///
    /// # Errors
    /// The time of the next check; None if a reply has to arrive first.
    pub(crate) fn check_free_slot(&self) -> Result<(), Option<Instant>> {
        if self.is_probing() {
            return if self.probe_sent_at.is_none() {
                Ok(())
            } else {
                Err(None)
            };
        }
        let now = Instant::now();
        if let Some(first) = self.first_sent_at.filter(|_| !self.health.is_proven()) {
            if self.has_budget {
                return Err(None);
            }
            if now < first + FIRST_REQUEST_ALONE {
                return Err(Some(first + FIRST_REQUEST_ALONE));
            }
        }
        let waits_for_replies = self.health.is_forbidding() && self.in_flight > 0;
        if !waits_for_replies && self.in_flight < self.concurrency.max_in_flight() {
            Ok(())
        } else {
            Err(None)
        }
    }

    /// Returns the row to send next.
    ///
    /// # Errors
    /// The time of the next check; None if a reply has to arrive first.
    pub(crate) fn next_row(&self) -> Result<QueuedRow, Option<Instant>> {
        let now = Instant::now();
        if self.is_probing() || !self.health.has_succeeded() || self.health.is_in_doubt() {
            // A row that has not failed yet shows whether the endpoint is failing.
            let is_failing = |row| self.health.is_failing(row);
            let from_middle = self.health.is_in_doubt();
            self.queue.peek_least_suspect(now, is_failing, from_middle)
        } else {
            self.queue.peek(now)
        }
    }

    fn is_probing(&self) -> bool {
        self.health.is_outage() || self.limiter.is_half_open()
    }

    /// Admits a request to the rate limits.
    ///
    /// # Errors
    /// The time of the next check.
    pub(crate) fn admit(&mut self, cost: RequestCost) -> Result<SendTicket, Instant> {
        let slots = if self.is_probing() || !self.health.is_proven() {
            1
        } else {
            self.concurrency
                .max_in_flight()
                .saturating_sub(self.in_flight)
        };
        self.limiter.admit(cost, slots.min(self.queue.len()))
    }

    /// Returns the daily limit and the wait for the next request, if a notice is due.
    pub(crate) fn daily_limit_notice(&mut self) -> Option<(u64, Duration)> {
        let now = Instant::now();
        let (limit, until) = self.limiter.daily_limit.used_up(now)?;
        if self
            .daily_limit_noted_at
            .is_some_and(|noted_at| now < noted_at + DAILY_LIMIT_NOTICE_INTERVAL)
        {
            return None;
        }
        self.daily_limit_noted_at = Some(now);
        Some((limit, until - now))
    }

    /// Returns true if rows have to be sent and the daily limit is not used up.
    pub(crate) fn may_send(&self) -> bool {
        !self.is_done() && self.limiter.daily_limit.used_up(Instant::now()).is_none()
    }

    /// Handles an event of the shared limits. Returns a notice for the user.
    pub(crate) fn poll_limiter_event(&mut self) -> Option<String> {
        match self.limiter.poll_event()? {
            LimiterEvent::Unavailable(reason) => Some(format!(
                "waiting: no request is sent while the shared limits cannot be read \
                 ({reason})"
            )),
            LimiterEvent::Recovered(outage) => {
                self.health.exclude_wait(outage);
                let outage = format_duration(outage);
                Some(format!(
                    "the shared limits can be read again, after {outage}"
                ))
            }
            LimiterEvent::OutageTooLong(outage, reason) => {
                self.stop(run_error::no_shared_limits(outage, &reason));
                None
            }
        }
    }

    /// Counts a request as in flight.
    pub(crate) fn request_sent(&mut self, ticket: &SendTicket) {
        self.in_flight += 1;
        if !self.health.is_proven() {
            self.first_sent_at.get_or_insert(ticket.sent_at);
        }
        if self.is_probing() {
            self.probe_sent_at = Some(ticket.sent_at);
        }
    }

    /// Counts the request of `ticket` as ended, with or without a reply, and updates the limits from the headers of the
    /// reply.
    pub(crate) fn reply_received(&mut self, ticket: &SendTicket, reports: &[LimitReport]) {
        self.in_flight -= 1;
        if self.probe_sent_at == Some(ticket.sent_at) {
            self.probe_sent_at = None;
        }
        if self.first_sent_at == Some(ticket.sent_at) {
            self.first_sent_at = None;
        }
        if self.limiter.update_from_headers(reports, ticket) {
            self.concurrency.follow_limits();
        }
    }

    /// Updates health, concurrency and limits after an answer.
    pub(crate) fn answered(
        &mut self,
        ticket: &SendTicket,
        reports: &[LimitReport],
        usage: Option<&Usage>,
    ) {
        let now = Instant::now();
        self.health.success(ticket.sent_at, now);
        if self.settings.limits.adapt {
            let is_full = self.in_flight + 1 >= self.concurrency.max_in_flight();
            self.concurrency.answered(ticket.sent_at, now, is_full);
        }
        let used = usage.map(|usage| RequestCost {
            input_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
        });
        self.limiter.answered(reports, ticket, used);
    }

    /// Returns the rows that the next run sends last; see [`EndpointHealth::suspects`].
    pub(crate) fn suspects(&self) -> Vec<usize> {
        self.health.suspects().collect()
    }

    /// Returns true if a request of this run was answered.
    pub(crate) fn has_succeeded(&self) -> bool {
        self.health.has_succeeded()
    }

    /// Counts a row that a content filter refused as a success of the endpoint.
    pub(crate) fn filtered(&mut self, ticket: &SendTicket) {
        self.health.success(ticket.sent_at, Instant::now());
        self.limiter.answered(&[], ticket, None);
    }

    /// Puts the row back in the queue, to be sent immediately with the renewed key.
    pub(crate) fn key_renewed(&mut self, entry: QueuedRow) {
        self.queue.delay(entry, Instant::now());
    }

    /// Decides after a transient failure.
    pub(crate) fn transient(
        &mut self,
        mut entry: QueuedRow,
        failure: RowFailure,
        wait: Duration,
    ) -> RetryDecision {
        let now = Instant::now();
        // After an error, servers only guess the wait: ignore a wait of hours.
        let wait = if wait > LONGEST_WAIT {
            Duration::ZERO
        } else {
            wait
        };
        let in_flight = self.in_flight + 1;
        self.health
            .failure(entry.row, failure.is_unreachable, in_flight, now);
        // This row, the rows in the queue, and the rows in flight.
        let remaining = 1 + self.queue.len() + self.in_flight;
        let has_ever_answered = self.health.has_succeeded() || self.has_earlier_answers;
        let rows_are_the_cause = has_ever_answered && !self.health.has_unfailed_rows(remaining);
        if self.health.is_outage() && !self.health.never_replied() && !rows_are_the_cause {
            // The endpoint is failing: the row keeps its attempts, and one probe at a time is sent.
            let mut pause = self.backoff_pause(self.health.probes(), OUTAGE_PAUSE_FACTOR);
            if has_ever_answered && remaining <= LAST_ROWS && failure.may_be_row_specific() {
                pause = pause.min(self.max_pause_between_last_rows(remaining));
            }
            let pause = pause.max(wait);
            let was_open = self.limiter.close_until(now + pause);
            self.queue.delay(entry, now + wait);
            self.stop_if_endpoint_is_down(&failure);
            return RetryDecision::Retry {
                pause: if was_open { pause } else { Duration::ZERO },
            };
        }
        entry.failed += 1;
        let max_attempts = self.retry.max_attempts;
        let failures = self.health.failures() as u32;
        if self.health.never_replied() && failures >= FIRST_CONTACT_ATTEMPTS.min(max_attempts) {
            self.stop(run_error::no_reply(
                &self.settings.teacher,
                &failure.message,
            ));
        } else if entry.failed >= max_attempts {
            if rows_are_the_cause || !self.health.may_be_endpoint_fault(entry.failed, remaining) {
                return RetryDecision::Failed(entry, failure);
            }
            // The row gets about half of its attempts back, so that one failure after the outage does not end it.
            entry.failed = (entry.failed - 1).min(max_attempts.div_ceil(2));
        }
        let pause = backoff(entry.failed, &self.retry, fastrand::f64()).max(wait);
        self.queue.delay(entry, now + pause);
        if !self.health.has_succeeded() && !rows_are_the_cause {
            // The first requests are sent one by one, with a pause between them.
            let pause = self.backoff_pause(failures, 1.0);
            self.limiter.close_until(now + pause);
        }
        self.stop_if_endpoint_is_down(&failure);
        let blocks_queue = self.in_flight == 0 && self.queue.peek(now).is_err();
        RetryDecision::Retry {
            pause: if blocks_queue { wait } else { Duration::ZERO },
        }
    }

    /// Returns the longest pause between the last rows in an outage, so that all of them are tried soon.
    fn max_pause_between_last_rows(&self, remaining: usize) -> Duration {
        let fraction_of_outage = self.retry.max_outage.mul_f64(LAST_ROWS_OUTAGE_FRACTION);
        fraction_of_outage.min(LAST_ROWS_TRIAL_TIME) / remaining.max(1) as u32
    }

    /// Records that a row has ended without an answer.
    pub(crate) fn row_given_up(&mut self, row: usize) {
        self.health.row_given_up(row);
    }

    /// Stops the upstream with an error; its rows stay pending.
    pub(crate) fn stop(&mut self, error: anyhow::Error) {
        self.stopped.get_or_insert(error);
    }

    pub(crate) fn take_error(&mut self) -> Option<anyhow::Error> {
        self.stopped.take()
    }

    /// Returns a back-off pause with jitter over its upper half only. Its maximum is `max_factor` times `retry.max_s`.
    fn backoff_pause(&self, attempt: u32, max_factor: f64) -> Duration {
        let retry = config::RetryConfig {
            max: self.retry.max.mul_f64(max_factor),
            ..self.retry.clone()
        };
        backoff(attempt, &retry, 0.5 + fastrand::f64() / 2.0)
    }

    /// Stops after repeated identical server errors, or after an outage.
    fn stop_if_endpoint_is_down(&mut self, failure: &RowFailure) {
        // A server that is starting up or overloaded uses other statuses than 500.
        let is_server_error =
            failure.class == "http 500" && !failure.is_bodyless && !self.has_earlier_answers;
        if is_server_error && self.health.server_failed(&failure.message) {
            self.stop(run_error::repeated_server_error(&failure.message));
        }
        self.stop_after_outage(&failure.message);
    }

    /// Stops if nothing has succeeded for `retry.max_outage_s`. Called after a failure, not by a timer, so that a wait
    /// requested by the endpoint ends first.
    fn stop_after_outage(&mut self, message: &str) {
        let outage = self.health.time_without_success(Instant::now());
        if outage >= self.retry.max_outage {
            self.stop(run_error::outage(outage, message));
        }
    }

    /// Excludes `elapsed`, the time until now, from the time without success if no request was in flight because the
    /// run is paused (`is_paused`) or a limit of the user is used up. Pauses after failures are not excluded.
    pub(crate) fn exclude_held_back(&mut self, elapsed: Duration, is_paused: bool) {
        let now = Instant::now();
        let is_held_back = is_paused && !self.limiter.is_closed(now);
        if self.in_flight == 0 && (is_held_back || self.limiter.waits_for_user_limit(now)) {
            self.health.exclude_held_back(elapsed);
        }
    }

    /// Returns true during an outage of the endpoint or of the shared limits, and during a pause of all requests.
    pub(crate) fn is_waiting(&self) -> bool {
        self.health.is_outage() || self.limiter.is_closed(Instant::now())
    }
}

#[cfg(test)]
mod tests;
