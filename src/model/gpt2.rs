//! GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019). Written
//! once, over [`Graph`].
//!
//! Its files hold linear weights as (inputs x outputs), and queries, keys and values in one weight;
//! in memory they are as those of other decoders. Dropout, which its config names, is not applied.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::config::ModelConfig;
use super::graph::Graph;
use super::parameters::{Checked, List, Parameter, Role};
use super::projection::Projection;
use super::weights::Tensors;

const PREFIX: &str = "transformer.";
const EMBEDDING: &str = "transformer.wte.weight";
const POSITIONS: &str = "transformer.wpe.weight";
const FINAL_NORM: &str = "transformer.ln_f";
const HEAD: &str = "lm_head.weight";

/// The module that holds queries, keys and values in the files, and its parts in memory.
const FUSED: &str = ".attn.c_attn.";
const PARTS: [&str; 3] = [".attn.q.", ".attn.k.", ".attn.v."];

/// Modules whose weights are stored as (inputs x outputs).
const TURNED: [&str; 3] = [
    ".attn.c_proj.weight",
    ".mlp.c_fc.weight",
    ".mlp.c_proj.weight",
];

/// A decoder's weights.
pub struct Gpt2 {
    embedding: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    head: Tensor,
    epsilon: f64,
}

struct Layer {
    ln_1: Norm,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    ln_2: Norm,
    fc: Projection,
    proj: Projection,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(name: &str, weights: &Checked) -> Result<Self> {
        Ok(Self {
            weight: weights.get(&format!("{name}.weight"))?,
            bias: weights.get(&format!("{name}.bias"))?,
        })
    }

    fn forward<G: Graph>(&self, graph: &mut G, x: &G::Value, epsilon: f64) -> Result<G::Value> {
        graph.layer_norm(x, &self.weight, &self.bias, epsilon)
    }
}

/// Names and shapes of the weights in memory, in the order of the forward pass.
pub fn parameters(config: &ModelConfig) -> Vec<Parameter> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let mut list = List::default();
    let norm = |list: &mut List, name: &str| {
        list.add(format!("{name}.weight"), &[hidden], Role::Norm);
        list.add(format!("{name}.bias"), &[hidden], Role::Bias);
    };
    list.add(EMBEDDING, &[config.vocab_size, hidden], Role::Table);
    let context = config.max_position_embeddings;
    list.add(POSITIONS, &[context, hidden], Role::Table);
    for layer in 0..config.num_hidden_layers {
        let name = |module: &str| module_name(layer, module);
        norm(&mut list, &name("ln_1"));
        for part in ["attn.q", "attn.k", "attn.v", "attn.c_proj"] {
            list.projection(&name(part), [hidden, hidden], true);
        }
        norm(&mut list, &name("ln_2"));
        list.projection(&name("mlp.c_fc"), [inner, hidden], true);
        list.projection(&name("mlp.c_proj"), [hidden, inner], true);
    }
    norm(&mut list, FINAL_NORM);
    if !config.tie_word_embeddings {
        list.add(HEAD, &[config.vocab_size, hidden], Role::Table);
    }
    list.into_inner()
}

fn module_name(layer: usize, module: &str) -> String {
    format!("{PREFIX}h.{layer}.{module}")
}

/// Weights as files hold them, as they are in memory.
///
/// # Errors
/// Where a weight cannot be cut into three.
pub fn import(stored: Tensors) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for (name, tensor) in stored {
        // The files of OpenAI's own models lack the prefix.
        let name = match name.starts_with(PREFIX) || name == HEAD {
            true => name,
            false => format!("{PREFIX}{name}"),
        };
        if let Some((layer, kind)) = name.split_once(FUSED) {
            let all = turned(&tensor)?;
            let parts = all.chunk(PARTS.len(), 0)?;
            for (part, tensor) in PARTS.iter().zip(parts) {
                tensors.insert(format!("{layer}{part}{kind}"), tensor.copy()?);
            }
        } else if TURNED.iter().any(|end| name.ends_with(end)) {
            tensors.insert(name, turned(&tensor)?);
        } else {
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}

/// Weights in memory as files hold them.
///
/// # Errors
/// Where a part of a fused weight is missing.
pub fn export(tensors: &Tensors) -> Result<Tensors> {
    let mut stored = Tensors::new();
    for (name, tensor) in tensors {
        if let Some((layer, kind)) = name.split_once(PARTS[0]) {
            let part = |part: &&str| tensors.get(&format!("{layer}{part}{kind}"));
            let parts: Option<Vec<&Tensor>> = PARTS.iter().map(part).collect();
            let parts = parts.with_context(|| format!("{layer} lacks keys or values"))?;
            let all = Tensor::cat(&parts, 0)?;
            stored.insert(format!("{layer}{FUSED}{kind}"), turned(&all)?);
        } else if TURNED.iter().any(|end| name.ends_with(end)) {
            stored.insert(name.clone(), turned(tensor)?);
        } else if !PARTS.iter().any(|part| name.contains(part)) {
            stored.insert(name.clone(), tensor.clone());
        }
    }
    Ok(stored)
}

/// The transpose of a weight; a bias as it is.
fn turned(tensor: &Tensor) -> Result<Tensor> {
    Ok(match tensor.rank() {
        2 => tensor.t()?.contiguous()?,
        _ => tensor.clone(),
    })
}

impl Gpt2 {
    /// # Errors
    /// Where `weights` lack one.
    pub(super) fn new(config: &ModelConfig, weights: &Checked) -> Result<Self> {
        let layers = (0..config.num_hidden_layers)
            .map(|layer| Layer::new(layer, weights))
            .collect::<Result<_>>()?;
        let tied = config.tie_word_embeddings;
        Ok(Self {
            embedding: weights.get(EMBEDDING)?,
            positions: weights.get(POSITIONS)?,
            layers,
            norm: Norm::new(FINAL_NORM, weights)?,
            head: weights.get(if tied { EMBEDDING } else { HEAD })?,
            epsilon: config.norm_eps,
        })
    }

    /// The LM head's weight (V x D).
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// As [`Llama::hidden`](super::llama::Llama::hidden).
    ///
    /// # Errors
    /// Where an id is past the vocabulary, or the graph fails.
    pub fn hidden<G: Graph>(
        &self,
        graph: &mut G,
        input_ids: &[u32],
        positions: &[u32],
    ) -> Result<G::Value> {
        let tokens = graph.embed(&self.embedding, input_ids)?;
        let mut x = graph.add_positions(tokens, &self.positions)?;
        for (index, layer) in self.layers.iter().enumerate() {
            graph.keep(&x);
            x = layer.forward(graph, index, x, self.epsilon)?;
        }
        let rows = graph.rows(x, positions)?;
        self.norm.forward(graph, &rows, self.epsilon)
    }
}

impl Layer {
    fn new(layer: usize, weights: &Checked) -> Result<Self> {
        let norm = |module: &str| Norm::new(&module_name(layer, module), weights);
        let projection = |module: &str| weights.projection(&module_name(layer, module), true);
        Ok(Self {
            ln_1: norm("ln_1")?,
            q: projection("attn.q")?,
            k: projection("attn.k")?,
            v: projection("attn.v")?,
            o: projection("attn.c_proj")?,
            ln_2: norm("ln_2")?,
            fc: projection("mlp.c_fc")?,
            proj: projection("mlp.c_proj")?,
        })
    }

    fn forward<G: Graph>(
        &self,
        graph: &mut G,
        index: usize,
        x: G::Value,
        epsilon: f64,
    ) -> Result<G::Value> {
        let normed = self.ln_1.forward(graph, &x, epsilon)?;
        let q = graph.linear(&normed, &self.q)?;
        let k = graph.linear(&normed, &self.k)?;
        let v = graph.linear(&normed, &self.v)?;
        drop(normed);
        let heads = graph.attention(index, [q, k, v], None)?;
        let x = graph.add_linear(x, &heads, &self.o)?;
        drop(heads);
        let normed = self.ln_2.forward(graph, &x, epsilon)?;
        let inner = graph.linear(&normed, &self.fc)?;
        drop(normed);
        let inner = graph.gelu(inner)?;
        graph.add_linear(x, &inner, &self.proj)
    }
}
