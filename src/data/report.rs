//! What became of the records.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::classes::Classes;
use crate::data::groups::Counts;
use crate::data::logprob_check::Gate;

/// Maximum number of distinct prompt endings that are shown.
const MAX_DIFFERENCES: usize = 5;

/// Reason in [`Report::ce_only`] for an answer without logprobs.
pub const NO_LOGPROBS: &str = "no logprobs";

/// Counts of rows and positions, for the user and for `--json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Rows read.
    pub records: u64,
    pub kept: u64,
    /// Examples on either side of the split; both 0 where nothing was split.
    pub train: u64,
    pub validation: u64,
    /// Records by group, and those that are not selected.
    #[serde(default)]
    pub groups: Counts,
    /// Selected rows that make no example, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Kept answers that train on cross-entropy alone, by reason.
    pub ce_only: BTreeMap<String, u64>,
    /// Supervised answers, and those without an end-of-turn token.
    #[serde(default)]
    pub answers: u64,
    #[serde(default)]
    pub without_end: u64,
    /// Supervised answers whose thinking the chat template does not print, by how they are trained.
    #[serde(default)]
    pub thinking: BTreeMap<String, u64>,
    /// Answers made into separate examples, since their prefix in the conversation differs from the generation
    /// prompt.
    #[serde(default)]
    pub split: u64,
    /// Answers whose prefix in the rendered conversation differs from the generation prompt, which the examples
    /// use; and the ends of both by frequency.
    #[serde(default)]
    pub prefix_differs: u64,
    #[serde(default)]
    pub differences: BTreeMap<String, u64>,
    /// Positions whose probabilities sum to more than 1; they train on cross-entropy.
    #[serde(default)]
    pub positions_over_one: u64,
    /// Tokens in the kept examples.
    pub tokens: u64,
    /// Supervised positions, and those of them with soft labels.
    pub positions: u64,
    pub soft_positions: u64,
    /// Kept answers with soft labels, and those of them that were drawn from the very distribution
    /// that their logprobs tell.
    #[serde(default)]
    pub with_soft_labels: u64,
    #[serde(default)]
    pub exact: u64,
    /// Answers with soft labels that end the turn, and those of them whose soft labels tell of its end.
    #[serde(default)]
    pub ends: u64,
    #[serde(default)]
    pub ends_listed: u64,
    /// The share of the teacher's probability that lies on student tokens, where there are soft
    /// labels; the rest is the tail.
    pub mean_mapped_mass: f64,
    /// How often the teacher's most likely token is what it emitted, beside what its probability says.
    #[serde(default)]
    pub gate: Gate,
    /// The same through the map to the student's tokens, by the kind of the token.
    #[serde(default)]
    pub classes: Classes,
}

impl Report {
    /// Adds the counts of further rows; the mean is another's to take.
    pub fn add(&mut self, other: Report) {
        self.records += other.records;
        self.groups.add(other.groups);
        self.kept += other.kept;
        self.answers += other.answers;
        self.without_end += other.without_end;
        self.split += other.split;
        self.positions_over_one += other.positions_over_one;
        self.tokens += other.tokens;
        self.positions += other.positions;
        self.soft_positions += other.soft_positions;
        self.with_soft_labels += other.with_soft_labels;
        self.exact += other.exact;
        self.ends += other.ends;
        self.ends_listed += other.ends_listed;
        self.gate.add(other.gate);
        self.classes.add(other.classes);
        for (mine, others) in [
            (&mut self.dropped, other.dropped),
            (&mut self.ce_only, other.ce_only),
            (&mut self.thinking, other.thinking),
        ] {
            for (reason, count) in others {
                *mine.entry(reason).or_default() += count;
            }
        }
        for (endings, count) in other.differences {
            self.count_difference(endings, count);
        }
    }

    /// Do endpoints leave the token that ends a turn out of their logprobs, as most do?
    pub fn misses_ends(&self) -> bool {
        2 * self.ends_listed < self.ends
    }

    /// Counts answers with these prompt endings, each of which could contain a date or an id.
    pub fn count_difference(&mut self, endings: String, count: u64) {
        self.prefix_differs += count;
        let has_room = self.differences.len() < MAX_DIFFERENCES;
        let endings = if has_room || self.differences.contains_key(&endings) {
            endings
        } else {
            "other endings".into()
        };
        *self.differences.entry(endings).or_default() += count;
    }
}

/// `reason: count` pairs, the most frequent first.
pub fn by_reason(counts: &BTreeMap<String, u64>) -> String {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|&(_, &count)| std::cmp::Reverse(count));
    let parts: Vec<String> = counts
        .iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    parts.join(", ")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} records, {} kept",
            self.records,
            self.kept - self.split
        )?;
        if self.split > 0 {
            write!(f, " as {} examples", self.kept)?;
        }
        if self.train + self.validation > 0 {
            write!(f, ": {} train, {} validation", self.train, self.validation)?;
        }
        for line in self.groups.lines() {
            write!(f, "\n{line}")?;
        }
        if let Some(advice) = self.groups.advice() {
            write!(f, "\n{advice}")?;
        }
        if !self.dropped.is_empty() {
            write!(f, "\ndropped: {}", by_reason(&self.dropped))?;
        }
        write!(
            f,
            "\n{} tokens, {} supervised, {} with soft labels ({:.1} %)",
            self.tokens,
            self.positions,
            self.soft_positions,
            100.0 * self.soft_positions as f64 / self.positions.max(1) as f64
        )?;
        if self.soft_positions > 0 {
            write!(f, ", mapped mass {:.3}", self.mean_mapped_mass)?;
        }
        if self.gate.exact.positions > 0 {
            let gate = &self.gate.exact;
            write!(
                f,
                "\nteacher's most likely token emitted: {:.2} % of {}, {:.2} % expected",
                100.0 * gate.rate(),
                gate.positions,
                100.0 * gate.expected(),
            )?;
        }
        let classes = self.classes.to_string();
        if !classes.is_empty() {
            write!(f, "\nthrough the map: {classes}")?;
        }
        if self.split > 0 {
            write!(
                f,
                "\n{} answers inside conversations became separate examples: rendered there, they are not what a model \
                 writes behind its generation prompt",
                self.split
            )?;
        }
        if self.prefix_differs > 0 {
            write!(
                f,
                "\n{} answers are trained after the generation prompt, which differs from their prefix in the \
                 rendered conversation: {}",
                self.prefix_differs,
                by_reason(&self.differences)
            )?;
        }
        if !self.thinking.is_empty() {
            write!(f, "\nanswers trained: {}", by_reason(&self.thinking))?;
        }
        if self.without_end > 0 {
            write!(
                f,
                "\n{} of {} answers have no end-of-turn token: the student does not learn to stop after them",
                self.without_end, self.answers
            )?;
        }
        if self.positions_over_one > 0 {
            write!(
                f,
                "\n{} positions without soft labels: the teacher's probabilities there sum to more than 1",
                self.positions_over_one
            )?;
        }
        if !self.ce_only.is_empty() {
            write!(f, "\ncross-entropy only: {}", by_reason(&self.ce_only))?;
        }
        Ok(())
    }
}
