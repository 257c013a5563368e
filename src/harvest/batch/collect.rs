//! From a batch under way to its answers in the cache, and every row accounted for.

use std::collections::HashMap;

use anyhow::Result;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::Value;

use super::journal::{PartRow, PartState, RequestFile};
use super::results::{self, RowResult};
use super::upstream::batches;
use super::{BatchStepError, Batches};
use crate::budget::dollars::Dollars;
use crate::cache::record::Timing;
use crate::client::attempt_error::{AttemptError, RefusalClaim, RowFailure};
use crate::client::batch_object;
use crate::client::batch_object::BatchObject;
use crate::client::response::completion::Completion;
use crate::client::response::error::ApiError;
use crate::harvest::answer_monitor::MonitorAlert;
use crate::harvest::attempt::EncodedAnswer;
use crate::harvest::run_error;
use crate::plan::PlannedRow;
use crate::prompt::Prompt;

/// How often a batch or a file may be "not found" before it counts as gone.
const GONE: u32 = 20;

/// Lines of a file between two looks at the progress.
const SHOW_EVERY: u64 = 500;

/// The rows of a part while its files are read.
pub(super) struct PartCollection {
    pub(super) members: Vec<PartRow>,
    /// Which member a key is.
    lines: HashMap<String, usize>,
    /// What became of each, beside those in the cache.
    pub(super) fates: Vec<Option<RowOutcome>>,
    bodies: RequestFile,
    timing: Timing,
    /// Rows that no file names were not asked.
    pub(super) rest_was_not_asked: bool,
    /// Lines that name none of its rows, and lines that name no row at all.
    pub(super) ignored: u64,
    pub(super) unreadable: Vec<u8>,
    pub(super) unreadable_lines: u64,
}

impl PartCollection {
    /// Number of rows found in its files so far that can be read.
    pub(super) fn seen(&self) -> u64 {
        let fates = self.fates.iter().flatten();
        let readable = fates.filter(|fate| !matches!(fate, RowOutcome::Unreadable { .. }));
        readable.count() as u64
    }

    /// Returns true if a row or a line cannot be read.
    pub(super) fn has_unreadable(&self) -> bool {
        let is_unreadable = |fate: &RowOutcome| matches!(fate, RowOutcome::Unreadable { .. });
        self.unreadable_lines > 0 || self.fates.iter().flatten().any(is_unreadable)
    }

    pub(super) fn keep_unreadable(&mut self, line: &[u8]) {
        self.unreadable.extend_from_slice(line);
        self.unreadable.push(b'\n');
        self.unreadable_lines += 1;
    }

    /// Returns true if several rows were found, and none that can be read.
    fn is_unreadable(&self) -> bool {
        self.seen() == 0 && self.fates.iter().flatten().count() > 1
    }
}

pub(super) enum RowOutcome {
    Answered,
    /// There is nothing in its answer, unless a later line has more.
    Blank(Box<Completion>),
    /// Its line cannot be read, unless a later one can: the file may be whole by then.
    Unreadable {
        problem: String,
        body: Bytes,
    },
    Again(RowFailure),
    Refused(RowFailure),
    Filtered(RowFailure),
    /// The endpoint says that no request can succeed.
    Claimed(RefusalClaim),
}

impl Batches<'_> {
    /// Asks how a batch is doing, and takes what it has brought if it has come to its end.
    pub(super) async fn poll(&mut self, index: usize) -> Result<(), BatchStepError> {
        let (upstream, transport) = self.lane_of(index)?;
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
        let card = match (
            BatchObject::parse(&reply.body),
            ApiError::parse(&reply.body),
        ) {
            (Some(card), _) => card,
            // An error in a good status.
            (None, error) if !error.message.is_empty() => {
                return self.batch_missing(index, &error.message);
            }
            (None, _) => {
                return Err(crate::client::attempt_error::connection_lost(
                    "malformed",
                    "the reply is no batch",
                )
                .into());
            }
        };
        self.upstreams[upstream].success();
        self.upstreams[upstream].has_batches = true;
        self.journal.parts[index]
            .live
            .status
            .clone_from(&card.status);
        match card.status.as_str() {
            "completed" | "expired" | "cancelled" => return self.take(index, &card).await,
            // What was answered before it failed is paid for.
            "failed" if card.has_answers() => return self.take(index, &card).await,
            "failed" if card.error_file.is_some() => return self.take_errors(index, card).await,
            "failed" => return self.failed(index, &card),
            // What is unknown is waited for, too.
            "cancelling" | "finalizing" => return Ok(()),
            _ => {}
        }
        let state = &self.journal.parts[index].state;
        if self.over.is_some() || matches!(state, PartState::Cancelling { .. }) {
            let cancelling = PartState::Cancelling {
                batch: batch.clone(),
            };
            if *state != cancelling {
                self.journal.set(index, cancelling)?;
            }
            match batch_object::check(api.cancel(&batch).await, now) {
                // It came to its end meanwhile.
                Err(AttemptError::Refused(_)) | Ok(_) => {}
                Err(trouble) => return Err(trouble.into()),
            }
        }
        Ok(())
    }

    /// What should be there is not; after a while that is believed.
    pub(super) fn is_missing(&mut self, index: usize, message: &str) -> Result<(), AttemptError> {
        let live = &mut self.journal.parts[index].live;
        live.gone += 1;
        match live.gone < GONE {
            true => Err(crate::client::attempt_error::connection_lost(
                "gone", message,
            )),
            false => Ok(()),
        }
    }

    /// The endpoint does not know a batch of ours.
    fn batch_missing(&mut self, index: usize, message: &str) -> Result<(), BatchStepError> {
        self.is_missing(index, message)?;
        self.progress
            .note(&format!("the endpoint has lost a batch: {message}"));
        let taking = self.open(index, &BatchObject::default())?;
        self.close(index, taking, "gone")
    }

    /// Records what both files of a batch hold, and accounts for every row.
    async fn take(&mut self, index: usize, card: &BatchObject) -> Result<(), BatchStepError> {
        let (upstream, transport) = self.lane_of(index)?;
        let has_file = card.output_file.is_some() || card.error_file.is_some();
        let has_lost_answers = !has_file && card.has_answers();
        if has_lost_answers {
            // The files may be on their way.
            self.is_missing(index, "a batch that has ended has no file")?;
            // If another batch brought answers, only the rows of this one are lost.
            let is_completed = card.status == "completed";
            if is_completed
                && !self.upstreams[upstream].has_answered
                && self.plan.answered[upstream] == 0
            {
                let batch = self.journal.parts[index].batch().unwrap_or_default();
                self.upstreams[upstream].stop(run_error::no_results(batch));
                return Ok(());
            }
        }
        for mistake in &card.errors {
            let message = &mistake.error.message;
            self.progress
                .note(&format!("a batch has ended with an error: {message}"));
        }
        let mut taking = self.open(index, card)?;
        let mut taken = 0;
        // The answers first: a row that is in both files has one.
        for file in [&card.output_file, &card.error_file].into_iter().flatten() {
            let batches = batches(&transport)?;
            let Some(mut rows) = self.rows_of_file(index, batches, file).await? else {
                continue;
            };
            let (mut of_file, mut understood) = (0, 0);
            while let Some(line) = self.next_row(index, &mut rows).await? {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                of_file += 1;
                let line = batches.without_key(line);
                understood += u64::from(self.take_line(index, &mut taking, line)?);
                taken += 1;
                if taken % SHOW_EVERY == 0 {
                    self.show();
                }
            }
            taking.unreadable_lines += rows.skipped();
            let is_unreadable = understood == 0 || taking.is_unreadable();
            if of_file + rows.skipped() > 0 && is_unreadable {
                return self.keep_unreadable_file(index, batches, file).await;
            }
        }
        // Without a number that can be true, all of them.
        let members = taking.members.len() as u64;
        let told = if card.status == "completed" {
            Some(members)
        } else {
            card.rows.filter(|rows| (1..=members).contains(rows))
        };
        if let Some(told) = told.filter(|told| *told > taking.seen()) {
            // The file may not be whole yet.
            let message = format!("its files hold {} of {told} rows", taking.seen());
            self.is_missing(index, &message)?;
            self.progress
                .note(&format!("a batch has ended, and {message}"));
        }
        self.record_rest(index, &mut taking)?;
        // What was answered and is nowhere may be billed.
        let status = if has_lost_answers && card.status != "completed" {
            "gone"
        } else {
            &card.status
        };
        self.close(index, taking, status)
    }

    /// Records the answers that are empty, or whose lines cannot be read: they were paid for.
    pub(super) fn record_rest(&mut self, index: usize, taking: &mut PartCollection) -> Result<()> {
        for row in 0..taking.fates.len() {
            let completion = match taking.fates[row].take() {
                Some(RowOutcome::Blank(completion)) => *completion,
                Some(RowOutcome::Unreadable { problem, body }) => {
                    self.unreadable.keep(&taking.members[row].key, &body)?;
                    Completion::unreadable(problem)
                }
                other => {
                    taking.fates[row] = other;
                    continue;
                }
            };
            self.answered(index, taking, row, completion)?;
            taking.fates[row] = Some(RowOutcome::Answered);
        }
        Ok(())
    }

    pub(super) fn open(&self, index: usize, card: &BatchObject) -> Result<PartCollection> {
        let nonce = &self.journal.parts[index].nonce;
        let members = self.journal.members(nonce)?;
        let created = card
            .created_at
            .and_then(|at| Timestamp::from_second(at).ok());
        let seconds = card
            .ended_at
            .zip(card.created_at)
            .map_or(0, |(to, from)| to - from);
        Ok(PartCollection {
            lines: members
                .iter()
                .enumerate()
                .map(|(line, member)| (member.key.clone(), line))
                .collect(),
            fates: members.iter().map(|_| None).collect(),
            bodies: self.journal.bodies(nonce)?,
            timing: Timing {
                sent_at: Timing::stamp(created.unwrap_or_else(|| self.clock.now())),
                latency_ms: u64::try_from(seconds).unwrap_or(0) * 1_000,
                attempts: 1,
            },
            ignored: 0,
            rest_was_not_asked: false,
            unreadable: Vec::new(),
            unreadable_lines: 0,
            members,
        })
    }

    /// Takes a line; true if it is of one of the part's rows. Only answers have an effect at once: the file
    /// may break off, and is read again then.
    pub(super) fn take_line(
        &mut self,
        index: usize,
        taking: &mut PartCollection,
        line: Bytes,
    ) -> Result<bool> {
        let mut is_ours = false;
        for outcome in results::read(&line) {
            match outcome {
                Some(outcome) => is_ours |= self.take_outcome(index, taking, outcome)?,
                None => taking.keep_unreadable(&line),
            }
        }
        Ok(is_ours)
    }

    fn take_outcome(
        &mut self,
        index: usize,
        taking: &mut PartCollection,
        outcome: RowResult,
    ) -> Result<bool> {
        let RowResult {
            custom_id,
            mut result,
        } = outcome;
        if let Err(trouble) = &mut result {
            let (_, transport) = self.lane_of(index)?;
            trouble.clean(&transport.secrets());
        }
        let row = taking.lines.get(&custom_id).copied();
        // An answer counts, also after a line that has none.
        let is_open = |row: &usize| match &taking.fates[*row] {
            None => true,
            Some(RowOutcome::Answered) => false,
            Some(_) => result.is_ok(),
        };
        let Some(row) = row.filter(is_open) else {
            taking.ignored += 1;
            return Ok(row.is_some());
        };
        let fate = match result {
            Ok(completion) if completion.has_content() => {
                self.answered(index, taking, row, *completion)?;
                RowOutcome::Answered
            }
            Ok(completion) => RowOutcome::Blank(completion),
            Err(AttemptError::Unreadable { problem, body }) => {
                RowOutcome::Unreadable { problem, body }
            }
            Err(AttemptError::Refused(failure)) => RowOutcome::Refused(failure),
            Err(AttemptError::Filtered(failure)) => RowOutcome::Filtered(failure),
            Err(AttemptError::Transient { failure, .. }) => RowOutcome::Again(failure),
            Err(AttemptError::Throttled { message, .. }) => {
                RowOutcome::Again(RowFailure::new("http 429", &message))
            }
            Err(AttemptError::KeyRenewed) => {
                RowOutcome::Again(RowFailure::new("http 401", "the key had expired"))
            }
            Err(AttemptError::Claim(claim)) => RowOutcome::Claimed(claim),
        };
        taking.fates[row] = Some(fate);
        Ok(true)
    }

    fn answered(
        &mut self,
        index: usize,
        taking: &mut PartCollection,
        line: usize,
        mut completion: Completion,
    ) -> Result<()> {
        if taking.members[line].is_answered(self.cache) {
            return Ok(());
        }
        let (upstream, transport) = self.lane_of(index)?;
        completion.clean(&transport.secrets());
        let asking = &self.plan.templates[upstream];
        let member = &taking.members[line];
        let body: Value = taking.bodies.read(member)?;
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
            ..taking.timing.clone()
        };
        let bound = member.bound();
        let answered = EncodedAnswer::new(asking, &row, &prompt, body, bound, completion, timing)?;
        let (bill, price) = (answered.bill(), asking.endpoint.price.clone());
        let wants_logprobs = asking.wants_logprobs();
        let append = |cache: &crate::cache::Cache| {
            cache
                .append_encoded(&answered.sealed)
                .map_err(|error| run_error::not_recorded(error, cache.safe_len()))
        };
        // A kill in between counts it twice: once as spent, once as held for a row without a record.
        let held = Dollars::at_least(member.usd);
        let unraised = Dollars::at_least(bound.cost(&price).unwrap_or(member.usd));
        let account = &mut self.books.account;
        account.settle_batch(held, unraised, 1, bill, &price)?;
        append(self.cache)?;
        let part = &mut self.journal.parts[index];
        part.live.held -= member.usd;
        let is_planned = part.live.rows.get(line).copied().flatten().is_some();
        if is_planned {
            self.summary.add(&answered.seen, wants_logprobs)
        } else {
            self.tally.besides += 1
        }
        let upstream = &mut self.upstreams[upstream];
        upstream.has_answered = true;
        for word in upstream.watch.check(&answered.seen) {
            match word {
                MonitorAlert::Note(text) => self.summary.warn(text),
                MonitorAlert::Stop(error) => upstream.stop(error),
            }
        }
        Ok(())
    }
}

/// Only compared with a date in `Retry-After`, which these replies have no use for.
pub(super) fn now() -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH
}
