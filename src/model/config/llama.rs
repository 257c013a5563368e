//! `config.json` of llama and its variants: mistral, qwen2, qwen3.

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::config::fields::{check_layer_count, config_error, without_nulls};
use crate::model::config::rope::Rope;
use crate::model::config::shape::{Architecture, LlamaVariant, ModelConfig};
use crate::ops::attention::Heads;

/// The fields of `config.json` that are used. Defaults are those of transformers' `LlamaConfig`, or of `Qwen2Config`
/// for the two window fields. Fields without a default that are not `Option` are required.
#[derive(Deserialize)]
struct LlamaFields {
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
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "super::fields::default_range")]
    initializer_range: f64,
    #[serde(default = "default_activation")]
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default = "default_window_layers")]
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_positions() -> usize {
    2048
}

fn default_activation() -> String {
    "silu".into()
}

fn default_window_layers() -> usize {
    28
}

/// Default sliding window of mistral and qwen, in tokens.
const DEFAULT_WINDOW: usize = 4096;

/// Parses `config.json`.
///
/// # Errors
/// Where fields are missing or have unsupported values.
pub(super) fn parse(json: Map<String, Value>) -> Result<ModelConfig> {
    let fields: LlamaFields = serde_json::from_value(without_nulls(&json))?;
    if fields.hidden_act != "silu" {
        return config_error(format!(
            "hidden_act {:?} is not supported in a {} model; expected \"silu\"",
            fields.hidden_act, fields.model_type
        ));
    }
    // Before `windows` allocates one entry per layer.
    check_layer_count(fields.num_hidden_layers)?;
    let heads = heads(&fields)?;
    let is_qwen2 = fields.model_type == "qwen2";
    let variant = LlamaVariant {
        rope: Rope::from_json(&json)?,
        qkv_bias: is_qwen2 || fields.attention_bias,
        output_bias: fields.attention_bias && !is_qwen2,
        mlp_bias: fields.mlp_bias && fields.model_type == "llama",
        qk_norm: fields.model_type == "qwen3",
        windows: windows(&fields, &json)?,
    };
    Ok(ModelConfig {
        architecture: Architecture::Llama(variant),
        vocab_size: fields.vocab_size,
        hidden_size: fields.hidden_size,
        intermediate_size: fields.intermediate_size,
        num_hidden_layers: fields.num_hidden_layers,
        heads,
        norm_eps: fields.rms_norm_eps,
        max_position_embeddings: fields.max_position_embeddings,
        tie_word_embeddings: fields.tie_word_embeddings,
        initializer_range: fields.initializer_range,
        adapter_scale: 1.0,
        json,
    })
}

/// Returns the checked head counts and the head width.
fn heads(fields: &LlamaFields) -> Result<Heads> {
    let query = fields.num_attention_heads;
    let key_value = fields.num_key_value_heads.unwrap_or(query);
    if query == 0 || key_value == 0 || !query.is_multiple_of(key_value) {
        return config_error(format!(
            "num_attention_heads ({query}) must be a multiple of num_key_value_heads ({key_value}), and both \
             greater than 0"
        ));
    }
    let head_dim = fields.head_dim.unwrap_or(fields.hidden_size / query);
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return config_error(format!(
            "head_dim is {head_dim}; the rotary embedding needs an even number above 0: change \
             hidden_size or num_attention_heads"
        ));
    }
    Ok(Heads::new(query, key_value, head_dim))
}

/// Returns the sliding window of each layer, by the rules of transformers. All layers of mistral have the window. In
/// qwen2 and qwen3 with `use_sliding_window`, `layer_types` marks the layers with the window as "sliding_attention";
/// without `layer_types`, the layers from index `max_window_layers` on have it. All other layers have none.
fn windows(fields: &LlamaFields, json: &Map<String, Value>) -> Result<Vec<Option<usize>>> {
    let layers = fields.num_hidden_layers;
    let window = match json.get("sliding_window") {
        None => Some(DEFAULT_WINDOW),
        Some(Value::Null) => None,
        Some(value) => Some(serde_json::from_value(value.clone())?),
    };
    if window == Some(0) {
        return config_error("sliding_window must be greater than 0".into());
    }
    match fields.model_type.as_str() {
        "mistral" => return Ok(vec![window; layers]),
        "qwen2" | "qwen3" if fields.use_sliding_window => {}
        _ => return Ok(vec![None; layers]),
    }
    let Some(types) = &fields.layer_types else {
        let window = |layer: usize| window.filter(|_| layer >= fields.max_window_layers);
        return Ok((0..layers).map(window).collect());
    };
    if types.len() != layers {
        return config_error(format!(
            "layer_types has {} entries for {layers} layers",
            types.len()
        ));
    }
    let layer_window = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(window),
        other => config_error(format!(
            "layer type {other:?} is not supported; expected \"full_attention\" or \"sliding_attention\""
        )),
    };
    types.iter().map(layer_window).collect()
}
