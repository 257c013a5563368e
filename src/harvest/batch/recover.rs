//! Resumes the parts that earlier runs left under way.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use super::BatchRun;
use super::journal::PartState;
use crate::budget::dollars::Dollars;
use crate::terminal::{format_count, sanitise};

impl BatchRun<'_> {
    /// Resumes the parts that earlier runs left under way: reserves their budget and removes their rows from the
    /// queue.
    pub(super) fn recover(&mut self) -> Result<()> {
        self.journal.remove_stale_files()?;
        let mut position_by_key = HashMap::new();
        for index in 0..self.journal.parts.len() {
            let part = &self.journal.parts[index];
            if part.is_done() {
                continue;
            }
            let upstream = self.upstreams.iter().position(|upstream| {
                upstream.settings.teacher.label() == part.teacher
                    && crate::config::teacher::identity(&upstream.settings.teacher) == part.endpoint
            });
            let part_rows = self.journal.members(&part.nonce)?;
            let unanswered = part_rows
                .iter()
                .filter(|member| !member.is_answered(self.cache));
            let unsettled_usd = unanswered.map(|member| member.usd).sum();
            if upstream.is_none() {
                self.progress.note(&format!(
                    "a batch of {} rows is under way at {}, which is not a teacher of this config: it \
                     is ignored",
                    format_count(part.rows),
                    sanitise(&part.teacher)
                ));
            }
            self.run_files
                .account
                .hold_for_batch(Dollars::at_least(unsettled_usd));
            let part = &mut self.journal.parts[index];
            part.progress.upstream = upstream;
            part.progress.unsettled_usd = unsettled_usd;
            part.progress.is_creation_unconfirmed =
                matches!(part.state, PartState::Creating { .. });
            part.progress.rows = vec![None; part_rows.len()];
            for (line, member) in part_rows.into_iter().enumerate() {
                position_by_key.insert(member.key, (index, line));
            }
        }
        if position_by_key.is_empty() {
            return Ok(());
        }
        let mut recovered_rows = HashSet::new();
        for (row, planned) in self.plan.rows.iter().enumerate() {
            let by_old_key = || position_by_key.get(planned.old_key.as_deref()?);
            let position = position_by_key.get(&planned.key).or_else(by_old_key);
            if let Some(&(index, line)) = position {
                self.journal.parts[index].progress.rows[line] = Some(row as u32);
                recovered_rows.insert(row);
            }
        }
        for upstream in &mut self.upstreams {
            upstream
                .waiting
                .retain(|entry| !recovered_rows.contains(&entry.row));
        }
        Ok(())
    }
}
