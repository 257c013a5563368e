//! A batch that failed as a whole: most often before any row was asked.

use std::collections::HashMap;

use super::api::{self, Card, Download, Lines, Mistake};
use super::collect::{Fate, now};
use super::lane::batches;
use super::rows::Rows;
use super::{Batches, Halt, results};
use crate::harvest::queue::Entry;
use crate::harvest::retry::{self, Claim, Failure, Trouble};

impl Batches<'_> {
    /// Reads the error file of a failed batch: it names the rows for which the input file was refused, and on
    /// some servers it holds answers.
    pub(super) async fn take_errors(&mut self, index: usize, mut card: Card) -> Result<(), Halt> {
        let (_, transport) = self.lane_of(index)?;
        let batches = batches(&transport)?;
        let file = card.error_file.clone().unwrap_or_default();
        let download = batches.content(&file).await;
        let pieces = match download.map_err(retry::classify_fault)? {
            Download::Content(pieces) => pieces,
            Download::Refused(reply) => match api::check(Ok(reply), now()) {
                Err(Trouble::Refused(failure)) => {
                    self.is_gone(index, &failure.message)?;
                    return self.failed(index, &card);
                }
                Err(trouble) => return Err(trouble.into()),
                Ok(_) => return self.failed(index, &card),
            },
        };
        let mut taking = self.open(index, &card)?;
        let mut rows = Rows::new(Lines::new(pieces));
        while let Some(line) = rows.next().await.map_err(retry::classify_fault)? {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let line = batches.without_key(line);
            let (kept, count) = (taking.unreadable.len(), taking.unreadable_lines);
            if !self.take_line(index, &mut taking, line.clone())?
                && let Some(mistake) = Mistake::of_line(&line)
            {
                card.mistakes.push(mistake);
                taking.unreadable.truncate(kept);
                taking.unreadable_lines = count;
            }
        }
        taking.unreadable_lines += rows.skipped();
        if taking.seen() == 0 {
            return self.failed(index, &card);
        }
        for mistake in &card.mistakes {
            let line = mistake
                .line
                .and_then(|line| usize::try_from(line).ok()?.checked_sub(1));
            if let Some(fate @ None) = line.and_then(|line| taking.fates.get_mut(line)) {
                let failure = Failure::new(mistake.error.code.as_str(), &mistake.error.message);
                *fate = Some(Fate::Refused(failure));
            }
        }
        // Rows that the file does not name were not asked, unless a line of it cannot be read.
        taking.rest_was_not_asked = taking.unreadable_lines == 0;
        self.record_rest(index, &mut taking)?;
        self.close(index, taking, "failed")
    }

    /// Lines that are bad fail, all others wait again.
    pub(super) fn failed(&mut self, index: usize, card: &Card) -> Result<(), Halt> {
        let (lane, _) = self.lane_of(index)?;
        let verdict = results::verdict(&card.mistakes);
        let part = &self.journal.parts[index];
        let (rows, tokens, members) = (
            part.live.rows.clone(),
            part.tokens,
            self.journal.members(&part.nonce)?,
        );
        let bad: HashMap<usize, Failure> = verdict.lines.into_iter().collect();
        for (line, (member, row)) in members.iter().zip(rows).enumerate() {
            let Some(row) = row else { continue };
            let mut entry = Entry {
                failed: member.failed,
                ..Entry::fresh(row as usize)
            };
            match bad.get(&line) {
                Some(failure) => {
                    entry.failed += 1;
                    self.fail(lane, entry, failure.clone());
                }
                None => {
                    self.tally.asked_again += 1;
                    self.lanes[lane].waiting.push_back(entry);
                }
            }
        }
        let enqueued: u64 = self
            .parts_of(lane)
            .into_iter()
            .filter(|&index| self.journal.parts[index].is_enqueued())
            .map(|index| self.journal.parts[index].tokens)
            .sum();
        self.end_part(index, "failed")?;
        if let Some((reason, message)) = verdict.stop {
            let failure = Failure::new("failed batch", &message);
            self.lanes[lane].all_claimed(Claim { reason, failure }, &self.config.retry);
            return Ok(());
        }
        let retry = &self.config.retry;
        let of_lane = &mut self.lanes[lane];
        match verdict.over_tokens {
            Some(told) => {
                let half = told.filter(|told| *told < enqueued).unwrap_or(enqueued / 2);
                let limit = of_lane.token_limit.unwrap_or(u64::MAX).min(half);
                of_lane.token_limit = Some(limit.max(1));
                if members.len() == 1 && enqueued == tokens {
                    of_lane.no_room_for_one(tokens, retry);
                }
            }
            None => {
                let message = verdict.message;
                self.progress
                    .note(&format!("a batch of {} failed: {message}", members.len()));
                of_lane.batch_failed(&message, retry);
            }
        }
        Ok(())
    }
}
