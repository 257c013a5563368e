//! What a run has done: counted (`summary`), shown (`table`, `progress`), and with advice for the next steps.

pub(crate) mod advice;
pub(crate) mod answer_facts;
pub(crate) mod batch_counts;
pub(crate) mod failures;
pub(crate) mod progress;
pub mod summary;
pub(crate) mod table;
pub(crate) mod timeline;
pub(crate) mod usable_logprobs;

use std::path::Path;

use anyhow::Result;

use crate::report::summary::{HarvestSummary, PastRun, file, past_runs};
use crate::terminal::escape_unsafe;

/// Completes the summary with what to do next, and leaves it in the run folder for the morning,
/// beside the rows that failed.
pub fn write(summary: &mut HarvestSummary, run_dir: &Path) -> Result<()> {
    failures::write(run_dir, &summary.failed_rows)?;
    summary.advice = advice::next_steps(summary, &failures::file(run_dir));
    summary.runs = past_runs(run_dir);
    summary.runs.push(PastRun::of(summary));
    let text = serde_json::to_string_pretty(summary)?;
    crate::fs::write_atomic(&file(run_dir), escape_unsafe(&text).as_bytes())
}
