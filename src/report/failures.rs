//! `failures.jsonl`: the rows of a run that failed or were refused by a content filter, with the reason.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use crate::cache::record::Timing;
use crate::client::attempt_error::RowFailure;
use crate::plan::queue::QueuedRow;
use crate::plan::unanswered::{Kind, UnansweredLine, UnansweredRow};
use crate::plan::{Plan, PlannedRow};

/// A line of the file: a row without an answer.
#[derive(Debug, Serialize)]
pub struct FailedRow {
    pub teacher: String,
    pub prompt_id: String,
    pub sample: u32,
    /// Cache key of the missing answer.
    pub key: String,
    /// Class of the last error, such as `http 500`.
    pub class: String,
    /// Message of the last error.
    pub message: String,
    /// Number of failed attempts that count towards `retry.max_attempts`; for a row that earlier runs gave up, the
    /// number of paid attempts in all earlier runs.
    pub attempts: u32,
}

impl FailedRow {
    /// Describes a row that failed, or was refused by a content filter, in this run.
    pub fn new(plan: &Plan, endpoint: usize, entry: QueuedRow, failure: RowFailure) -> FailedRow {
        let row = &plan.rows[entry.row];
        FailedRow {
            class: failure.class,
            message: failure.message,
            attempts: entry.failed,
            ..FailedRow::without_failure(plan, endpoint, row)
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
        history: UnansweredRow,
    ) -> FailedRow {
        FailedRow {
            class: history.class,
            message: history.message,
            attempts: history.paid,
            ..FailedRow::without_failure(plan, endpoint, row)
        }
    }

    /// Creates the line of a row, with empty `class` and `message` and 0 `attempts`.
    fn without_failure(plan: &Plan, endpoint: usize, row: &PlannedRow) -> FailedRow {
        FailedRow {
            teacher: plan.templates[endpoint].endpoint.teacher.label().into(),
            prompt_id: plan.prompts[row.prompt as usize].id.clone(),
            sample: row.sample,
            key: row.key.clone(),
            class: String::new(),
            message: String::new(),
            attempts: 0,
        }
    }
}

/// Returns the path of `failures.jsonl`.
pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("failures.jsonl")
}

/// Replaces the file by one with the failed rows of this run. Rows that failed in earlier runs may have an answer now.
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
