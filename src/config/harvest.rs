//! Settings of `distill harvest`.

use std::path::PathBuf;
use std::time::Duration;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::parsed::{DailyWindow, Deadline, Parsed, seconds};
use super::redis_url::RedisUrl;

/// Source of the prompts, and the number of answers to each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptsConfig {
    /// File of prompts; the extension determines its format.
    pub source: PathBuf,
    /// Template file such as those in `prompts/`. Without one, rows must have `messages` or be plain text.
    pub template: Option<PathBuf>,
    /// Number of answers to request per prompt.
    pub samples: u32,
    /// Maximum number of prompts, from the beginning of the source.
    pub limit: Option<usize>,
    /// Assignment of prompts to teachers.
    pub teachers: Assignment,
    /// Order in which the prompts are sent.
    pub order: PromptOrder,
}

impl Default for PromptsConfig {
    fn default() -> Self {
        Self {
            source: "prompts.jsonl".into(),
            template: None,
            samples: 1,
            limit: None,
            teachers: Assignment::Share,
            order: PromptOrder::Prefix,
        }
    }
}

/// Teachers that answer a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Assignment {
    /// Each prompt goes to one teacher; `teacher.share` sets the proportions.
    Share,
    /// Each prompt goes to every teacher.
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptOrder {
    /// Prompts with a long common prefix follow each other, for hits in the provider's prompt cache.
    Prefix,
    /// The order of the source.
    Source,
}

/// Fields of each request. Unset values are not sent, so the endpoint's defaults apply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    pub max_tokens: u32,
    /// Name of the field that carries `max_tokens`.
    pub max_tokens_field: MaxTokensField,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// Number of logprobs to request per token, 0 to 20.
    pub top_logprobs: u32,
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    /// True for a reasoning model. Such models reject temperature, top_p, logprobs and stop, so these are not sent.
    pub reasoning: bool,
    pub reasoning_effort: Option<String>,
    /// File of a JSON schema that answers must satisfy; it is sent as `response_format`.
    pub schema: Option<PathBuf>,
    /// Additional fields of the request body, sent unchanged.
    pub extra: Map<String, Value>,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            max_tokens_field: MaxTokensField::MaxCompletionTokens,
            temperature: Some(1.0),
            top_p: None,
            top_logprobs: 20,
            seed: None,
            stop: Vec::new(),
            reasoning: false,
            reasoning_effort: None,
            schema: None,
            extra: Map::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    MaxTokens,
    MaxCompletionTokens,
}

impl MaxTokensField {
    /// Returns the name in a request body.
    pub fn name(self) -> &'static str {
        match self {
            MaxTokensField::MaxTokens => "max_tokens",
            MaxTokensField::MaxCompletionTokens => "max_completion_tokens",
        }
    }

    /// Returns the other name, for an endpoint that rejects this one.
    pub fn other(self) -> MaxTokensField {
        match self {
            MaxTokensField::MaxTokens => MaxTokensField::MaxCompletionTokens,
            MaxTokensField::MaxCompletionTokens => MaxTokensField::MaxTokens,
        }
    }
}

/// Reaction of `distill harvest` to answers without logprobs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HarvestConfig {
    /// Action after 20 consecutive answers without usable logprobs, if `sampling.top_logprobs` requests them.
    pub on_missing_logprobs: OnMissingLogprobs,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMissingLogprobs {
    /// Send no more requests to the endpoint; other endpoints continue.
    #[default]
    Stop,
    /// Warn, and continue with the text of the answers alone.
    Warn,
}

/// Limits of the requests to an endpoint; `None` for no limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Maximum number of requests in a minute.
    pub requests_per_minute: Option<u32>,
    /// Maximum number of tokens in a minute, counted as providers do: prompt estimate + max_tokens.
    pub tokens_per_minute: Option<u32>,
    /// Maximum number of requests in any 24 hours, counting earlier runs in the same run folder.
    pub requests_per_day: Option<u64>,
    /// Redis server that counts the requests and tokens under these three limits for all processes with the same model
    /// and endpoint; `None` to count in each process.
    pub shared: Option<RedisUrl>,
    /// Maximum number of requests in flight.
    pub concurrency: usize,
    /// True to lower the concurrency if status 429 or a high latency shows that the server is overloaded.
    pub adapt: bool,
    /// True to obey the limits in the server's headers where they are stricter.
    pub follow_headers: bool,
}

impl LimitsConfig {
    /// Returns the limits that this process enforces without the Redis server.
    pub fn own(&self) -> LimitsConfig {
        match self.shared {
            None => self.clone(),
            Some(_) => LimitsConfig {
                requests_per_minute: None,
                tokens_per_minute: None,
                requests_per_day: None,
                ..self.clone()
            },
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            requests_per_minute: None,
            tokens_per_minute: None,
            requests_per_day: None,
            shared: None,
            concurrency: 32,
            adapt: true,
            follow_headers: true,
        }
    }
}

/// Retries of failed requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfig {
    /// Maximum number of attempts for a request with transient failures (5xx, timeout, reset).
    pub max_attempts: u32,
    /// Maximum pause before the first retry of a row. The maximum doubles with each retry; the pause is random, between
    /// 0 and the maximum.
    #[serde(rename = "base_s", with = "seconds")]
    pub base: Duration,
    /// Limit of the doubled maximum. Pauses between the probes of an outage, and waits that the endpoint requests, may
    /// be longer.
    #[serde(rename = "max_s", with = "seconds")]
    pub max: Duration,
    /// Time without a success after which an endpoint is stopped. Other endpoints continue; the run exits with 4.
    #[serde(rename = "max_outage_s", with = "seconds")]
    pub max_outage: Duration,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            max_attempts: 6,
            base: Duration::from_millis(500),
            max: Duration::from_secs(60),
            max_outage: Duration::from_secs(1_800),
        }
    }
}

/// US dollars per million tokens, for the budget and the recorded cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Price {
    pub input: Option<f64>,
    pub cached_input: Option<f64>,
    pub output: Option<f64>,
    /// Day on which these prices were looked up, `YYYY-MM-DD`.
    pub as_of: Option<Parsed<Date>>,
}

impl Price {
    /// Returns the prices multiplied by `share`, the part that remains to be paid.
    pub fn discounted(&self, share: f64) -> Price {
        let share_of = |price: Option<f64>| price.map(|price| price * share);
        Price {
            input: share_of(self.input),
            cached_input: share_of(self.cached_input),
            output: share_of(self.output),
            as_of: self.as_of.clone(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetConfig {
    /// Maximum cost of all runs in this run folder, at the configured prices.
    pub usd: Option<f64>,
}

/// Time and mode of the requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    pub mode: RequestMode,
    /// Daily window in which requests are sent, such as `"22:00-06:30"`.
    pub window: Option<Parsed<DailyWindow>>,
    /// End of the run: a time of day such as `"06:30"`, a date and time, or an RFC 3339 timestamp.
    pub deadline: Option<Parsed<Deadline>>,
    /// Time zone of these times, such as `Europe/Berlin`; this machine's by default.
    pub timezone: Option<Parsed<TimeZone>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestMode {
    /// One request per row, answered immediately.
    #[default]
    Realtime,
    /// Files of many rows, answered within a day, at `batch.discount` times the price.
    Batch,
}

/// Sizes and polling of batches, for `schedule.mode = "batch"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Maximum number of requests in a batch.
    pub max_requests: usize,
    /// Maximum size of a request file.
    pub max_megabytes: f64,
    /// Maximum size of an answer file, estimated from `max_tokens` and `top_logprobs`.
    pub max_output_gigabytes: f64,
    /// Maximum number of tokens (prompt estimates + `max_tokens`) in all unfinished batches of the endpoint.
    pub enqueued_tokens: Option<u64>,
    /// Value of the field `completion_window` of the Batch API.
    pub completion_window: String,
    /// Time between two polls of a batch.
    #[serde(rename = "poll_s", with = "seconds")]
    pub poll: Duration,
    /// Price of an answer in a batch, as a share of `[price]`: 0.2 means 20 % of the price, not 20 % off.
    pub discount: f64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            max_requests: 50_000,
            max_megabytes: 190.0,
            max_output_gigabytes: 4.0,
            enqueued_tokens: None,
            completion_window: "24h".into(),
            poll: Duration::from_secs(30),
            discount: 0.5,
        }
    }
}

/// Durability and compression of the cache files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    pub durability: Durability,
    pub compression: Compression,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            durability: Durability::Batch,
            compression: Compression::None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Uncompressed JSON lines.
    None,
    /// Older lines move into a file of zstd frames.
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// Sync every 64 records or every second, whichever comes first.
    Batch,
    /// Sync every record before it counts as recorded.
    Record,
    /// Leave syncing to the operating system: a power loss may lose the records of many seconds.
    None,
}
