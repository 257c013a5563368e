//! What `distill train` and `distill eval` are told.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StudentConfig {
    pub init: StudentInit,
    /// A Hugging Face model folder. With `init = "random"` only its tokenizer and chat template
    /// are used, and the shape below.
    pub path: PathBuf,
    /// Variables of the chat template, such as `enable_thinking`.
    pub template_args: BTreeMap<String, serde_json::Value>,
    /// Date that `strftime_now` returns in the chat template.
    pub template_date: Option<TemplateDate>,
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

impl Default for StudentConfig {
    fn default() -> Self {
        Self {
            init: StudentInit::Pretrained,
            path: "student".into(),
            template_args: BTreeMap::new(),
            template_date: None,
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

/// "record", or a date such as "2026-01-31".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TemplateDate {
    Fixed(jiff::civil::Date),
    /// When the record's request was sent, in UTC.
    Record,
}

impl TryFrom<String> for TemplateDate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "record" {
            return Ok(Self::Record);
        }
        let date = text.parse().map_err(|_| {
            format!("expected \"record\" or a date such as \"2026-01-31\", found {text:?}")
        });
        date.map(Self::Fixed)
    }
}

impl From<TemplateDate> for String {
    fn from(date: TemplateDate) -> Self {
        match date {
            TemplateDate::Fixed(date) => date.to_string(),
            TemplateDate::Record => "record".into(),
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
pub enum StudentInit {
    /// Weights from `student.path`.
    Pretrained,
    /// Fresh weights of the given shape.
    Random,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    pub kd: KdMode,
    /// The share of the soft-label term where a position has soft labels. None: see
    /// `train::soft_labels::default_weight`.
    pub kd_weight: Option<f64>,
    /// For `kd = "damped"`: the weight of the likelihood of an emitted token outside the top-k, among the tokens there.
    pub tail_weight: f64,
    /// The weight of the likelihoods of chunks that several tokens of the teacher spell.
    pub alm_weight: f64,
    /// tau, for `kd = "temperature"`.
    pub temperature: f64,
    /// For `kd = "jsd"`: near 0 it is the forward KL, near 1 the reverse one.
    pub beta: f64,
    /// For `kd = "skew_kl"` and "skew_reverse_kl": how much of one side is mixed into the other.
    pub alpha: f64,
    /// The share of cross-entropy that is taken against the uniform distribution.
    pub label_smoothing: f64,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            kd: KdMode::Auto,
            kd_weight: None,
            tail_weight: 0.35,
            alm_weight: 0.5,
            temperature: 2.0,
            beta: 0.5,
            alpha: 0.1,
            label_smoothing: 0.0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KdMode {
    /// Cross-entropy on the answers alone.
    None,
    /// `Damped` for the answers whose sampling settings allow it, `Tail` for the others.
    Auto,
    /// KL on the teacher's top-k plus one bucket for all the rest.
    Tail,
    /// `Tail`, with the emitted token as a sample of what is in the bucket.
    Unbiased,
    /// `Unbiased`, with a lower weight of that sample.
    Damped,
    /// The top-k at a temperature, and the bucket.
    Temperature,
    ReverseKl,
    Jsd,
    SkewKl,
    SkewReverseKl,
    /// Total variation distance.
    Tvd,
    /// For comparison: the teacher's top-k as if it were all there is.
    Renormalize,
    /// For comparison: the same on both sides.
    RenormalizeBoth,
}

impl KdMode {
    /// As the config file spells it.
    pub fn name(self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value.as_str().unwrap_or_default().to_owned()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the adapters that are trained in place of the weights; 0: the weights themselves.
    pub rank: usize,
    /// What an adapter adds is multiplied by `alpha` / `rank`.
    pub alpha: f64,
    /// Linear layers that get an adapter: regular expressions, any of which matches a part of the
    /// name. Empty: all of them.
    pub targets: Vec<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 0,
            alpha: 16.0,
            targets: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    pub seed: u64,
    /// Optimizer steps. None: as many as `epochs` makes.
    pub steps: Option<u64>,
    pub epochs: f64,
    /// Examples per optimizer step.
    pub batch_size: usize,
    /// Examples per forward and backward pass; gradients accumulate up to `batch_size`.
    pub micro_batch_size: usize,
    /// Tokens per forward and backward pass, in place of `micro_batch_size`; 0: that decides.
    pub micro_batch_tokens: usize,
    pub learning_rate: f64,
    /// The rate at the end, as a share of `learning_rate`.
    pub min_learning_rate_ratio: f64,
    pub warmup_steps: u64,
    pub schedule: LrSchedule,
    /// The share of the steps, at their end, over which "wsd" decays.
    pub decay_share: f64,
    pub weight_decay: f64,
    /// Parameters without weight decay besides norms and biases: regular expressions, any of which
    /// matches a part of the name.
    pub no_decay: Vec<String>,
    /// Parameters that stay as they are: regular expressions, as `no_decay`.
    pub freeze: Vec<String>,
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
    /// Weight of the past in a running average of the weights, which is what is evaluated and
    /// becomes the student; 0 for none.
    pub ema_decay: f64,
    /// The validation metric whose best checkpoint is kept and becomes the student.
    pub best: BestMetric,
    /// Validations in a row without a better `best` after which training ends; 0: never.
    pub patience: u64,
    /// Let the student answer a part of the prompts itself, for the teacher to judge.
    pub on_policy: bool,
    /// Where the arithmetic runs.
    pub device: Device,
    /// What factors of matrix products are rounded to. Weights, sums and the optimizer are f32.
    pub dtype: ComputeDtype,
    /// Compute activations twice instead of keeping them: slower, less memory, the same numbers.
    pub activation_checkpointing: bool,
    /// Threads for the arithmetic; 0: one per core. The numbers do not depend on it.
    pub threads: usize,
}

/// How a student writes answers itself; for `train.on_policy`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OnPolicyConfig {
    /// The share of each step's prompts that it answers; the others are learnt as they are.
    pub share: f64,
    /// What its answers are judged by.
    pub kd: KdMode,
    /// Who judges them.
    pub judge: ScoredBy,
    /// The folder of the teacher's tokenizer, for a judge behind an API. None: its tokens are known by
    /// their texts alone.
    pub tokenizer: Option<PathBuf>,
    pub max_tokens: u32,
    pub temperature: f64,
}

/// Who judges what a student writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoredBy {
    /// The model in `teacher.local`, by its whole distributions.
    Local,
    /// The endpoint of `teacher`, by vLLM's chat completions with `prompt_logprobs`.
    PromptLogprobs,
    /// The endpoint of `teacher`, by text completions with `echo` and `logprobs`.
    Echo,
}

impl Default for OnPolicyConfig {
    fn default() -> Self {
        Self {
            share: 0.5,
            kd: KdMode::ReverseKl,
            judge: ScoredBy::Local,
            tokenizer: None,
            max_tokens: 128,
            temperature: 1.0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// A GPU that this program was built for, where there is one; else the CPU.
    Auto,
    Cpu,
    Cuda,
    Metal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// bf16 where the device is faster with it (AMX, AVX512-BF16 of AMD, CUDA), f32 elsewhere.
    Auto,
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestMetric {
    /// The last weights become the student.
    Last,
    /// The lowest cross-entropy.
    Ce,
    /// The lowest KL divergence to the teacher.
    Kl,
    /// The highest token accuracy.
    TokenAccuracy,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            steps: None,
            epochs: 3.0,
            batch_size: 32,
            micro_batch_size: 8,
            micro_batch_tokens: 0,
            learning_rate: 3e-4,
            min_learning_rate_ratio: 0.1,
            warmup_steps: 50,
            schedule: LrSchedule::Cosine,
            decay_share: 0.2,
            weight_decay: 0.01,
            no_decay: Vec::new(),
            freeze: Vec::new(),
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            eval_every: 100,
            checkpoint_every: 200,
            keep_checkpoints: 2,
            ema_decay: 0.0,
            best: BestMetric::Last,
            patience: 0,
            on_policy: false,
            device: Device::Auto,
            dtype: ComputeDtype::Auto,
            activation_checkpointing: false,
            threads: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    Constant,
    Linear,
    Cosine,
    /// Warmup, stable, decay.
    Wsd,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Held-out rows with truth, as JSONL; rendered through `prompts.template`.
    pub source: Option<PathBuf>,
    /// The field of a row that holds the true answer.
    pub truth: String,
    pub matching: AnswerMatching,
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

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            source: None,
            truth: "answer".into(),
            matching: AnswerMatching::Exact,
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
pub enum AnswerMatching {
    /// The same text, white space at both ends aside.
    Exact,
    /// The same JSON value, whatever its key order and white space.
    Json,
}
