//! `unanswered.jsonl` in the run folder: what later runs need to know about rows without an answer.
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
    /// Failure class of the last paid attempt or refusal.
    pub class: String,
    /// Message of the last paid attempt or refusal.
    pub message: String,
    /// Refused by a content filter.
    pub is_filtered: bool,
    /// True after a [`Kind::Suspect`] or [`Kind::Failed`] line.
    pub is_suspect: bool,
    /// Class of the last [`Kind::Failed`] line; empty without one.
    pub failed_as: String,
}

/// A line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnansweredLine {
    pub key: String,
    pub prompt_id: String,
    pub sample: u32,
    pub kind: Kind,
    pub class: String,
    pub message: String,
    /// RFC 3339, in UTC.
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
    /// The reply to the row ended the run, or would have ended it without answers to other rows.
    Suspect,
    /// The row failed while other rows were answered.
    Failed,
}

impl UnansweredLine {
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

/// Content of the file, by cache key.
#[derive(Debug, Default)]
pub struct Unanswered {
    path: PathBuf,
    rows: HashMap<String, UnansweredRow>,
}

pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("unanswered.jsonl")
}

impl Unanswered {
    /// Reads the file of the run folder, if it exists. Skips torn and damaged lines with a warning.
    pub fn load(run_dir: &Path) -> Result<Unanswered> {
        let mut unanswered = Unanswered {
            path: file(run_dir),
            rows: HashMap::new(),
        };
        let lines = unanswered.lines()?;
        lines.iter().for_each(|line| unanswered.count(line));
        Ok(unanswered)
    }

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
                "{}: skipped {damaged} damaged lines: their rows may be requested again",
                self.path.display()
            );
        }
        Ok(lines)
    }

    fn count(&mut self, line: &UnansweredLine) {
        let known = self.rows.entry(line.key.clone()).or_default();
        match line.kind {
            Kind::PaidAttempt => known.paid += 1,
            Kind::Filtered => known.is_filtered = true,
            Kind::Suspect => {
                known.is_suspect = true;
                return;
            }
            Kind::Failed => {
                known.is_suspect = true;
                known.failed_as.clone_from(&line.class);
                return;
            }
        }
        known.class.clone_from(&line.class);
        known.message.clone_from(&line.message);
    }

    /// Status of the row with this key before a run.
    pub fn row_status(&self, key: &str, is_cached: bool, max_attempts: u32) -> RowStatus {
        if is_cached {
            return RowStatus::Answered;
        }
        match self.get(key) {
            _ if self.is_filtered(key) => RowStatus::Answered,
            Some(known) if known.paid >= max_attempts => RowStatus::GivenUp,
            Some(known) if known.is_suspect => RowStatus::Suspect,
            _ => RowStatus::Open,
        }
    }

    /// Returns true if the row with this key was refused by a content filter.
    pub fn is_filtered(&self, key: &str) -> bool {
        self.get(key).is_some_and(|known| known.is_filtered)
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Keys of the rows with paid attempts or a refusal.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        let rows = self.rows.iter();
        let rows = rows.filter(|(_, known)| known.paid > 0 || known.is_filtered);
        rows.map(|(key, _)| key.as_str())
    }

    /// History of the row with this key.
    pub fn get(&self, key: &str) -> Option<&UnansweredRow> {
        self.rows.get(key)
    }

    /// Appends a line. It survives a kill of this process once this returns.
    pub fn add(&mut self, line: &UnansweredLine) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        crate::fs::append(&self.path, &text)?;
        self.count(line);
        Ok(())
    }

    /// Removes the refusals and paid attempts of the rows that satisfy `is_wanted`, so that later runs request
    /// them. Keeps their failures, so that they are requested last. Returns their keys.
    pub fn forget(
        &mut self,
        is_wanted: impl Fn(&str, &UnansweredRow) -> bool,
    ) -> Result<Vec<String>> {
        let wanted = |key: &String, known: &UnansweredRow| is_wanted(key, known);
        let rows = self.rows.iter().filter(|(key, known)| wanted(key, known));
        let forgotten: Vec<String> = rows.map(|(key, _)| key.clone()).collect();
        let mut kept_text = Vec::new();
        let mut kept = Unanswered::default();
        for line in self.lines()? {
            let known = self.rows.get(&line.key);
            let is_wanted = known.is_some_and(|known| wanted(&line.key, known));
            if !is_wanted || line.kind == Kind::Failed {
                serde_json::to_writer(&mut kept_text, &line)?;
                kept_text.push(b'\n');
                kept.count(&line);
            }
        }
        self.rows = kept.rows;
        if !forgotten.is_empty() {
            crate::fs::write_atomic(&self.path, &kept_text)?;
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
        // A torn line, as after a kill.
        text.extend_from_slice(b"{\"key\":\"a\",\"pro");
        std::fs::write(file(dir.path()), text).unwrap();

        let mut second = Unanswered::load(dir.path()).unwrap();
        second.add(&line("a", Kind::PaidAttempt)).unwrap();
        let known = |unanswered: &Unanswered, key: &str| {
            unanswered
                .get(key)
                .map(|known| (known.paid, known.is_filtered))
        };
        second.add(&line("c", Kind::PaidAttempt)).unwrap();
        second.add(&line("c", Kind::Failed)).unwrap();
        let mut third = Unanswered::load(dir.path()).unwrap();
        assert_eq!(known(&third, "a"), Some((2, false)));
        assert_eq!(known(&third, "b"), Some((0, true)));
        let is_wanted = |key: &str, known: &UnansweredRow| known.is_filtered || key == "c";
        assert_eq!(third.forget(is_wanted).unwrap().len(), 2);
        let fourth = Unanswered::load(dir.path()).unwrap();
        assert_eq!(fourth.rows, third.rows);
        assert_eq!(
            (known(&fourth, "a"), known(&fourth, "b")),
            (Some((2, false)), None)
        );
        // Its failure is kept, so that other rows are requested first.
        assert_eq!(known(&fourth, "c"), Some((0, false)));
        assert_eq!(fourth.row_status("c", false, 1), RowStatus::Suspect);
    }
}
