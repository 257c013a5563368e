//! `[limits]`: limits per minute, per day and on concurrent requests, and rate-limit headers.

use serde::{Deserialize, Serialize};

use crate::mock::script::values::{is_valid_amount, require};

/// The window over which a limit per minute is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitWindow {
    /// A bucket that refills continuously.
    Bucket,
    /// Each minute since the start of the mock.
    FixedMinute,
    /// The last 60 seconds.
    SlidingMinute,
}

/// The number of tokens that a request is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenCounting {
    /// Prompt tokens and `max_tokens`.
    Estimate,
    /// The estimate at first. When the answer is sent, the charge is corrected to its usage.
    Actual,
}

/// The provider whose rate-limit headers are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeaderDialect {
    None,
    Openai,
    Azure,
    Groq,
    Anthropic,
    Together,
    Fireworks,
}

/// The format in which an error states how long to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryAfter {
    None,
    /// Whole seconds, rounded up.
    Seconds,
    /// Seconds with decimals.
    Float,
    /// An HTTP date, rounded up to a whole second.
    Date,
    /// A date in the past.
    PastDate,
    /// A date ten years ahead.
    FarDate,
    /// The header `retry-after-ms`, in milliseconds.
    Ms,
    /// A sentence in the message: "Please try again in 1.2s."
    Words,
    /// A header that is neither a number nor a date.
    Garbage,
}

/// A change of all limits per minute and per day: from `at_s` on, they are `factor` times those of the script.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitChange {
    /// Seconds since the start of the mock.
    pub at_s: f64,
    pub factor: f64,
}

/// The section `[limits]`. A limit that is None does not apply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitScript {
    pub window: LimitWindow,
    pub requests_per_minute: Option<u64>,
    /// Prompt and output tokens; only prompt tokens if `output_tokens_per_minute` is set.
    pub tokens_per_minute: Option<u64>,
    pub output_tokens_per_minute: Option<u64>,
    /// Maximum number of requests in each 24 hours since the start of the mock.
    pub requests_per_day: Option<u64>,
    /// Maximum number of concurrent requests.
    pub concurrency: Option<u64>,
    /// Number of concurrent requests above which the latency grows in proportion to their number.
    pub load_capacity: Option<u64>,
    pub counts: TokenCounting,
    /// True if a rejected request counts against the limits of requests per minute and per day.
    pub count_refused: bool,
    /// Capacity of a bucket, in seconds of its limit: the limit per minute times `burst_s` / 60.
    pub burst_s: f64,
    pub headers: HeaderDialect,
    pub retry_after: RetryAfter,
    /// Status of a rejection.
    pub status: u16,
    pub changes: Vec<LimitChange>,
}

impl Default for LimitScript {
    fn default() -> Self {
        Self {
            window: LimitWindow::Bucket,
            requests_per_minute: None,
            tokens_per_minute: None,
            output_tokens_per_minute: None,
            requests_per_day: None,
            concurrency: None,
            load_capacity: None,
            counts: TokenCounting::Estimate,
            count_refused: false,
            burst_s: 60.0,
            headers: HeaderDialect::Openai,
            retry_after: RetryAfter::Seconds,
            status: 429,
            changes: Vec::new(),
        }
    }
}

impl LimitScript {
    pub(crate) fn check(&self) -> Result<(), String> {
        let limits = [
            ("limits.requests_per_minute", self.requests_per_minute),
            ("limits.tokens_per_minute", self.tokens_per_minute),
            (
                "limits.output_tokens_per_minute",
                self.output_tokens_per_minute,
            ),
            ("limits.requests_per_day", self.requests_per_day),
            ("limits.concurrency", self.concurrency),
            ("limits.load_capacity", self.load_capacity),
        ];
        for (key, limit) in limits {
            require(
                limit != Some(0),
                key,
                "must be at least 1; remove it for no limit",
            )?;
        }
        require(
            self.burst_s.is_finite() && self.burst_s > 0.0,
            "limits.burst_s",
            "must be greater than 0",
        )?;
        require(
            (400..600).contains(&self.status),
            "limits.status",
            "must be from 400 to 599",
        )?;
        require(
            self.changes.iter().all(|change| {
                is_valid_amount(change.at_s)
                    && is_valid_amount(change.factor)
                    && change.factor > 0.0
            }) && self.changes.is_sorted_by(|a, b| a.at_s < b.at_s),
            "limits.changes",
            "must be in increasing order of `at_s`, with factors greater than 0, both at most 1e9",
        )
    }
}
