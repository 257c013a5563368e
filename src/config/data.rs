//! Settings of the training data.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// None: a cache. Else a JSONL file of `{"messages": [...]}` rows.
    pub source: Option<PathBuf>,
    /// The cache folder of another run. None: this run's.
    pub cache: Option<PathBuf>,
    /// Which answers of a cache are used.
    pub groups: Groups,
    /// Share of the prompts that is held out for the validation loss.
    pub validation_share: f64,
    /// Longer examples are left out, and counted.
    pub max_length: usize,
    /// Merge the answers to a prompt into a trie: where some begin alike, what they go on with are soft
    /// labels for answers without logprobs.
    pub sample_trie: bool,
    /// At most so many of the teacher's alternatives at a position, the most likely ones; None: all.
    pub top_logprobs: Option<usize>,
    /// Model folder of the teacher, if its tokens are named by id (`token_id:N`).
    pub teacher_tokenizer: Option<PathBuf>,
    /// Finish reasons whose answers are trained on.
    pub keep_finish_reasons: Vec<String>,
    /// Treatment of thinking at the beginning of an answer.
    pub thinking: Thinking,
}

/// Answers of a cache: "asked", "all", or groups by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "OneOrMany", into = "OneOrMany")]
pub enum Groups {
    /// Those to the questions of this config.
    Asked,
    All,
    Named(Vec<String>),
}

impl Groups {
    /// Those of a command line; None without names.
    pub fn named(names: &[String]) -> Option<Groups> {
        match names {
            [] => None,
            [name] => Some(OneOrMany::One(name.clone()).into()),
            names => Some(Groups::Named(names.to_vec())),
        }
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl From<OneOrMany> for Groups {
    fn from(names: OneOrMany) -> Self {
        match names {
            OneOrMany::One(name) if name == "asked" => Groups::Asked,
            OneOrMany::One(name) if name == "all" => Groups::All,
            OneOrMany::One(name) => Groups::Named(vec![name]),
            OneOrMany::Many(names) => Groups::Named(names),
        }
    }
}

impl From<Groups> for OneOrMany {
    fn from(groups: Groups) -> Self {
        match groups {
            Groups::Asked => OneOrMany::One("asked".into()),
            Groups::All => OneOrMany::One("all".into()),
            Groups::Named(names) => OneOrMany::Many(names),
        }
    }
}

/// Treatment of the text between `<think>` and `</think>` at the beginning of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thinking {
    /// Supervised, like the rest of the answer.
    Supervise,
    /// Kept in the input without loss.
    Context,
    /// Removed from the example.
    Drop,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            source: None,
            cache: None,
            groups: Groups::Asked,
            validation_share: 0.02,
            max_length: 1024,
            sample_trie: false,
            top_logprobs: None,
            teacher_tokenizer: None,
            keep_finish_reasons: ["stop", "eos", "end_turn"].map(String::from).to_vec(),
            thinking: Thinking::Supervise,
        }
    }
}
