//! Counts for one preparation of training data: records, examples and positions, and a check of the teacher's logprobs.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::data::groups::GroupCounts;
use crate::data::logprob_check::LogprobCheck;

/// Maximum number of pairs of prompt endings that are counted separately.
const MAX_ENDINGS: usize = 5;

/// Reason in [`DataReport::ce_only`] for an answer without logprobs.
pub(crate) const NO_LOGPROBS: &str = "no logprobs";

/// Counts of records and positions, for the user and for `--json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// Number of records read; in a file of conversations, a record is a row.
    pub records: u64,
    /// Number of examples made.
    pub kept: u64,
    /// Number of training examples; 0 before the split.
    pub train: u64,
    /// Number of validation examples; 0 before the split.
    pub validation: u64,
    /// Records by group, used and left out.
    #[serde(default)]
    pub groups: GroupCounts,
    /// Number of selected records without an example, and of separate answers (see `split`) without one, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Number of examples whose last answer trains on cross-entropy alone, by reason.
    pub ce_only: BTreeMap<String, u64>,
    /// Number of supervised answers.
    #[serde(default)]
    pub answers: u64,
    /// Number of supervised answers without an end-of-turn token, except truncated answers.
    #[serde(default)]
    pub without_end: u64,
    /// Number of supervised answers whose reasoning the chat template drops, or the record has in a separate field, by
    /// its treatment.
    #[serde(default)]
    pub thinking: BTreeMap<String, u64>,
    /// Number of earlier answers of conversations that became separate examples, because the text before the answer in
    /// the rendered conversation differs from the generation prompt.
    #[serde(default)]
    pub split: u64,
    /// Number of answers that follow the generation prompt in their example, although the text before the answer in the
    /// rendered conversation differs from it.
    #[serde(default)]
    pub prefix_differs: u64,
    /// `prefix_differs` by the ends of the two texts.
    #[serde(default)]
    pub differences: BTreeMap<String, u64>,
    /// Number of positions at which the teacher's probabilities sum to more than 1. They have no soft labels.
    #[serde(default)]
    pub positions_over_one: u64,
    /// Number of supervised positions whose label is the unknown token: text that the vocabulary cannot spell. They have
    /// no soft labels.
    #[serde(default)]
    pub unknown_labels: u64,
    /// Number of unknown tokens in the sources of an encoder-decoder.
    #[serde(default)]
    pub unknown_source_tokens: u64,
    /// Number of tokens in the sources of an encoder-decoder.
    #[serde(default)]
    pub source_tokens: u64,
    /// Number of tokens in the kept examples.
    pub tokens: u64,
    /// Number of supervised positions.
    pub positions: u64,
    /// Number of supervised positions with soft labels.
    pub soft_positions: u64,
    /// Number of kept answers with soft labels.
    #[serde(default)]
    pub with_soft_labels: u64,
    /// Number of answers with soft labels whose tokens were sampled from the reported distribution: at temperature 1,
    /// without top_p. The JSON keeps the name of earlier versions.
    #[serde(default, rename = "exact")]
    pub exact_samples: u64,
    /// Number of answers that have soft labels and an end-of-turn token.
    #[serde(default)]
    pub ends: u64,
    /// Number of answers that have soft labels, one of them for the end-of-turn token.
    #[serde(default)]
    pub ends_listed: u64,
    /// Mean share of the teacher's probability that lies on student tokens, over positions with soft labels. The
    /// remaining probability is the tail.
    pub mean_mapped_mass: f64,
    /// Check of the teacher's logprobs: the number of positions at which it emitted its most likely token, and the
    /// number that its probabilities predict. The JSON keeps the name of earlier versions.
    #[serde(default, rename = "gate")]
    pub logprob_check: LogprobCheck,
}

impl DataReport {
    /// Adds the counts of `other`, except `train`, `validation` and `mean_mapped_mass`, which the caller computes once
    /// all examples are known.
    pub fn add(&mut self, other: DataReport) {
        self.records += other.records;
        self.groups.add(other.groups);
        self.kept += other.kept;
        self.answers += other.answers;
        self.without_end += other.without_end;
        self.split += other.split;
        self.positions_over_one += other.positions_over_one;
        self.unknown_labels += other.unknown_labels;
        self.unknown_source_tokens += other.unknown_source_tokens;
        self.source_tokens += other.source_tokens;
        self.tokens += other.tokens;
        self.positions += other.positions;
        self.soft_positions += other.soft_positions;
        self.with_soft_labels += other.with_soft_labels;
        self.exact_samples += other.exact_samples;
        self.ends += other.ends;
        self.ends_listed += other.ends_listed;
        self.logprob_check.add(other.logprob_check);
        for (totals, counts) in [
            (&mut self.dropped, other.dropped),
            (&mut self.ce_only, other.ce_only),
            (&mut self.thinking, other.thinking),
        ] {
            for (reason, count) in counts {
                *totals.entry(reason).or_default() += count;
            }
        }
        for (endings, count) in other.differences {
            self.count_difference(endings, count);
        }
    }

    /// Returns true if more than half of the answers with soft labels and an end-of-turn token have no soft label for
    /// that token. Most endpoints return no logprobs for it.
    pub fn misses_ends(&self) -> bool {
        2 * self.ends_listed < self.ends
    }

    /// Returns true if no example has logprobs.
    fn has_no_logprobs(&self) -> bool {
        self.kept > 0 && self.ce_only.get(NO_LOGPROBS) == Some(&self.kept)
    }

    /// Counts answers with this pair of prompt endings. After [`MAX_ENDINGS`] distinct pairs all others share one
    /// entry, because a date or an id may make each pair distinct.
    pub(crate) fn count_difference(&mut self, endings: String, count: u64) {
        self.prefix_differs += count;
        let has_room = self.differences.len() < MAX_ENDINGS;
        let endings = if has_room || self.differences.contains_key(&endings) {
            endings
        } else {
            "other endings".into()
        };
        *self.differences.entry(endings).or_default() += count;
    }
}

/// Formats counts as `12 reason, 3 other reason`, the most frequent first.
pub(crate) fn by_reason(counts: &BTreeMap<String, u64>) -> String {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|&(_, &count)| std::cmp::Reverse(count));
    let parts: Vec<String> = counts
        .iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    parts.join(", ")
}

impl fmt::Display for DataReport {
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
        write!(f, "\n{} tokens, {} supervised", self.tokens, self.positions)?;
        if self.has_no_logprobs() {
            // Soft labels may come from a local teacher.
            write!(f, ", no logprobs in the data")?;
        } else {
            let share = 100.0 * self.soft_positions as f64 / self.positions.max(1) as f64;
            write!(
                f,
                ", {} with soft labels ({share:.1} %)",
                self.soft_positions
            )?;
        }
        if self.soft_positions > 0 {
            write!(
                f,
                ", {:.1} % of the teacher's probability on student tokens",
                100.0 * self.mean_mapped_mass
            )?;
        }
        if self.logprob_check.exact.positions > 0 {
            let top_token = &self.logprob_check.exact;
            write!(
                f,
                "\nteacher's most likely token emitted: {:.2} % of {}, {:.2} % expected",
                100.0 * top_token.rate(),
                top_token.positions,
                100.0 * top_token.expected(),
            )?;
        }
        if self.split > 0 {
            write!(
                f,
                "\n{} earlier answers of conversations became separate examples, each after the prompt that a model would \
                 answer",
                self.split
            )?;
        }
        if self.prefix_differs > 0 {
            write!(
                f,
                "\n{} answers follow the generation prompt in training, which differs from the text before them in the \
                 rendered conversation: {}",
                self.prefix_differs,
                by_reason(&self.differences)
            )?;
        }
        if !self.thinking.is_empty() {
            write!(f, "\nanswers in training: {}", by_reason(&self.thinking))?;
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
        if self.unknown_labels > 0 {
            write!(
                f,
                "\n{} of {} labels are the unknown token, because the student's vocabulary cannot spell the text: they \
                 train on cross-entropy",
                self.unknown_labels, self.positions
            )?;
        }
        if self.unknown_source_tokens > 0 {
            write!(
                f,
                "\n{} of {} tokens of the sources are the unknown token: the student cannot read the text there",
                self.unknown_source_tokens, self.source_tokens
            )?;
        }
        if !self.ce_only.is_empty() && !self.has_no_logprobs() {
            write!(f, "\ncross-entropy only: {}", by_reason(&self.ce_only))?;
        }
        Ok(())
    }
}
