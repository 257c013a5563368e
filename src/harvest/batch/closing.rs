//! Ends a part: each of its rows is answered, fails or returns to the queue.

use std::collections::HashMap;

use anyhow::Result;

use super::collect::{PartCollection, RowOutcome};
use super::journal::PartState;
use super::{BatchRun, BatchStepError};
use crate::budget::account::Charge;
use crate::budget::dollars::Dollars;
use crate::client::attempt_error::{EndpointRefusal, RefusalReason, RowFailure};
use crate::harvest::run_error;
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, UnansweredLine};
use crate::report::failures::FailedRow;

/// Minimum number of refused rows, all with the same message, at which the settings are assumed to be wrong rather than
/// the rows.
const SAME_REFUSALS: usize = 5;

/// Sums over the rows of a part while the part is closed.
#[derive(Default)]
struct ClosingTotals {
    /// Number of unanswered rows that may be billed.
    lost: u64,
    /// Reserved cost of these rows in US dollars.
    lost_usd: f64,
    /// Number of rows that a content filter refused.
    filtered: u64,
    /// Number of refused rows by error message.
    refusals: HashMap<String, usize>,
    /// First endpoint refusal, in a batch without answers.
    endpoint_refusal: Option<EndpointRefusal>,
}

impl BatchRun<'_> {
    /// Ends every row of the part or returns it to the queue, then ends the part.
    pub(super) fn close_part(
        &mut self,
        index: usize,
        collection: PartCollection,
        status: &str,
    ) -> Result<(), BatchStepError> {
        let (upstream, _) = self.upstream_of(index)?;
        let was_cancelled = matches!(
            self.journal.parts[index].state,
            PartState::Cancelling { .. }
        );
        if collection.unreadable_lines > 0 {
            self.save_unreadable_lines(index, &collection)?;
        }
        let answers = collection
            .members
            .iter()
            .filter(|member| member.is_answered(self.cache));
        let has_answers = answers.count() > 0;
        let mut closing = ClosingTotals::default();
        let unnamed_rows_not_run = collection.unnamed_rows_not_run;
        for (line, (member, outcome)) in collection
            .members
            .iter()
            .zip(collection.outcomes)
            .enumerate()
        {
            if member.is_answered(self.cache) {
                continue;
            }
            // A line that cannot be parsed may be the paid answer of this row.
            let may_be_unreadable = outcome.is_none() && collection.unreadable_lines > 0;
            let may_be_billed = match &outcome {
                Some(outcome) => outcome.may_be_billed(),
                // A row that the batch did not run is not billed; a row that it lost may be billed.
                None if unnamed_rows_not_run => false,
                None => may_be_unreadable || (status != "expired" && status != "cancelled"),
            };
            if may_be_billed {
                closing.lost += 1;
                closing.lost_usd += member.usd;
            }
            let row = self.journal.parts[index].progress.rows.get(line).copied();
            let Some(row) = row.flatten() else {
                continue;
            };
            let mut entry = QueuedRow {
                failed: member.failed,
                ..QueuedRow::fresh(row as usize)
            };
            // An endpoint refusal is not recorded as a paid attempt of its row.
            let is_row_failure = !matches!(outcome, Some(RowOutcome::EndpointRefused(_)));
            let failure = match outcome {
                Some(RowOutcome::Refused(failure)) => {
                    *closing.refusals.entry(failure.message.clone()).or_default() += 1;
                    entry.failed += 1;
                    self.fail(upstream, entry, failure);
                    continue;
                }
                Some(RowOutcome::Filtered(failure)) => {
                    self.end_filtered(upstream, entry, &failure)?;
                    closing.filtered += 1;
                    continue;
                }
                Some(RowOutcome::EndpointRefused(refusal)) => {
                    let is_row_specific = matches!(
                        refusal.reason,
                        RefusalReason::Forbidden | RefusalReason::Address
                    );
                    if has_answers && is_row_specific {
                        entry.failed += 1;
                        self.fail(upstream, entry, refusal.failure);
                        continue;
                    }
                    if !has_answers {
                        self.upstreams[upstream].waiting.push_back(entry);
                        closing.endpoint_refusal.get_or_insert(refusal);
                        continue;
                    }
                    refusal.failure
                }
                Some(RowOutcome::Retry(failure)) => failure,
                Some(
                    RowOutcome::Answered | RowOutcome::Empty(_) | RowOutcome::Unreadable { .. },
                ) => {
                    self.upstreams[upstream].waiting.push_back(entry);
                    continue;
                }
                None if unnamed_rows_not_run => {
                    self.counts.requeued_rows += 1;
                    self.upstreams[upstream].waiting.push_back(entry);
                    continue;
                }
                None if may_be_unreadable => {
                    let failure =
                        RowFailure::new("unreadable", "a line of its batch cannot be parsed");
                    self.record_paid_attempt(entry, &failure)?;
                    entry.failed += 1;
                    self.fail(upstream, entry, failure);
                    continue;
                }
                None => {
                    self.counts.lost += u64::from(status == "completed");
                    RowFailure::new("lost in a batch", "the row is in neither file of its batch")
                }
            };
            let paid = if may_be_billed && is_row_failure {
                self.record_paid_attempt(entry, &failure)?
            } else {
                0
            };
            // A cancelled batch does not count as a failed attempt.
            entry.failed += u32::from(!was_cancelled);
            if entry.failed.max(paid) >= self.settings.retry.max_attempts {
                self.fail(upstream, entry, failure);
            } else {
                self.counts.requeued_rows += 1;
                self.upstreams[upstream].waiting.push_back(entry);
            }
        }
        self.counts.ignored += collection.ignored;
        self.settle_lost(index, upstream, &closing)?;
        if has_answers || closing.filtered > 0 {
            self.upstreams[upstream].batch_succeeded();
        }
        if let [(message, count)] = closing.refusals.iter().collect::<Vec<_>>().as_slice()
            && **count >= SAME_REFUSALS
            && !self.upstreams[upstream].has_answered
        {
            self.upstreams[upstream].stop(run_error::repeated_refusal(message));
        }
        self.end_part(index, status)?;
        if let Some(refusal) = closing.endpoint_refusal {
            self.upstreams[upstream].batch_refused(refusal, &self.settings.retry);
        }
        Ok(())
    }

    /// Saves the lines of a part from which no row can be parsed, and reports them.
    fn save_unreadable_lines(&mut self, index: usize, collection: &PartCollection) -> Result<()> {
        let nonce = &self.journal.parts[index].nonce;
        let place = if collection.unreadable.is_empty() {
            "they are too long to be saved".to_owned()
        } else {
            let file = self.unreadable.save(nonce, &collection.unreadable)?;
            format!("they are saved in {}", file.display())
        };
        self.progress.note(&format!(
            "{} lines of a batch cannot be parsed: {place}",
            collection.unreadable_lines
        ));
        Ok(())
    }

    /// Charges the reserved cost of the unanswered rows that may be billed.
    fn settle_lost(
        &mut self,
        index: usize,
        upstream: usize,
        closing: &ClosingTotals,
    ) -> Result<()> {
        self.summary.attempts_lost += closing.lost;
        let price = self.upstreams[upstream].settings.price.clone();
        self.journal.parts[index].progress.unsettled_usd -= closing.lost_usd;
        let lost = Dollars::at_least(closing.lost_usd);
        self.run_files
            .account
            .settle_batch(lost, lost, closing.lost, Charge::Possible, &price)
    }

    /// Records an attempt that may have been billed. Returns the number of such attempts of the row over all runs.
    fn record_paid_attempt(&mut self, entry: QueuedRow, failure: &RowFailure) -> Result<u32> {
        let unanswered_line = self.unanswered_line(entry, Kind::PaidAttempt, failure);
        self.run_files.unanswered.add(&unanswered_line)?;
        Ok(self
            .run_files
            .unanswered
            .get(&unanswered_line.key)
            .map_or(0, |history| history.paid))
    }

    /// Ends a row that a content filter refused.
    fn end_filtered(
        &mut self,
        upstream: usize,
        entry: QueuedRow,
        failure: &RowFailure,
    ) -> Result<()> {
        let line = self.unanswered_line(entry, Kind::Filtered, failure);
        self.run_files.unanswered.add(&line)?;
        let row = FailedRow::new(&self.plan, upstream, entry, failure.clone());
        self.summary.filtered(row);
        self.upstreams[upstream].has_answered = true;
        Ok(())
    }

    fn unanswered_line(
        &self,
        entry: QueuedRow,
        kind: Kind,
        failure: &RowFailure,
    ) -> UnansweredLine {
        UnansweredLine::new(&self.plan, entry, kind, failure, self.clock.now())
    }
}
