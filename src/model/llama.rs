//! The llama decoder (Touvron et al., arXiv 2302.13971): SmolLM2, Llama 3, TinyLlama; and those that
//! differ from it in details: mistral (a sliding window; arXiv 2310.06825), qwen2 (biases; arXiv
//! 2407.10671), qwen3 (a norm of every head; arXiv 2505.09388).
//!
//! Written once, over [`Graph`]: for training and generation, on every device.

use anyhow::Result;

use super::graph::Graph;
use super::norm::Norm;
use super::parameters::{CheckedWeights, ParameterList};
use super::projection::Projection;
use crate::model::config::shape::LlamaVariant;
use crate::model::config::shape::ModelConfig;
use crate::model::parameters::WeightNames;

pub(super) const NAMES: WeightNames = WeightNames {
    prefix: "model.",
    embedding: "model.embed_tokens.weight",
    positions: None,
    norm: ("model.norm", false),
};

/// A layer's weights.
pub(crate) struct LlamaLayer {
    input_norm: Norm,
    q: Projection,
    k: Projection,
    v: Projection,
    /// Of every head of queries and of keys.
    qk_norm: Option<[Norm; 2]>,
    o: Projection,
    post_attention_norm: Norm,
    gate: Projection,
    up: Projection,
    down: Projection,
    window: Option<usize>,
}

/// Adds the weights of a layer, in the order of the forward pass.
pub(super) fn add_layer_parameters(
    list: &mut ParameterList,
    layer: usize,
    config: &ModelConfig,
    variant: &LlamaVariant,
) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q_width, kv_width) = (config.heads.query_width(), config.heads.key_value_width());
    let name = |module: &str| module_name(layer, module);
    list.norm(&name("input_layernorm"), hidden, false);
    let bias = variant.qkv_bias;
    list.projection(&name("self_attn.q_proj"), [q_width, hidden], bias);
    list.projection(&name("self_attn.k_proj"), [kv_width, hidden], bias);
    list.projection(&name("self_attn.v_proj"), [kv_width, hidden], bias);
    if variant.qk_norm {
        list.norm(&name("self_attn.q_norm"), config.heads.head_dim, false);
        list.norm(&name("self_attn.k_norm"), config.heads.head_dim, false);
    }
    let bias = variant.output_bias;
    list.projection(&name("self_attn.o_proj"), [hidden, q_width], bias);
    list.norm(&name("post_attention_layernorm"), hidden, false);
    let bias = variant.mlp_bias;
    list.projection(&name("mlp.gate_proj"), [inner, hidden], bias);
    list.projection(&name("mlp.up_proj"), [inner, hidden], bias);
    list.projection(&name("mlp.down_proj"), [hidden, inner], bias);
}

fn module_name(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}")
}

impl LlamaLayer {
    /// # Errors
    /// Where `weights` lack one.
    pub(super) fn new(
        layer: usize,
        variant: &LlamaVariant,
        weights: &CheckedWeights,
    ) -> Result<Self> {
        let norm = |module: &str| weights.norm(&module_name(layer, module), false);
        let projection = |module: &str, bias: bool| {
            let name = module_name(layer, module);
            weights.projection(&name, bias)
        };
        let qk_norm =
            || -> Result<[Norm; 2]> { Ok([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]) };
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            q: projection("self_attn.q_proj", variant.qkv_bias)?,
            k: projection("self_attn.k_proj", variant.qkv_bias)?,
            v: projection("self_attn.v_proj", variant.qkv_bias)?,
            qk_norm: variant.qk_norm.then(qk_norm).transpose()?,
            o: projection("self_attn.o_proj", variant.output_bias)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate: projection("mlp.gate_proj", variant.mlp_bias)?,
            up: projection("mlp.up_proj", variant.mlp_bias)?,
            down: projection("mlp.down_proj", variant.mlp_bias)?,
            window: variant.windows[layer],
        })
    }

    /// What the layer with this index makes of `x` (T x D).
    ///
    /// # Errors
    /// Where the graph fails.
    pub(crate) fn forward<G: Graph>(
        &self,
        graph: &mut G,
        index: usize,
        x: G::Value,
    ) -> Result<G::Value> {
        let normed = self.input_norm.forward(graph, &x)?;
        let mut q = graph.linear(&normed, &self.q)?;
        let mut k = graph.linear(&normed, &self.k)?;
        let v = graph.linear(&normed, &self.v)?;
        drop(normed);
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            q = q_norm.forward(graph, &q)?;
            k = k_norm.forward(graph, &k)?;
        }
        let (q, k) = (graph.rope(q)?, graph.rope(k)?);
        let heads = graph.attention(index, [q, k, v], self.window)?;
        let x = graph.add_linear(x, &heads, &self.o)?;
        drop(heads);
        let normed = self.post_attention_norm.forward(graph, &x)?;
        let gate = graph.linear(&normed, &self.gate)?;
        let up = graph.linear(&normed, &self.up)?;
        drop(normed);
        let inner = graph.swiglu(gate, up)?;
        graph.add_linear(x, &inner, &self.down)
    }
}
