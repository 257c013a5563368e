//! `failures.jsonl`: the rows that ended without an answer, and why.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::plan::Plan;
use super::queue::Entry;
use super::retry::Failure;

/// A line of the file.
#[derive(Debug, Serialize)]
pub struct FailedRow {
    pub teacher: String,
    pub prompt_id: String,
    pub sample: u32,
    /// The key that an answer would have been recorded under.
    pub key: String,
    pub class: String,
    pub message: String,
    pub attempts: u32,
}

impl FailedRow {
    pub fn new(plan: &Plan, lane: usize, entry: Entry, failure: Failure) -> FailedRow {
        let row = &plan.rows[entry.row];
        FailedRow {
            teacher: plan.askings[lane].lane.teacher.label().into(),
            prompt_id: plan.prompts[row.prompt as usize].id.clone(),
            sample: row.sample,
            key: row.key.clone(),
            class: failure.class,
            message: failure.message,
            attempts: entry.failed,
        }
    }
}

pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("failures.jsonl")
}

/// Replaces the file by the rows of this run: an older one would speak of rows that have been
/// answered since.
pub fn write(run_dir: &Path, rows: &[FailedRow]) -> Result<()> {
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
