//! What `distill harvest` is told.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::redis_url::RedisUrl;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptsConfig {
    /// `.jsonl` (a JSON object a line) or any other extension for plain text (a prompt a line).
    pub source: PathBuf,
    /// A TOML file from `prompts/`. None: rows must carry `messages`, or be plain text.
    pub template: Option<PathBuf>,
    /// Answers to ask for per prompt.
    pub samples: u32,
    /// Use only the first so many prompts.
    pub limit: Option<usize>,
    /// With several teachers: who is asked.
    pub teachers: Assignment,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Assignment {
    /// Each prompt goes to one teacher, by `teacher.share`.
    Share,
    /// Each prompt goes to every teacher.
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptOrder {
    /// Prompts that begin alike follow each other, so that the provider's prompt cache hits.
    Prefix,
    /// As in the source.
    Source,
}

/// What is sent with each prompt. Unset values are not sent, so the endpoint's defaults hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    pub max_tokens: u32,
    /// The name under which `max_tokens` is sent.
    pub max_tokens_field: MaxTokensField,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// Logprobs to ask for per token, 0 to 20; 0 asks for none.
    pub top_logprobs: u32,
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    /// The model thinks first: temperature, top_p, logprobs and stop, which such models refuse,
    /// are not sent.
    pub reasoning: bool,
    pub reasoning_effort: Option<String>,
    /// A JSON schema that answers must satisfy; the endpoint gets it as `response_format`.
    pub schema: Option<PathBuf>,
    /// Further fields of the request body, sent as they stand.
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
    /// As it stands in a request body.
    pub fn name(self) -> &'static str {
        match self {
            MaxTokensField::MaxTokens => "max_tokens",
            MaxTokensField::MaxCompletionTokens => "max_completion_tokens",
        }
    }

    pub fn other(self) -> MaxTokensField {
        match self {
            MaxTokensField::MaxTokens => MaxTokensField::MaxCompletionTokens,
            MaxTokensField::MaxCompletionTokens => MaxTokensField::MaxTokens,
        }
    }
}

/// Settings of `distill harvest` itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HarvestConfig {
    /// Reaction to 20 consecutive answers without usable logprobs, if `sampling.top_logprobs` requests them.
    pub on_missing_logprobs: OnMissingLogprobs,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMissingLogprobs {
    /// Ask nothing more.
    #[default]
    Stop,
    /// Say so, and go on with the answers alone.
    Warn,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    pub requests_per_minute: Option<u32>,
    /// Prompt estimate + max_tokens, as providers count.
    pub tokens_per_minute: Option<u32>,
    /// In any 24 hours, earlier runs in the same run folder included.
    pub requests_per_day: Option<u64>,
    /// Where these three are kept for all processes that ask the same model of the same endpoint;
    /// None: each process keeps its own.
    pub shared: Option<RedisUrl>,
    /// Requests in flight at once.
    pub concurrency: usize,
    /// Lower the concurrency where the server is overloaded: on 429, or by its latency.
    pub adapt: bool,
    /// Keep to the limits that the server's headers tell, where they are stricter.
    pub follow_headers: bool,
}

impl LimitsConfig {
    /// Those that this process keeps by itself.
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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfig {
    /// Attempts for a request that fails in a way that may pass (5xx, time-out, reset).
    pub max_attempts: u32,
    /// First pause; each further one doubles, with full jitter.
    pub base_s: f64,
    /// Longest pause.
    pub max_s: f64,
    /// Give up (exit 4) when nothing has succeeded for so long.
    pub max_outage_s: f64,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            max_attempts: 6,
            base_s: 0.5,
            max_s: 60.0,
            max_outage_s: 1800.0,
        }
    }
}

/// US dollars per million tokens, for the cost shown and recorded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Price {
    pub input: Option<f64>,
    pub cached_input: Option<f64>,
    pub output: Option<f64>,
    /// The day on which these prices were read, `YYYY-MM-DD`.
    pub as_of: Option<String>,
}

impl Price {
    /// What is left of it where only a share is to be paid.
    pub fn at(&self, share: f64) -> Price {
        let at = |price: Option<f64>| price.map(|price| price * share);
        Price {
            input: at(self.input),
            cached_input: at(self.cached_input),
            output: at(self.output),
            as_of: self.as_of.clone(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetConfig {
    /// The most that this run folder may ever cost, at the configured prices.
    pub usd: Option<f64>,
}

/// When requests may leave, and in which way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    pub mode: RequestMode,
    /// `"22:00-06:30"`: outside it nothing leaves.
    pub window: Option<String>,
    /// `"06:30"` (the next one), a date and time, or an RFC 3339 time stamp.
    pub deadline: Option<String>,
    /// Whose clock these times are read from, as `Europe/Berlin`; this machine's by default.
    pub timezone: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestMode {
    /// A request for each row, answered at once.
    #[default]
    Realtime,
    /// Files of many rows, answered within a day, at `batch.discount` of the price.
    Batch,
}

/// How rows go into batches; for `schedule.mode = "batch"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    pub max_requests: usize,
    /// Of a file of requests.
    pub max_megabytes: f64,
    /// Of a file of answers, as long as `max_tokens` and `top_logprobs` let them become.
    pub max_output_gigabytes: f64,
    /// Prompt estimates + max_tokens of all batches under way.
    pub enqueued_tokens: Option<u64>,
    /// As the endpoint calls it.
    pub completion_window: String,
    pub poll_s: f64,
    /// The share of the price that an answer costs in a batch.
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
            poll_s: 30.0,
            discount: 0.5,
        }
    }
}

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
    /// JSON lines as they are.
    None,
    /// Older lines move into zstd frames, beside the file of the newest ones.
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// Sync every 64 records or every second, whichever comes first.
    Batch,
    /// Sync every record before it counts as done.
    Record,
    /// Leave it to the operating system: power loss may cost more than a second's work.
    None,
}
