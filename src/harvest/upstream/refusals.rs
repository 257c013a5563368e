//! Decisions after a refusal: wait, try another row, fail the row or stop.
//!
//! A "claim" is a reply that no request can succeed: wrong key, address or model, no credit, no access.

use crate::harvest::upstream::LONGEST_WAIT;
use std::time::Duration;

use tokio::time::Instant;

use crate::client::attempt_error::{RefusalClaim, RefusalReason, RowFailure};
use crate::harvest::run_error;
use crate::harvest::upstream::{RetryDecision, Upstream};
use crate::plan::queue::QueuedRow;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::send_ticket::SendTicket;

/// Rounds of claims after which an endpoint that has answered before is stopped.
const CLAIM_ROUNDS: u32 = 4;

/// Maximum number of further rounds, one for each claim that a later answer contradicted.
const MAX_EXTRA_CLAIM_ROUNDS: u32 = 12;

/// Claims of one row, while others are answered, after which the row fails.
const MAX_CLAIMS_PER_ROW: u32 = 3;

/// Rows with a claim after which the run stops, before its first answer: used if the cache holds answers or an
/// earlier run ended with a claim.
const CLAIMING_ROWS: usize = 3;

/// Like [`CLAIMING_ROWS`], if rows of the plan failed while others were answered.
const CLAIMING_ROWS_IF_DOUBTFUL: usize = 8;

/// Like [`CLAIMING_ROWS`], for a wrong key.
const CLAIMING_ROWS_FOR_A_KEY: usize = 2;

/// Number of remaining rows up to which all may be refused with the same message, if the cache holds answers.
const REFUSED_ROWS: usize = 20;

/// Times that a row is throttled, while others are answered, after which the row fails. With the default pauses
/// they take longer than a limit per minute does.
const MAX_THROTTLES_PER_ROW: u32 = 8;

/// Rounds of requested waits above [`LONGEST_WAIT`] after which the run ends.
const LONG_WAIT_ROUNDS: u32 = 2;

impl Upstream {
    /// Decides after a throttled request: the gate closes for all rows, and the row keeps its attempts.
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
        let too_small = self.limiter.too_small(&cost);
        if too_small.is_some() || message.to_lowercase().contains("request too large") {
            let which = too_small.map_or("the endpoint's limit".into(), |(resource, limit)| {
                format!("the endpoint's limit of {limit} {}", resource.name())
            });
            let failure = RowFailure::over_limit(&which, cost.tokens() as f64, &message);
            return RetryDecision::Failed(entry, failure);
        }
        if self.settings.limits.adapt {
            self.concurrency.throttled(ticket.sent_at, now);
        }
        let backoff = self.backoff_pause(round, 1.0);
        let long_wait = wait.filter(|wait| *wait > LONGEST_WAIT);
        if let Some(long_wait) = long_wait
            && self.health.long_wait_requested(ticket.sent_at, now) >= LONG_WAIT_ROUNDS
        {
            self.queue.delay(entry, now);
            return RetryDecision::LongWait(long_wait);
        }
        // After a second refusal the pause is never shorter than the back-off.
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
        // The row itself may be the cause: each further refusal delays it longer behind the other rows.
        let row_delay = self.backoff_pause(entry.throttled, 1.0);
        entry.throttled += 1;
        let first = *entry.throttled_at.get_or_insert(now);
        let is_often_throttled = |entry: &QueuedRow| entry.throttled >= MAX_THROTTLES_PER_ROW;
        let others_succeed = self.health.last_success().is_some_and(|at| at > first);
        let is_alone = self.in_flight == 0 && self.queue.all(is_often_throttled);
        if others_succeed
            && is_alone
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
        RetryDecision::Again {
            // All requests in flight may be refused alike: report one pause.
            pause: if was_open { pause } else { Duration::ZERO },
        }
    }

    /// Decides after a claim that no request can succeed. Before the first answer the run stops; after it, the row
    /// fails or is tried again until the claim is confirmed.
    pub(crate) fn claimed(
        &mut self,
        mut entry: QueuedRow,
        claim: RefusalClaim,
        ticket: &SendTicket,
    ) -> RetryDecision {
        let now = Instant::now();
        let RefusalClaim { reason, failure } = claim;
        let teacher = &self.settings.teacher;
        if self.stopped.is_some() {
            self.queue.delay(entry, now);
            return RetryDecision::AGAIN;
        }
        if !self.health.has_succeeded() {
            return self.claimed_first(entry, RefusalClaim { reason, failure });
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
                return RetryDecision::AGAIN;
            }
            entry.failed += 1;
            return RetryDecision::Failed(entry, failure);
        }
        entry.claimed += 1;
        let round = self.health.claimed(entry.row, ticket.sent_at, now);
        let contradicted = self.health.contradicted();
        if round > CLAIM_ROUNDS + contradicted.min(MAX_EXTRA_CLAIM_ROUNDS) {
            self.queue.delay(entry, now);
            self.stop(crate::client::refused::refused_after_answers(
                reason,
                &failure.message,
                teacher,
            ));
            return RetryDecision::AGAIN;
        }
        let is_contradicted = round == 1 || contradicted >= MAX_CLAIMS_PER_ROW;
        if entry.claimed > MAX_CLAIMS_PER_ROW && is_contradicted {
            entry.failed += 1;
            return RetryDecision::Failed(entry, failure);
        }
        let pause = self.backoff_pause(round, 1.0);
        let was_open = self.limiter.close_until(now + pause);
        self.queue.delay(entry, now + pause);
        RetryDecision::Again {
            pause: if was_open { pause } else { Duration::ZERO },
        }
    }

    /// Decides like [`Upstream::claimed`], before the first answer. If the cache holds answers or an earlier run ended
    /// with a claim, the row may be the cause, and other rows are tried first.
    fn claimed_first(&mut self, mut entry: QueuedRow, claim: RefusalClaim) -> RetryDecision {
        let now = Instant::now();
        let RefusalClaim { reason, failure } = claim;
        let suspects = self.health.suspect(entry.row);
        let is_key = reason == RefusalReason::Key;
        // A wrong key is far likelier than a row that causes such a reply.
        if self.has_earlier_answers || self.has_suspects && !is_key {
            let remaining = 1 + self.queue.len() + self.in_flight;
            // The last rows may be those that are always refused. An empty account or a wrong key refuses all rows
            // alike. A wrong key fails a row only if the row has caused a claim before.
            let max_remaining = match reason {
                RefusalReason::Credit | RefusalReason::Key => CLAIMING_ROWS - 1,
                _ => REFUSED_ROWS,
            };
            if self.has_earlier_answers
                && remaining <= max_remaining
                && (!is_key || entry.claimed > 0)
            {
                entry.failed += 1;
                return RetryDecision::Failed(entry, failure);
            }
            let enough = match reason {
                RefusalReason::Key => CLAIMING_ROWS_FOR_A_KEY,
                RefusalReason::Credit => CLAIMING_ROWS,
                _ if self.has_earlier_answers && self.has_suspects => CLAIMING_ROWS_IF_DOUBTFUL,
                _ => CLAIMING_ROWS,
            };
            if suspects < enough && suspects < remaining && entry.claimed <= CLAIM_ROUNDS {
                // If all other rows are delayed, this row is sent again.
                let pause = self.backoff_pause(entry.claimed, 1.0);
                entry.claimed += 1;
                let wait = if entry.claimed > 1 {
                    pause
                } else {
                    Duration::ZERO
                };
                self.queue.delay(entry, now + wait);
                return RetryDecision::AGAIN;
            }
        }
        self.queue.delay(entry, now);
        let teacher = &self.settings.teacher;
        self.stop(crate::client::refused::refused(
            reason,
            &failure.message,
            teacher,
        ));
        RetryDecision::AGAIN
    }

    /// Fails a row that is refused as in an earlier run, where other rows were answered.
    pub(crate) fn failed_again(
        &mut self,
        mut entry: QueuedRow,
        failure: RowFailure,
    ) -> RetryDecision {
        self.health.failed_as_before();
        entry.failed += 1;
        RetryDecision::Failed(entry, failure)
    }

    /// Fails a refused row. Stops if the first rows are all refused with the same message.
    pub(crate) fn refused(&mut self, mut entry: QueuedRow, failure: RowFailure) -> RetryDecision {
        if failure.is_bodyless && self.health.has_succeeded() {
            return self.transient(entry, failure, Duration::ZERO);
        }
        entry.failed += 1;
        // Requests in flight may still be answered. If the cache holds answers, the last rows may be those that are
        // always refused.
        let is_settled = !self.has_earlier_answers || self.queue.len() > REFUSED_ROWS;
        if self.health.refused(&failure.message) && self.in_flight == 0 && is_settled {
            self.stop(run_error::refused_alike(&failure.message));
        }
        RetryDecision::Failed(entry, failure)
    }
}
