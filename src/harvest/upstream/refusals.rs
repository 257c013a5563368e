//! Decisions after a refusal: wait, try another row, fail the row or stop.

use crate::harvest::upstream::LONGEST_WAIT;
use std::time::Duration;

use tokio::time::Instant;

use crate::client::attempt_error::{RefusalClaim, RefusalReason, RowFailure};
use crate::harvest::run_error;
use crate::harvest::upstream::{RetryDecision, Upstream};
use crate::plan::queue::QueuedRow;
use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::send_ticket::SendTicket;

/// Rounds in which an endpoint that has answered says that no request can succeed, before it is believed.
const CLAIM_ROUNDS: u32 = 4;

/// Further rounds, one for each time that such a reply was followed by an answer.
const MAX_EXTRA_CLAIM_ROUNDS: u32 = 12;

/// Times that one row brings such a reply while others are answered, before it is the row.
const MAX_CLAIMS_PER_ROW: u32 = 3;

/// Rows that bring such a reply before any is answered, where the cache holds answers or an earlier run
/// has ended so, before it is believed.
const CLAIMING_ROWS: usize = 3;

/// As [`CLAIMS_OF_ROWS`], where rows have failed while others were answered.
const CLAIMING_ROWS_IF_DOUBTFUL: usize = 8;

/// As [`CLAIMS_OF_ROWS`], for a wrong key.
const CLAIMING_ROWS_FOR_A_KEY: usize = 2;

/// Rows that may all be refused, also in the same words, though the cache holds answers.
const REFUSED_ROWS: usize = 20;

/// Rounds in which the endpoint asks to wait for a row while others were answered, before it is the row. With
/// the default pauses they take longer than a limit a minute does.
const MAX_THROTTLES_PER_ROW: u32 = 8;

/// Rounds in which the endpoint asks for such a wait, before it is believed.
const LONG_WAIT_ROUNDS: u32 = 2;

impl Upstream {
    /// The endpoint asks everybody to wait: the row costs no attempt, and the gate closes.
    pub(crate) fn throttled(
        &mut self,
        mut entry: QueuedRow,
        cost: RequestCost,
        ticket: &SendTicket,
        wait: Option<Duration>,
        message: String,
    ) -> RetryDecision {
        let now = Instant::now();
        let round = self.health.throttled(ticket.at, now);
        // No wait makes room for a request that is larger than the limit itself.
        let too_small = self.limiter.too_small(&cost);
        if too_small.is_some() || message.to_lowercase().contains("request too large") {
            let which = too_small.map_or("the endpoint's limit".into(), |(resource, limit)| {
                format!("the endpoint's limit of {limit} {}", resource.name())
            });
            let failure = RowFailure::over_limit(&which, cost.tokens() as f64, &message);
            return RetryDecision::Failed(entry, failure);
        }
        if self.settings.limits.adapt {
            self.concurrency.throttled(ticket.at, now);
        }
        let own = self.firm_pause(round, 1.0);
        let far = wait.filter(|wait| *wait > LONGEST_WAIT);
        if let Some(far) = far
            && self.health.long_wait_requested(ticket.at, now) >= LONG_WAIT_ROUNDS
        {
            self.queue.delay(entry, now);
            return RetryDecision::LongWait(far);
        }
        // Never shorter than our own back-off once it has refused again after the wait that it asked for.
        let pause = match wait.filter(|_| far.is_none()) {
            Some(wait) if round > 1 => wait.max(own),
            Some(wait) => wait,
            None => own,
        };
        let was_open = self.limiter.close_until(now + pause);
        let is_long = wait.is_some() && pause.as_secs_f64() > self.retry.max_s;
        if was_open && is_long && round <= MAX_THROTTLES_PER_ROW {
            self.health.exclude_wait(pause);
        }
        // It may be the row after all: behind the others with it, the further the oftener.
        let row_delay = self.firm_pause(entry.throttled, 1.0);
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
            // Everything in flight may say the same; once is enough.
            pause: if was_open { pause } else { Duration::ZERO },
        }
    }

    /// The reply says that no request can succeed. Before the first answer that is believed at once;
    /// where others are answered it is the row, or it passes.
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
                // What is in flight may still be answered: nothing more is sent until then.
                if self.in_flight == 0 {
                    self.stop(crate::client::refused::refused_by_now(
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
        let round = self.health.claimed(entry.row, ticket.at, now);
        let contradicted = self.health.contradicted();
        if round > CLAIM_ROUNDS + contradicted.min(MAX_EXTRA_CLAIM_ROUNDS) {
            self.queue.delay(entry, now);
            self.stop(crate::client::refused::refused_by_now(
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
        let pause = self.firm_pause(round, 1.0);
        let was_open = self.limiter.close_until(now + pause);
        self.queue.delay(entry, now + pause);
        RetryDecision::Again {
            pause: if was_open { pause } else { Duration::ZERO },
        }
    }

    /// As [`Lane::claimed`], before the first answer. Where answers are in the cache, or an earlier run has
    /// ended like this, it may be the row: others are tried.
    fn claimed_first(&mut self, mut entry: QueuedRow, claim: RefusalClaim) -> RetryDecision {
        let now = Instant::now();
        let RefusalClaim { reason, failure } = claim;
        let suspects = self.health.suspect(entry.row);
        let is_key = reason == RefusalReason::Key;
        // A wrong key is far likelier than a row that brings such a reply: the next run tries others first.
        if self.is_known || self.has_suspects && !is_key {
            let remaining = 1 + self.queue.len() + self.in_flight;
            // The last few rows may be those that are always refused. An empty account or a wrong key refuses
            // all rows alike; and a wrong key is believed at once, but of a row that has brought such a reply
            // before.
            let max_remaining = match reason {
                RefusalReason::Credit | RefusalReason::Key => CLAIMING_ROWS - 1,
                _ => REFUSED_ROWS,
            };
            if self.is_known && remaining <= max_remaining && (!is_key || entry.claimed > 0) {
                entry.failed += 1;
                return RetryDecision::Failed(entry, failure);
            }
            let enough = match reason {
                RefusalReason::Key => CLAIMING_ROWS_FOR_A_KEY,
                RefusalReason::Credit => CLAIMING_ROWS,
                _ if self.is_known && self.has_suspects => CLAIMING_ROWS_IF_DOUBTFUL,
                _ => CLAIMING_ROWS,
            };
            if suspects < enough && suspects < remaining && entry.claimed <= CLAIM_ROUNDS {
                // Where the others wait, it is this row's turn again.
                let pause = self.firm_pause(entry.claimed, 1.0);
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

    /// The row fails as it did in an earlier run, while others were answered: that shows nothing new.
    pub(crate) fn failed_again(
        &mut self,
        mut entry: QueuedRow,
        failure: RowFailure,
    ) -> RetryDecision {
        self.health.failed_as_before();
        entry.failed += 1;
        RetryDecision::Failed(entry, failure)
    }

    pub(crate) fn refused(&mut self, mut entry: QueuedRow, failure: RowFailure) -> RetryDecision {
        if failure.is_bodyless && self.health.has_succeeded() {
            return self.transient(entry, failure, Duration::ZERO);
        }
        entry.failed += 1;
        // Replies in flight may show that other rows are answered, and if the cache holds answers, these may be
        // the rows that are always refused.
        let is_settled = !self.is_known || self.queue.len() > REFUSED_ROWS;
        if self.health.refused(&failure.message) && self.in_flight == 0 && is_settled {
            self.stop(run_error::refused_alike(&failure.message));
        }
        RetryDecision::Failed(entry, failure)
    }
}
