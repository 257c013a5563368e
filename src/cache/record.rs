//! One answered request, as one line of the cache.

use crate::cache::encoding::RawToken;
use crate::cache::usage::Usage;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::stored;

/// The schema that this version writes. Readers accept it and every earlier one.
pub const SCHEMA: u32 = 2;

/// A line of the cache, without its checksum (see [`super::line`] for the line format).
///
/// Every field is always present and is stored with one type (see `stored`), so that
/// `pandas`, `datasets` and other readers that infer a schema from the first rows can read the file
/// as it is. The one exception is `logprobs`, which is null where there are none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Schema version of this line.
    pub v: u32,
    /// Names what was asked, in hex: the answer to "have we paid for this?". See [`super::question`].
    pub key: String,
    /// `max_tokens`, where the answer was cut off there: with more of them it is asked for again. 0
    /// otherwise, and in records of schema 1.
    #[serde(default)]
    pub cut_at: u32,
    /// The prompt's id, as in the prompt source.
    pub prompt_id: String,
    /// Which of `prompts.samples` answers this is, from 0.
    pub sample: u32,
    pub status: Status,
    /// Why a quarantined answer must not be trained on; empty otherwise.
    pub reason: String,
    /// Base URL of the endpoint that answered.
    pub endpoint: String,
    /// `teacher.name`, where one was set.
    #[serde(default)]
    pub teacher: String,
    /// Hash of what `distill probe` knew of the endpoint then; empty if it was not probed.
    #[serde(default)]
    pub probe: String,
    /// The request body as sent.
    #[serde(with = "stored::request")]
    pub request: Value,
    pub answer: Answer,
    /// None where the endpoint reports none, which is stored as zeros.
    #[serde(with = "stored::usage")]
    pub usage: Option<Usage>,
    /// Model name as reported by the endpoint; empty if it reports none.
    pub model: String,
    /// `system_fingerprint` as reported; empty if none.
    pub fingerprint: String,
    pub logprobs: Option<Logprobs>,
    pub timing: Timing,
    /// Cost at the prices in the config; none where no price is configured, which is stored as 0.
    #[serde(with = "stored::cost")]
    pub cost_usd: Option<f64>,
    /// Response fields that this version does not know, kept as they came.
    #[serde(with = "stored::extra")]
    pub extra: Map<String, Value>,
}

/// Returns true if the answer is of `distill serve --mock`, by its `system_fingerprint`.
pub fn is_mock(fingerprint: &str) -> bool {
    fingerprint == "fp_mock"
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    Quarantined,
}

/// What the teacher said. Text fields are empty where the endpoint sent none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub text: String,
    /// As the endpoint spells it: `stop`, `length`, `content_filter`, `eos`, ...
    pub finish_reason: String,
    pub refusal: String,
    pub reasoning: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// When the request was sent: RFC 3339 in UTC with milliseconds, as by [`Timing::stamp`].
    pub sent_at: String,
    pub latency_ms: u64,
    /// 1 where the first attempt succeeded.
    pub attempts: u32,
}

impl Timing {
    /// `sent_at` in UTC; None if it is no timestamp.
    pub fn date(sent_at: &str) -> Option<DateTime> {
        let sent_at: jiff::Timestamp = sent_at.parse().ok()?;
        Some(sent_at.to_zoned(TimeZone::UTC).datetime())
    }

    /// `time` as `sent_at` holds it: always with milliseconds. Where some stamps have a fraction
    /// and others none, readers that guess types guess differently from one block to the next.
    pub fn stamp(time: jiff::Timestamp) -> String {
        format!("{time:.3}")
    }
}

/// Top-k logprobs of an answer of T tokens, in columns (T tokens; up to k alternatives each).
///
/// Columns rather than a list per position: each has one type, so schema-inferring readers load
/// it, and it is smaller. A token is stored by its bytes: as text where these are UTF-8, otherwise
/// as `""` here and in hex in `raw`. A logprob is `None` where the endpoint sent a sentinel
/// (-9999, null, not finite), and is kept to f32 precision, in which endpoints compute.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// The emitted tokens (T).
    pub token: Vec<String>,
    /// Their logprobs (T).
    pub logprob: Vec<Option<f32>>,
    /// The alternatives, best first (T x up to k).
    pub top: Vec<Vec<String>>,
    /// Their logprobs (the shape of `top`).
    pub top_logprob: Vec<Vec<Option<f32>>>,
    /// Tokens whose bytes are no valid UTF-8.
    #[serde(with = "stored::raw")]
    pub raw: Vec<RawToken>,
    /// Do the emitted tokens' bytes, joined, equal the answer's text? A last token that ends the turn aside.
    pub matches_text: bool,
}
