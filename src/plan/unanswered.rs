//! `unanswered.jsonl` in the run folder: rows that a content filter refuses, which are not asked again; attempts
//! that may have been billed and brought no answer, so that no row is bought more often than
//! `retry.max_attempts` times, reruns included; and rows that failed, which the next run asks last.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::cache::record::Timing;
use crate::client::attempt_error::RowFailure;
use crate::plan::queue::QueuedRow;
use crate::plan::{Plan, RowStatus};

/// What is known of a row without an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UnansweredRow {
    /// Attempts that may have been billed.
    pub paid: u32,
    /// The class and the message of the last of them.
    pub class: String,
    pub message: String,
    /// A filter refuses it.
    pub is_filtered: bool,
    /// A run ended because of its reply, or would have, had nothing else been answered.
    pub is_suspect: bool,
    /// Class of the failure with which it ended while other rows were answered; empty if it did not.
    pub failed_as: String,
}

/// A line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    pub key: String,
    pub prompt_id: String,
    pub sample: u32,
    pub kind: Kind,
    pub class: String,
    pub message: String,
    /// RFC 3339, in UTC.
    pub at: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// May have been billed, and brought no answer.
    PaidAttempt,
    /// Refused by a content filter.
    Filtered,
    /// A run ended because of its reply, or would have, had nothing else been answered.
    Suspect,
    /// Has failed while other rows were answered.
    Failed,
}

impl Line {
    pub fn new(
        plan: &Plan,
        entry: QueuedRow,
        kind: Kind,
        failure: &RowFailure,
        now: jiff::Timestamp,
    ) -> Line {
        let row = &plan.rows[entry.row];
        Line {
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

#[derive(Debug, Default)]
pub struct Unanswered {
    path: PathBuf,
    rows: HashMap<String, UnansweredRow>,
}

pub(crate) fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("unanswered.jsonl")
}

impl Unanswered {
    /// Reads the file of the run folder, if there is one. A line that is torn or damaged costs itself.
    pub fn load(run_dir: &Path) -> Result<Unanswered> {
        let mut unanswered = Unanswered {
            path: file(run_dir),
            rows: HashMap::new(),
        };
        let lines = unanswered.lines()?;
        lines.iter().for_each(|line| unanswered.count(line));
        Ok(unanswered)
    }

    fn lines(&self) -> Result<Vec<Line>> {
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
                "{}: {damaged} lines are damaged and left out: their rows may be asked once more",
                self.path.display()
            );
        }
        Ok(lines)
    }

    fn count(&mut self, line: &Line) {
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

    /// How the row with this key stands before a run.
    pub fn standing(&self, key: &str, is_cached: bool, max_attempts: u32) -> RowStatus {
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

    /// Does a filter refuse the row with this key?
    pub fn is_filtered(&self, key: &str) -> bool {
        self.get(key).is_some_and(|known| known.is_filtered)
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The keys of all rows that were paid for or refused.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        let rows = self.rows.iter();
        let rows = rows.filter(|(_, known)| known.paid > 0 || known.is_filtered);
        rows.map(|(key, _)| key.as_str())
    }

    /// What is known of the row with this key.
    pub fn get(&self, key: &str) -> Option<&UnansweredRow> {
        self.rows.get(key)
    }

    /// Adds what has become of an attempt. It survives a kill of this process once this returns.
    pub fn add(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        crate::fs::append(&self.path, &text)?;
        self.count(line);
        Ok(())
    }

    /// Forgets the rows that `is_wanted` names, so that they are asked again, after those that have not failed.
    /// Returns their keys.
    pub fn forget(
        &mut self,
        is_wanted: impl Fn(&str, &UnansweredRow) -> bool,
    ) -> Result<Vec<String>> {
        let wanted = |key: &String, known: &UnansweredRow| is_wanted(key, known);
        let rows = self.rows.iter().filter(|(key, known)| wanted(key, known));
        let forgotten: Vec<String> = rows.map(|(key, _)| key.clone()).collect();
        let (mut kept, mut left) = (Vec::new(), Unanswered::default());
        for line in self.lines()? {
            let known = self.rows.get(&line.key);
            let is_wanted = known.is_some_and(|known| wanted(&line.key, known));
            if !is_wanted || line.kind == Kind::Failed {
                serde_json::to_writer(&mut kept, &line)?;
                kept.push(b'\n');
                left.count(&line);
            }
        }
        self.rows = left.rows;
        if !forgotten.is_empty() {
            crate::fs::write_atomic(&self.path, &kept)?;
        }
        Ok(forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(key: &str, kind: Kind) -> Line {
        Line {
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
    fn attempts_add_up_over_runs_and_can_be_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Unanswered::load(dir.path()).unwrap();
        first.add(&line("a", Kind::PaidAttempt)).unwrap();
        first.add(&line("b", Kind::Filtered)).unwrap();
        let mut text = std::fs::read(file(dir.path())).unwrap();
        // As a kill leaves it.
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
        // That it has failed is remembered: others go before it.
        assert_eq!(known(&fourth, "c"), Some((0, false)));
        assert_eq!(fourth.standing("c", false, 1), RowStatus::Suspect);
    }
}
