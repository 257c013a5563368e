//! The shape of a decoder, independent of how `config.json` spells it.

use serde_json::{Map, Value};

use crate::model::config::rope::Rope;
use crate::ops::attention::Heads;

/// The architecture and sizes of a decoder.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub architecture: Architecture,
    /// V
    pub vocab_size: usize,
    /// D
    pub hidden_size: usize,
    /// F
    pub intermediate_size: usize,
    /// L
    pub num_hidden_layers: usize,
    pub heads: Heads,
    /// Epsilon of the norms, added to the mean of squares or the variance.
    pub norm_eps: f64,
    /// Context length in tokens.
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Standard deviation of random initial weights.
    pub initializer_range: f64,
    /// Scale of the LoRA adapters, if the weights include any: alpha / rank.
    pub adapter_scale: f64,
    /// `config.json` as read. It is written to the student's folder, so that no field is lost.
    pub(crate) json: Map<String, Value>,
}

/// The architecture of a decoder.
#[derive(Debug, Clone)]
pub enum Architecture {
    Llama(LlamaVariant),
    Gpt2,
}

/// The differences between decoders of the llama family.
#[derive(Debug, Clone)]
pub struct LlamaVariant {
    pub rope: Rope,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The output projection of attention has a bias.
    pub output_bias: bool,
    /// The projections of the feed-forward network have biases.
    pub mlp_bias: bool,
    /// Each query head and each key head has an RMSNorm.
    pub qk_norm: bool,
    /// Sliding window of each layer: the maximum number of keys that a query sees, including its own. None: no window.
    pub windows: Vec<Option<usize>>,
}
