//! From a batch under way to its answers in the cache, and every row accounted for.

use std::collections::HashMap;
use std::io::Write;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use serde_json::Value;

use super::api::{self, BatchApi, Card, Download, Lines};
use super::journal::{Bodies, Member, State};
use super::lane::batches;
use super::results::{self, Outcome};
use super::{Batches, Halt};
use crate::cache::record::Timing;
use crate::harvest::attempt::Answered;
use crate::harvest::budget::{Bill, Dollars};
use crate::harvest::failures::FailedRow;
use crate::harvest::plan::Row;
use crate::harvest::queue::Entry;
use crate::harvest::reply::Completion;
use crate::harvest::reply::error::ApiError;
use crate::harvest::retry::{self, Claim, Failure, Reason, Trouble};
use crate::harvest::unanswered::{Kind, Line};
use crate::harvest::watch::Word;
use crate::harvest::{stop, unreadable};
use crate::prompt::Prompt;

/// How often a batch or a file may be "not found" before it counts as gone.
const GONE: u32 = 20;

/// Rows of a batch that are all refused in the same words: it is no matter of the rows.
const SAME_REFUSALS: usize = 5;

/// Lines of a file between two looks at the progress.
const SHOW_EVERY: u64 = 500;

/// In bytes, in any of its forms.
const LONGEST_KEY: usize = 16 << 10;

/// The rows of a part while its files are read.
struct Taking {
    members: Vec<Member>,
    /// Which member a key is.
    lines: HashMap<String, usize>,
    /// What became of each, beside those in the cache.
    fates: Vec<Option<Fate>>,
    bodies: Bodies,
    timing: Timing,
    /// Lines that name none of its rows, and lines that name no row at all.
    ignored: u64,
    unreadable: Vec<u8>,
    unreadable_lines: u64,
}

enum Fate {
    Answered,
    Again(Failure),
    Refused(Failure),
    Filtered(Failure),
    /// The endpoint says that no request can succeed.
    Claimed(Claim),
}

impl Batches<'_> {
    /// Asks how a batch is doing, and takes what it has brought if it has come to its end.
    pub(super) async fn look_at(&mut self, index: usize) -> Result<(), Halt> {
        let (lane, transport) = self.lane_of(index)?;
        let api = batches(&transport)?;
        let Some(batch) = self.journal.parts[index].batch().map(String::from) else {
            return Ok(());
        };
        let now = self.clock.now().into();
        let reply = match api::check(api.retrieve(&batch).await, now) {
            Err(Trouble::Refused(failure)) => return self.gone(index, &failure.message),
            reply => reply?,
        };
        let card = match (Card::parse(&reply.body), ApiError::parse(&reply.body)) {
            (Some(card), _) => card,
            // An error in a good status.
            (None, error) if !error.message.is_empty() => return self.gone(index, &error.message),
            (None, _) => return Err(retry::lost("malformed", "the reply is no batch").into()),
        };
        self.lanes[lane].success();
        self.journal.parts[index]
            .live
            .status
            .clone_from(&card.status);
        match card.status.as_str() {
            "completed" | "expired" | "cancelled" => return self.take(index, &card).await,
            "failed" => return self.failed(index, &card),
            // What is unknown is waited for, too.
            "cancelling" | "finalizing" => return Ok(()),
            _ => {}
        }
        let state = &self.journal.parts[index].state;
        if self.over.is_some() || matches!(state, State::Cancelling { .. }) {
            let cancelling = State::Cancelling {
                batch: batch.clone(),
            };
            if *state != cancelling {
                self.journal.set(index, cancelling)?;
            }
            match api::check(api.cancel(&batch).await, now) {
                // It came to its end meanwhile.
                Err(Trouble::Refused(_)) | Ok(_) => {}
                Err(trouble) => return Err(trouble.into()),
            }
        }
        Ok(())
    }

    /// What should be there is not; after a while that is believed.
    fn is_gone(&mut self, index: usize, message: &str) -> Result<(), Trouble> {
        let live = &mut self.journal.parts[index].live;
        live.gone += 1;
        match live.gone < GONE {
            true => Err(retry::lost("gone", message)),
            false => Ok(()),
        }
    }

    /// The endpoint does not know a batch of ours.
    fn gone(&mut self, index: usize, message: &str) -> Result<(), Halt> {
        self.is_gone(index, message)?;
        self.progress
            .note(&format!("the endpoint has lost a batch: {message}"));
        let taking = self.open(index, &Card::default())?;
        self.close(index, taking, "gone")
    }

    /// Records what both files of a batch hold, and accounts for every row.
    async fn take(&mut self, index: usize, card: &Card) -> Result<(), Halt> {
        let (_, transport) = self.lane_of(index)?;
        if card.status == "completed" && card.output_file.is_none() && card.error_file.is_none() {
            // The files may be on their way.
            self.is_gone(index, "a completed batch has no file")?;
        }
        let mut taking = self.open(index, card)?;
        let mut taken = 0;
        // The answers first: a row that is in both files has one.
        for file in [&card.output_file, &card.error_file].into_iter().flatten() {
            let batches = batches(&transport)?;
            let download = batches.content(file).await;
            let pieces = match download.map_err(retry::classify_fault)? {
                Download::Content(pieces) => pieces,
                Download::Refused(reply) => match api::check(Ok(reply), now()) {
                    Err(Trouble::Refused(failure)) => {
                        self.is_gone(index, &failure.message)?;
                        // Its rows are in neither file.
                        continue;
                    }
                    Err(trouble) => return Err(trouble.into()),
                    Ok(_) => continue,
                },
            };
            let mut lines = Lines::new(pieces);
            let (mut of_file, mut understood) = (0, 0);
            while let Some(line) = lines.next().await.map_err(retry::classify_fault)? {
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
            if of_file > 0 && understood == 0 {
                return self.keep_unreadable_file(index, batches, file).await;
            }
        }
        self.close(index, taking, &card.status)
    }

    /// No line of a results file is one of ours: what was paid for must not be bought again. The file is
    /// kept, and the lane stops; the batch is looked at again by the next run.
    async fn keep_unreadable_file(
        &mut self,
        index: usize,
        batches: &dyn BatchApi,
        file: &str,
    ) -> Result<(), Halt> {
        let (lane, _) = self.lane_of(index)?;
        let folder = unreadable::dir(&self.config.run_dir);
        crate::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}.results", self.journal.parts[index].nonce));
        let mut kept = crate::fs::Whole::create(&path)?;
        if let Download::Content(mut pieces) =
            batches.content(file).await.map_err(retry::classify_fault)?
        {
            let could_not = "could not keep a results file";
            let mut held = Vec::new();
            while let Some(piece) = pieces.next().await {
                held.extend_from_slice(&piece.map_err(retry::classify_fault)?);
                held = batches.without_key(held.into()).into();
                // A key may begin in one piece and end in the next one.
                let sure = held.len().saturating_sub(LONGEST_KEY);
                kept.write_all(&held[..sure]).context(could_not)?;
                held.drain(..sure);
            }
            kept.write_all(&held).context(could_not)?;
        }
        kept.commit(true)?;
        self.lanes[lane].stop(stop::unreadable_results(&path));
        Ok(())
    }

    fn open(&self, index: usize, card: &Card) -> Result<Taking> {
        let nonce = &self.journal.parts[index].nonce;
        let members = self.journal.members(nonce)?;
        let created = card
            .created_at
            .and_then(|at| Timestamp::from_second(at).ok());
        let seconds = card
            .ended_at
            .zip(card.created_at)
            .map_or(0, |(to, from)| to - from);
        Ok(Taking {
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
            unreadable: Vec::new(),
            unreadable_lines: 0,
            members,
        })
    }

    /// Takes a line; true if it is of one of the part's rows. Only answers have an effect at once: the file
    /// may break off, and is read again then.
    fn take_line(&mut self, index: usize, taking: &mut Taking, line: Bytes) -> Result<bool> {
        let Some(Outcome { custom_id, result }) = results::read(&line) else {
            taking.unreadable.extend_from_slice(&line);
            taking.unreadable.push(b'\n');
            taking.unreadable_lines += 1;
            return Ok(false);
        };
        let row = taking.lines.get(&custom_id).copied();
        let Some(row) = row.filter(|row| taking.fates[*row].is_none()) else {
            taking.ignored += 1;
            return Ok(row.is_some());
        };
        let fate = match result {
            Ok(completion) => {
                self.answered(index, taking, row, *completion)?;
                Fate::Answered
            }
            Err(Trouble::Unreadable { problem, body }) => {
                let key = &taking.members[row].key;
                self.unreadable.keep(key, &body)?;
                self.answered(index, taking, row, Completion::unreadable(problem))?;
                Fate::Answered
            }
            Err(Trouble::Refused(failure)) => Fate::Refused(failure),
            Err(Trouble::Filtered(failure)) => Fate::Filtered(failure),
            Err(Trouble::Transient { failure, .. }) => Fate::Again(failure),
            Err(Trouble::Throttled { message, .. }) => {
                Fate::Again(Failure::new("http 429", &message))
            }
            Err(Trouble::KeyRenewed) => {
                Fate::Again(Failure::new("http 401", "the key had expired"))
            }
            Err(Trouble::Claim(claim)) => Fate::Claimed(claim),
        };
        taking.fates[row] = Some(fate);
        Ok(true)
    }

    fn answered(
        &mut self,
        index: usize,
        taking: &mut Taking,
        line: usize,
        completion: Completion,
    ) -> Result<()> {
        if taking.members[line].is_answered(self.cache) {
            return Ok(());
        }
        let (lane, _) = self.lane_of(index)?;
        let asking = &self.plan.askings[lane];
        let member = &taking.members[line];
        let body: Value = taking.bodies.read(member)?;
        let row = Row {
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
        let answered = Answered::new(asking, &row, &prompt, body, bound, completion, timing)?;
        let (bill, price) = (answered.bill(), asking.lane.price.clone());
        let wants_logprobs = asking.wants_logprobs();
        let append = |cache: &crate::cache::Cache| {
            cache
                .append_sealed(&answered.sealed)
                .map_err(|error| stop::not_recorded(error, cache.safe()))
        };
        // A kill in between counts it twice: once as spent, once as held for a row without a record.
        let held = Dollars::at_least(member.usd);
        self.books.account.settle_of_batch(held, 1, bill, &price)?;
        append(self.cache)?;
        let part = &mut self.journal.parts[index];
        part.live.held -= member.usd;
        let is_planned = part.live.rows.get(line).copied().flatten().is_some();
        match is_planned {
            true => self.summary.add(&answered.seen, wants_logprobs),
            false => self.tally.besides += 1,
        }
        let lane = &mut self.lanes[lane];
        lane.has_answered = true;
        for word in lane.watch.see(&answered.seen) {
            match word {
                Word::Note(text) => self.summary.warn(text),
                Word::Stop(error) => lane.stop(error),
            }
        }
        Ok(())
    }

    /// Every row of the part ends, or waits again; and so the part ends.
    fn close(&mut self, index: usize, taking: Taking, status: &str) -> Result<(), Halt> {
        let (lane, _) = self.lane_of(index)?;
        let was_cancelled = matches!(self.journal.parts[index].state, State::Cancelling { .. });
        if taking.unreadable_lines > 0 {
            let nonce = &self.journal.parts[index].nonce;
            let file = self.unreadable.keep(nonce, &taking.unreadable)?;
            self.progress.note(&format!(
                "{} lines of a batch cannot be read: they are kept in {}",
                taking.unreadable_lines,
                file.display()
            ));
        }
        let answers = taking
            .members
            .iter()
            .filter(|member| member.is_answered(self.cache));
        let has_answers = answers.count() > 0;
        let mut closing = Closing::default();
        for (line, (member, fate)) in taking.members.iter().zip(taking.fates).enumerate() {
            if member.is_answered(self.cache) {
                continue;
            }
            // A line that cannot be read may be this row's, which then was paid for.
            let may_be_unreadable = fate.is_none() && taking.unreadable_lines > 0;
            let may_be_billed = match &fate {
                Some(Fate::Again(failure) | Fate::Refused(failure) | Fate::Filtered(failure)) => {
                    failure.may_be_billed
                }
                Some(Fate::Answered | Fate::Claimed(_)) => false,
                // What a batch did not come to is not billed; what it lost may be.
                None => status != "expired" && status != "cancelled",
            };
            if may_be_billed {
                closing.lost += 1;
                closing.lost_usd += member.usd;
            }
            let row = self.journal.parts[index].live.rows.get(line).copied();
            let Some(row) = row.flatten() else {
                continue;
            };
            let mut entry = Entry {
                failed: member.failed,
                ..Entry::fresh(row as usize)
            };
            let failure = match fate {
                Some(Fate::Refused(failure)) => {
                    *closing.refusals.entry(failure.message.clone()).or_default() += 1;
                    entry.failed += 1;
                    self.fail(lane, entry, failure);
                    continue;
                }
                Some(Fate::Filtered(failure)) => {
                    self.filtered(lane, entry, &failure)?;
                    closing.filtered += 1;
                    continue;
                }
                Some(Fate::Claimed(claim)) => {
                    let is_of_the_row = matches!(claim.reason, Reason::Forbidden | Reason::Address);
                    if has_answers && is_of_the_row {
                        entry.failed += 1;
                        self.fail(lane, entry, claim.failure);
                        continue;
                    }
                    if !has_answers {
                        self.lanes[lane].waiting.push_back(entry);
                        closing.claim.get_or_insert(claim);
                        continue;
                    }
                    claim.failure
                }
                Some(Fate::Again(failure)) => failure,
                Some(Fate::Answered) => {
                    self.lanes[lane].waiting.push_back(entry);
                    continue;
                }
                None if may_be_unreadable => {
                    let failure = Failure::new("unreadable", "a line of its batch cannot be read");
                    self.paid(entry, &failure)?;
                    entry.failed += 1;
                    self.fail(lane, entry, failure);
                    continue;
                }
                None => {
                    self.tally.lost += u64::from(status == "completed");
                    Failure::new("lost in a batch", "the row is in neither file of its batch")
                }
            };
            let paid = if may_be_billed {
                self.paid(entry, &failure)?
            } else {
                0
            };
            // What this side has cancelled, failed for no reason of its own.
            entry.failed += u32::from(!was_cancelled);
            if entry.failed.max(paid) >= self.config.retry.max_attempts {
                self.fail(lane, entry, failure);
            } else {
                self.tally.asked_again += 1;
                self.lanes[lane].waiting.push_back(entry);
            }
        }
        self.tally.ignored += taking.ignored;
        self.settle_lost(index, lane, &closing)?;
        if has_answers || closing.filtered > 0 {
            self.lanes[lane].batch_succeeded();
        }
        if let [(message, count)] = closing.refusals.iter().collect::<Vec<_>>().as_slice()
            && **count >= SAME_REFUSALS
            && !self.lanes[lane].has_answered
        {
            self.lanes[lane].stop(stop::refused_alike(message));
        }
        self.end_part(index, status)?;
        match closing.claim {
            Some(claim) => Err(Trouble::Claim(claim).into()),
            None => Ok(()),
        }
    }

    fn settle_lost(&mut self, index: usize, lane: usize, closing: &Closing) -> Result<()> {
        self.summary.attempts_lost += closing.lost;
        let price = self.lanes[lane].settings.price.clone();
        self.journal.parts[index].live.held -= closing.lost_usd;
        let lost = Dollars::at_least(closing.lost_usd);
        self.books
            .account
            .settle_of_batch(lost, closing.lost, Bill::Possible, &price)
    }

    /// Notes an attempt that may have been billed. Returns how many there were of the row.
    fn paid(&mut self, entry: Entry, failure: &Failure) -> Result<u32> {
        let line = self.line(entry, Kind::PaidAttempt, failure);
        self.books.unanswered.add(&line)?;
        Ok(self
            .books
            .unanswered
            .get(&line.key)
            .map_or(0, |known| known.paid))
    }

    /// The row ends as refused by a content filter.
    fn filtered(&mut self, lane: usize, entry: Entry, failure: &Failure) -> Result<()> {
        let line = self.line(entry, Kind::Filtered, failure);
        self.books.unanswered.add(&line)?;
        let row = FailedRow::new(&self.plan, lane, entry, failure.clone());
        self.summary.filtered(row);
        self.lanes[lane].has_answered = true;
        Ok(())
    }

    fn line(&self, entry: Entry, kind: Kind, failure: &Failure) -> Line {
        Line::new(&self.plan, entry, kind, failure, self.clock.now())
    }
}

/// Sums over the rows of a part that ends.
#[derive(Default)]
struct Closing {
    lost: u64,
    lost_usd: f64,
    filtered: u64,
    refusals: HashMap<String, usize>,
    claim: Option<Claim>,
}

/// Only compared with a date in `Retry-After`, which these replies have no use for.
fn now() -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH
}
