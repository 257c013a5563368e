//! A batch that failed as a whole: most often before any row was asked.

use std::collections::HashMap;

use super::collect::RowOutcome;
use super::upstream::batches;
use super::{BatchStepError, Batches, results};
use crate::client::attempt_error::{RefusalClaim, RowFailure};
use crate::client::batch_object::{BatchFileError, BatchObject};
use crate::plan::queue::QueuedRow;

/// Returns true if an answer may be in the line, which names none of the rows.
fn may_be_answer(line: &[u8], is_readable: bool) -> bool {
    let has = |field: &[u8]| memchr::memmem::find(line, field).is_some();
    has(b"\"choices\"") || !is_readable && has(results::ID)
}

impl Batches<'_> {
    /// Reads the error file of a failed batch: it names the rows for which the input file was refused, and on
    /// some servers it holds answers.
    pub(super) async fn take_errors(
        &mut self,
        index: usize,
        mut card: BatchObject,
    ) -> Result<(), BatchStepError> {
        let (_, transport) = self.lane_of(index)?;
        let batches = batches(&transport)?;
        let file = card.error_file.clone().unwrap_or_default();
        let Some(mut rows) = self.rows_of_file(index, batches, &file).await? else {
            return self.failed(index, &card);
        };
        let mut taking = self.open(index, &card)?;
        while let Some(line) = self.next_row(index, &mut rows).await? {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let line = batches.without_key(line);
            let (kept, count) = (taking.unreadable.len(), taking.unreadable_lines);
            if self.take_line(index, &mut taking, line.clone())? {
                continue;
            }
            let is_readable = taking.unreadable_lines == count;
            taking.unreadable.truncate(kept);
            taking.unreadable_lines = count;
            if may_be_answer(&line, is_readable) {
                taking.keep_unreadable(&line);
            } else {
                card.errors.extend(BatchFileError::from_line(&line));
            }
        }
        taking.unreadable_lines += rows.skipped();
        if taking.seen() == 0 && taking.has_unreadable() {
            // Answers may be among it.
            return self.keep_unreadable_file(index, batches, &file).await;
        }
        if taking.seen() == 0 {
            return self.failed(index, &card);
        }
        for mistake in &card.errors {
            let line = mistake
                .line
                .and_then(|line| usize::try_from(line).ok()?.checked_sub(1));
            if let Some(fate @ None) = line.and_then(|line| taking.fates.get_mut(line)) {
                let failure = RowFailure::new(mistake.error.code.as_str(), &mistake.error.message);
                *fate = Some(RowOutcome::Refused(failure));
            }
        }
        // Rows that the file does not name were not asked, unless a line of it cannot be read.
        taking.rest_was_not_asked = taking.unreadable_lines == 0;
        self.record_rest(index, &mut taking)?;
        self.close(index, taking, "failed")
    }

    /// Lines that are bad fail, all others wait again.
    pub(super) fn failed(
        &mut self,
        index: usize,
        card: &BatchObject,
    ) -> Result<(), BatchStepError> {
        let (upstream, _) = self.lane_of(index)?;
        let verdict = results::verdict(&card.errors);
        let part = &self.journal.parts[index];
        let (rows, tokens, members) = (
            part.live.rows.clone(),
            part.tokens,
            self.journal.members(&part.nonce)?,
        );
        let bad: HashMap<usize, RowFailure> = verdict.lines.into_iter().collect();
        for (line, (member, row)) in members.iter().zip(rows).enumerate() {
            let Some(row) = row else { continue };
            let mut entry = QueuedRow {
                failed: member.failed,
                ..QueuedRow::fresh(row as usize)
            };
            match bad.get(&line) {
                Some(failure) => {
                    entry.failed += 1;
                    self.fail(upstream, entry, failure.clone());
                }
                None => {
                    self.tally.asked_again += 1;
                    self.upstreams[upstream].waiting.push_back(entry);
                }
            }
        }
        let enqueued: u64 = self
            .parts_of(upstream)
            .into_iter()
            .filter(|&index| self.journal.parts[index].is_enqueued())
            .map(|index| self.journal.parts[index].tokens)
            .sum();
        self.end_part(index, "failed")?;
        if let Some((reason, message)) = verdict.stop {
            let failure = RowFailure::new("failed batch", &message);
            self.upstreams[upstream]
                .all_claimed(RefusalClaim { reason, failure }, &self.config.retry);
            return Ok(());
        }
        let retry = &self.config.retry;
        let of_upstream = &mut self.upstreams[upstream];
        match verdict.over_tokens {
            Some(told) => {
                let half = told.filter(|told| *told < enqueued).unwrap_or(enqueued / 2);
                let limit = of_upstream.token_limit.unwrap_or(u64::MAX).min(half);
                of_upstream.token_limit = Some(limit.max(1));
                if members.len() == 1 && enqueued == tokens {
                    of_upstream.no_room_for_one(tokens, retry);
                }
            }
            None => {
                let message = verdict.message;
                self.progress
                    .note(&format!("a batch of {} failed: {message}", members.len()));
                of_upstream.batch_failed(&message, retry);
            }
        }
        Ok(())
    }
}
