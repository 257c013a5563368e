//! Handles a batch that failed as a whole, usually before any row was run.

use std::collections::HashMap;

use super::collect::RowOutcome;
use super::upstream::batches;
use super::{BatchRun, BatchStepError, results};
use crate::client::attempt_error::{EndpointRefusal, RowFailure};
use crate::client::batch_object::{BatchFileError, BatchObject};
use crate::plan::queue::QueuedRow;

/// Returns true if a line that names no row of the part may contain an answer. `is_readable` is true if the line can be
/// parsed.
fn may_be_answer(line: &[u8], is_readable: bool) -> bool {
    let has = |field: &[u8]| memchr::memmem::find(line, field).is_some();
    has(b"\"choices\"") || !is_readable && has(results::CUSTOM_ID)
}

impl BatchRun<'_> {
    /// Reads the error file of a failed batch. The file names the rows for which the input file was refused. On some
    /// servers it also contains answers.
    pub(super) async fn collect_error_file(
        &mut self,
        index: usize,
        mut object: BatchObject,
    ) -> Result<(), BatchStepError> {
        let (_, transport) = self.upstream_of(index)?;
        let batches = batches(&transport)?;
        let file = object.error_file.clone().unwrap_or_default();
        let Some(mut rows) = self.rows_of_file(index, batches, &file).await? else {
            return self.end_failed_batch(index, &object);
        };
        let mut collection = self.open_collection(index, &object)?;
        while let Some(line) = self.next_row(index, &mut rows).await? {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let line = batches.without_key(line);
            let unreadable_bytes = collection.unreadable.len();
            let unreadable_lines = collection.unreadable_lines;
            if self.take_line(index, &mut collection, line.clone())? {
                continue;
            }
            // The line names no row of the part. It is kept as unreadable only if it may be an answer.
            let is_readable = collection.unreadable_lines == unreadable_lines;
            collection.unreadable.truncate(unreadable_bytes);
            collection.unreadable_lines = unreadable_lines;
            if may_be_answer(&line, is_readable) {
                collection.keep_unreadable(&line);
            } else {
                object.errors.extend(BatchFileError::from_line(&line));
            }
        }
        collection.unreadable_lines += rows.skipped();
        if collection.readable_rows() == 0 && collection.has_unreadable() {
            // The unreadable lines may be paid answers.
            return self.keep_unreadable_file(index, batches, &file).await;
        }
        if collection.readable_rows() == 0 {
            return self.end_failed_batch(index, &object);
        }
        for file_error in &object.errors {
            let line = file_error
                .line
                .and_then(|line| usize::try_from(line).ok()?.checked_sub(1));
            if let Some(outcome @ None) = line.and_then(|line| collection.outcomes.get_mut(line)) {
                let failure =
                    RowFailure::new(file_error.error.code.as_str(), &file_error.error.message);
                *outcome = Some(RowOutcome::Refused(failure));
            }
        }
        // Rows that the file does not name were not run, unless a line cannot be parsed.
        collection.unnamed_rows_not_run = collection.unreadable_lines == 0;
        self.record_unusable(index, &mut collection)?;
        self.close_part(index, collection, "failed")
    }

    /// Ends a failed batch: the rows of refused lines fail, all other rows return to the queue.
    pub(super) fn end_failed_batch(
        &mut self,
        index: usize,
        object: &BatchObject,
    ) -> Result<(), BatchStepError> {
        let (upstream, _) = self.upstream_of(index)?;
        let batch_failure = results::classify_batch_failure(&object.errors);
        let part = &self.journal.parts[index];
        let rows = part.progress.rows.clone();
        let tokens = part.tokens;
        let members = self.journal.members(&part.nonce)?;
        let failure_by_line: HashMap<usize, RowFailure> = batch_failure.lines.into_iter().collect();
        for (line, (member, row)) in members.iter().zip(rows).enumerate() {
            let Some(row) = row else { continue };
            let mut entry = QueuedRow {
                failed: member.failed,
                ..QueuedRow::fresh(row as usize)
            };
            match failure_by_line.get(&line) {
                Some(failure) => {
                    entry.failed += 1;
                    self.fail(upstream, entry, failure.clone());
                }
                None => {
                    self.counts.requeued_rows += 1;
                    self.upstreams[upstream].waiting.push_back(entry);
                }
            }
        }
        let enqueued_tokens: u64 = self
            .parts_of(upstream)
            .into_iter()
            .filter(|&index| self.journal.parts[index].is_enqueued())
            .map(|index| self.journal.parts[index].tokens)
            .sum();
        self.end_part(index, "failed")?;
        if let Some((reason, message)) = batch_failure.endpoint_refusal {
            let failure = RowFailure::new("failed batch", &message);
            self.upstreams[upstream]
                .batch_refused(EndpointRefusal { reason, failure }, &self.settings.retry);
            return Ok(());
        }
        let retry = &self.settings.retry;
        let upstream_state = &mut self.upstreams[upstream];
        match batch_failure.over_tokens {
            Some(stated_limit) => {
                let reduced = stated_limit
                    .filter(|stated| *stated < enqueued_tokens)
                    .unwrap_or(enqueued_tokens / 2);
                let limit = upstream_state.token_limit.unwrap_or(u64::MAX).min(reduced);
                upstream_state.token_limit = Some(limit.max(1));
                if members.len() == 1 && enqueued_tokens == tokens {
                    upstream_state.single_row_exceeds_limit(tokens, retry);
                }
            }
            None => {
                let message = batch_failure.message;
                self.progress
                    .note(&format!("a batch of {} failed: {message}", members.len()));
                upstream_state.batch_failed(&message, retry);
            }
        }
        Ok(())
    }
}
