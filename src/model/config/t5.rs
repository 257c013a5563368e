//! `config.json` of T5, T5 v1.1, flan-T5 and mT5.

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::StudentConfig;
use crate::model::config::fields::{check_layer_count, config_error, without_nulls};
use crate::model::config::shape::{Architecture, ModelConfig, T5Variant};
use crate::ops::attention::Heads;

/// Context length of the encoder, and of the decoder, in tokens. The positions of T5 are relative, so the architecture
/// has no maximum: `n_positions` of `config.json` is only the length of its pre-training. This limit bounds the work
/// for one request.
const MAX_POSITIONS: usize = 1 << 13;

/// Maximum number of buckets of relative positions.
const MAX_BUCKETS: usize = 1 << 12;

/// The fields of `config.json` that are used. Defaults are those of transformers' `T5Config`. Fields without a default
/// are required.
#[derive(Deserialize)]
struct T5Fields {
    model_type: String,
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_layers: usize,
    num_decoder_layers: Option<usize>,
    num_heads: usize,
    #[serde(default = "default_buckets")]
    relative_attention_num_buckets: usize,
    #[serde(default = "default_max_distance")]
    relative_attention_max_distance: usize,
    #[serde(default = "default_eps")]
    layer_norm_epsilon: f64,
    #[serde(default = "default_factor")]
    initializer_factor: f64,
    feed_forward_proj: Option<String>,
    /// Parts of `feed_forward_proj`, which transformers writes beside it and prefers when it loads the folder.
    dense_act_fn: Option<String>,
    is_gated_act: Option<bool>,
    tie_word_embeddings: Option<bool>,
    /// Written by transformers 5, which ties always and uses this flag for what `tie_word_embeddings` meant.
    scale_decoder_outputs: Option<bool>,
    transformers_version: Option<String>,
    decoder_start_token_id: Option<u32>,
    pad_token_id: Option<u32>,
}

fn default_buckets() -> usize {
    32
}

fn default_max_distance() -> usize {
    128
}

fn default_eps() -> f64 {
    1e-6
}

fn default_factor() -> f64 {
    1.0
}

/// Returns the `config.json` of a student with random weights: T5 v1.1 of the sizes in `[student]`.
pub(super) fn student_json(
    student: &StudentConfig,
    vocab_size: usize,
    stop_ids: &[u32],
    decoder_start: Option<u32>,
) -> Value {
    let start = decoder_start.unwrap_or(0);
    json!({
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": true,
        "vocab_size": vocab_size,
        "d_model": student.hidden_size,
        "d_kv": student.hidden_size / student.num_attention_heads.max(1),
        "d_ff": student.intermediate_size,
        "num_layers": student.num_encoder_layers.unwrap_or(student.num_hidden_layers),
        "num_decoder_layers": student.num_hidden_layers,
        "num_heads": student.num_attention_heads,
        "relative_attention_num_buckets": default_buckets(),
        "relative_attention_max_distance": default_max_distance(),
        "dropout_rate": 0.0,
        "layer_norm_epsilon": default_eps(),
        "initializer_factor": default_factor(),
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": student.tie_word_embeddings,
        "decoder_start_token_id": start,
        "pad_token_id": start,
        "eos_token_id": stop_ids.first(),
    })
}

/// Completes `config.json` so that transformers 4 and 5 read the same model. Adds a description of each change that is
/// not only a spelling to `changes`.
pub(super) fn write(
    json: &mut Map<String, Value>,
    variant: &T5Variant,
    tie_word_embeddings: bool,
    changes: &mut Vec<&'static str>,
) {
    json.entry("decoder_start_token_id")
        .or_insert_with(|| variant.start_id.into());
    if json.get("tie_word_embeddings") != Some(&tie_word_embeddings.into()) {
        // Version 4 initialises an untied head randomly unless this is false.
        json.insert("tie_word_embeddings".into(), tie_word_embeddings.into());
        if !tie_word_embeddings {
            changes
                .push("tie_word_embeddings = false, because the weights have a head of their own");
        }
    }
}

/// Checks that the parts of the feed-forward's name agree with the whole.
fn check_feed_forward(fields: &T5Fields, is_gated: bool) -> Result<()> {
    let expected = if is_gated { "gelu_new" } else { "relu" };
    let activation = fields.dense_act_fn.as_deref();
    if let Some(activation) = activation.filter(|name| *name != expected) {
        return config_error(format!(
            "dense_act_fn is {activation:?}; expected {expected:?}, as feed_forward_proj says"
        ));
    }
    match fields.is_gated_act {
        Some(value) if value != is_gated => config_error(format!(
            "is_gated_act is {value}; expected {is_gated}, as feed_forward_proj says"
        )),
        _ => Ok(()),
    }
}

/// Parses `config.json`.
///
/// # Errors
/// Where fields are missing or have unsupported values.
pub(super) fn parse(json: Map<String, Value>) -> Result<ModelConfig> {
    let fields: T5Fields = serde_json::from_value(without_nulls(&json))?;
    let is_mt5 = fields.model_type == "mt5";
    let default_feed_forward = if is_mt5 { "gated-gelu" } else { "relu" };
    let feed_forward = fields.feed_forward_proj.as_deref();
    let is_gated = match feed_forward.unwrap_or(default_feed_forward) {
        "relu" => false,
        "gated-gelu" => true,
        other => {
            return config_error(format!(
                "feed_forward_proj {other:?} is not supported in a {} model; expected \"relu\" or \"gated-gelu\"",
                fields.model_type
            ));
        }
    };
    check_feed_forward(&fields, is_gated)?;
    let buckets = fields.relative_attention_num_buckets;
    let max_distance = fields.relative_attention_max_distance;
    // The encoder divides the buckets in two directions, and each direction in two halves.
    if !(4..=MAX_BUCKETS).contains(&buckets) || !buckets.is_multiple_of(4) {
        return config_error(format!(
            "relative_attention_num_buckets is {buckets}; expected a multiple of 4 from 4 to {MAX_BUCKETS}"
        ));
    }
    if max_distance <= buckets / 2 {
        return config_error(format!(
            "relative_attention_max_distance is {max_distance}; expected more than half of \
             relative_attention_num_buckets ({buckets})"
        ));
    }
    check_layer_count(fields.num_layers)?;
    let tie_word_embeddings = fields.tie_word_embeddings.unwrap_or(!is_mt5);
    let is_version_5 = |version: &str| version.starts_with("5.");
    let is_version_5 = fields
        .transformers_version
        .as_deref()
        .is_some_and(is_version_5);
    let scales_outputs = if is_mt5 {
        // transformers 5 never scales an mT5, and version 4 scales a tied one.
        if tie_word_embeddings {
            tracing::warn!(
                "transformers 4 and 5 read an mT5 with tied embeddings differently: read as by version {}, because \
                 `transformers_version` in config.json is {}",
                if is_version_5 { 5 } else { 4 },
                fields.transformers_version.as_deref().unwrap_or("missing")
            );
        }
        tie_word_embeddings && !is_version_5
    } else {
        fields.scale_decoder_outputs.unwrap_or(tie_word_embeddings)
    };
    let variant = T5Variant {
        encoder_layers: fields.num_layers,
        is_gated,
        buckets,
        max_distance,
        scales_outputs,
        allows_own_head: is_version_5 || fields.scale_decoder_outputs.is_some(),
        initializer_factor: fields.initializer_factor,
        start_id: fields
            .decoder_start_token_id
            .or(fields.pad_token_id)
            .unwrap_or(0),
    };
    if variant.start_id as usize >= fields.vocab_size {
        return config_error(format!(
            "decoder_start_token_id is {}, which is outside the vocabulary of {}",
            variant.start_id, fields.vocab_size
        ));
    }
    Ok(ModelConfig {
        architecture: Architecture::T5(variant),
        vocab_size: fields.vocab_size,
        hidden_size: fields.d_model,
        intermediate_size: fields.d_ff,
        num_hidden_layers: fields.num_decoder_layers.unwrap_or(fields.num_layers),
        heads: Heads {
            scale: 1.0,
            ..Heads::new(fields.num_heads, fields.num_heads, fields.d_kv)
        },
        norm_eps: fields.layer_norm_epsilon,
        max_position_embeddings: MAX_POSITIONS,
        tie_word_embeddings,
        initializer_range: fields.initializer_factor,
        adapter_scale: 1.0,
        json,
    })
}
