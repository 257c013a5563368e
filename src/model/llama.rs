//! The llama decoder (Touvron et al., arXiv 2302.13971): SmolLM2, Llama 3, TinyLlama; and those that
//! differ from it in details: mistral (a sliding window; arXiv 2310.06825), qwen2 (biases; arXiv
//! 2407.10671), qwen3 (a norm of every head; arXiv 2505.09388).
//!
//! Written once, over [`Graph`]: for training and generation, on every device.

use anyhow::Result;
use candle_core::Tensor;

use super::config::{LlamaVariant, ModelConfig};
use super::graph::Graph;
use super::parameters::{Checked, List, Parameter, Role};
use super::projection::Projection;

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A decoder's weights.
pub struct Llama {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    epsilon: f64,
}

struct Layer {
    input_norm: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    /// Of every head of queries and of keys.
    head_norms: Option<[Tensor; 2]>,
    o: Projection,
    post_attention_norm: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    window: Option<usize>,
}

/// Names and shapes of the weights, in the order of the forward pass.
pub fn parameters(config: &ModelConfig, variant: &LlamaVariant) -> Vec<Parameter> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (wide, narrow) = (config.heads.query_width(), config.heads.key_value_width());
    let mut list = List::default();
    list.add(EMBEDDING, &[config.vocab_size, hidden], Role::Table);
    for layer in 0..config.num_hidden_layers {
        let name = |module: &str| module_name(layer, module);
        let norm = |module: &str| format!("{}.weight", name(module));
        list.add(norm("input_layernorm"), &[hidden], Role::Norm);
        let bias = variant.qkv_bias;
        list.projection(&name("self_attn.q_proj"), [wide, hidden], bias);
        list.projection(&name("self_attn.k_proj"), [narrow, hidden], bias);
        list.projection(&name("self_attn.v_proj"), [narrow, hidden], bias);
        if variant.head_norms {
            let channels = config.heads.channels;
            list.add(norm("self_attn.q_norm"), &[channels], Role::Norm);
            list.add(norm("self_attn.k_norm"), &[channels], Role::Norm);
        }
        let bias = variant.output_bias;
        list.projection(&name("self_attn.o_proj"), [hidden, wide], bias);
        list.add(norm("post_attention_layernorm"), &[hidden], Role::Norm);
        let bias = variant.mlp_bias;
        list.projection(&name("mlp.gate_proj"), [inner, hidden], bias);
        list.projection(&name("mlp.up_proj"), [inner, hidden], bias);
        list.projection(&name("mlp.down_proj"), [hidden, inner], bias);
    }
    list.add(FINAL_NORM, &[hidden], Role::Norm);
    if !config.tie_word_embeddings {
        list.add(HEAD, &[config.vocab_size, hidden], Role::Table);
    }
    list.into_inner()
}

fn module_name(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}")
}

impl Llama {
    /// # Errors
    /// Where `weights` lack one.
    pub(super) fn new(
        config: &ModelConfig,
        variant: &LlamaVariant,
        weights: &Checked,
    ) -> Result<Self> {
        let layers = (0..config.num_hidden_layers)
            .map(|layer| Layer::new(layer, variant, weights))
            .collect::<Result<_>>()?;
        let tied = config.tie_word_embeddings;
        Ok(Self {
            embedding: weights.get(EMBEDDING)?,
            layers,
            norm: weights.get(FINAL_NORM)?,
            head: weights.get(if tied { EMBEDDING } else { HEAD })?,
            epsilon: config.norm_eps,
        })
    }

    /// The LM head's weight (V x D); logits are hidden states times its transpose.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Hidden states (N x D), ready for the head, of the rows `positions` (N) of the tokens
    /// `input_ids` (T).
    ///
    /// # Errors
    /// Where an id is past the vocabulary, or the graph fails.
    pub fn hidden<G: Graph>(
        &self,
        graph: &mut G,
        input_ids: &[u32],
        positions: &[u32],
    ) -> Result<G::Value> {
        let mut x = graph.embed(&self.embedding, input_ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            graph.keep(&x);
            x = layer.forward(graph, index, x, self.epsilon)?;
        }
        let rows = graph.rows(x, positions)?;
        graph.rms_norm(&rows, &self.norm, self.epsilon)
    }
}

impl Layer {
    fn new(layer: usize, variant: &LlamaVariant, weights: &Checked) -> Result<Self> {
        let norm = |module: &str| weights.get(&format!("{}.weight", module_name(layer, module)));
        let projection = |module: &str, bias: bool| {
            let name = module_name(layer, module);
            weights.projection(&name, bias)
        };
        let head_norms = || -> Result<[Tensor; 2]> {
            Ok([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?])
        };
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            q: projection("self_attn.q_proj", variant.qkv_bias)?,
            k: projection("self_attn.k_proj", variant.qkv_bias)?,
            v: projection("self_attn.v_proj", variant.qkv_bias)?,
            head_norms: variant.head_norms.then(head_norms).transpose()?,
            o: projection("self_attn.o_proj", variant.output_bias)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate: projection("mlp.gate_proj", variant.mlp_bias)?,
            up: projection("mlp.up_proj", variant.mlp_bias)?,
            down: projection("mlp.down_proj", variant.mlp_bias)?,
            window: variant.windows[layer],
        })
    }

    fn forward<G: Graph>(
        &self,
        graph: &mut G,
        index: usize,
        x: G::Value,
        epsilon: f64,
    ) -> Result<G::Value> {
        let normed = graph.rms_norm(&x, &self.input_norm, epsilon)?;
        let mut q = graph.linear(&normed, &self.q)?;
        let mut k = graph.linear(&normed, &self.k)?;
        let v = graph.linear(&normed, &self.v)?;
        drop(normed);
        if let Some([q_norm, k_norm]) = &self.head_norms {
            q = graph.rms_norm(&q, q_norm, epsilon)?;
            k = graph.rms_norm(&k, k_norm, epsilon)?;
        }
        let (q, k) = (graph.rope(q)?, graph.rope(k)?);
        let heads = graph.attention(index, [q, k, v], self.window)?;
        let x = graph.add_linear(x, &heads, &self.o)?;
        drop(heads);
        let normed = graph.rms_norm(&x, &self.post_attention_norm, epsilon)?;
        let gate = graph.linear(&normed, &self.gate)?;
        let up = graph.linear(&normed, &self.up)?;
        drop(normed);
        let inner = graph.swiglu(gate, up)?;
        graph.add_linear(x, &inner, &self.down)
    }
}
