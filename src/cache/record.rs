//! [`Record`]: one answered request, stored as one line of the cache.

use crate::cache::raw_token::RawToken;
use crate::cache::usage::Usage;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::stored;

/// Schema version that this version writes. Readers accept it and every earlier one.
pub const SCHEMA: u32 = 2;

/// Logprob that OpenAI's API sends for "too unlikely to report", since JSON has no infinity. A response's
/// logprob at or below it is stored as missing.
pub(crate) const MISSING_LOGPROB: f32 = -9999.0;

/// Highest of the sentinels that endpoints send for "too unlikely to report": some send -100. Training ignores
/// a stored logprob at or below it.
pub(crate) const HIGHEST_SENTINEL_LOGPROB: f32 = -100.0;

/// One line of the cache, without its checksum (see [`super::line`] for the line format).
///
/// Every field is always present and has one stored type (see `stored`), so that `pandas`, `datasets` and
/// other readers that infer a schema from the first rows can read the file. The one exception is `logprobs`,
/// which is null where there are none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Schema version of this line.
    pub v: u32,
    /// Identifies the request, in hex; two records of one key are two answers to one request. See
    /// [`super::question`].
    pub key: String,
    /// `max_tokens` of the request if the answer was truncated there: a run with a larger `max_tokens` repeats the
    /// request. 0 otherwise, and in records of schema 1.
    #[serde(default)]
    pub cut_at: u32,
    /// Id of the prompt, as in the prompt source.
    pub prompt_id: String,
    /// Index of the answer among `prompts.samples`, counted from 0.
    pub sample: u32,
    pub status: Status,
    /// Reason why a quarantined answer must not be trained on; empty otherwise.
    pub reason: String,
    /// Base URL of the endpoint that answered.
    pub endpoint: String,
    /// `teacher.name`; empty if none was set.
    #[serde(default)]
    pub teacher: String,
    /// Hash of the `distill probe` findings about the endpoint at that time; empty if it was not probed.
    #[serde(default)]
    pub probe: String,
    /// The request body as sent.
    #[serde(with = "stored::request")]
    pub request: Value,
    pub answer: Answer,
    /// `None` (stored as zeros) if the endpoint reported none.
    #[serde(with = "stored::usage")]
    pub usage: Option<Usage>,
    /// Model name as reported by the endpoint; empty if none.
    pub model: String,
    /// `system_fingerprint` as reported; empty if none.
    pub fingerprint: String,
    pub logprobs: Option<Logprobs>,
    pub timing: Timing,
    /// US dollars at the prices in the config; `None` (stored as 0) if no price is configured.
    #[serde(with = "stored::cost")]
    pub cost_usd: Option<f64>,
    /// Response fields that this version does not know, unchanged.
    #[serde(with = "stored::extra")]
    pub extra: Map<String, Value>,
}

/// Returns true if `distill serve --mock` gave the answer, judged by its `system_fingerprint`.
pub(crate) fn is_mock(fingerprint: &str) -> bool {
    fingerprint == "fp_mock"
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    Quarantined,
}

/// The teacher's answer. A text that the endpoint did not send is empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub text: String,
    /// As the endpoint spells it: `stop`, `length`, `content_filter`, `eos`, ...
    pub finish_reason: String,
    pub refusal: String,
    pub reasoning: String,
}

/// Returns true if an answer with this finish reason was truncated at the maximum number of tokens.
pub fn is_truncated(finish_reason: &str) -> bool {
    matches!(finish_reason, "length" | "max_tokens")
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Time at which the request was sent: RFC 3339 in UTC with milliseconds, as by [`Timing::stamp`].
    pub sent_at: String,
    pub latency_ms: u64,
    /// Number of attempts: the one that succeeded, and the failed ones that count towards `retry.max_attempts`.
    pub attempts: u32,
}

impl Timing {
    /// Parses `sent_at` as UTC; `None` if it is not a timestamp.
    pub fn date(sent_at: &str) -> Option<DateTime> {
        let sent_at: jiff::Timestamp = sent_at.parse().ok()?;
        Some(sent_at.to_zoned(TimeZone::UTC).datetime())
    }

    /// Formats `time` for `sent_at`, always with milliseconds: if only some timestamps had a fraction, readers
    /// that infer types would infer different ones from block to block.
    pub fn stamp(time: jiff::Timestamp) -> String {
        format!("{time:.3}")
    }
}

/// Top-k logprobs of an answer of T tokens, in columns (T tokens; up to k alternatives each).
///
/// Columns are smaller than a list of objects per position, and each has one type, as readers that infer a
/// schema need. A token is stored by its bytes: as text if they are UTF-8, otherwise as `""` here and in hex
/// in `raw`. A logprob is `None` if the endpoint sent null, a number that is not finite, or one at or below
/// `MISSING_LOGPROB`. Logprobs have f32 precision, in which endpoints compute.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// Emitted tokens (T).
    pub token: Vec<String>,
    /// Logprobs of the emitted tokens (T).
    pub logprob: Vec<Option<f32>>,
    /// Alternatives at each position, most likely first (T x up to k).
    pub top: Vec<Vec<String>>,
    /// Logprobs of the alternatives (the shape of `top`).
    pub top_logprob: Vec<Vec<Option<f32>>>,
    /// Tokens whose bytes are not valid UTF-8.
    #[serde(with = "stored::raw")]
    pub raw: Vec<RawToken>,
    /// True if the joined bytes of the emitted tokens equal the answer's text. A last token that ends the turn
    /// does not count.
    pub matches_text: bool,
}
