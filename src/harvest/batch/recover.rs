//! Resumes the parts that earlier runs left under way.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use super::BatchRun;
use super::journal::{self, PartState};
use crate::budget::dollars::Dollars;
use crate::exit::Exit;
use crate::terminal::{format_count, sanitise};

impl BatchRun<'_> {
    /// Resumes the parts that earlier runs left under way: reserves their budget and removes their rows from the
    /// queue. Rows of a batch at a teacher that is not in the config leave the queue too, because they were bought; see
    /// [`BatchRun::ignored_rows_error`].
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
            if upstream.is_none() && !part.is_enqueued() {
                // No batch exists, so its rows can be sent to the teachers of this config.
                self.journal.end(index, "not created")?;
                continue;
            }
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

    /// Returns an error if rows of the plan are in batches that this run ignores.
    pub(super) fn ignored_rows_error(&self) -> Option<anyhow::Error> {
        let parts = self.journal.parts.iter();
        let ignored = parts.filter(|part| !part.is_done() && part.progress.upstream.is_none());
        let rows: u64 = ignored
            .map(|part| part.progress.rows.iter().flatten().count() as u64)
            .sum();
        let message = format!(
            "{} rows are in batches at a teacher that is not in this config: restore its settings, such as \
             `teacher.base_url`, and rerun the command to collect them; or remove these batches from {} and \
             rerun the command to buy the answers from the teachers of this config",
            format_count(rows),
            journal::file(&self.settings.run_dir).display()
        );
        (rows > 0).then(|| Exit::Resumable(message).into())
    }
}
