//! `[limits]`: what is allowed per minute, per day, at once, and how it is told.

use serde::{Deserialize, Serialize};

use crate::mock::script::{is_time, require};

/// How limits per minute are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitWindow {
    /// A bucket that refills continuously.
    Bucket,
    /// Anew each minute, from the start on.
    FixedMinute,
    /// Over the last 60 seconds, at every moment.
    SlidingMinute,
}

/// What a request is charged against the limits of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenCounting {
    /// Its prompt and the longest answer that it allows.
    Estimate,
    /// The same until its answer is there, and what it used from then on.
    Actual,
}

/// Whose headers tell of the limits.
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

/// How a refusal says when to come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryAfter {
    None,
    /// Whole seconds, rounded up.
    Seconds,
    Float,
    Date,
    /// A date that has passed.
    PastDate,
    /// A date in ten years.
    FarDate,
    /// `retry-after-ms`.
    Ms,
    /// In the message: "please try again in 1.2s".
    Words,
    Garbage,
}

/// From `at_s` on, limits are `factor` times what the file says.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitChange {
    /// Since the start.
    pub at_s: f64,
    pub factor: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitScript {
    pub window: LimitWindow,
    pub requests_per_minute: Option<u64>,
    /// Of prompts and answers; of prompts alone where answers have a limit of their own.
    pub tokens_per_minute: Option<u64>,
    /// Of answers.
    pub output_tokens_per_minute: Option<u64>,
    /// Counted anew each day, from the start on.
    pub requests_per_day: Option<u64>,
    /// Requests at once.
    pub concurrency: Option<u64>,
    /// With more requests at once than this, latency grows in proportion.
    pub load_capacity: Option<u64>,
    pub counts: TokenCounting,
    /// Whether a refused request counts as one.
    pub count_refused: bool,
    /// The bucket's size, as seconds' worth of its limit.
    pub burst_s: f64,
    pub headers: HeaderDialect,
    pub retry_after: RetryAfter,
    /// The status of a refusal.
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
                "must be at least 1; leave it out for none",
            )?;
        }
        require(
            self.burst_s.is_finite() && self.burst_s > 0.0,
            "limits.burst_s",
            "must be above 0",
        )?;
        require(
            (400..600).contains(&self.status),
            "limits.status",
            "must be from 400 to 599",
        )?;
        require(
            self.changes.iter().all(|change| {
                is_time(change.at_s) && is_time(change.factor) && change.factor > 0.0
            }) && self.changes.is_sorted_by(|a, b| a.at_s < b.at_s),
            "limits.changes",
            "must be in the order of time, with factors above 0",
        )
    }
}
