//! A decoder: embedding, layers, final norm and LM head. The layers are those of its architecture.

// Tensor names carry their shape; see the legend in `model`.
#![allow(non_snake_case)]

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::graph::Graph;
use super::norm::Norm;
use super::parameters::{
    CheckedWeights, LM_HEAD, Parameter, ParameterList, ParameterRole, WeightNames,
};
use super::weights::{self, Tensors};
use super::{gpt2, llama};
use crate::exit::Exit;
use crate::model::config::shape::{Architecture, ModelConfig};

/// The weights of a decoder.
pub struct Decoder {
    embedding: Tensor,
    /// Learned positions (positions x D), in architectures that have them.
    positions: Option<Tensor>,
    layers: Vec<DecoderLayer>,
    norm: Norm,
    head: Tensor,
}

enum DecoderLayer {
    Llama(llama::LlamaLayer),
    Gpt2(gpt2::Gpt2Layer),
}

/// The file that marks a folder as an adapter without base weights.
const ADAPTER: &str = "adapter_config.json";

impl Decoder {
    /// Builds a decoder from `tensors`. Tensors that are variables are trainable.
    ///
    /// # Errors
    /// Names the first tensor that is missing or whose shape does not match `config`.
    pub fn new(config: &ModelConfig, tensors: &Tensors) -> Result<Self> {
        let weights = CheckedWeights::new(config, tensors)?;
        let layer = |index| {
            Ok(match &config.architecture {
                Architecture::Llama(variant) => {
                    DecoderLayer::Llama(llama::LlamaLayer::new(index, variant, &weights)?)
                }
                Architecture::Gpt2 => DecoderLayer::Gpt2(gpt2::Gpt2Layer::new(index, &weights)?),
            })
        };
        let names = config.names();
        let tied = config.tie_word_embeddings;
        Ok(Self {
            embedding: weights.get(names.embedding)?,
            positions: names.positions.map(|name| weights.get(name)).transpose()?,
            layers: (0..config.num_hidden_layers)
                .map(layer)
                .collect::<Result<_>>()?,
            norm: weights.norm(names.norm.0, names.norm.1)?,
            head: weights.get(if tied { names.embedding } else { LM_HEAD })?,
        })
    }

    /// Returns the weight of the LM head (V x D). Logits are hidden states times its transpose.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Computes hidden states (N x D), ready for the LM head, of the rows `positions` (N) of the tokens
    /// `input_ids` (T).
    ///
    /// # Errors
    /// Where an id is outside the vocabulary, or the graph fails.
    pub fn hidden<G: Graph>(
        &self,
        graph: &mut G,
        input_ids: &[u32],
        positions: &[u32],
    ) -> Result<G::Value> {
        let mut x_TD = graph.embed(&self.embedding, input_ids)?;
        if let Some(table) = &self.positions {
            x_TD = graph.add_positions(x_TD, table)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            graph.mark_checkpoint(&x_TD);
            x_TD = match layer {
                DecoderLayer::Llama(layer) => layer.forward(graph, index, x_TD)?,
                DecoderLayer::Gpt2(layer) => layer.forward(graph, index, x_TD)?,
            };
        }
        let x_ND = graph.select_rows(x_TD, positions)?;
        self.norm.forward(graph, &x_ND)
    }
}

impl ModelConfig {
    fn names(&self) -> &'static WeightNames {
        match self.architecture {
            Architecture::Llama(_) => &llama::NAMES,
            Architecture::Gpt2 => &gpt2::NAMES,
        }
    }

    /// Returns names and shapes of the weights in memory, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        let names = self.names();
        let table = [self.vocab_size, self.hidden_size];
        let mut list = ParameterList::default();
        list.add(names.embedding, &table, ParameterRole::Table);
        if let Some(name) = names.positions {
            let shape = [self.max_position_embeddings, self.hidden_size];
            list.add(name, &shape, ParameterRole::Table);
        }
        for layer in 0..self.num_hidden_layers {
            match &self.architecture {
                Architecture::Llama(variant) => {
                    llama::add_layer_parameters(&mut list, layer, self, variant)
                }
                Architecture::Gpt2 => gpt2::add_layer_parameters(&mut list, layer, self),
            }
        }
        list.norm(names.norm.0, self.hidden_size, names.norm.1);
        if !self.tie_word_embeddings {
            list.add(LM_HEAD, &table, ParameterRole::Table);
        }
        list.into_inner()
    }

    /// Number of weights; tied weights count once.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(Parameter::count).sum()
    }

    /// Returns the names of the weights in the files.
    fn stored_names(&self) -> BTreeSet<String> {
        let names = self
            .parameters()
            .into_iter()
            .map(|parameter| parameter.name);
        match self.architecture {
            Architecture::Llama(_) => names.collect(),
            Architecture::Gpt2 => names.map(gpt2::stored_name).collect(),
        }
    }

    /// Converts weights from the layout of the files to that in memory.
    ///
    /// # Errors
    /// Where shapes do not match the architecture.
    pub fn import(&self, stored: Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) => Ok(stored),
            Architecture::Gpt2 => gpt2::import(stored),
        }
    }

    /// Converts weights from the layout in memory to that of the files.
    ///
    /// # Errors
    /// As [`ModelConfig::import`].
    pub fn export(&self, tensors: &Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) => Ok(tensors.clone()),
            Architecture::Gpt2 => gpt2::export(tensors),
        }
    }
}

/// Reads the shape and the weights of a Hugging Face folder. Logs the names of unused tensors.
///
/// # Errors
/// Where a file is missing or malformed, the weights have more layers than `config.json` says, or the
/// folder holds an adapter.
pub fn load(dir: &Path) -> Result<(ModelConfig, Tensors)> {
    if dir.join(ADAPTER).exists() {
        bail!(Exit::Usage(format!(
            "{} holds an adapter ({ADAPTER}), which cannot be loaded: merge it into the weights with peft's \
             `merge_and_unload` and `save_pretrained`",
            dir.display()
        )));
    }
    let config = ModelConfig::load(dir)?;
    let load = || {
        let stored = config.stored_names();
        // transformers accepts weight names with and without the prefix.
        let name = |name: &str| {
            let with_prefix = format!("{}{name}", config.names().prefix);
            let names = [name.to_owned(), with_prefix];
            names.into_iter().find(|name| stored.contains(name))
        };
        let loaded = weights::load(dir, name)?;
        weights::check_layers(&loaded.unused, config.num_hidden_layers)?;
        if !loaded.unused.is_empty() {
            tracing::warn!(
                "unused tensors in {} (a {} model does not have them): {}",
                dir.display(),
                config.model_type(),
                weights::name_patterns(&loaded.unused).join(", ")
            );
        }
        config.import(loaded.tensors)
    };
    let tensors = load().with_context(|| format!("cannot load {}", dir.display()))?;
    Ok((config, tensors))
}
