//! TODO

use crate::model::config::rope::Rope;
use crate::ops::attention::Heads;
use serde_json::Map;
use serde_json::Value;

/// A decoder's shape.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub heads: Heads,
    /// What keeps the norms from dividing by zero.
    pub norm_eps: f64,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// What LoRA adapters among the weights are multiplied by: alpha / rank.
    pub adapter_scale: f64,
    /// The file as read: written back with the student, so that nothing in it is lost.
    pub(crate) json: Map<String, Value>,
}

/// How a decoder is built.
#[derive(Debug, Clone)]
pub enum Architecture {
    Llama(LlamaVariant),
    Gpt2,
}

/// In what decoders of this family differ.
#[derive(Debug, Clone)]
pub struct LlamaVariant {
    pub rope: Rope,
    /// Do queries, keys and values have biases?
    pub qkv_bias: bool,
    /// Does the projection after attention?
    pub output_bias: bool,
    /// Do those of the feed-forward layer?
    pub mlp_bias: bool,
    /// Is each head of queries and keys normalised?
    pub qk_norm: bool,
    /// How many keys a query sees, itself included, layer by layer; none: all before it.
    pub windows: Vec<Option<usize>>,
}
