//! Settings of `distill train` and `distill eval`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::parsed::Parsed;

/// The student: its initial weights, tokenizer and shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StudentConfig {
    pub init: StudentInit,
    /// With `init = "layers"`: number or indices of the layers to keep, of the encoder of an encoder-decoder; `None` for
    /// all.
    pub encoder_layers: Option<LayerChoice>,
    /// The same for the decoder.
    pub decoder_layers: Option<LayerChoice>,
    /// Hugging Face model folder. With `init = "random"` only its tokenizer and chat template are used; the fields from
    /// `hidden_size` to `max_position_embeddings` then set the shape of the model.
    pub path: PathBuf,
    /// Architecture of a student with `init = "random"`.
    pub model_type: StudentType,
    /// Jinja template of the text that the encoder of an encoder-decoder reads, with `messages` as in a chat template;
    /// `None` for the chat template of the folder, or without one the contents of all messages, one per line.
    pub source_template: Option<String>,
    /// Variables of the chat template, such as `enable_thinking`.
    pub template_args: BTreeMap<String, serde_json::Value>,
    /// Date that `strftime_now` returns in the chat template. Training with a template that calls it needs
    /// a date.
    pub template_date: Option<TemplateDate>,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    /// Layers of the encoder of an encoder-decoder with random weights; `None` for `num_hidden_layers`.
    pub num_encoder_layers: Option<usize>,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub tie_word_embeddings: bool,
    pub rope_theta: f64,
    pub max_position_embeddings: usize,
    /// Number type of the saved weights; during training they are f32.
    pub save_dtype: SaveDtype,
}

impl Default for StudentConfig {
    fn default() -> Self {
        Self {
            init: StudentInit::Pretrained,
            encoder_layers: None,
            decoder_layers: None,
            path: "student".into(),
            model_type: StudentType::Llama,
            source_template: None,
            template_args: BTreeMap::new(),
            template_date: None,
            hidden_size: 256,
            intermediate_size: 688,
            num_hidden_layers: 4,
            num_encoder_layers: None,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            tie_word_embeddings: true,
            rope_theta: 10_000.0,
            max_position_embeddings: 2048,
            save_dtype: SaveDtype::F32,
        }
    }
}

/// Date in a chat template: "record", or a date such as "2026-01-31".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TemplateDate {
    Fixed(jiff::civil::Date),
    /// Date of the record's request, in UTC.
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
    /// Some layers of the model in `student.path`.
    Layers,
    /// Random weights.
    Random,
}

/// Layers to keep: their number, or their indices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number of layers, or a list of layer indices"
)]
pub enum LayerChoice {
    Count(usize),
    Indices(Vec<usize>),
}

/// Architecture of a student with random weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StudentType {
    /// A decoder.
    Llama,
    /// An encoder-decoder: T5 v1.1, with a gated feed-forward network.
    T5,
}

/// Weights and parameters of the loss terms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    pub kd: KdMode,
    /// Weight of the soft-label term at positions with soft labels. The default is
    /// `train::soft_labels::default_weight`, and 1 for the full KL to a local teacher.
    pub kd_weight: Option<f64>,
    /// For `kd = "damped"` and "auto": weight lambda of the sampled token outside the top-k.
    pub tail_weight: f64,
    /// Weight of the likelihood of a text chunk where the tokens of teacher and student differ.
    pub alm_weight: f64,
    /// Temperature tau of `kd = "temperature"`.
    pub temperature: f64,
    /// For `kd = "jsd"`: share of the teacher in the mixture. Near 0 the loss is proportional to the forward KL, near 1
    /// to the reverse KL.
    pub beta: f64,
    /// For `kd = "skew_kl"`: share of the teacher's distribution that is mixed into the student's. For
    /// "skew_reverse_kl": share of the student's distribution that is mixed into the teacher's.
    pub alpha: f64,
    /// Weight of the uniform distribution in the labels of the cross-entropy.
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

/// Loss term of the soft labels; `train::loss::divergence` has the formulas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KdMode {
    /// No divergence: cross-entropy on the answers.
    None,
    /// `Damped` for the answers whose sampling settings allow it, `Tail` for the others.
    Auto,
    /// KL on the teacher's top-k plus one bucket for all other tokens.
    Tail,
    /// `Tail`, with the emitted token as a sample of the bucket.
    Unbiased,
    /// `Unbiased`, with a lower weight of that sample.
    Damped,
    /// KL on the top-k at the temperature `loss.temperature`, plus KL between top-k and bucket.
    Temperature,
    /// Reverse KL on the top-k and the bucket.
    ReverseKl,
    /// Generalised Jensen-Shannon divergence on the top-k and the bucket, with `loss.beta`.
    Jsd,
    /// KL to a mixture of both distributions, with `loss.alpha`.
    SkewKl,
    /// Reverse KL to a mixture of both distributions, with `loss.alpha`.
    SkewReverseKl,
    /// Total variation distance.
    Tvd,
    /// For comparison: KL with the teacher's top-k renormalised to 1.
    Renormalize,
    /// For comparison: KL with the top-k of teacher and student renormalised to 1.
    RenormalizeBoth,
}

impl KdMode {
    /// Returns the name in the config file.
    pub fn name(self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value.as_str().unwrap_or_default().to_owned()
    }
}

/// Low-rank adapters (LoRA).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the adapters; 0 trains the weights themselves.
    pub rank: usize,
    /// The output of an adapter is multiplied by `alpha` / `rank`.
    pub alpha: f64,
    /// Linear layers that get an adapter, as regular expressions that match a part of the name; empty for all.
    pub targets: Vec<Parsed<Regex>>,
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

/// Optimizer, schedule, validation and device of the training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    pub seed: u64,
    /// Number of optimizer steps; `None` for the number of steps in `epochs`.
    pub steps: Option<u64>,
    pub epochs: f64,
    /// Examples per optimizer step.
    pub batch_size: usize,
    /// Examples per forward and backward pass; gradients accumulate up to `batch_size`.
    pub micro_batch_size: usize,
    /// Maximum number of tokens per forward and backward pass; a longer example has its own pass. 0 to use
    /// `micro_batch_size` instead.
    pub micro_batch_tokens: usize,
    pub learning_rate: f64,
    /// Final learning rate, as a share of `learning_rate`.
    pub min_learning_rate_ratio: f64,
    pub warmup_steps: u64,
    pub schedule: LrSchedule,
    /// Share of the steps over which the schedule "wsd" decays, at the end.
    pub decay_share: f64,
    pub weight_decay: f64,
    /// Parameters without weight decay, in addition to norms and biases, as regular expressions that match a part of the
    /// name.
    pub no_decay: Vec<Parsed<Regex>>,
    /// Parameters that are not trained, as regular expressions that match a part of the name.
    pub freeze: Vec<Parsed<Regex>>,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// True to multiply the learning rate of each parameter by the root mean square of its values, as Adafactor does
    /// (Shazeer and Stern, arXiv 1804.04235, section 8). T5 is trained so, at rates of about 0.01: its embeddings and
    /// position biases are many times larger than its other weights.
    pub scale_parameter: bool,
    /// Maximum global norm of the gradient; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Number of steps between validations; 0 to validate only at the end.
    pub eval_every: u64,
    /// Number of steps between checkpoints; 0 for none at regular intervals. One is also written at the end, at a stop
    /// and after each new best validation.
    pub checkpoint_every: u64,
    /// Number of the newest checkpoints to keep, at least 1. The best one is kept as well.
    pub keep_checkpoints: usize,
    /// Decay of the exponential moving average of the weights, which is evaluated and becomes the student; 0 for none.
    pub ema_decay: f64,
    /// Validation metric whose best checkpoint is kept and becomes the student.
    pub best: BestMetric,
    /// Number of consecutive validations without an improvement of `best` after which training ends; 0 for no limit.
    pub patience: u64,
    /// True to train also on answers that the student generates and the teacher scores.
    pub on_policy: bool,
    /// Device of the computation.
    pub device: Device,
    /// Number type of the factors of matrix products. Weights, sums and the optimizer state are f32.
    pub dtype: ComputeDtype,
    /// True to recompute activations in the backward pass: slower, with less memory and the same result.
    pub activation_checkpointing: bool,
    /// Number of threads; 0 for one per core. The result does not depend on it.
    pub threads: usize,
}

/// Answers that the student generates, for `train.on_policy`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OnPolicyConfig {
    /// Share of each step's prompts that the student answers; the others keep their cached answers.
    pub share: f64,
    /// Divergence on the student's answers.
    pub kd: KdMode,
    /// Source of the teacher's logprobs for the student's answers.
    pub judge: ScoredBy,
    /// Folder of the teacher's tokenizer, for a teacher behind an API. `None` to use the texts of its tokens alone.
    pub tokenizer: Option<PathBuf>,
    pub max_tokens: u32,
    pub temperature: f64,
}

/// Source of the teacher's logprobs for the student's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoredBy {
    /// The model in `teacher.local`, with full distributions.
    Local,
    /// The endpoint of `teacher`, with vLLM's chat completions and `prompt_logprobs`.
    PromptLogprobs,
    /// The endpoint of `teacher`, with text completions, `echo` and `logprobs`.
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
    /// A GPU that this build supports, if the machine has one; else the CPU.
    Auto,
    Cpu,
    Cuda,
    Metal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// bf16 if the device is faster with it (AMX, AVX512-BF16 of AMD, CUDA), else f32.
    Auto,
    F32,
    Bf16,
}

/// Checkpoint that becomes the student.
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
            scale_parameter: false,
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

/// Learning rate over the steps after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    Constant,
    Linear,
    Cosine,
    /// Warmup, stable, decay.
    Wsd,
}

/// Settings of `distill eval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// JSONL file of held-out rows with true answers, rendered through `prompts.template`.
    pub source: Option<PathBuf>,
    /// Field of a row with the true answer.
    pub truth: String,
    pub matching: AnswerMatching,
    /// Cache folder of teacher answers to held-out prompts, for perplexity, agreement and KL; `None` for the
    /// validation part of the training data.
    pub teacher_cache: Option<PathBuf>,
    /// Model folder to evaluate; `None` for the student of this run.
    pub model: Option<PathBuf>,
    pub max_tokens: u32,
    pub batch_size: usize,
    /// Maximum number of rows, from the beginning of `source`.
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

/// Comparison of an answer with the true one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerMatching {
    /// The same text, except for leading and trailing white space.
    Exact,
    /// The same JSON value, in any key order.
    Json,
}
