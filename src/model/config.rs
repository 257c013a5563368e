//! The shape of a decoder, as `config.json` of a Hugging Face folder gives it.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::Student;
use crate::exit::Exit;
use crate::ops::attention::Heads;

/// A llama-architecture decoder's shape.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub heads: Heads,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// The file as read: written back with the student, so that nothing in it is lost.
    json: Map<String, Value>,
}

/// The rotary embedding's frequencies.
#[derive(Debug, Clone)]
pub struct Rope {
    pub theta: f64,
    /// Llama 3's stretch of low frequencies; none for plain rotary embedding.
    pub llama3: Option<Llama3Scaling>,
}

/// `rope_type = "llama3"`: wavelengths longer than the original context are slowed by `factor`,
/// short ones kept, those between blended.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

/// The fields of `config.json` that decide about the arithmetic.
#[derive(Deserialize)]
struct File {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    /// transformers up to 4; from 5 on `rope_parameters`, with theta inside.
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "default_range")]
    initializer_range: f64,
    #[serde(default = "default_activation")]
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_positions() -> usize {
    2048
}

fn default_range() -> f64 {
    0.02
}

fn default_activation() -> String {
    "silu".into()
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
    pub fn of_student(student: &Student, vocab_size: usize, stop_ids: &[u32]) -> Result<Self> {
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
        let file: File = serde_json::from_value(Value::Object(json.clone()))?;
        let refuse = |what: String| Err(Exit::Usage(what).into());
        if file.model_type != "llama" {
            return refuse(format!(
                "model_type is {:?}, and this version trains \"llama\" (SmolLM2, Llama 3, TinyLlama)",
                file.model_type
            ));
        }
        if file.hidden_act != "silu" || file.attention_bias || file.mlp_bias {
            return refuse(
                "a llama variant with biases or an activation other than silu is not supported"
                    .into(),
            );
        }
        let query = file.num_attention_heads;
        let key_value = file.num_key_value_heads.unwrap_or(query);
        if query == 0 || key_value == 0 || !query.is_multiple_of(key_value) {
            return refuse(format!(
                "num_attention_heads ({query}) must be a multiple of num_key_value_heads ({key_value})"
            ));
        }
        let channels = file.head_dim.unwrap_or(file.hidden_size / query);
        if channels == 0 || !channels.is_multiple_of(2) {
            return refuse(format!(
                "head_dim is {channels}, and the rotary embedding needs an even number: choose \
                 hidden_size and num_attention_heads accordingly"
            ));
        }
        Ok(Self {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            heads: Heads {
                query,
                key_value,
                channels,
            },
            rms_norm_eps: file.rms_norm_eps,
            rope: Rope::from_file(&file)?,
            max_position_embeddings: file.max_position_embeddings,
            tie_word_embeddings: file.tie_word_embeddings,
            initializer_range: file.initializer_range,
            json,
        })
    }

    /// `config.json` as it goes into the student's folder, with the data type of its weights.
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut json = self.json.clone();
        json.remove("torch_dtype");
        json.insert("dtype".into(), dtype.into());
        Value::Object(json)
    }
}

impl Rope {
    fn from_file(file: &File) -> Result<Self> {
        let scaling = file.rope_parameters.as_ref().or(file.rope_scaling.as_ref());
        let field = |name: &str| scaling.and_then(|map| map.get(name));
        let theta = field("rope_theta")
            .and_then(Value::as_f64)
            .or(file.rope_theta)
            .unwrap_or(10_000.0);
        let kind = field("rope_type").or(field("type")).and_then(Value::as_str);
        let llama3 = match kind {
            None | Some("default") => None,
            Some("llama3") => {
                let map = Value::Object(scaling.cloned().unwrap_or_default());
                Some(serde_json::from_value(map).context("rope scaling of type llama3")?)
            }
            Some(other) => {
                let what = format!("rope scaling of type {other:?} is not supported");
                return Err(Exit::Usage(what).into());
            }
        };
        Ok(Self { theta, llama3 })
    }

    /// Radians per position of each channel pair (C / 2).
    pub fn inverse_frequencies(&self, channels: usize) -> Vec<f32> {
        (0..channels / 2)
            .map(|pair| {
                let frequency = self.theta.powf(-((2 * pair) as f64) / channels as f64);
                self.llama3.map_or(frequency, |s| s.scale(frequency)) as f32
            })
            .collect()
    }
}

impl Llama3Scaling {
    fn scale(&self, frequency: f64) -> f64 {
        let context = self.original_max_position_embeddings;
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < context / self.high_freq_factor {
            return frequency;
        }
        if wavelength > context / self.low_freq_factor {
            return frequency / self.factor;
        }
        let smooth = (context / wavelength - self.low_freq_factor)
            / (self.high_freq_factor - self.low_freq_factor);
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}
