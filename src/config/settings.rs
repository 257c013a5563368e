//! Every setting, its type and its default. `config.example.toml` documents them one by one, and a
//! test holds the two equal.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder of this run: the cache, checkpoints, metrics and the student land here.
    pub run_dir: PathBuf,
    pub teacher: Teacher,
    pub prompts: Prompts,
    pub sampling: Sampling,
    pub limits: Limits,
    pub retry: Retry,
    pub price: Price,
    pub cache: Cache,
    pub student: Student,
    pub data: Data,
    pub loss: Loss,
    pub train: Train,
    pub eval: Eval,
}

impl Config {
    /// The folder of this run's cache, which `harvest` writes.
    pub fn own_cache(&self) -> PathBuf {
        self.run_dir.join("cache")
    }

    /// The folder of the cache that `train` and `eval` read.
    pub fn training_cache(&self) -> PathBuf {
        self.data.cache.clone().unwrap_or_else(|| self.own_cache())
    }

    /// The folder that `train` writes the student to.
    pub fn student_dir(&self) -> PathBuf {
        self.run_dir.join("student")
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "run".into(),
            teacher: Teacher::default(),
            prompts: Prompts::default(),
            sampling: Sampling::default(),
            limits: Limits::default(),
            retry: Retry::default(),
            price: Price::default(),
            cache: Cache::default(),
            student: Student::default(),
            data: Data::default(),
            loss: Loss::default(),
            train: Train::default(),
            eval: Eval::default(),
        }
    }
}

/// The endpoint that is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Teacher {
    pub base_url: String,
    pub model: String,
    /// Name of the environment variable that holds the key; empty for an endpoint without one.
    pub api_key_env: String,
    pub connect_timeout_s: f64,
    /// For the whole answer. Generous, since a request that timed out may have been billed.
    pub timeout_s: f64,
}

impl Default for Teacher {
    fn default() -> Self {
        Self {
            base_url: "https://api.openai.com/v1".into(),
            model: String::new(),
            api_key_env: "OPENAI_API_KEY".into(),
            connect_timeout_s: 10.0,
            timeout_s: 600.0,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prompts {
    /// `.jsonl` (a JSON object a line) or any other extension for plain text (a prompt a line).
    pub source: PathBuf,
    /// A TOML file from `prompts/`. None: rows must carry `messages`, or be plain text.
    pub template: Option<PathBuf>,
    /// Answers to ask for per prompt.
    pub samples: u32,
    /// Use only the first so many prompts.
    pub limit: Option<usize>,
}

impl Default for Prompts {
    fn default() -> Self {
        Self {
            source: "prompts.jsonl".into(),
            template: None,
            samples: 1,
            limit: None,
        }
    }
}

/// What is sent with each prompt. Unset values are not sent, so the endpoint's defaults hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    pub max_tokens: u32,
    /// The name under which `max_tokens` is sent.
    pub max_tokens_field: MaxTokensField,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// Logprobs to ask for per token, 0 to 20; 0 asks for none.
    pub top_logprobs: u32,
    pub seed: Option<i64>,
    pub stop: Vec<String>,
    /// Further fields of the request body, sent as they stand.
    pub extra: Map<String, Value>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            max_tokens_field: MaxTokensField::MaxCompletionTokens,
            temperature: Some(1.0),
            top_p: None,
            top_logprobs: 20,
            seed: None,
            stop: Vec::new(),
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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    pub requests_per_minute: Option<u32>,
    /// Prompt estimate + max_tokens, as providers count.
    pub tokens_per_minute: Option<u32>,
    /// Requests in flight at once.
    pub concurrency: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests_per_minute: None,
            tokens_per_minute: None,
            concurrency: 32,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// Attempts for a request that fails in a way that may pass (5xx, time-out, reset).
    pub max_attempts: u32,
    /// First pause; each further one doubles, with full jitter.
    pub base_s: f64,
    /// Longest pause.
    pub max_s: f64,
    /// Give up (exit 4) when nothing has succeeded for so long.
    pub max_outage_s: f64,
}

impl Default for Retry {
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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    pub durability: Durability,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            durability: Durability::Batch,
        }
    }
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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Student {
    pub init: Init,
    /// A Hugging Face model folder. With `init = "random"` only its tokenizer and chat template
    /// are used, and the shape below.
    pub path: PathBuf,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub tie_word_embeddings: bool,
    pub rope_theta: f64,
    pub max_position_embeddings: usize,
    /// The number type of the weights in the student's folder; training itself is in f32.
    pub save_dtype: SaveDtype,
}

impl Default for Student {
    fn default() -> Self {
        Self {
            init: Init::Pretrained,
            path: "student".into(),
            hidden_size: 256,
            intermediate_size: 688,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            tie_word_embeddings: true,
            rope_theta: 10_000.0,
            max_position_embeddings: 2048,
            save_dtype: SaveDtype::F32,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveDtype {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Weights from `student.path`.
    Pretrained,
    /// Fresh weights of the given shape.
    Random,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// None: a cache. Else a JSONL file of `{"messages": [...]}` rows.
    pub source: Option<PathBuf>,
    /// The cache folder of another run. None: this run's.
    pub cache: Option<PathBuf>,
    /// Share of the prompts that is held out for the validation loss.
    pub validation_share: f64,
    /// Longer examples are left out, and counted.
    pub max_length: usize,
    /// Finish reasons whose answers are trained on.
    pub keep_finish_reasons: Vec<String>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            source: None,
            cache: None,
            validation_share: 0.02,
            max_length: 1024,
            keep_finish_reasons: ["stop", "eos", "end_turn"].map(String::from).to_vec(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Loss {
    pub kd: Kd,
    /// lambda: the share of the soft-label term where a position has soft labels.
    pub kd_weight: f64,
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            kd: Kd::Tail,
            kd_weight: 0.5,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kd {
    /// Cross-entropy on the answers alone.
    None,
    /// KL on the teacher's top-k plus one bucket for all the rest.
    Tail,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    pub seed: u64,
    /// Optimizer steps. None: as many as `epochs` makes.
    pub steps: Option<u64>,
    pub epochs: f64,
    /// Examples per optimizer step.
    pub batch_size: usize,
    /// Examples per forward and backward pass; gradients accumulate up to `batch_size`.
    pub micro_batch_size: usize,
    pub learning_rate: f64,
    /// The rate at the end, as a share of `learning_rate`.
    pub min_learning_rate_ratio: f64,
    pub warmup_steps: u64,
    pub schedule: Schedule,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Largest global norm of the gradient; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Validation and metrics line every so many steps; 0: at the end only.
    pub eval_every: u64,
    /// Checkpoint every so many steps; 0: at the end only.
    pub checkpoint_every: u64,
    /// Checkpoints kept; the newest ones.
    pub keep_checkpoints: usize,
    /// Threads for the arithmetic; 0: one per core.
    pub threads: usize,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            seed: 0,
            steps: None,
            epochs: 3.0,
            batch_size: 32,
            micro_batch_size: 8,
            learning_rate: 3e-4,
            min_learning_rate_ratio: 0.1,
            warmup_steps: 50,
            schedule: Schedule::Cosine,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            eval_every: 100,
            checkpoint_every: 200,
            keep_checkpoints: 2,
            threads: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Held-out rows with truth, as JSONL; rendered through `prompts.template`.
    pub source: Option<PathBuf>,
    /// The field of a row that holds the true answer.
    pub truth: String,
    pub matching: Matching,
    /// The cache folder of teacher answers to held-out prompts: perplexity, agreement and KL are
    /// taken on it. None: the validation part of the training data.
    pub teacher_cache: Option<PathBuf>,
    /// The model folder to evaluate. None: the student of this run.
    pub model: Option<PathBuf>,
    pub max_tokens: u32,
    pub batch_size: usize,
    /// Use only the first so many rows.
    pub limit: Option<usize>,
}

impl Default for Eval {
    fn default() -> Self {
        Self {
            source: None,
            truth: "answer".into(),
            matching: Matching::Exact,
            teacher_cache: None,
            model: None,
            max_tokens: 512,
            batch_size: 32,
            limit: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// The same text, white space at both ends aside.
    Exact,
    /// The same JSON value, whatever its key order and white space.
    Json,
}
