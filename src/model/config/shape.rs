//! The shape of a model, independent of how `config.json` spells it.

use serde_json::{Map, Value};

use crate::model::config::rope::Rope;
use crate::ops::attention::Heads;

/// The architecture and sizes of a model.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub architecture: Architecture,
    /// V
    pub vocab_size: usize,
    /// D
    pub hidden_size: usize,
    /// F
    pub intermediate_size: usize,
    /// L; of an encoder-decoder, the number of layers of the decoder.
    pub num_hidden_layers: usize,
    pub heads: Heads,
    /// Epsilon of the norms, added to the mean of squares or the variance.
    pub norm_eps: f64,
    /// Context length in tokens; of an encoder-decoder, the maximum of the source and of the answer.
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Standard deviation of random initial weights.
    pub initializer_range: f64,
    /// Scale of the LoRA adapters, if the weights include any: alpha / rank.
    pub adapter_scale: f64,
    /// `config.json` as read. It is written to the student's folder, so that no field is lost.
    pub(crate) json: Map<String, Value>,
}

/// The architecture of a model.
#[derive(Debug, Clone)]
pub enum Architecture {
    Llama(LlamaVariant),
    Gpt2,
    T5(T5Variant),
}

/// The properties of an encoder-decoder of the T5 family.
#[derive(Debug, Clone)]
pub struct T5Variant {
    /// Number of layers of the encoder.
    pub encoder_layers: usize,
    /// The feed-forward network is GEGLU, not ReLU.
    pub is_gated: bool,
    /// Number of buckets of relative positions.
    pub buckets: usize,
    /// Distances from this one on share the last bucket.
    pub max_distance: usize,
    /// The hidden states are multiplied by D^-0.5 before the head.
    pub scales_outputs: bool,
    /// The weights may have a head of their own although `tie_word_embeddings` is true, as transformers 5 writes them.
    pub allows_own_head: bool,
    /// Factor of the standard deviations of random initial weights.
    pub initializer_factor: f64,
    /// First token of the decoder's input.
    pub start_id: u32,
}

impl ModelConfig {
    /// Returns true if an encoder reads the prompt, and the decoder only the answer.
    pub fn is_encoder_decoder(&self) -> bool {
        matches!(self.architecture, Architecture::T5(_))
    }

    /// Returns the first token of the decoder's input, in an encoder-decoder.
    pub(crate) fn decoder_start(&self) -> Option<u32> {
        match &self.architecture {
            Architecture::T5(variant) => Some(variant.start_id),
            Architecture::Llama(_) | Architecture::Gpt2 => None,
        }
    }

    /// Returns true if the context holds a prompt of `prompt_tokens` tokens and an answer of at least one token.
    pub(crate) fn fits_prompt(&self, prompt_tokens: usize) -> bool {
        prompt_tokens <= self.max_position_embeddings && self.room_for_answer(prompt_tokens) > 0
    }

    /// Returns the maximum number of answer tokens after a prompt of `prompt_tokens` tokens.
    pub(crate) fn room_for_answer(&self, prompt_tokens: usize) -> usize {
        let before_answer = if self.is_encoder_decoder() {
            // The token that starts the decoder.
            1
        } else {
            prompt_tokens
        };
        self.max_position_embeddings.saturating_sub(before_answer)
    }
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
