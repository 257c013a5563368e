//! `config.json` of llama and its variants: mistral, qwen2, qwen3.

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::config::fields::{check_layer_count, config_error, without_nulls};
use crate::model::config::rope::Rope;
use crate::model::config::shape::{Architecture, LlamaVariant, ModelConfig};
use crate::ops::attention::Heads;

/// The fields of `config.json` that are used, with the defaults of transformers.
#[derive(Deserialize)]
struct LlamaJson {
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
    let file: LlamaJson = serde_json::from_value(without_nulls(&json))?;
    if file.hidden_act != "silu" {
        return config_error(format!(
            "hidden_act {:?} is not supported in a {} model; expected \"silu\"",
            file.hidden_act, file.model_type
        ));
    }
    // Before `windows` allocates one entry per layer.
    check_layer_count(file.num_hidden_layers)?;
    let heads = heads(&file)?;
    let qwen2 = file.model_type == "qwen2";
    let variant = LlamaVariant {
        rope: Rope::from_json(&json)?,
        qkv_bias: qwen2 || file.attention_bias,
        output_bias: file.attention_bias && !qwen2,
        mlp_bias: file.mlp_bias && file.model_type == "llama",
        qk_norm: file.model_type == "qwen3",
        windows: windows(&file, &json)?,
    };
    Ok(ModelConfig {
        architecture: Architecture::Llama(variant),
        vocab_size: file.vocab_size,
        hidden_size: file.hidden_size,
        intermediate_size: file.intermediate_size,
        num_hidden_layers: file.num_hidden_layers,
        heads,
        norm_eps: file.rms_norm_eps,
        max_position_embeddings: file.max_position_embeddings,
        tie_word_embeddings: file.tie_word_embeddings,
        initializer_range: file.initializer_range,
        adapter_scale: 1.0,
        json,
    })
}

/// Returns the checked head counts and the head width.
fn heads(file: &LlamaJson) -> Result<Heads> {
    let query = file.num_attention_heads;
    let key_value = file.num_key_value_heads.unwrap_or(query);
    if query == 0 || key_value == 0 || !query.is_multiple_of(key_value) {
        return config_error(format!(
            "num_attention_heads ({query}) must be a multiple of num_key_value_heads ({key_value})"
        ));
    }
    let head_dim = file.head_dim.unwrap_or(file.hidden_size / query);
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return config_error(format!(
            "head_dim is {head_dim}; the rotary embedding needs an even number above 0: change \
             hidden_size or num_attention_heads"
        ));
    }
    Ok(Heads {
        query,
        key_value,
        head_dim,
    })
}

/// Returns the sliding window of each layer, by the rules of transformers.
fn windows(file: &LlamaJson, json: &Map<String, Value>) -> Result<Vec<Option<usize>>> {
    let layers = file.num_hidden_layers;
    let window = match json.get("sliding_window") {
        None => Some(DEFAULT_WINDOW),
        Some(Value::Null) => None,
        Some(value) => Some(serde_json::from_value(value.clone())?),
    };
    if window == Some(0) {
        return config_error("sliding_window must be greater than 0".into());
    }
    match file.model_type.as_str() {
        "mistral" => return Ok(vec![window; layers]),
        "qwen2" | "qwen3" if file.use_sliding_window => {}
        _ => return Ok(vec![None; layers]),
    }
    let Some(types) = &file.layer_types else {
        let window = |layer: usize| window.filter(|_| layer >= file.max_window_layers);
        return Ok((0..layers).map(window).collect());
    };
    if types.len() != layers {
        return config_error(format!(
            "layer_types has {} entries for {layers} layers",
            types.len()
        ));
    }
    let window_of = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(window),
        other => config_error(format!(
            "layer type {other:?} is not supported; expected \"full_attention\" or \"sliding_attention\""
        )),
    };
    types.iter().map(window_of).collect()
}
