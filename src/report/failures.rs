//! `failures.jsonl`: the rows of a run that failed or were refused by a content filter, with the reason.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use crate::cache::record::Timing;
use crate::client::attempt_error::RowFailure;
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, UnansweredLine, UnansweredRow};
use crate::plan::{Plan, PlannedRow};

/// A line of the file.
#[derive(Debug, Serialize)]
pub struct FailedRow {
    pub teacher: String,
    pub prompt_id: String,
    pub sample: u32,
    /// Cache key of the missing answer.
    pub key: String,
    pub class: String,
    pub message: String,
    pub attempts: u32,
}

impl FailedRow {
    pub fn new(plan: &Plan, endpoint: usize, entry: QueuedRow, failure: RowFailure) -> FailedRow {
        let row = &plan.rows[entry.row];
        FailedRow {
            teacher: plan.templates[endpoint].endpoint.teacher.label().into(),
            prompt_id: plan.prompts[row.prompt as usize].id.clone(),
            sample: row.sample,
            key: row.key.clone(),
            class: failure.class,
            message: failure.message,
            attempts: entry.failed,
        }
    }

    /// Builds the line of `unanswered.jsonl` that records this failure for later runs.
    pub fn line(&self, now: jiff::Timestamp) -> UnansweredLine {
        UnansweredLine {
            key: self.key.clone(),
            prompt_id: self.prompt_id.clone(),
            sample: self.sample,
            kind: Kind::Failed,
            class: self.class.clone(),
            message: self.message.clone(),
            at: Timing::stamp(now),
        }
    }

    /// Describes a row that used up `retry.max_attempts` paid attempts in earlier runs.
    pub fn given_up(
        plan: &Plan,
        endpoint: usize,
        row: &PlannedRow,
        known: UnansweredRow,
    ) -> FailedRow {
        FailedRow {
            teacher: plan.templates[endpoint].endpoint.teacher.label().into(),
            prompt_id: plan.prompts[row.prompt as usize].id.clone(),
            sample: row.sample,
            key: row.key.clone(),
            class: known.class,
            message: known.message,
            attempts: known.paid,
        }
    }
}

pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("failures.jsonl")
}

/// Replaces the file by the rows of this run: rows of an older file may have an answer by now.
pub(crate) fn write(run_dir: &Path, rows: &[FailedRow]) -> Result<()> {
    let path = file(run_dir);
    if rows.is_empty() && !path.exists() {
        return Ok(());
    }
    let mut lines = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut lines, row)?;
        lines.push(b'\n');
    }
    crate::fs::write_atomic(&path, &lines)
}
