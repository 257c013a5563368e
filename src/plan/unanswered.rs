//! `unanswered.jsonl` in the run folder: the history of the rows without an answer, for later runs.
//!
//! - Rows refused by a content filter; later runs do not request them.
//! - Attempts that may have been billed without an answer. Over all runs, a row gets at most
//!   `retry.max_attempts` of them.
//! - Rows that failed; the next run requests them last.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::cache::record::Timing;
use crate::client::attempt_error::RowFailure;
use crate::plan::queue::QueuedRow;
use crate::plan::{Plan, RowStatus};

/// History of a row without an answer, over all runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UnansweredRow {
    /// Number of attempts that may have been billed.
    pub paid: u32,
    /// Failure class of the last paid attempt or content-filter refusal.
    pub class: String,
    /// Message of the last paid attempt or content-filter refusal.
    pub message: String,
    /// True if a content filter refused the row.
    pub is_filtered: bool,
    /// True after a [`Kind::Suspect`] or [`Kind::Failed`] line.
    pub is_suspect: bool,
    /// Failure class of the last [`Kind::Failed`] line; empty if the row has no such line.
    pub failed_as: String,
}

/// A line of `unanswered.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnansweredLine {
    pub key: String,
    pub prompt_id: String,
    pub sample: u32,
    pub kind: Kind,
    pub class: String,
    pub message: String,
    /// Time of the event, RFC 3339 in UTC.
    pub at: String,
}

/// Kind of a [`UnansweredLine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An attempt that may have been billed without an answer.
    PaidAttempt,
    /// The row was refused by a content filter.
    Filtered,
    /// The row failed in a run without answers; or, after the last answer of a run, the reply to the row claimed that
    /// no request can succeed.
    Suspect,
    /// The row failed while other rows were answered.
    Failed,
}

impl UnansweredLine {
    /// Creates the line for a row of `plan`.
    pub fn new(
        plan: &Plan,
        entry: QueuedRow,
        kind: Kind,
        failure: &RowFailure,
        now: jiff::Timestamp,
    ) -> UnansweredLine {
        let row = &plan.rows[entry.row];
        UnansweredLine {
            key: row.key.clone(),
            prompt_id: plan.prompts[row.prompt as usize].id.clone(),
            sample: row.sample,
            kind,
            class: failure.class.clone(),
            message: failure.message.clone(),
            at: Timing::stamp(now),
        }
    }
}

/// Content of `unanswered.jsonl`, by cache key.
#[derive(Debug, Default)]
pub(crate) struct Unanswered {
    path: PathBuf,
    rows: HashMap<String, UnansweredRow>,
}

/// Returns the path of `unanswered.jsonl`.
pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("unanswered.jsonl")
}

impl Unanswered {
    /// Reads the file of the run folder, if it exists. Skips incomplete and damaged lines with a warning.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn load(run_dir: &Path) -> Result<Unanswered> {
        let mut unanswered = Unanswered {
            path: file(run_dir),
            rows: HashMap::new(),
        };
        let lines = unanswered.lines()?;
        lines.iter().for_each(|line| unanswered.count(line));
        Ok(unanswered)
    }

    /// Reads the lines of the file; skips damaged ones with a warning.
    fn lines(&self) -> Result<Vec<UnansweredLine>> {
        if !self.path.exists() {
            return Ok(Vec::new());
        }
        let text = crate::fs::read(&self.path)?;
        let lines = text.split(|byte| *byte == b'\n');
        let lines = lines.filter(|line| !line.trim_ascii().is_empty());
        let mut damaged = 0;
        let lines = lines
            .filter_map(|line| {
                let line = serde_json::from_slice(line).ok();
                damaged += usize::from(line.is_none());
                line
            })
            .collect();
        if damaged > 0 {
            tracing::warn!(
                "{}: {damaged} lines are damaged and were skipped: their rows may be requested again",
                self.path.display()
            );
        }
        Ok(lines)
    }

    /// Adds a line to the history of its row.
    fn count(&mut self, line: &UnansweredLine) {
        let history = self.rows.entry(line.key.clone()).or_default();
        match line.kind {
            Kind::PaidAttempt => history.paid += 1,
            Kind::Filtered => history.is_filtered = true,
            Kind::Suspect => {
                history.is_suspect = true;
                return;
            }
            Kind::Failed => {
                history.is_suspect = true;
                history.failed_as.clone_from(&line.class);
                return;
            }
        }
        history.class.clone_from(&line.class);
        history.message.clone_from(&line.message);
    }

    /// Returns the status of the row with this key before a run.
    pub(crate) fn row_status(&self, key: &str, is_cached: bool, max_attempts: u32) -> RowStatus {
        if is_cached {
            return RowStatus::Answered;
        }
        match self.get(key) {
            _ if self.is_filtered(key) => RowStatus::Answered,
            Some(history) if history.paid >= max_attempts => RowStatus::GivenUp,
            Some(history) if history.is_suspect => RowStatus::Suspect,
            _ => RowStatus::Open,
        }
    }

    /// Returns true if the row with this key was refused by a content filter.
    pub(crate) fn is_filtered(&self, key: &str) -> bool {
        self.get(key).is_some_and(|history| history.is_filtered)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the keys of the rows with paid attempts or a content-filter refusal.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let rows = self.rows.iter();
        let rows = rows.filter(|(_, history)| history.paid > 0 || history.is_filtered);
        rows.map(|(key, _)| key.as_str())
    }

    /// Returns the history of the row with this key.
    pub(crate) fn get(&self, key: &str) -> Option<&UnansweredRow> {
        self.rows.get(key)
    }

    /// Appends a line. After the call returns, a kill of this process does not lose the line.
    pub(crate) fn add(&mut self, line: &UnansweredLine) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        crate::fs::append(&self.path, &text)?;
        self.count(line);
        Ok(())
    }

    /// Removes the lines of the rows that satisfy `is_selected`, so that later runs request these rows. Keeps
    /// [`Kind::Failed`] lines, so that these rows are requested last. Returns the keys of the rows.
    pub(crate) fn forget(
        &mut self,
        is_selected: impl Fn(&str, &UnansweredRow) -> bool,
    ) -> Result<Vec<String>> {
        let rows = self
            .rows
            .iter()
            .filter(|(key, history)| is_selected(key, history));
        let forgotten: Vec<String> = rows.map(|(key, _)| key.clone()).collect();
        let mut remaining_text = Vec::new();
        let mut remaining = Unanswered::default();
        for line in self.lines()? {
            let history = self.rows.get(&line.key);
            let is_forgotten = history.is_some_and(|history| is_selected(&line.key, history));
            if !is_forgotten || line.kind == Kind::Failed {
                serde_json::to_writer(&mut remaining_text, &line)?;
                remaining_text.push(b'\n');
                remaining.count(&line);
            }
        }
        self.rows = remaining.rows;
        if !forgotten.is_empty() {
            crate::fs::write_atomic(&self.path, &remaining_text)?;
        }
        Ok(forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(key: &str, kind: Kind) -> UnansweredLine {
        UnansweredLine {
            key: key.into(),
            prompt_id: "p".into(),
            sample: 0,
            kind,
            class: "timeout".into(),
            message: "m".into(),
            at: String::new(),
        }
    }

    #[test]
    fn unanswered_file_sums_attempts_over_runs_and_forgets_selected_rows() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Unanswered::load(dir.path()).unwrap();
        first.add(&line("a", Kind::PaidAttempt)).unwrap();
        first.add(&line("b", Kind::Filtered)).unwrap();
        let mut text = std::fs::read(file(dir.path())).unwrap();
        // An incomplete line, as after a kill.
        text.extend_from_slice(b"{\"key\":\"a\",\"pro");
        std::fs::write(file(dir.path()), text).unwrap();

        let mut second = Unanswered::load(dir.path()).unwrap();
        second.add(&line("a", Kind::PaidAttempt)).unwrap();
        let paid_and_filtered = |unanswered: &Unanswered, key: &str| {
            unanswered
                .get(key)
                .map(|history| (history.paid, history.is_filtered))
        };
        second.add(&line("c", Kind::PaidAttempt)).unwrap();
        second.add(&line("c", Kind::Failed)).unwrap();
        let mut third = Unanswered::load(dir.path()).unwrap();
        assert_eq!(paid_and_filtered(&third, "a"), Some((2, false)));
        assert_eq!(paid_and_filtered(&third, "b"), Some((0, true)));
        let is_selected = |key: &str, history: &UnansweredRow| history.is_filtered || key == "c";
        assert_eq!(third.forget(is_selected).unwrap().len(), 2);
        let fourth = Unanswered::load(dir.path()).unwrap();
        assert_eq!(fourth.rows, third.rows);
        assert_eq!(
            (
                paid_and_filtered(&fourth, "a"),
                paid_and_filtered(&fourth, "b")
            ),
            (Some((2, false)), None)
        );
        // The failure of `c` is kept, so that other rows are requested first.
        assert_eq!(paid_and_filtered(&fourth, "c"), Some((0, false)));
        assert_eq!(fourth.row_status("c", false, 1), RowStatus::Suspect);
    }
}
