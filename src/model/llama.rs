//! The llama decoder (Touvron et al., arXiv 2302.13971): SmolLM2, Llama 3, TinyLlama.
//!
//! Written once, for training and for generation: the two differ in where the keys and values come
//! from, so attention is a function that the caller passes in.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::weights::Tensors;
use crate::ops::linear::linear;
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;

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

    /// Hidden states before the final norm (T x D) of the tokens `input_ids` (T).
    ///
    /// `attend(layer, q, k, v)` gets the projections before the rotary embedding, (T x H C) and
    /// twice (T x G C), and returns the heads' outputs (T x H C).
    ///
    /// # Errors
    /// Where an id is past the vocabulary, or `attend` fails.
    pub fn hidden(
        &self,
        input_ids: &[u32],
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let ids = Tensor::new(input_ids, self.embedding.device())?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.input_norm, self.epsilon)?;
            let q = linear(&normed, &layer.q)?;
            let k = linear(&normed, &layer.k)?;
            let v = linear(&normed, &layer.v)?;
            let heads = attend(index, &q, &k, &v)?;
            x = (x + linear(&heads, &layer.o)?)?;
            let normed = rms_norm(&x, &layer.post_attention_norm, self.epsilon)?;
            let inner = swiglu(&linear(&normed, &layer.gate)?, &linear(&normed, &layer.up)?)?;
            x = (x + linear(&inner, &layer.down)?)?;
        }
        Ok(x)
    }

    /// The final norm, for the rows (N x D) that meet the head.
    ///
    /// # Errors
    /// Where the shape is another.
    pub fn normed(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(hidden, &self.norm, self.epsilon)?)
    }
}
