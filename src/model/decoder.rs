//! A decoder: embedding, layers, final norm and LM head. What a layer does is its architecture's.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::config::{Architecture, ModelConfig};
use super::graph::Graph;
use super::norm::Norm;
use super::parameters::{Checked, List, Parameter, Role};
use super::weights::{self, Tensors};
use super::{gpt2, llama};

/// A decoder's weights.
pub struct Decoder {
    embedding: Tensor,
    /// (positions x D), where positions are learned.
    positions: Option<Tensor>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Tensor,
}

enum Layer {
    Llama(llama::Layer),
    Gpt2(gpt2::Layer),
}

/// What an architecture calls the weights that are of no layer.
pub(super) struct Names {
    pub embedding: &'static str,
    /// Where positions are learned.
    pub positions: Option<&'static str>,
    /// The norm after the last layer, and whether it has a bias.
    pub norm: (&'static str, bool),
}

/// The LM head, where it is not the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

impl Decoder {
    /// A decoder over the given tensors; trainable where these are variables.
    ///
    /// # Errors
    /// Names the first tensor that is missing or has another shape than `config` says.
    pub fn new(config: &ModelConfig, tensors: &Tensors) -> Result<Self> {
        let weights = Checked::new(config, tensors)?;
        let layer = |index| {
            Ok(match &config.architecture {
                Architecture::Llama(variant) => {
                    Layer::Llama(llama::Layer::new(index, variant, &weights)?)
                }
                Architecture::Gpt2 => Layer::Gpt2(gpt2::Layer::new(index, &weights)?),
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
            head: weights.get(if tied { names.embedding } else { HEAD })?,
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
            graph.keep(&x);
            x = match layer {
                Layer::Llama(layer) => layer.forward(graph, index, x)?,
                Layer::Gpt2(layer) => layer.forward(graph, index, x)?,
            };
        }
        let rows = graph.rows(x, positions)?;
        self.norm.forward(graph, &rows)
    }
}

impl ModelConfig {
    fn names(&self) -> &'static Names {
        match self.architecture {
            Architecture::Llama(_) => &llama::NAMES,
            Architecture::Gpt2 => &gpt2::NAMES,
        }
    }

    /// Names and shapes of the weights in memory, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (names, table) = (self.names(), [self.vocab_size, self.hidden_size]);
        let mut list = List::default();
        list.add(names.embedding, &table, Role::Table);
        if let Some(name) = names.positions {
            let shape = [self.max_position_embeddings, self.hidden_size];
            list.add(name, &shape, Role::Table);
        }
        for layer in 0..self.num_hidden_layers {
            match &self.architecture {
                Architecture::Llama(variant) => llama::list(&mut list, layer, self, variant),
                Architecture::Gpt2 => gpt2::list(&mut list, layer, self),
            }
        }
        list.norm(names.norm.0, self.hidden_size, names.norm.1);
        if !self.tie_word_embeddings {
            list.add(HEAD, &table, Role::Table);
        }
        list.into_inner()
    }

    /// How many numbers the weights have, tied ones counted once.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(Parameter::count).sum()
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

/// Reads shape and weights of a Hugging Face folder.
///
/// # Errors
/// Where a file is missing or malformed.
pub fn load(dir: &Path) -> Result<(ModelConfig, Tensors)> {
    let config = ModelConfig::load(dir)?;
    let tensors = config
        .import(weights::load(dir)?)
        .with_context(|| format!("cannot load {}", dir.display()))?;
    Ok((config, tensors))
}
