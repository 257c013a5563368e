//! `config.json` of GPT-2.

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::config::fields::{config_error, without_nulls};
use crate::model::config::shape::{Architecture, ModelConfig};
use crate::ops::attention::Heads;

/// The fields of `config.json` that are used, with the defaults of transformers.
#[derive(Deserialize)]
struct Gpt2Json {
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
    let file: Gpt2Json = serde_json::from_value(without_nulls(&json))?;
    let activation = file.activation_function.as_str();
    if !matches!(activation, "gelu_new" | "gelu_pytorch_tanh") {
        return config_error(format!(
            "activation_function {activation:?} is not supported in a gpt2 model; expected \
             \"gelu_new\""
        ));
    }
    if !file.scale_attn_weights || file.scale_attn_by_inverse_layer_idx || file.add_cross_attention
    {
        return config_error(
            "scale_attn_weights = false, scale_attn_by_inverse_layer_idx and \
             add_cross_attention are not supported"
                .into(),
        );
    }
    if file.n_head == 0 || !file.n_embd.is_multiple_of(file.n_head) {
        return config_error(format!(
            "n_embd ({}) must be a multiple of n_head ({})",
            file.n_embd, file.n_head
        ));
    }
    Ok(ModelConfig {
        architecture: Architecture::Gpt2,
        vocab_size: file.vocab_size,
        hidden_size: file.n_embd,
        intermediate_size: file.n_inner.unwrap_or(4 * file.n_embd),
        num_hidden_layers: file.n_layer,
        heads: Heads {
            query: file.n_head,
            key_value: file.n_head,
            head_dim: file.n_embd / file.n_head,
        },
        norm_eps: file.layer_norm_epsilon,
        max_position_embeddings: file.n_positions,
        tie_word_embeddings: file.tie_word_embeddings,
        initializer_range: file.initializer_range,
        adapter_scale: 1.0,
        json,
    })
}
