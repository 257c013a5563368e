//! From a batch under way to its answers in the cache, and every row accounted for.

use std::collections::HashMap;

use anyhow::Result;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::Value;

use super::api::{Card, Download, Lines};
use super::journal::{Bodies, Member, State};
use super::lane::batches;
use super::results::{self, Outcome};
use super::{Batches, Halt};
use crate::cache::record::Timing;
use crate::harvest::attempt::Answered;
use crate::harvest::budget::Bill;
use crate::harvest::plan::Row;
use crate::harvest::queue::Entry;
use crate::harvest::retry::{self, Failure, Trouble};
use crate::harvest::stop;
use crate::harvest::wire::Completion;
use crate::prompt::Prompt;

/// How often a batch or a file may be "not found" before it counts as gone.
const GONE: u32 = 20;

/// Rows of a batch that are all refused in the same words: it is no matter of the rows.
const SAME_REFUSALS: usize = 5;

/// Lines of a file between two looks at the progress.
const SHOW_EVERY: u64 = 500;

/// The rows of a part while its files are read.
struct Taking {
    members: Vec<Member>,
    /// Which member a key is.
    lines: HashMap<String, usize>,
    /// What became of each, beside those in the cache.
    fates: Vec<Option<Fate>>,
    bodies: Bodies,
    timing: Timing,
    ignored: u64,
    stop: Option<Trouble>,
}

enum Fate {
    Answered,
    Again(Failure),
    Refused(Failure),
    /// Not to be asked before something else has changed.
    Stopped,
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
        let reply = match retry::check(api.retrieve(&batch).await, now) {
            Err(Trouble::Refused(failure)) => return self.gone(index, &failure.message),
            reply => reply?,
        };
        let card = Card::parse(&reply.body)
            .ok_or_else(|| retry::lost("malformed", "the reply is no batch"))?;
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
            match retry::check(api.cancel(&batch).await, now) {
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
            let api = batches(&transport)?;
            let download = api.content(file).await;
            let pieces = match download.map_err(retry::classify_fault)? {
                Download::Content(pieces) => pieces,
                Download::Refused(reply) => match retry::check(Ok(reply), now()) {
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
            while let Some(line) = lines.next().await.map_err(retry::classify_fault)? {
                self.take_line(index, &mut taking, api.without_key(line))?;
                taken += 1;
                if taken % SHOW_EVERY == 0 {
                    self.show();
                }
            }
        }
        self.close(index, taking, &card.status)
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
            stop: None,
            members,
        })
    }

    /// Only answers have an effect at once: the file may break off, and is read again then.
    fn take_line(&mut self, index: usize, taking: &mut Taking, line: Bytes) -> Result<()> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let outcome = results::read(&line);
        let row = outcome.and_then(|Outcome { custom_id, result }| {
            Some((*taking.lines.get(&custom_id)?, result))
        });
        let Some((line, result)) = row.filter(|(line, _)| taking.fates[*line].is_none()) else {
            taking.ignored += 1;
            return Ok(());
        };
        let fate = match result {
            Ok(completion) => {
                if !self.cache.contains(&taking.members[line].key) {
                    self.answered(index, taking, line, *completion)?;
                }
                Fate::Answered
            }
            Err(Trouble::Refused(failure)) => Fate::Refused(failure),
            Err(Trouble::Transient { failure, .. }) => Fate::Again(failure),
            Err(Trouble::Throttled { message, .. }) => {
                Fate::Again(Failure::new("http 429", &message))
            }
            Err(stop @ Trouble::Stop(..)) => {
                taking.stop.get_or_insert(stop);
                Fate::Stopped
            }
        };
        taking.fates[line] = Some(fate);
        Ok(())
    }

    fn answered(
        &mut self,
        index: usize,
        taking: &mut Taking,
        line: usize,
        completion: Completion,
    ) -> Result<()> {
        let (lane, _) = self.lane_of(index)?;
        let asking = &self.plan.askings[lane];
        let member = &taking.members[line];
        let body: Value = taking.bodies.read(member)?;
        let row = Row {
            prompt: 0,
            sample: member.sample,
            key: member.key.clone(),
            bytes: 0,
        };
        let prompt = Prompt {
            id: member.prompt_id.clone(),
            messages: Vec::new(),
        };
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
        // What the record tells the next run of its cost must be in it before the amount is let go;
        // what only the ledger can tell, must be in there before the record is.
        let is_measured = matches!(bill, Bill::Measured(_));
        if is_measured {
            append(self.cache)?;
        }
        self.purse.settle_of_batch(member.usd, 1, bill, &price)?;
        if !is_measured {
            append(self.cache)?;
        }
        let part = &mut self.journal.parts[index];
        part.live.held -= member.usd;
        let is_planned = part.live.rows.get(line).copied().flatten().is_some();
        match is_planned {
            true => self.summary.add(&answered, wants_logprobs),
            false => self.tally.besides += 1,
        }
        self.lanes[lane].has_answered = true;
        Ok(())
    }

    /// Every row of the part ends, or waits again; and so the part ends.
    fn close(&mut self, index: usize, taking: Taking, status: &str) -> Result<(), Halt> {
        let (lane, _) = self.lane_of(index)?;
        let was_cancelled = matches!(self.journal.parts[index].state, State::Cancelling { .. });
        let (mut lost, mut lost_usd, mut answers) = (0, 0.0, 0);
        let mut refusals: HashMap<String, usize> = HashMap::new();
        for (line, (member, fate)) in taking.members.iter().zip(taking.fates).enumerate() {
            if self.cache.contains(&member.key) {
                answers += 1;
                continue;
            }
            let may_be_billed = match &fate {
                Some(Fate::Again(failure) | Fate::Refused(failure)) => failure.may_be_billed,
                Some(Fate::Answered | Fate::Stopped) => false,
                // What a batch did not come to is not billed; what it lost may be.
                None => status != "expired" && status != "cancelled",
            };
            if may_be_billed {
                lost += 1;
                lost_usd += member.usd;
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
                    *refusals.entry(failure.message.clone()).or_default() += 1;
                    entry.failed += 1;
                    self.fail(lane, entry, failure);
                    continue;
                }
                Some(Fate::Again(failure)) => failure,
                Some(Fate::Answered | Fate::Stopped) => {
                    self.lanes[lane].waiting.push_back(entry);
                    continue;
                }
                None => {
                    self.tally.lost += u64::from(status == "completed");
                    Failure::new("lost in a batch", "the row is in neither file of its batch")
                }
            };
            // What this side has cancelled, failed for no reason of its own.
            entry.failed += u32::from(!was_cancelled);
            if entry.failed >= self.config.retry.max_attempts {
                self.fail(lane, entry, failure);
            } else {
                self.tally.asked_again += 1;
                self.lanes[lane].waiting.push_back(entry);
            }
        }
        self.tally.ignored += taking.ignored;
        self.summary.attempts_lost += lost;
        let price = self.lanes[lane].settings.price.clone();
        self.journal.parts[index].live.held -= lost_usd;
        self.purse
            .settle_of_batch(lost_usd, lost, Bill::Possible, &price)?;
        if answers > 0 {
            self.lanes[lane].batch_succeeded();
        }
        if let [(message, count)] = refusals.into_iter().collect::<Vec<_>>().as_slice()
            && *count >= SAME_REFUSALS
            && !self.lanes[lane].has_answered
        {
            self.lanes[lane].stop(stop::refused_alike(message));
        }
        self.end_part(index, status)?;
        match taking.stop {
            Some(stop) => Err(stop.into()),
            None => Ok(()),
        }
    }
}

/// Only compared with a date in `Retry-After`, which these replies have no use for.
fn now() -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH
}
