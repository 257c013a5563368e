//! What asking in batches comes to, before anything is asked.

use std::collections::HashSet;

use anyhow::Result;
use serde::Serialize;

use super::journal::Journal;
use super::parts::{self, Room};
use crate::config::Config;
use crate::plan::{Plan, Row};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// To be submitted.
    pub batches: u64,
    /// At the endpoint already, and so many of the rows with them.
    pub under_way: u64,
    pub rows_under_way: u64,
    /// How often `batch.enqueued_tokens` has to be free again, the first time included.
    pub rounds: u64,
}

impl Outlook {
    /// # Errors
    /// Where the journal of an earlier run is damaged.
    pub fn new(config: &Config, plan: &Plan) -> Result<Outlook> {
        let journal = Journal::load(&config.run_dir)?;
        let mut outlook = Outlook::default();
        let mut asked = HashSet::new();
        for part in journal.parts.iter().filter(|part| !part.is_done()) {
            outlook.under_way += 1;
            let members = journal.members(&part.nonce)?;
            asked.extend(members.into_iter().map(|member| member.key));
        }
        let room = Room::of(&config.batch, None, f64::INFINITY);
        for (lane, rows) in plan.lanes.iter().enumerate() {
            let mut sizes = Vec::new();
            for row in rows.clone() {
                let Row { key, old_key, .. } = &plan.rows[row];
                let of_old = || old_key.as_deref().is_some_and(|key| asked.contains(key));
                match asked.contains(key) || of_old() {
                    true => outlook.rows_under_way += 1,
                    false => sizes.push(parts::size(plan, lane, row, 0.0)),
                }
            }
            let tokens: u64 = sizes.iter().map(|size| size.tokens).sum();
            let limit = config.batch.enqueued_tokens.unwrap_or(u64::MAX).max(1);
            outlook.rounds = outlook.rounds.max(tokens.div_ceil(limit));
            let mut rest = &sizes[..];
            while !rest.is_empty() {
                let (count, ..) = room.take(rest.iter().copied());
                // A row that fits into no batch fails by itself.
                outlook.batches += u64::from(count > 0);
                rest = &rest[count.max(1)..];
            }
        }
        Ok(outlook)
    }
}
