//! `config.json` of GPT-2.

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::config::fields::{config_error, without_nulls};
use crate::model::config::shape::{Architecture, ModelConfig};
use crate::ops::attention::Heads;

/// The fields of `config.json` that are used. All sizes except `n_inner` are required; the other fields have the
/// defaults of transformers.
#[derive(Deserialize)]
struct Gpt2Fields {
    vocab_size: usize,
    n_positions: usize,
    n_embd: usize,
    n_layer: usize,
    n_head: usize,
    n_inner: Option<usize>,
    #[serde(default = "default_eps")]
    layer_norm_epsilon: f64,
    #[serde(default = "super::fields::default_range")]
    initializer_range: f64,
    #[serde(default = "default_activation")]
    activation_function: String,
    #[serde(default = "default_true")]
    scale_attn_weights: bool,
    #[serde(default)]
    scale_attn_by_inverse_layer_idx: bool,
    #[serde(default)]
    add_cross_attention: bool,
    #[serde(default = "default_true")]
    tie_word_embeddings: bool,
}

fn default_eps() -> f64 {
    1e-5
}

fn default_activation() -> String {
    "gelu_new".into()
}

fn default_true() -> bool {
    true
}

/// Parses `config.json`.
///
/// # Errors
/// Where fields are missing or have unsupported values.
pub(super) fn parse(json: Map<String, Value>) -> Result<ModelConfig> {
    let fields: Gpt2Fields = serde_json::from_value(without_nulls(&json))?;
    let activation = fields.activation_function.as_str();
    if !matches!(activation, "gelu_new" | "gelu_pytorch_tanh") {
        return config_error(format!(
            "activation_function {activation:?} is not supported in a gpt2 model; expected \
             \"gelu_new\""
        ));
    }
    if !fields.scale_attn_weights
        || fields.scale_attn_by_inverse_layer_idx
        || fields.add_cross_attention
    {
        return config_error(
            "scale_attn_weights = false, scale_attn_by_inverse_layer_idx and \
             add_cross_attention are not supported"
                .into(),
        );
    }
    if fields.n_head == 0 || !fields.n_embd.is_multiple_of(fields.n_head) {
        return config_error(format!(
            "n_embd ({}) must be a multiple of n_head ({}), and n_head greater than 0",
            fields.n_embd, fields.n_head
        ));
    }
    Ok(ModelConfig {
        architecture: Architecture::Gpt2,
        vocab_size: fields.vocab_size,
        hidden_size: fields.n_embd,
        intermediate_size: fields.n_inner.unwrap_or(fields.n_embd.saturating_mul(4)),
        num_hidden_layers: fields.n_layer,
        heads: Heads::new(fields.n_head, fields.n_head, fields.n_embd / fields.n_head),
        norm_eps: fields.layer_norm_epsilon,
        max_position_embeddings: fields.n_positions,
        tie_word_embeddings: fields.tie_word_embeddings,
        initializer_range: fields.initializer_range,
        adapter_scale: 1.0,
        json,
    })
}
