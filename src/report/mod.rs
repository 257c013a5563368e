//! Reports on a harvest: counters, the progress line, the table at the end and advice for the next steps.
//!
//! | file | content |
//! |---|---|
//! | `summary` | `HarvestSummary`: counters of a run, and `summary.json` |
//! | `answer_facts` | properties of one answer that the counters and the monitor use |
//! | `usable_logprobs` | check whether the logprobs of an answer can become soft labels |
//! | `batch_counts` | counters of a run in batch mode |
//! | `timeline` | statistics by hour, and use of the rate limits |
//! | `progress` | the progress line, with rates over the last minute |
//! | `table` | the summary as a table for people |
//! | `advice` | next steps after a run |
//! | `failures` | `failures.jsonl`: rows of the run that failed or were filtered |
//!
//! Invariants: `cached + ok + quarantined + failed + pending = total` at the end of a run; the room only counts and
//! formats, and does not influence the run; text from an endpoint is sanitised before it reaches a terminal or
//! `summary.json`.

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

/// Adds the advice and the run history to the summary, and writes `summary.json` and `failures.jsonl`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(summary: &mut HarvestSummary, run_dir: &Path) -> Result<()> {
    failures::write(run_dir, &summary.failed_rows)?;
    summary.advice = advice::next_steps(summary, &failures::file(run_dir));
    summary.runs = past_runs(run_dir);
    summary.runs.push(PastRun::new(summary));
    let text = serde_json::to_string_pretty(summary)?;
    crate::fs::write_atomic(&file(run_dir), escape_unsafe(&text).as_bytes())
}
