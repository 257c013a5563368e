//! The llama decoder (Touvron et al., arXiv 2302.13971): SmolLM2, Llama 3, TinyLlama. Also its
//! variants: mistral (a sliding window; arXiv 2310.06825), qwen2 (biases; arXiv 2407.10671), qwen3
//! (norms of query and key heads; arXiv 2505.09388).
//!
//! The layer is written once, over [`Graph`]: it trains on every device and generates on the CPU.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::Result;

use super::graph::{AttentionKind, AttentionLayer, Graph};
use super::norm::Norm;
use super::parameters::{CheckedWeights, ParameterList};
use super::projection::Projection;
use crate::model::config::shape::{LlamaVariant, ModelConfig};
use crate::model::parameters::WeightNames;
use crate::ops::activation::Activation;

pub(super) const NAMES: WeightNames = WeightNames {
    prefix: "model.",
    embedding: "model.embed_tokens.weight",
    position_embedding: None,
    final_norm: "model.norm",
    final_norm_has_bias: false,
};

/// The weights of a layer.
pub(crate) struct LlamaLayer {
    attention: AttentionLayer,
    input_norm: Norm,
    q: Projection,
    k: Projection,
    v: Projection,
    /// The norm of each query head and the norm of each key head (qwen3).
    qk_norm: Option<[Norm; 2]>,
    o: Projection,
    post_attention_norm: Norm,
    gate: Projection,
    up: Projection,
    down: Projection,
}

/// Adds the weights of a layer, in the order of the forward pass.
pub(super) fn add_layer_parameters(
    list: &mut ParameterList,
    layer: usize,
    config: &ModelConfig,
    variant: &LlamaVariant,
) {
    let hidden = config.hidden_size;
    let inner = config.intermediate_size;
    let q_width = config.heads.query_width();
    let kv_width = config.heads.key_value_width();
    let name = |module: &str| module_name(layer, module);
    list.add_norm(&name("input_layernorm"), hidden, false);
    let bias = variant.qkv_bias;
    list.add_projection(&name("self_attn.q_proj"), [q_width, hidden], bias);
    list.add_projection(&name("self_attn.k_proj"), [kv_width, hidden], bias);
    list.add_projection(&name("self_attn.v_proj"), [kv_width, hidden], bias);
    if variant.qk_norm {
        list.add_norm(&name("self_attn.q_norm"), config.heads.head_dim, false);
        list.add_norm(&name("self_attn.k_norm"), config.heads.head_dim, false);
    }
    let bias = variant.output_bias;
    list.add_projection(&name("self_attn.o_proj"), [hidden, q_width], bias);
    list.add_norm(&name("post_attention_layernorm"), hidden, false);
    let bias = variant.mlp_bias;
    list.add_projection(&name("mlp.gate_proj"), [inner, hidden], bias);
    list.add_projection(&name("mlp.up_proj"), [inner, hidden], bias);
    list.add_projection(&name("mlp.down_proj"), [hidden, inner], bias);
}

fn module_name(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}")
}

impl LlamaLayer {
    /// Builds the layer `index` from `weights`.
    ///
    /// # Errors
    /// Where a weight is missing.
    pub(super) fn new(
        index: usize,
        variant: &LlamaVariant,
        weights: &CheckedWeights,
    ) -> Result<Self> {
        let norm = |module: &str| weights.norm(&module_name(index, module), false);
        let projection = |module: &str, has_bias: bool| {
            weights.projection(&module_name(index, module), has_bias)
        };
        let qk_norm =
            || -> Result<[Norm; 2]> { Ok([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]) };
        Ok(Self {
            attention: AttentionLayer {
                index,
                kind: AttentionKind::Causal {
                    window: variant.windows[index],
                },
                bias: None,
            },
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
        })
    }

    /// Runs the layer.
    ///
    /// # Errors
    /// Where the graph fails.
    pub(crate) fn forward<G: Graph>(&self, graph: &mut G, x_TD: G::Value) -> Result<G::Value> {
        let normed_TD = self.input_norm.forward(graph, &x_TD)?;
        let mut q_THC = graph.linear(&normed_TD, &self.q)?;
        let mut k_TGC = graph.linear(&normed_TD, &self.k)?;
        let v_TGC = graph.linear(&normed_TD, &self.v)?;
        drop(normed_TD);
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            q_THC = q_norm.forward(graph, &q_THC)?;
            k_TGC = k_norm.forward(graph, &k_TGC)?;
        }
        let q_THC = graph.rope(q_THC)?;
        let k_TGC = graph.rope(k_TGC)?;
        let heads_THC = graph.attention(&self.attention, q_THC, Some([k_TGC, v_TGC]))?;
        let x_TD = graph.add_linear(x_TD, &heads_THC, &self.o)?;
        drop(heads_THC);
        let normed_TD = self.post_attention_norm.forward(graph, &x_TD)?;
        let gate_TF = graph.linear(&normed_TD, &self.gate)?;
        let up_TF = graph.linear(&normed_TD, &self.up)?;
        drop(normed_TD);
        let inner_TF = graph.activate_gated(Activation::Silu, gate_TF, up_TF)?;
        graph.add_linear(x_TD, &inner_TF, &self.down)
    }
}
