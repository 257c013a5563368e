//! Decisions after a refusal: wait, try another row, fail the row or stop.
//!
//! An "endpoint refusal" ([`EndpointRefusal`]) says that no request can succeed: wrong key, address or model, no
//! credit, no access. Some endpoints send such a reply to one row only, so a run stops immediately only if nothing
//! contradicts the refusal. Once other rows were answered, several rounds of endpoint refusals must confirm it.

use std::time::Duration;

use tokio::time::Instant;

use crate::client::attempt_error::{EndpointRefusal, RefusalReason, RowFailure};
use crate::harvest::run_error;
use crate::harvest::upstream::{LONGEST_WAIT, RetryDecision, Upstream};
use crate::plan::queue::QueuedRow;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::send_ticket::SendTicket;

/// Maximum number of rounds of endpoint refusals from an endpoint that has answered in this run. The next round stops
/// it.
const MAX_REFUSAL_ROUNDS: u32 = 4;

/// Maximum number of rounds in addition to [`MAX_REFUSAL_ROUNDS`]: one for each time that an answer contradicted the
/// endpoint refusals.
const MAX_EXTRA_REFUSAL_ROUNDS: u32 = 12;

/// Maximum number of endpoint refusals of one row while other rows are answered. The next one fails the row.
const MAX_ENDPOINT_REFUSALS_PER_ROW: u32 = 3;

/// Number of rows with an endpoint refusal after which a run without an answer stops, if the cache holds answers or an
/// earlier run left suspects. Otherwise the first endpoint refusal stops the run.
const ROWS_TO_CONFIRM_REFUSAL: usize = 3;

/// Like [`ROWS_TO_CONFIRM_REFUSAL`], if the cache holds answers and an earlier run left suspects.
const ROWS_TO_CONFIRM_WITH_SUSPECTS: usize = 8;

/// Like [`ROWS_TO_CONFIRM_REFUSAL`], for refusals of the key.
const ROWS_TO_CONFIRM_WRONG_KEY: usize = 2;

/// Maximum number of remaining rows at which all of them may be rows that the endpoint always refuses, if the cache
/// holds answers to other rows.
const MAX_ALWAYS_REFUSED_ROWS: usize = 20;

/// Number of throttled requests after which a row fails, if other rows were answered meanwhile and every remaining row
/// was throttled as often. With the default pauses the requests span more than a minute, so that a limit per minute
/// fails no row. Also a number of rounds of throttled requests: no row fails in an earlier round, and long requested
/// waits of later rounds are not excluded from an outage.
const MAX_THROTTLES_PER_ROW: u32 = 8;

/// Number of rounds of requested waits above [`LONGEST_WAIT`] after which the endpoint is stopped.
const MAX_LONG_WAIT_ROUNDS: u32 = 2;

impl Upstream {
    /// Decides after a throttled request: no row is sent during the pause, and the request does not count as a failed
    /// attempt.
    pub(crate) fn throttled(
        &mut self,
        mut entry: QueuedRow,
        cost: RequestCost,
        ticket: &SendTicket,
        wait: Option<Duration>,
        message: String,
    ) -> RetryDecision {
        let now = Instant::now();
        let round = self.health.throttled(ticket.sent_at, now);
        // A request larger than the limit itself never fits.
        let exceeded = self.limiter.limit_smaller_than(&cost);
        if exceeded.is_some() || message.to_lowercase().contains("request too large") {
            let limit_text = exceeded.map_or("the endpoint's limit".into(), |(resource, limit)| {
                format!("the endpoint's limit of {limit} {}", resource.name())
            });
            let failure = RowFailure::over_limit(&limit_text, cost.tokens() as f64, &message);
            return RetryDecision::Failed(entry, failure);
        }
        if self.settings.limits.adapt {
            self.concurrency.throttled(ticket.sent_at, now);
        }
        let backoff = self.backoff_pause(round, 1.0);
        let long_wait = wait.filter(|wait| *wait > LONGEST_WAIT);
        if let Some(long_wait) = long_wait
            && self.health.long_wait_requested(ticket.sent_at, now) >= MAX_LONG_WAIT_ROUNDS
        {
            self.queue.delay(entry, now);
            return RetryDecision::LongWait(long_wait);
        }
        // From the second round on, the pause is never shorter than the backoff.
        let pause = match wait.filter(|_| long_wait.is_none()) {
            Some(wait) if round > 1 => wait.max(backoff),
            Some(wait) => wait,
            None => backoff,
        };
        let was_open = self.limiter.close_until(now + pause);
        let is_long = wait.is_some() && pause > self.retry.max;
        if was_open && is_long && round <= MAX_THROTTLES_PER_ROW {
            self.health.exclude_wait(pause);
        }
        // The row itself may be the cause: each further refusal delays the row longer behind the other rows.
        let row_delay = self.backoff_pause(entry.throttled, 1.0);
        entry.throttled += 1;
        let first_throttled_at = *entry.throttled_at.get_or_insert(now);
        let is_often_throttled = |entry: &QueuedRow| entry.throttled >= MAX_THROTTLES_PER_ROW;
        let others_succeed = self
            .health
            .last_success()
            .is_some_and(|success| success > first_throttled_at);
        let has_no_other_rows = self.in_flight == 0 && self.queue.all(is_often_throttled);
        if others_succeed
            && has_no_other_rows
            && is_often_throttled(&entry)
            && round >= MAX_THROTTLES_PER_ROW
        {
            entry.failed += 1;
            return RetryDecision::Failed(entry, RowFailure::new("throttled", &message));
        }
        let row_delay = if entry.throttled > 1 {
            pause + row_delay
        } else {
            Duration::ZERO
        };
        self.queue.delay(entry, now + row_delay);
        self.stop_after_outage(&message);
        RetryDecision::Retry {
            // Several requests in flight may be throttled together: report one pause.
            pause: if was_open { pause } else { Duration::ZERO },
        }
    }

    /// Decides after an endpoint refusal. Before the first answer of the run, see
    /// [`Upstream::endpoint_refused_before_answer`]. After it, the row fails or is tried again until enough rounds
    /// confirm the refusal.
    pub(crate) fn endpoint_refused(
        &mut self,
        mut entry: QueuedRow,
        refusal: EndpointRefusal,
        ticket: &SendTicket,
    ) -> RetryDecision {
        let now = Instant::now();
        let EndpointRefusal { reason, failure } = refusal;
        let teacher = &self.settings.teacher;
        if self.stopped.is_some() {
            self.queue.delay(entry, now);
            return RetryDecision::RETRY;
        }
        if !self.health.has_succeeded() {
            let refusal = EndpointRefusal { reason, failure };
            return self.endpoint_refused_before_answer(entry, refusal);
        }
        if failure.is_bodyless
            && matches!(reason, RefusalReason::Address | RefusalReason::Forbidden)
        {
            return self.transient(entry, failure, Duration::ZERO);
        }
        if matches!(reason, RefusalReason::Address | RefusalReason::Forbidden) {
            if self.health.request_forbidden(entry.row, now) {
                self.queue.delay(entry, now);
                // Requests in flight may still be answered: send nothing until they finish.
                if self.in_flight == 0 {
                    self.stop(crate::client::refused::refused_after_answers(
                        reason,
                        &failure.message,
                        teacher,
                    ));
                }
                return RetryDecision::RETRY;
            }
            entry.failed += 1;
            return RetryDecision::Failed(entry, failure);
        }
        entry.endpoint_refusals += 1;
        let round = self.health.endpoint_refused(entry.row, ticket.sent_at, now);
        let contradictions = self.health.contradictions();
        if round > MAX_REFUSAL_ROUNDS + contradictions.min(MAX_EXTRA_REFUSAL_ROUNDS) {
            self.queue.delay(entry, now);
            self.stop(crate::client::refused::refused_after_answers(
                reason,
                &failure.message,
                teacher,
            ));
            return RetryDecision::RETRY;
        }
        let others_succeed = round == 1 || contradictions >= MAX_ENDPOINT_REFUSALS_PER_ROW;
        if entry.endpoint_refusals > MAX_ENDPOINT_REFUSALS_PER_ROW && others_succeed {
            entry.failed += 1;
            return RetryDecision::Failed(entry, failure);
        }
        let pause = self.backoff_pause(round, 1.0);
        let was_open = self.limiter.close_until(now + pause);
        self.queue.delay(entry, now + pause);
        RetryDecision::Retry {
            pause: if was_open { pause } else { Duration::ZERO },
        }
    }

    /// Decides after an endpoint refusal before the first answer of the run. If the cache holds answers or an earlier
    /// run left suspects, the row may be the cause, and other rows are tried first. Otherwise the endpoint stops.
    fn endpoint_refused_before_answer(
        &mut self,
        mut entry: QueuedRow,
        refusal: EndpointRefusal,
    ) -> RetryDecision {
        let now = Instant::now();
        let EndpointRefusal { reason, failure } = refusal;
        let refused_rows = self.health.endpoint_refused_before_answer(entry.row);
        let is_key = reason == RefusalReason::Key;
        // A wrong key is more likely than a row that causes a refusal of the key.
        if self.has_earlier_answers || self.has_suspects && !is_key {
            let remaining = 1 + self.queue.len() + self.in_flight;
            // The last rows may be rows that the endpoint always refuses. With an empty account or a wrong key, every
            // row is refused. A refusal of the key fails a row only if the row was refused before.
            let max_remaining = match reason {
                RefusalReason::Credit | RefusalReason::Key => ROWS_TO_CONFIRM_REFUSAL - 1,
                _ => MAX_ALWAYS_REFUSED_ROWS,
            };
            if self.has_earlier_answers
                && remaining <= max_remaining
                && (!is_key || entry.endpoint_refusals > 0)
            {
                entry.failed += 1;
                return RetryDecision::Failed(entry, failure);
            }
            let rows_to_confirm = match reason {
                RefusalReason::Key => ROWS_TO_CONFIRM_WRONG_KEY,
                RefusalReason::Credit => ROWS_TO_CONFIRM_REFUSAL,
                _ if self.has_earlier_answers && self.has_suspects => ROWS_TO_CONFIRM_WITH_SUSPECTS,
                _ => ROWS_TO_CONFIRM_REFUSAL,
            };
            if refused_rows < rows_to_confirm
                && refused_rows < remaining
                && entry.endpoint_refusals <= MAX_REFUSAL_ROUNDS
            {
                // If all other rows are delayed, this row is sent again.
                let pause = self.backoff_pause(entry.endpoint_refusals, 1.0);
                entry.endpoint_refusals += 1;
                let wait = if entry.endpoint_refusals > 1 {
                    pause
                } else {
                    Duration::ZERO
                };
                self.queue.delay(entry, now + wait);
                return RetryDecision::RETRY;
            }
        }
        self.queue.delay(entry, now);
        let teacher = &self.settings.teacher;
        self.stop(crate::client::refused::refused(
            reason,
            &failure.message,
            teacher,
        ));
        RetryDecision::RETRY
    }

    /// Fails a row that is refused with the same error as in an earlier run in which other rows were answered.
    pub(crate) fn failed_again(
        &mut self,
        mut entry: QueuedRow,
        failure: RowFailure,
    ) -> RetryDecision {
        self.health.failed_as_before();
        entry.failed += 1;
        RetryDecision::Failed(entry, failure)
    }

    /// Fails a refused row. Stops the endpoint if nothing has succeeded and consecutive rows are refused with the same
    /// message.
    pub(crate) fn refused(&mut self, mut entry: QueuedRow, failure: RowFailure) -> RetryDecision {
        if failure.is_bodyless && self.health.has_succeeded() {
            return self.transient(entry, failure, Duration::ZERO);
        }
        entry.failed += 1;
        // Requests in flight may still be answered. If the cache holds answers, the last rows may be rows that the
        // endpoint always refuses.
        let may_be_settings =
            !self.has_earlier_answers || self.queue.len() > MAX_ALWAYS_REFUSED_ROWS;
        if self.health.refused(&failure.message) && self.in_flight == 0 && may_be_settings {
            self.stop(run_error::repeated_refusal(&failure.message));
        }
        RetryDecision::Failed(entry, failure)
    }
}
