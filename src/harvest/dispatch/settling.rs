//! Settles a reply: its budget reservation and the state of its row.

use anyhow::{Result, bail};
use tokio::time::Instant;

use super::Dispatcher;
use crate::budget::account::Charge;
use crate::client::attempt_error::{AttemptError, EndpointRefusal, RowFailure};
use crate::harvest::attempt::FinishedAttempt;
use crate::harvest::run_error;
use crate::harvest::upstream::RetryDecision;
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, UnansweredLine};
use crate::rate_limit::send_ticket::SendTicket;
use crate::report::answer_facts::AnswerFacts;
use crate::report::failures::FailedRow;
use crate::terminal::format_duration;
use crate::terminal::progress::SHORTEST_SHOWN_WAIT;

impl Dispatcher<'_> {
    /// Settles the budget of a finished attempt, then counts its answer or decides about its row.
    pub(super) fn settle(&mut self, finished: FinishedAttempt) -> Result<()> {
        let FinishedAttempt {
            attempt,
            reports,
            result,
            _permit: _,
        } = finished;
        let index = attempt.upstream;
        let upstream = &mut self.upstreams[index];
        upstream.reply_received(&attempt.ticket, &reports);
        let price = upstream.settings.price.clone();
        let error = match result {
            Ok(answered) => {
                upstream.answered(&attempt.ticket, &reports, answered.facts.usage.as_ref());
                let charge = answered.charge();
                self.run_files
                    .account
                    .settle(&attempt.reserved, charge, &price);
                self.count_answer(index, &answered.facts);
                return Ok(());
            }
            Err(error) => error,
        };
        let failure = match &error {
            AttemptError::Refused(failure)
            | AttemptError::EndpointRefused(EndpointRefusal { failure, .. })
            | AttemptError::Filtered(failure)
            | AttemptError::Transient { failure, .. } => Some(failure),
            _ => None,
        };
        let billed = failure.filter(|failure| failure.may_be_billed);
        let charge = match billed {
            Some(_) => Charge::Possible,
            None => Charge::Nothing,
        };
        self.summary.attempts_lost += u64::from(billed.is_some());
        self.run_files
            .account
            .settle(&attempt.reserved, charge, &price);
        self.timeline.hour(Instant::now()).failed_attempts += 1;
        let mut entry = attempt.entry;
        let mut paid = 0;
        // An endpoint refusal is not the fault of its row, so it is not recorded as a paid attempt of the row.
        let is_row_failure = !matches!(error, AttemptError::EndpointRefused(_));
        if let Some(failure) = billed.filter(|_| is_row_failure) {
            entry.paid += 1;
            paid = self.record_paid_attempt(entry, failure)?;
        }
        let has_used_paid_attempts = paid >= self.settings.retry.max_attempts;
        self.decide(index, entry, &attempt.ticket, error, has_used_paid_attempts)
    }

    /// Decides about a row whose attempt failed: retry the row, fail it, or stop the upstream. `has_used_paid_attempts`
    /// is true if the row has used up its possibly billed attempts.
    fn decide(
        &mut self,
        index: usize,
        entry: QueuedRow,
        ticket: &SendTicket,
        error: AttemptError,
        has_used_paid_attempts: bool,
    ) -> Result<()> {
        let upstream = &mut self.upstreams[index];
        let history = self
            .run_files
            .unanswered
            .get(&self.plan.rows[entry.row].key);
        let failed_as = history.map_or("", |history| history.failed_as.as_str());
        let (decision, message) = match error {
            AttemptError::Refused(failure)
            | AttemptError::EndpointRefused(EndpointRefusal { failure, .. })
                if failure.class == failed_as =>
            {
                let message = failure.message.clone();
                (upstream.failed_again(entry, failure), message)
            }
            AttemptError::Refused(failure) => {
                let message = failure.message.clone();
                (upstream.refused(entry, failure), message)
            }
            AttemptError::Filtered(failure) => {
                upstream.filtered(ticket);
                return self.end_filtered(index, entry, failure);
            }
            AttemptError::Throttled { wait, message } => {
                self.summary.used[index].throttled += 1;
                let cost = self.plan.cost(index, entry.row);
                let decision = upstream.throttled(entry, cost, ticket, wait, message.clone());
                (decision, message)
            }
            AttemptError::Transient { failure, wait } => {
                let message = failure.message.clone();
                match upstream.transient(entry, failure.clone(), wait) {
                    RetryDecision::Retry { .. } if has_used_paid_attempts => {
                        upstream.queue.remove(entry.row);
                        (RetryDecision::Failed(entry, failure), message)
                    }
                    decision => (decision, message),
                }
            }
            AttemptError::EndpointRefused(refusal) => {
                let message = refusal.failure.message.clone();
                (upstream.endpoint_refused(entry, refusal, ticket), message)
            }
            AttemptError::KeyRenewed => {
                upstream.key_renewed(entry);
                return Ok(());
            }
            // `attempt::run` records an unreadable reply as a quarantined answer.
            AttemptError::Unreadable { problem, .. } => {
                bail!("internal error: an unreadable reply was not recorded: {problem}")
            }
        };
        match decision {
            RetryDecision::Failed(entry, failure) => {
                upstream.row_given_up(entry.row);
                let row = FailedRow::new(&self.plan, index, entry, failure);
                self.summary.fail(row);
            }
            RetryDecision::Retry { pause } if pause >= SHORTEST_SHOWN_WAIT => self
                .progress
                .note(&format!("waiting {}: {message}", format_duration(pause))),
            RetryDecision::Retry { .. } => {}
            RetryDecision::LongWait(wait) => {
                let now = self.clock.now();
                let until = now.checked_add(wait).unwrap_or(jiff::Timestamp::MAX);
                upstream.stop(run_error::long_wait(
                    &self.schedule.show(until),
                    wait,
                    &message,
                ));
            }
        }
        Ok(())
    }

    /// Records an attempt that may have been billed. Returns the number of such attempts of the row over all runs.
    fn record_paid_attempt(&mut self, entry: QueuedRow, failure: &RowFailure) -> Result<u32> {
        let line = UnansweredLine::new(
            &self.plan,
            entry,
            Kind::PaidAttempt,
            failure,
            self.clock.now(),
        );
        self.unless_disk_full(|run_files| run_files.unanswered.add(&line))?;
        let history = self.run_files.unanswered.get(&line.key);
        Ok(history.map_or(0, |history| history.paid).max(entry.paid))
    }

    /// Ends a row that a content filter refused.
    fn end_filtered(&mut self, index: usize, entry: QueuedRow, failure: RowFailure) -> Result<()> {
        let line = UnansweredLine::new(
            &self.plan,
            entry,
            Kind::Filtered,
            &failure,
            self.clock.now(),
        );
        self.unless_disk_full(|run_files| run_files.unanswered.add(&line))?;
        let row = FailedRow::new(&self.plan, index, entry, failure);
        self.summary.filtered(row);
        Ok(())
    }

    /// Adds an answer to the summary. Stops the upstream after too many answers that training cannot use.
    fn count_answer(&mut self, index: usize, facts: &AnswerFacts) {
        let wants_logprobs = self.plan.templates[index].wants_logprobs();
        self.summary.add(facts, wants_logprobs);
        self.timeline.hour(Instant::now()).answered += 1;
        let upstream = &mut self.upstreams[index];
        if let Some(error) = upstream.monitor.check_and_warn(facts, &mut self.summary) {
            upstream.stop(error);
        }
    }
}
