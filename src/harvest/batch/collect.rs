//! Polls a batch and collects its results: records the answers and determines the outcome of every row.

use std::collections::HashMap;

use anyhow::Result;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::Value;

use super::journal::{PartRow, PartState, RequestFile};
use super::results::{self, RowResult};
use super::upstream::batches;
use super::{BatchRun, BatchStepError};
use crate::budget::dollars::Dollars;
use crate::cache::record::Timing;
use crate::client::attempt_error::{AttemptError, EndpointRefusal, RowFailure};
use crate::client::batch_object;
use crate::client::batch_object::BatchObject;
use crate::client::response::completion::Completion;
use crate::client::response::error::ApiError;
use crate::harvest::attempt::EncodedAnswer;
use crate::harvest::run_error;
use crate::plan::PlannedRow;
use crate::prompt::Prompt;

/// Number of failed attempts to find a batch or a complete file after which the part is closed without it.
const MAX_NOT_FOUND: u32 = 20;

/// Number of result lines between two progress updates.
const SHOW_EVERY: u64 = 500;

/// Rows and outcomes of a part while its result files are read.
pub(super) struct PartCollection {
    pub(super) members: Vec<PartRow>,
    /// Index of each key in `members`.
    index_by_key: HashMap<String, usize>,
    /// Outcome of each row; None if no line read so far names the row.
    pub(super) outcomes: Vec<Option<RowOutcome>>,
    bodies: RequestFile,
    timing: Timing,
    /// True if the endpoint did not run the rows that no file names.
    pub(super) unnamed_rows_not_run: bool,
    /// Number of results that name no row of the part, or whose row has an outcome already. An answer still replaces
    /// any other outcome.
    pub(super) ignored: u64,
    /// Text of the lines from which no row can be parsed.
    pub(super) unreadable: Vec<u8>,
    /// Number of lines from which no row can be parsed, including those too long to keep.
    pub(super) unreadable_lines: u64,
}

impl PartCollection {
    /// Returns the number of rows found so far whose lines can be parsed.
    pub(super) fn readable_rows(&self) -> u64 {
        let outcomes = self.outcomes.iter().flatten();
        let readable = outcomes.filter(|outcome| !matches!(outcome, RowOutcome::Unreadable { .. }));
        readable.count() as u64
    }

    /// Returns true if at least one line cannot be parsed.
    pub(super) fn has_unreadable(&self) -> bool {
        let is_unreadable = |outcome: &RowOutcome| matches!(outcome, RowOutcome::Unreadable { .. });
        self.unreadable_lines > 0 || self.outcomes.iter().flatten().any(is_unreadable)
    }

    /// Keeps a line from which no row can be parsed.
    pub(super) fn keep_unreadable(&mut self, line: &[u8]) {
        self.unreadable.extend_from_slice(line);
        self.unreadable.push(b'\n');
        self.unreadable_lines += 1;
    }

    /// Returns true if at least two rows were found and none of them can be parsed.
    fn is_unreadable(&self) -> bool {
        self.readable_rows() == 0 && self.outcomes.iter().flatten().count() > 1
    }
}

/// Outcome of a row in the result files of its batch.
pub(super) enum RowOutcome {
    Answered,
    /// The answer is empty; a later line may have another answer to the row.
    Empty(Box<Completion>),
    /// The line cannot be parsed; a later line may have an answer to the row.
    Unreadable {
        problem: String,
        body: Bytes,
    },
    /// Transient failure: the row returns to the queue if it has attempts left.
    Retry(RowFailure),
    /// The endpoint refused the row, which therefore fails.
    Refused(RowFailure),
    /// A content filter refused the row.
    Filtered(RowFailure),
    /// The endpoint says that no request can succeed.
    EndpointRefused(EndpointRefusal),
}

impl RowOutcome {
    /// Returns true if the row may be billed although no answer to it was recorded.
    pub(super) fn may_be_billed(&self) -> bool {
        match self {
            RowOutcome::Retry(failure)
            | RowOutcome::Refused(failure)
            | RowOutcome::Filtered(failure) => failure.may_be_billed,
            RowOutcome::EndpointRefused(refusal) => refusal.failure.may_be_billed,
            RowOutcome::Answered | RowOutcome::Empty(_) | RowOutcome::Unreadable { .. } => false,
        }
    }
}

impl BatchRun<'_> {
    /// Requests the status of a batch, and collects its results if it has ended.
    pub(super) async fn poll(&mut self, index: usize) -> Result<(), BatchStepError> {
        let (upstream, transport) = self.upstream_of(index)?;
        let api = batches(&transport)?;
        let Some(batch) = self.journal.parts[index].batch().map(String::from) else {
            return Ok(());
        };
        let now = self.clock.now().into();
        let reply = match batch_object::check(api.retrieve(&batch).await, now) {
            Err(AttemptError::Refused(failure)) => {
                return self.batch_missing(index, &failure.message);
            }
            reply => reply?,
        };
        let object = match (
            BatchObject::parse(&reply.body),
            ApiError::parse(&reply.body),
        ) {
            (Some(object), _) => object,
            // The endpoint reports an error with a success status.
            (None, error) if !error.message.is_empty() => {
                return self.batch_missing(index, &error.message);
            }
            (None, _) => {
                return Err(crate::client::attempt_error::possibly_billed(
                    "malformed",
                    "the reply is not a batch",
                )
                .into());
            }
        };
        self.upstreams[upstream].success();
        self.upstreams[upstream].has_batches = true;
        self.journal.parts[index]
            .progress
            .status
            .clone_from(&object.status);
        match object.status.as_str() {
            "completed" | "expired" | "cancelled" => {
                return self.collect_results(index, &object).await;
            }
            // The batch failed after some rows were answered, and these answers were paid for.
            "failed" if object.has_answers() => return self.collect_results(index, &object).await,
            "failed" if object.error_file.is_some() => {
                return self.collect_error_file(index, object).await;
            }
            "failed" => return self.end_failed_batch(index, &object),
            "cancelling" | "finalizing" => return Ok(()),
            // Any other status, known or unknown, means that the batch has not ended.
            _ => {}
        }
        let state = &self.journal.parts[index].state;
        if self.deadline_passed_at.is_some() || matches!(state, PartState::Cancelling { .. }) {
            let cancelling = PartState::Cancelling {
                batch: batch.clone(),
            };
            if *state != cancelling {
                self.journal.set(index, cancelling)?;
            }
            match batch_object::check(api.cancel(&batch).await, now) {
                // A refusal means that the batch has ended meanwhile.
                Err(AttemptError::Refused(_)) | Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Counts a missing or incomplete batch or file.
    ///
    /// # Errors
    /// Before the [`MAX_NOT_FOUND`]th time, so that the step is retried.
    pub(super) fn retry_missing(
        &mut self,
        index: usize,
        message: &str,
    ) -> Result<(), AttemptError> {
        let progress = &mut self.journal.parts[index].progress;
        progress.not_found += 1;
        if progress.not_found < MAX_NOT_FOUND {
            Err(crate::client::attempt_error::possibly_billed(
                "gone", message,
            ))
        } else {
            Ok(())
        }
    }

    /// Handles a batch that the endpoint does not find: retries, and finally closes its part without results.
    fn batch_missing(&mut self, index: usize, message: &str) -> Result<(), BatchStepError> {
        self.retry_missing(index, message)?;
        self.progress
            .note(&format!("the endpoint no longer finds a batch: {message}"));
        let collection = self.open_collection(index, &BatchObject::default())?;
        self.close_part(index, collection, "gone")
    }

    /// Records the answers in both files of a batch and determines the outcome of every row.
    async fn collect_results(
        &mut self,
        index: usize,
        object: &BatchObject,
    ) -> Result<(), BatchStepError> {
        let (upstream, transport) = self.upstream_of(index)?;
        let has_file = object.output_file.is_some() || object.error_file.is_some();
        let has_lost_answers = !has_file && object.has_answers();
        if has_lost_answers {
            // The files may not be visible yet.
            self.retry_missing(index, "a batch that has ended has no file")?;
            // An upstream without any answer so far stops. Otherwise only the rows of this batch are lost.
            let is_completed = object.status == "completed";
            if is_completed
                && !self.upstreams[upstream].has_answered
                && self.plan.answered[upstream] == 0
            {
                let batch = self.journal.parts[index].batch().unwrap_or_default();
                self.upstreams[upstream].stop(run_error::no_results(batch));
                return Ok(());
            }
        }
        for file_error in &object.errors {
            let message = &file_error.error.message;
            self.progress
                .note(&format!("a batch has ended with an error: {message}"));
        }
        let mut collection = self.open_collection(index, object)?;
        let mut lines_read = 0;
        // The output file is read first: a row that is in both files has an answer.
        for file in [&object.output_file, &object.error_file]
            .into_iter()
            .flatten()
        {
            let batches = batches(&transport)?;
            let Some(mut rows) = self.rows_of_file(index, batches, file).await? else {
                continue;
            };
            let mut line_count = 0;
            let mut own_lines = 0;
            while let Some(line) = self.next_row(index, &mut rows).await? {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                line_count += 1;
                let line = batches.without_key(line);
                own_lines += u64::from(self.take_line(index, &mut collection, line)?);
                lines_read += 1;
                if lines_read % SHOW_EVERY == 0 {
                    self.show_progress();
                }
            }
            collection.unreadable_lines += rows.skipped();
            let is_unreadable = own_lines == 0 || collection.is_unreadable();
            if line_count + rows.skipped() > 0 && is_unreadable {
                return self.keep_unreadable_file(index, batches, file).await;
            }
        }
        // A completed batch must have every row. Any other batch must have the number of rows that the endpoint
        // reports, if that number is plausible.
        let members = collection.members.len() as u64;
        let expected = if object.status == "completed" {
            Some(members)
        } else {
            object.rows.filter(|rows| (1..=members).contains(rows))
        };
        if let Some(expected) = expected.filter(|expected| *expected > collection.readable_rows()) {
            // The file may be incomplete.
            let message = format!(
                "its files hold {} of {expected} rows",
                collection.readable_rows()
            );
            self.retry_missing(index, &message)?;
            self.progress
                .note(&format!("a batch has ended, and {message}"));
        }
        self.record_unusable(index, &mut collection)?;
        // The status `gone` marks the rows as possibly billed: the batch has answers that are in no file.
        let status = if has_lost_answers && object.status != "completed" {
            "gone"
        } else {
            &object.status
        };
        self.close_part(index, collection, status)
    }

    /// Records empty answers and lines that cannot be parsed: they were paid for.
    pub(super) fn record_unusable(
        &mut self,
        index: usize,
        collection: &mut PartCollection,
    ) -> Result<()> {
        for row in 0..collection.outcomes.len() {
            let completion = match collection.outcomes[row].take() {
                Some(RowOutcome::Empty(completion)) => *completion,
                Some(RowOutcome::Unreadable { problem, body }) => {
                    self.unreadable.save(&collection.members[row].key, &body)?;
                    Completion::unreadable(problem)
                }
                other => {
                    collection.outcomes[row] = other;
                    continue;
                }
            };
            self.record_answer(index, collection, row, completion)?;
            collection.outcomes[row] = Some(RowOutcome::Answered);
        }
        Ok(())
    }

    /// Opens the files of a part in order to collect the results of its batch.
    pub(super) fn open_collection(
        &self,
        index: usize,
        object: &BatchObject,
    ) -> Result<PartCollection> {
        let nonce = &self.journal.parts[index].nonce;
        let members = self.journal.members(nonce)?;
        let created = object
            .created_at
            .and_then(|seconds| Timestamp::from_second(seconds).ok());
        let seconds = object
            .ended_at
            .zip(object.created_at)
            .map_or(0, |(ended, created)| ended.saturating_sub(created));
        Ok(PartCollection {
            index_by_key: members
                .iter()
                .enumerate()
                .map(|(line, member)| (member.key.clone(), line))
                .collect(),
            outcomes: members.iter().map(|_| None).collect(),
            bodies: self.journal.bodies(nonce)?,
            timing: Timing {
                sent_at: Timing::stamp(created.unwrap_or_else(|| self.clock.now())),
                latency_ms: u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000),
                attempts: 1,
            },
            ignored: 0,
            unnamed_rows_not_run: false,
            unreadable: Vec::new(),
            unreadable_lines: 0,
            members,
        })
    }

    /// Parses a line and sets the outcomes of its rows. Returns true if it names a row of the part. Only answers are
    /// recorded immediately; if the download breaks off, the file is read again for the other outcomes.
    pub(super) fn take_line(
        &mut self,
        index: usize,
        collection: &mut PartCollection,
        line: Bytes,
    ) -> Result<bool> {
        let mut names_row = false;
        for row_result in results::parse_line(&line) {
            match row_result {
                Some(row_result) => {
                    names_row |= self.take_row_result(index, collection, row_result)?
                }
                None => collection.keep_unreadable(&line),
            }
        }
        Ok(names_row)
    }

    /// Sets the outcome of one row. Returns true if the row belongs to the part.
    fn take_row_result(
        &mut self,
        index: usize,
        collection: &mut PartCollection,
        row_result: RowResult,
    ) -> Result<bool> {
        let RowResult {
            custom_id,
            mut result,
        } = row_result;
        if let Err(error) = &mut result {
            let (_, transport) = self.upstream_of(index)?;
            error.clean(&transport.secrets());
        }
        let row = collection.index_by_key.get(&custom_id).copied();
        // An answer replaces an earlier outcome that is not an answer.
        let is_open = |row: &usize| match &collection.outcomes[*row] {
            None => true,
            Some(RowOutcome::Answered) => false,
            Some(_) => result.is_ok(),
        };
        let Some(row) = row.filter(is_open) else {
            collection.ignored += 1;
            return Ok(row.is_some());
        };
        let outcome = match result {
            Ok(completion) if completion.has_content() => {
                self.record_answer(index, collection, row, *completion)?;
                RowOutcome::Answered
            }
            Ok(completion) => RowOutcome::Empty(completion),
            Err(AttemptError::Unreadable { problem, body }) => {
                RowOutcome::Unreadable { problem, body }
            }
            Err(AttemptError::Refused(failure)) => RowOutcome::Refused(failure),
            Err(AttemptError::Filtered(failure)) => RowOutcome::Filtered(failure),
            Err(AttemptError::Transient { failure, .. }) => RowOutcome::Retry(failure),
            Err(AttemptError::Throttled { message, .. }) => {
                RowOutcome::Retry(RowFailure::new("http 429", &message))
            }
            Err(AttemptError::KeyRenewed) => {
                RowOutcome::Retry(RowFailure::new("http 401", "the key had expired"))
            }
            Err(AttemptError::EndpointRefused(refusal)) => RowOutcome::EndpointRefused(refusal),
        };
        collection.outcomes[row] = Some(outcome);
        Ok(true)
    }

    /// Records an answer, charges it and counts it.
    fn record_answer(
        &mut self,
        index: usize,
        collection: &mut PartCollection,
        line: usize,
        mut completion: Completion,
    ) -> Result<()> {
        if collection.members[line].is_answered(self.cache) {
            return Ok(());
        }
        let (upstream, transport) = self.upstream_of(index)?;
        completion.clean(&transport.secrets());
        let template = &self.plan.templates[upstream];
        let member = &collection.members[line];
        let body: Value = collection.bodies.read_body(member)?;
        let row = PlannedRow {
            prompt: 0,
            sample: member.sample,
            key: member.key.clone(),
            old_key: None,
            bytes: 0,
        };
        let prompt = Prompt::plain(member.prompt_id.clone(), Vec::new());
        let timing = Timing {
            attempts: member.failed + 1,
            ..collection.timing.clone()
        };
        let bound = member.bound();
        let answered =
            EncodedAnswer::new(template, &row, &prompt, body, bound, completion, timing)?;
        let charge = answered.charge();
        let price = template.endpoint.price.clone();
        let wants_logprobs = template.wants_logprobs();
        // A kill between the two writes counts the row twice (spent and reserved), never zero times.
        let reserved = Dollars::at_least(member.usd);
        let unraised = Dollars::at_least(bound.cost(&price).unwrap_or(member.usd));
        let account = &mut self.run_files.account;
        account.settle_batch(reserved, unraised, 1, charge, &price)?;
        let cache = self.cache;
        cache
            .append_encoded(&answered.encoded)
            .map_err(|error| run_error::not_recorded(error, cache.intact_len()))?;
        let part = &mut self.journal.parts[index];
        part.progress.unsettled_usd -= member.usd;
        let is_planned = part.progress.rows.get(line).copied().flatten().is_some();
        if is_planned {
            self.summary.add(&answered.facts, wants_logprobs)
        } else {
            self.counts.unplanned_answers += 1
        }
        let upstream = &mut self.upstreams[upstream];
        upstream.has_answered = true;
        let facts = &answered.facts;
        if let Some(error) = upstream.monitor.check_and_warn(facts, &mut self.summary) {
            upstream.stop(error);
        }
        Ok(())
    }
}
