//! One decoder of several architectures.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::config::{Architecture, ModelConfig};
use super::gpt2::{self, Gpt2};
use super::graph::Graph;
use super::llama::{self, Llama};
use super::parameters::{Checked, Parameter};
use super::weights::{self, Tensors};

/// A decoder's weights, in the order of its architecture.
pub enum Decoder {
    Llama(Llama),
    Gpt2(Gpt2),
}

impl Decoder {
    /// A decoder over the given tensors; trainable where these are variables.
    ///
    /// # Errors
    /// Names the first tensor that is missing or has another shape than `config` says.
    pub fn new(config: &ModelConfig, tensors: &Tensors) -> Result<Self> {
        let weights = Checked::new(config, tensors)?;
        Ok(match &config.architecture {
            Architecture::Llama(variant) => Self::Llama(Llama::new(config, variant, &weights)?),
            Architecture::Gpt2 => Self::Gpt2(Gpt2::new(config, &weights)?),
        })
    }

    /// The LM head's weight (V x D); logits are hidden states times its transpose.
    pub fn head(&self) -> &Tensor {
        match self {
            Self::Llama(llama) => llama.head(),
            Self::Gpt2(gpt2) => gpt2.head(),
        }
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
        match self {
            Self::Llama(llama) => llama.hidden(graph, input_ids, positions),
            Self::Gpt2(gpt2) => gpt2.hidden(graph, input_ids, positions),
        }
    }
}

impl ModelConfig {
    /// Names and shapes of the weights in memory, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        match &self.architecture {
            Architecture::Llama(variant) => llama::parameters(self, variant),
            Architecture::Gpt2 => gpt2::parameters(self),
        }
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
