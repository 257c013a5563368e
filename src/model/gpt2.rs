//! GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), written once
//! over [`Graph`].
//!
//! The files store linear weights as (inputs x outputs), and the projections of queries, keys and values
//! as one fused weight. In memory, linear weights are (outputs x inputs) and the three projections are
//! separate, as in the other architectures. Dropout is not applied, even if `config.json` sets it.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::graph::{AttentionKind, AttentionLayer, Graph};
use super::norm::Norm;
use super::parameters::{CheckedWeights, ParameterList};
use super::projection::Projection;
use super::weights::Tensors;
use crate::model::config::shape::ModelConfig;
use crate::model::parameters::WeightNames;
use crate::ops::activation::Activation;

const PREFIX: &str = "transformer.";

pub(super) const NAMES: WeightNames = WeightNames {
    prefix: PREFIX,
    embedding: "transformer.wte.weight",
    position_embedding: Some("transformer.wpe.weight"),
    final_norm: "transformer.ln_f",
    final_norm_has_bias: true,
};

/// The module in the files that projects to queries, keys and values.
const FUSED_QKV: &str = ".attn.c_attn.";
/// The modules in memory that project to queries, keys and values.
const QKV_PARTS: [&str; 3] = [".attn.q.", ".attn.k.", ".attn.v."];

/// Endings of the weights that the files store as (inputs x outputs), in addition to the fused weight.
const TRANSPOSED: [&str; 3] = [
    ".attn.c_proj.weight",
    ".mlp.c_fc.weight",
    ".mlp.c_proj.weight",
];

/// The weights of a layer.
pub(crate) struct Gpt2Layer {
    attention: AttentionLayer,
    ln_1: Norm,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    ln_2: Norm,
    fc: Projection,
    proj: Projection,
}

/// Adds the weights that a layer has in memory, in the order of the forward pass.
pub(super) fn add_layer_parameters(list: &mut ParameterList, layer: usize, config: &ModelConfig) {
    let hidden = config.hidden_size;
    let inner = config.intermediate_size;
    let name = |module: &str| module_name(layer, module);
    list.add_norm(&name("ln_1"), hidden, true);
    for module in ["attn.q", "attn.k", "attn.v", "attn.c_proj"] {
        list.add_projection(&name(module), [hidden, hidden], true);
    }
    list.add_norm(&name("ln_2"), hidden, true);
    list.add_projection(&name("mlp.c_fc"), [inner, hidden], true);
    list.add_projection(&name("mlp.c_proj"), [hidden, inner], true);
}

fn module_name(layer: usize, module: &str) -> String {
    format!("{PREFIX}h.{layer}.{module}")
}

/// Converts the name of a weight in memory to its name in the files.
pub(super) fn stored_name(name: String) -> String {
    let part = QKV_PARTS.iter().find(|part| name.contains(*part));
    part.map_or(name.clone(), |part| name.replace(part, FUSED_QKV))
}

/// Converts weights from the layout of the files to the layout in memory. Shapes are not checked here,
/// but when a model is built.
///
/// # Errors
/// Where a tensor cannot be split or copied.
pub(crate) fn to_memory_layout(stored: Tensors) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for (name, tensor) in stored {
        if let Some((layer, kind)) = name.split_once(FUSED_QKV) {
            let fused = transposed(&tensor)?;
            let parts = fused.chunk(QKV_PARTS.len(), 0)?;
            for (part, tensor) in QKV_PARTS.iter().zip(parts) {
                tensors.insert(format!("{layer}{part}{kind}"), tensor.copy()?);
            }
        } else if TRANSPOSED.iter().any(|end| name.ends_with(end)) {
            tensors.insert(name, transposed(&tensor)?);
        } else {
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}

/// Converts weights from the layout in memory to the layout of the files.
///
/// # Errors
/// Where a part of a fused weight is missing.
pub(crate) fn to_file_layout(tensors: &Tensors) -> Result<Tensors> {
    let mut stored = Tensors::new();
    for (name, tensor) in tensors {
        if let Some((layer, kind)) = name.split_once(QKV_PARTS[0]) {
            let part = |part: &&str| tensors.get(&format!("{layer}{part}{kind}"));
            let parts: Option<Vec<&Tensor>> = QKV_PARTS.iter().map(part).collect();
            let parts =
                parts.with_context(|| format!("the keys or values of {layer} are missing"))?;
            let fused = Tensor::cat(&parts, 0)?;
            stored.insert(format!("{layer}{FUSED_QKV}{kind}"), transposed(&fused)?);
        } else if TRANSPOSED.iter().any(|end| name.ends_with(end)) {
            stored.insert(name.clone(), transposed(tensor)?);
        } else if !QKV_PARTS.iter().any(|part| name.contains(part)) {
            stored.insert(name.clone(), tensor.clone());
        }
    }
    Ok(stored)
}

/// Transposes a weight; returns a bias unchanged.
fn transposed(tensor: &Tensor) -> Result<Tensor> {
    Ok(match tensor.rank() {
        2 => tensor.t()?.contiguous()?,
        _ => tensor.clone(),
    })
}

impl Gpt2Layer {
    /// Builds the layer `index` from `weights`.
    ///
    /// # Errors
    /// Where a weight is missing.
    pub(super) fn new(index: usize, weights: &CheckedWeights) -> Result<Self> {
        let norm = |module: &str| weights.norm(&module_name(index, module), true);
        let projection = |module: &str| weights.projection(&module_name(index, module), true);
        Ok(Self {
            attention: AttentionLayer {
                index,
                kind: AttentionKind::Causal { window: None },
                bias: None,
            },
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

    /// Runs the layer.
    ///
    /// # Errors
    /// Where the graph fails.
    pub(crate) fn forward<G: Graph>(&self, graph: &mut G, x_TD: G::Value) -> Result<G::Value> {
        let normed_TD = self.ln_1.forward(graph, &x_TD)?;
        let q_THC = graph.linear(&normed_TD, &self.q)?;
        let k_THC = graph.linear(&normed_TD, &self.k)?;
        let v_THC = graph.linear(&normed_TD, &self.v)?;
        drop(normed_TD);
        let heads_THC = graph.attention(&self.attention, q_THC, Some([k_THC, v_THC]))?;
        let x_TD = graph.add_linear(x_TD, &heads_THC, &self.o)?;
        drop(heads_THC);
        let normed_TD = self.ln_2.forward(graph, &x_TD)?;
        let inner_TF = graph.linear(&normed_TD, &self.fc)?;
        drop(normed_TD);
        let inner_TF = graph.activate(Activation::Gelu, inner_TF)?;
        graph.add_linear(x_TD, &inner_TF, &self.proj)
    }
}
