//! Reads the shape of a model from `config.json` of a Hugging Face folder, and writes it back.
//!
//! | file | content |
//! |---|---|
//! | `shape` | the shape, independent of how `config.json` spells it |
//! | `llama`, `gpt2`, `t5` | the fields of `config.json`, by family of architectures |
//! | `rope` | settings and frequencies of the rotary embedding |
//! | `fields` | checks and errors that the readers share |
//!
//! Invariants: a setting that would change the result and is not supported is an error, never
//! ignored. Sizes are checked before anything is allocated from them. Unknown fields are kept and
//! written back.

pub(crate) mod fields;
pub(crate) mod gpt2;
pub(crate) mod llama;
pub(crate) mod rope;
pub mod shape;
pub(crate) mod t5;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::config::{StudentConfig, StudentType};
use crate::model::config::fields::{check_layer_count, config_error, default_range};
pub use crate::model::config::shape::LlamaVariant;
use crate::model::config::shape::{Architecture, ModelConfig};
use crate::ops::attention::Heads;
pub use rope::{Llama3Scaling, Rope};

/// Maximum context length in tokens. A longer context in `config.json` is reduced to it, because the rotary
/// angles of every position are precomputed.
const MAX_POSITIONS: usize = 1 << 17;

/// Maximum of each of the vocabulary, hidden, feed-forward and attention sizes.
const MAX_WIDTH: usize = 1 << 24;

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// Where the file is missing or malformed, or describes a model that this version cannot train.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}: a model folder contains config.json, *.safetensors and tokenizer.json",
                path.display()
            )
        })?;
        let read = || -> Result<Self> { Self::from_json(serde_json::from_str(&text)?) };
        read().with_context(|| format!("{} does not describe a usable model", path.display()))
    }

    /// Builds the shape of a student with `init = "random"` from `[student]`, for a tokenizer of
    /// `vocab_size` ids. The decoder of an encoder-decoder begins with `decoder_start`.
    ///
    /// # Errors
    /// Where the sizes do not fit each other.
    pub fn from_student(
        student: &StudentConfig,
        vocab_size: usize,
        stop_ids: &[u32],
        decoder_start: Option<u32>,
    ) -> Result<Self> {
        let json = match student.model_type {
            StudentType::Llama => Self::llama_json(student, vocab_size, stop_ids),
            StudentType::T5 => t5::student_json(student, vocab_size, stop_ids, decoder_start),
        };
        let read = || Self::from_json(serde_json::from_value(json)?);
        read().context("the sizes in [student] do not fit each other")
    }

    fn llama_json(student: &StudentConfig, vocab_size: usize, stop_ids: &[u32]) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": student.hidden_size,
            "intermediate_size": student.intermediate_size,
            "num_hidden_layers": student.num_hidden_layers,
            "num_attention_heads": student.num_attention_heads,
            "num_key_value_heads": student.num_key_value_heads,
            "head_dim": student.hidden_size / student.num_attention_heads.max(1),
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "rms_norm_eps": 1e-5,
            "rope_theta": student.rope_theta,
            "max_position_embeddings": student.max_position_embeddings,
            "tie_word_embeddings": student.tie_word_embeddings,
            "initializer_range": default_range(),
            "eos_token_id": stop_ids.first(),
        })
    }

    /// Parses `config.json` and checks the sizes.
    pub(super) fn from_json(json: Map<String, Value>) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str);
        let mut config = match model_type {
            Some("llama" | "mistral" | "qwen2" | "qwen3") => llama::parse(json),
            Some("gpt2") => gpt2::parse(json),
            Some("t5" | "mt5") => t5::parse(json),
            Some(other) => config_error(format!(
                "model_type {other:?} is not supported; expected \"llama\" (SmolLM2, Llama 3, \
                 TinyLlama), \"mistral\", \"qwen2\", \"qwen3\", \"gpt2\", \"t5\" or \"mt5\""
            )),
            None => config_error("model_type is missing".into()),
        }?;
        config.check_sizes()?;
        config.max_position_embeddings = config.max_position_embeddings.min(MAX_POSITIONS);
        Ok(config)
    }

    /// Checks that the sizes are plausible, before memory is allocated from them.
    fn check_sizes(&self) -> Result<()> {
        let Heads {
            query, head_dim, ..
        } = self.heads;
        let sizes = [
            ("vocabulary", self.vocab_size, MAX_WIDTH),
            ("hidden size", self.hidden_size, MAX_WIDTH),
            ("feed-forward size", self.intermediate_size, MAX_WIDTH),
            ("attention width", query.saturating_mul(head_dim), MAX_WIDTH),
            (
                "number of positions",
                self.max_position_embeddings,
                usize::MAX,
            ),
        ];
        check_layer_count(self.num_hidden_layers)?;
        for (name, size, max) in sizes {
            if size == 0 {
                return config_error(format!("the {name} must be greater than 0"));
            }
            if size > max {
                return config_error(format!("the {name} is {size}; the maximum is {max}"));
            }
        }
        let is_finite = self.norm_eps.is_finite() && self.initializer_range.is_finite();
        if !is_finite || self.norm_eps < 0.0 || self.initializer_range < 0.0 {
            return config_error(
                "the epsilon of the norms and initializer_range must be finite and not negative"
                    .into(),
            );
        }
        Ok(())
    }

    /// Returns `config.json` for the student's folder, with `dtype` as the data type of the weights. Also returns a
    /// description of each other difference from the file that was read.
    pub fn to_json(&self, dtype: &str) -> (Value, Vec<&'static str>) {
        let mut json = self.json.clone();
        let mut changes = Vec::new();
        json.remove("torch_dtype");
        json.insert("dtype".into(), dtype.into());
        // The student's weights are not quantized.
        if json.remove("quantization_config").is_some() {
            changes.push("without quantization_config");
        }
        if let Architecture::T5(variant) = &self.architecture {
            t5::write(&mut json, variant, self.tie_word_embeddings, &mut changes);
        }
        if let Some(rope) = self.rope()
            && rope.write(&mut json)
        {
            changes.push("rope settings in the spellings of transformers 4 and 5");
        }
        (Value::Object(json), changes)
    }

    /// Returns the `model_type` of Hugging Face.
    pub fn model_type(&self) -> &str {
        let name = self.json.get("model_type").and_then(Value::as_str);
        name.unwrap_or_default()
    }

    /// Returns the rotary embedding, in architectures that have one.
    pub fn rope(&self) -> Option<&Rope> {
        match &self.architecture {
            Architecture::Llama(variant) => Some(&variant.rope),
            Architecture::Gpt2 | Architecture::T5(_) => None,
        }
    }
}
