//! A decoder: embedding, layers, final norm and LM head. What a layer does is its architecture's.

use crate::model::parameters::LM_HEAD;
use crate::model::parameters::WeightNames;
use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::graph::Graph;
use super::norm::Norm;
use super::parameters::{CheckedWeights, Parameter, ParameterList, ParameterRole};
use super::weights::{self, Tensors};
use super::{gpt2, llama};
use crate::exit::Exit;
use crate::model::config::shape::{Architecture, ModelConfig};

/// A decoder's weights.
pub struct Decoder {
    embedding: Tensor,
    /// (positions x D), where positions are learned.
    positions: Option<Tensor>,
    layers: Vec<DecoderLayer>,
    norm: Norm,
    head: Tensor,
}

enum DecoderLayer {
    Llama(llama::LlamaLayer),
    Gpt2(gpt2::Gpt2Layer),
}

/// File of an adapter beside the weights.
const ADAPTER: &str = "adapter_config.json";

impl Decoder {
    /// A decoder over the given tensors; trainable where these are variables.
    ///
    /// # Errors
    /// WeightNames the first tensor that is missing or has another shape than `config` says.
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
        if let Some(table) = &self.positions {
            x = graph.add_positions(x, table)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            graph.mark_checkpoint(&x);
            x = match layer {
                DecoderLayer::Llama(layer) => layer.forward(graph, index, x)?,
                DecoderLayer::Gpt2(layer) => layer.forward(graph, index, x)?,
            };
        }
        let rows = graph.select_rows(x, positions)?;
        self.norm.forward(graph, &rows)
    }
}

impl ModelConfig {
    fn names(&self) -> &'static WeightNames {
        match self.architecture {
            Architecture::Llama(_) => &llama::NAMES,
            Architecture::Gpt2 => &gpt2::NAMES,
        }
    }

    /// WeightNames and shapes of the weights in memory, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (names, table) = (self.names(), [self.vocab_size, self.hidden_size]);
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

    /// How many numbers the weights have, tied ones counted once.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(Parameter::count).sum()
    }

    /// WeightNames of the weights in files.
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

    /// Weights as files hold them, as they are in memory.
    ///
    /// # Errors
    /// Where they do not have the shapes of the architecture.
    pub fn import(&self, stored: Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) => Ok(stored),
            Architecture::Gpt2 => gpt2::import(stored),
        }
    }

    /// Weights in memory as files hold them.
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

/// Reads shape and weights of a Hugging Face folder. Tensors in the files that are not used are named in the log.
///
/// # Errors
/// Where a file is missing or malformed, weights have more layers than `config.json` says, or there is an adapter,
/// which would be left out.
pub fn load(dir: &Path) -> Result<(ModelConfig, Tensors)> {
    if dir.join(ADAPTER).exists() {
        bail!(Exit::Usage(format!(
            "{} holds an adapter ({ADAPTER}), which this version does not load: merge it into the weights first, with \
             peft's `merge_and_unload` and `save_pretrained`",
            dir.display()
        )));
    }
    let config = ModelConfig::load(dir)?;
    let load = || {
        let stored = config.stored_names();
        // Transformers finds weights with and without the prefix of a model that has a head.
        let name = |name: &str| {
            let with_prefix = format!("{}{name}", config.names().prefix);
            let names = [name.to_owned(), with_prefix];
            names.into_iter().find(|name| stored.contains(name))
        };
        let loaded = weights::load(dir, name)?;
        weights::check_layers(&loaded.unused, config.num_hidden_layers)?;
        if !loaded.unused.is_empty() {
            tracing::warn!(
                "tensors in {} that a {} model does not use: {}",
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
