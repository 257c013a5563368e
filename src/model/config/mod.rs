//! The shape of a decoder, as `config.json` of a Hugging Face folder gives it.

pub(crate) mod fields;
pub(crate) mod gpt2;
pub(crate) mod llama;
pub(crate) mod rope;
pub mod shape;

use crate::model::config::fields::check_layer_count;
use crate::model::config::fields::config_error;
use crate::model::config::shape::Architecture;
use crate::model::config::shape::ModelConfig;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::config::Student;
pub use crate::model::config::shape::LlamaVariant;
use crate::ops::attention::Heads;
pub use rope::{Llama3Scaling, Rope};

/// Longer contexts are used up to here: the angles of every position are kept.
const MAX_POSITIONS: usize = 1 << 17;

const MAX_WIDTH: usize = 1 << 24;
fn default_range() -> f64 {
    0.02
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// Where the file is missing or malformed, or describes a model that this version cannot train.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}: a model folder holds config.json, *.safetensors and tokenizer.json",
                path.display()
            )
        })?;
        let read = || -> Result<Self> { Self::from_json(serde_json::from_str(&text)?) };
        read().with_context(|| format!("{} does not describe a usable model", path.display()))
    }

    /// The shape that `[student]` gives for `init = "random"`, for a tokenizer of `vocab_size` ids.
    ///
    /// # Errors
    /// Where the sizes do not fit each other.
    pub fn from_student(student: &Student, vocab_size: usize, stop_ids: &[u32]) -> Result<Self> {
        let json = json!({
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
        });
        let read = || Self::from_json(serde_json::from_value(json)?);
        read().context("[student] has sizes that do not fit")
    }

    fn from_json(json: Map<String, Value>) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str);
        let mut config = match model_type {
            Some("llama" | "mistral" | "qwen2" | "qwen3") => llama::parse(json),
            Some("gpt2") => gpt2::parse(json),
            Some(other) => config_error(format!(
                "model_type is {other:?}, and this version trains \"llama\" (SmolLM2, Llama 3, \
                 TinyLlama), \"mistral\", \"qwen2\", \"qwen3\" and \"gpt2\""
            )),
            None => config_error("it has no model_type".into()),
        }?;
        config.check_sizes()?;
        config.max_position_embeddings = config.max_position_embeddings.min(MAX_POSITIONS);
        Ok(config)
    }

    /// Refuses sizes that no model has: what is made from them must not fill the memory before the
    /// weights are looked at.
    fn check_sizes(&self) -> Result<()> {
        let Heads {
            query, head_dim, ..
        } = self.heads;
        let sizes = [
            ("vocabulary", self.vocab_size, MAX_WIDTH),
            ("hidden size", self.hidden_size, MAX_WIDTH),
            ("feed-forward size", self.intermediate_size, MAX_WIDTH),
            ("attention", query.saturating_mul(head_dim), MAX_WIDTH),
            (
                "number of positions",
                self.max_position_embeddings,
                usize::MAX,
            ),
        ];
        check_layer_count(self.num_hidden_layers)?;
        for (what, size, most) in sizes {
            if size == 0 || size > most {
                return config_error(format!("its {what} of {size} is not that of a model"));
            }
        }
        let finite = self.norm_eps.is_finite() && self.initializer_range.is_finite();
        if !finite || self.norm_eps < 0.0 || self.initializer_range < 0.0 {
            return config_error("its epsilon or initializer_range is no number of use".into());
        }
        Ok(())
    }

    /// `config.json` as it goes into the student's folder, with the data type of its weights; and its other
    /// differences from the file that was read.
    pub fn to_json(&self, dtype: &str) -> (Value, Vec<&'static str>) {
        let mut json = self.json.clone();
        let mut changes = Vec::new();
        json.remove("torch_dtype");
        json.insert("dtype".into(), dtype.into());
        // The weights are plain numbers now.
        if json.remove("quantization_config").is_some() {
            changes.push("without quantization_config");
        }
        if let Some(rope) = self.rope()
            && rope.write(&mut json)
        {
            changes.push("rope settings as transformers 4 and 5 spell them");
        }
        (Value::Object(json), changes)
    }

    /// What Hugging Face calls the architecture.
    pub fn model_type(&self) -> &str {
        let name = self.json.get("model_type").and_then(Value::as_str);
        name.unwrap_or_default()
    }

    /// The rotary embedding, in architectures that have one.
    pub fn rope(&self) -> Option<&Rope> {
        match &self.architecture {
            Architecture::Llama(variant) => Some(&variant.rope),
            Architecture::Gpt2 => None,
        }
    }
}
