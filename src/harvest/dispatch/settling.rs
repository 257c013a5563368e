//! Settles a reply: the budget reservation, and the state of its row.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

use super::Dispatcher;
use crate::budget::account::Charge;
use crate::client::attempt_error::{AttemptError, RefusalClaim, RowFailure};
use crate::harvest::attempt::FinishedAttempt;
use crate::harvest::stop;
use crate::harvest::upstream::RetryDecision;
use crate::harvest::watch::MonitorAlert;
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, Line};
use crate::rate_limit::send_ticket::SendTicket;
use crate::report::failures::FailedRow;
use crate::report::seen::AnswerFacts;
use crate::terminal::format_duration;

/// A wait that is worth telling.
const LONG_WAIT: Duration = Duration::from_secs(5);

impl Dispatcher<'_> {
    pub(super) fn settle(&mut self, finished: FinishedAttempt) -> Result<()> {
        let FinishedAttempt {
            attempt,
            reports,
            result,
            _permit: _,
        } = finished;
        let index = attempt.lane;
        let lane = &mut self.lanes[index];
        lane.came_back(&attempt.departure, &reports);
        let price = lane.settings.price.clone();
        let trouble = match result {
            Ok(answered) => {
                lane.answered(&attempt.departure, &reports, answered.seen.usage.as_ref());
                let bill = answered.bill();
                self.books.account.settle(&attempt.reserved, bill, &price);
                self.count(index, &answered.seen);
                return Ok(());
            }
            Err(trouble) => trouble,
        };
        let failure = match &trouble {
            AttemptError::Refused(failure)
            | AttemptError::Filtered(failure)
            | AttemptError::Transient { failure, .. } => Some(failure),
            _ => None,
        };
        let billed = failure.filter(|failure| failure.may_be_billed);
        let bill = match billed {
            Some(_) => Charge::Possible,
            None => Charge::Nothing,
        };
        self.summary.attempts_lost += u64::from(billed.is_some());
        self.books.account.settle(&attempt.reserved, bill, &price);
        self.timeline.hour(Instant::now()).failed_attempts += 1;
        let mut entry = attempt.entry;
        let mut paid = 0;
        if let Some(failure) = billed {
            entry.paid += 1;
            paid = self.note_paid(entry, failure)?;
        }
        let is_spent = paid >= self.config.retry.max_attempts;
        self.judge(index, entry, &attempt.departure, trouble, is_spent)
    }

    /// Decides what becomes of a row whose attempt brought no answer.
    fn judge(
        &mut self,
        index: usize,
        entry: QueuedRow,
        departure: &SendTicket,
        trouble: AttemptError,
        is_spent: bool,
    ) -> Result<()> {
        let lane = &mut self.lanes[index];
        let known = self.books.unanswered.get(&self.plan.rows[entry.row].key);
        let failed_as = known.map_or("", |known| known.failed_as.as_str());
        let (verdict, message) = match trouble {
            AttemptError::Refused(failure) | AttemptError::Claim(RefusalClaim { failure, .. })
                if failure.class == failed_as =>
            {
                let message = failure.message.clone();
                (lane.failed_again(entry, failure), message)
            }
            AttemptError::Refused(failure) => {
                let message = failure.message.clone();
                (lane.refused(entry, failure), message)
            }
            AttemptError::Filtered(failure) => {
                lane.filtered(departure);
                return self.filtered(index, entry, failure);
            }
            AttemptError::Throttled { wait, message } => {
                self.summary.used[index].throttled += 1;
                let cost = self.plan.cost(index, entry.row);
                let verdict = lane.throttled(entry, cost, departure, wait, message.clone());
                (verdict, message)
            }
            AttemptError::Transient { failure, wait } => {
                let message = failure.message.clone();
                match lane.transient(entry, failure.clone(), wait) {
                    // It has been bought as often as it may be.
                    RetryDecision::Again { .. } if is_spent => {
                        lane.queue.remove(entry.row);
                        (RetryDecision::Failed(entry, failure), message)
                    }
                    verdict => (verdict, message),
                }
            }
            AttemptError::Claim(claim) => {
                let message = claim.failure.message.clone();
                (lane.claimed(entry, claim, departure), message)
            }
            AttemptError::KeyRenewed => {
                lane.key_renewed(entry);
                return Ok(());
            }
            // An attempt makes an answer of it.
            AttemptError::Unreadable { problem, .. } => bail!("a reply was left unread: {problem}"),
        };
        match verdict {
            RetryDecision::Failed(entry, failure) => {
                lane.gave_up(entry.row);
                let row = FailedRow::new(&self.plan, index, entry, failure);
                self.summary.fail(row);
            }
            RetryDecision::Again { pause } if pause >= LONG_WAIT => self
                .progress
                .note(&format!("waiting {}: {message}", format_duration(pause))),
            RetryDecision::Again { .. } => {}
            RetryDecision::Far(wait) => {
                let now = self.clock.now();
                let until = now.checked_add(wait).unwrap_or(jiff::Timestamp::MAX);
                lane.stop(stop::far(&self.schedule.show(until), wait, &message));
            }
        }
        Ok(())
    }

    /// Notes an attempt that may have been billed. Returns how many there were of the row, in all runs.
    fn note_paid(&mut self, entry: QueuedRow, failure: &RowFailure) -> Result<u32> {
        let line = Line::new(
            &self.plan,
            entry,
            Kind::PaidAttempt,
            failure,
            self.clock.now(),
        );
        self.unless_full(|books| books.unanswered.add(&line))?;
        let known = self.books.unanswered.get(&line.key);
        Ok(known.map_or(0, |known| known.paid).max(entry.paid))
    }

    /// The row ends as refused by a content filter.
    fn filtered(&mut self, index: usize, entry: QueuedRow, failure: RowFailure) -> Result<()> {
        let line = Line::new(
            &self.plan,
            entry,
            Kind::Filtered,
            &failure,
            self.clock.now(),
        );
        self.unless_full(|books| books.unanswered.add(&line))?;
        let row = FailedRow::new(&self.plan, index, entry, failure);
        self.summary.filtered(row);
        Ok(())
    }

    fn count(&mut self, index: usize, seen: &AnswerFacts) {
        let wants_logprobs = self.plan.askings[index].wants_logprobs();
        self.summary.add(seen, wants_logprobs);
        self.timeline.hour(Instant::now()).answered += 1;
        let lane = &mut self.lanes[index];
        for word in lane.watch.see(seen) {
            match word {
                MonitorAlert::Note(text) => self.summary.warn(text),
                MonitorAlert::Stop(error) => lane.stop(error),
            }
        }
    }
}
