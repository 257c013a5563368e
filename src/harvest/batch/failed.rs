//! A batch that failed as a whole, before any row was asked.

use std::collections::HashMap;

use super::api::Card;
use super::{Batches, Halt, results};
use crate::harvest::queue::Entry;
use crate::harvest::retry::{Claim, Failure};

impl Batches<'_> {
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
