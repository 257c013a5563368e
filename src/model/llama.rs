//! The llama decoder (Touvron et al., arXiv 2302.13971): SmolLM2, Llama 3, TinyLlama.
//!
//! Written once, over [`Graph`]: for training and generation, on every device.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::graph::Graph;
use super::weights::Tensors;

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A decoder's weights. Linear weights are (outputs x inputs).
pub struct Llama {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    epsilon: f64,
}

struct Layer {
    input_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    post_attention_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Names and shapes of the parameters, in the order of the forward pass.
pub fn parameters(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (wide, narrow) = (config.heads.query_width(), config.heads.key_value_width());
    let mut list = vec![(EMBEDDING.to_string(), vec![config.vocab_size, hidden])];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[usize]| {
            list.push((layer_name(layer, name), shape.to_vec()));
        };
        add("input_layernorm", &[hidden]);
        add("self_attn.q_proj", &[wide, hidden]);
        add("self_attn.k_proj", &[narrow, hidden]);
        add("self_attn.v_proj", &[narrow, hidden]);
        add("self_attn.o_proj", &[hidden, wide]);
        add("post_attention_layernorm", &[hidden]);
        add("mlp.gate_proj", &[inner, hidden]);
        add("mlp.up_proj", &[inner, hidden]);
        add("mlp.down_proj", &[hidden, inner]);
    }
    list.push((FINAL_NORM.to_string(), vec![hidden]));
    if !config.tie_word_embeddings {
        list.push((HEAD.to_string(), vec![config.vocab_size, hidden]));
    }
    list
}

fn layer_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

/// Fresh weights: normal with deviation `initializer_range`, norms at one.
///
/// # Errors
/// Where a tensor cannot be allocated.
pub fn random_weights(config: &ModelConfig, seed: u64) -> Result<Tensors> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tensors = Tensors::new();
    for (name, shape) in parameters(config) {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = if shape.len() == 1 {
            vec![1.0; count]
        } else {
            let normal = |_| normal(&mut random) * config.initializer_range;
            (0..count).map(normal).map(|v| v as f32).collect()
        };
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    Ok(tensors)
}

/// A standard normal number (Box and Muller).
fn normal(random: &mut fastrand::Rng) -> f64 {
    let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * random.f64()).cos()
}

impl Llama {
    /// Builds the decoder over the given tensors; trainable where these are variables.
    ///
    /// # Errors
    /// Names the first tensor that is missing or has another shape than `config` says.
    pub fn new(config: &ModelConfig, tensors: &Tensors) -> Result<Self> {
        for (name, shape) in parameters(config) {
            let Some(tensor) = tensors.get(&name) else {
                bail!("the weights lack {name}, which config.json asks for");
            };
            if tensor.dims() != shape {
                bail!(
                    "tensor {name} is {:?}, and config.json makes it {shape:?}",
                    tensor.dims()
                );
            }
        }
        let get = |name: &str| -> Result<Tensor> {
            tensors
                .get(name)
                .cloned()
                .context("a checked tensor is there")
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let get = |name: &str| get(&layer_name(layer, name));
                Ok(Layer {
                    input_norm: get("input_layernorm")?,
                    q: get("self_attn.q_proj")?,
                    k: get("self_attn.k_proj")?,
                    v: get("self_attn.v_proj")?,
                    o: get("self_attn.o_proj")?,
                    post_attention_norm: get("post_attention_layernorm")?,
                    gate: get("mlp.gate_proj")?,
                    up: get("mlp.up_proj")?,
                    down: get("mlp.down_proj")?,
                })
            })
            .collect::<Result<_>>()?;
        let tied = config.tie_word_embeddings;
        Ok(Self {
            embedding: get(EMBEDDING)?,
            layers,
            norm: get(FINAL_NORM)?,
            head: get(if tied { EMBEDDING } else { HEAD })?,
            epsilon: config.rms_norm_eps,
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
    fn forward<G: Graph>(
        &self,
        graph: &mut G,
        index: usize,
        x: G::Value,
        epsilon: f64,
    ) -> Result<G::Value> {
        let normed = graph.rms_norm(&x, &self.input_norm, epsilon)?;
        let q = graph.linear(&normed, &self.q, None)?;
        let k = graph.linear(&normed, &self.k, None)?;
        let v = graph.linear(&normed, &self.v, None)?;
        drop(normed);
        let (q, k) = (graph.rope(q)?, graph.rope(k)?);
        let heads = graph.attention(index, q, k, v)?;
        let x = graph.add_linear(x, &heads, &self.o, None)?;
        drop(heads);
        let normed = graph.rms_norm(&x, &self.post_attention_norm, epsilon)?;
        let gate = graph.linear(&normed, &self.gate, None)?;
        let up = graph.linear(&normed, &self.up, None)?;
        drop(normed);
        let inner = graph.swiglu(gate, up)?;
        graph.add_linear(x, &inner, &self.down, None)
    }
}
