//! Settings of the training data.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Settings of the training data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// JSONL file of `{"messages": [...]}` rows; `None` for a cache.
    pub source: Option<PathBuf>,
    /// Cache folder of another run; `None` for this run's cache.
    pub cache: Option<PathBuf>,
    /// Selection of the answers of a cache.
    pub groups: Groups,
    /// Share of the prompts held out for the validation loss.
    pub validation_share: f64,
    /// Maximum length of an example in tokens; longer examples are skipped and counted. For an encoder-decoder, the
    /// maximum length of the answer.
    pub max_length: usize,
    /// Maximum length of the source of an encoder-decoder in tokens; longer examples are skipped and counted.
    pub max_source_length: usize,
    /// True to merge the answers to a prompt into a prefix trie. For answers without logprobs, the frequencies of the
    /// next tokens in the trie become soft labels.
    pub sample_trie: bool,
    /// Number of the most likely alternatives of the teacher to keep at a position; `None` for all.
    pub top_logprobs: Option<usize>,
    /// Model folder of the teacher; needed if the server names tokens by id (`token_id:N`).
    pub teacher_tokenizer: Option<PathBuf>,
    /// Finish reasons whose answers are trained on.
    pub keep_finish_reasons: Vec<String>,
    /// Treatment of thinking at the beginning of an answer.
    pub thinking: Thinking,
}

/// Selection of the answers in a cache: "asked", "all", "mock", or the names of groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "OneOrMany", into = "OneOrMany")]
pub enum Groups {
    /// Answers to the questions of this config.
    Asked,
    /// All answers except those of a mock.
    All,
    /// Group ids, models, teachers or addresses; "mock" for the answers of a mock.
    Named(Vec<String>),
}

/// One name or a list of names, as the config file may set [`Groups`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"asked\", \"all\", \"mock\", or a list of groups, models or teachers"
)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl TryFrom<OneOrMany> for Groups {
    type Error = String;

    fn try_from(names: OneOrMany) -> Result<Self, String> {
        match names {
            OneOrMany::One(name) => Groups::parse(vec![name]),
            OneOrMany::Many(names) => Groups::parse(names),
        }
    }
}

impl Groups {
    /// Parses the names of groups.
    ///
    /// # Errors
    /// If "asked" or "all" is combined with other names, a name is empty, or there are no names.
    pub fn parse(names: Vec<String>) -> Result<Groups, String> {
        let is_keyword = |name: &String| name == "asked" || name == "all";
        match names.as_slice() {
            [name] if name == "asked" => Ok(Groups::Asked),
            [name] if name == "all" => Ok(Groups::All),
            _ if names.iter().any(is_keyword) => {
                Err("\"asked\" and \"all\" cannot be combined with other groups".into())
            }
            _ if names.is_empty() || names.iter().any(String::is_empty) => {
                Err("name at least one group, or \"all\"".into())
            }
            _ => Ok(Groups::Named(names)),
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
    /// Trained on, like the text after it.
    Supervise,
    /// Kept in the input, without loss on its tokens.
    Context,
    /// Removed from the example.
    Drop,
}

/// Returns the cache folder of the run in `run_dir`.
pub fn cache_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("cache")
}

/// Returns the folder in `run_dir` with the teacher's logprobs of answers that the student wrote in on-policy training.
pub fn scores_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("judged")
}

impl DataConfig {
    /// Returns the cache folder with the answers to train on, for a run in `run_dir`.
    pub fn cache_folder(&self, run_dir: &Path) -> PathBuf {
        let default = || cache_dir(run_dir);
        self.cache.clone().unwrap_or_else(default)
    }

    /// Returns the same settings with the maximum lengths limited to `context_length`, a number of tokens.
    pub fn within(&self, context_length: usize) -> DataConfig {
        DataConfig {
            max_length: self.max_length.min(context_length),
            max_source_length: self.max_source_length.min(context_length),
            ..self.clone()
        }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            source: None,
            cache: None,
            groups: Groups::Asked,
            validation_share: 0.02,
            max_length: 1024,
            max_source_length: 1024,
            sample_trie: false,
            top_logprobs: None,
            teacher_tokenizer: None,
            keep_finish_reasons: ["stop", "eos", "end_turn"].map(String::from).to_vec(),
            thinking: Thinking::Supervise,
        }
    }
}
