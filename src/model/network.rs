//! A model without its backend: the weights of any architecture, the list of its parameters, and loading from a Hugging
//! Face folder.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::decoder::{Decoder, DecoderKind};
use super::graph::Graph;
use super::input::ModelInput;
use super::parameters::{
    CheckedWeights, LM_HEAD, ParameterList, ParameterRole, ParameterSpec, WeightNames,
};
use super::t5::T5;
use super::weights::{self, LoadedTensors, Tensors};
use super::{gpt2, t5};
use crate::exit::Exit;
use crate::model::config::shape::{Architecture, ModelConfig};

/// The weights of a model.
pub(crate) enum Network {
    Decoder(Decoder),
    T5(T5),
}

/// The file that marks a PEFT folder, which holds an adapter without the weights of its base model.
const ADAPTER_CONFIG: &str = "adapter_config.json";

impl Network {
    /// Builds a network from `tensors`. Tensors that are variables are trainable.
    ///
    /// # Errors
    /// Where a tensor is missing or its shape does not match `config`; the error names the first such tensor. Where a
    /// LoRA adapter has only one of its two weights.
    pub(crate) fn new(config: &ModelConfig, tensors: &Tensors) -> Result<Self> {
        let weights = CheckedWeights::new(config, tensors)?;
        Ok(match &config.architecture {
            Architecture::Llama(variant) => {
                Self::Decoder(Decoder::new(config, DecoderKind::Llama(variant), &weights)?)
            }
            Architecture::Gpt2 => Self::Decoder(Decoder::new(config, DecoderKind::Gpt2, &weights)?),
            Architecture::T5(variant) => Self::T5(T5::new(config, variant, &weights)?),
        })
    }

    /// Returns the weight of the LM head (V x D). Logits are hidden states times its transpose.
    pub(crate) fn head(&self) -> &Tensor {
        match self {
            Self::Decoder(decoder) => decoder.head(),
            Self::T5(t5) => t5.head(),
        }
    }

    /// Runs the network over `input`, up to and including the final norm. Returns the hidden states (N x D) at
    /// `positions_N`.
    ///
    /// # Errors
    /// Where an id is outside the vocabulary, or the graph fails.
    pub(crate) fn hidden<G: Graph>(&self, graph: &mut G, input: ModelInput) -> Result<G::Value> {
        match self {
            Self::Decoder(decoder) => decoder.hidden(graph, input.input_ids_T, input.positions_N),
            Self::T5(t5) => t5.hidden(graph, input),
        }
    }
}

/// A stack of layers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerStack {
    /// Begin of the names of its weights, before the index of the layer.
    pub prefix: &'static str,
    /// Number of layers.
    pub layers: usize,
    /// Field of `config.json` with the number of layers.
    pub field: &'static str,
}

impl ModelConfig {
    fn names(&self) -> &'static WeightNames {
        match &self.architecture {
            Architecture::Llama(variant) => DecoderKind::Llama(variant).names(),
            Architecture::Gpt2 => DecoderKind::Gpt2.names(),
            Architecture::T5(_) => &t5::NAMES,
        }
    }

    /// Returns the stacks of layers: the decoder's, after the encoder's if there is one.
    pub(crate) fn layer_stacks(&self) -> Vec<LayerStack> {
        let decoder = |prefix, field| LayerStack {
            prefix,
            layers: self.num_hidden_layers,
            field,
        };
        match &self.architecture {
            Architecture::Llama(_) => vec![decoder("model.layers.", "num_hidden_layers")],
            Architecture::Gpt2 => vec![decoder("transformer.h.", "n_layer")],
            Architecture::T5(variant) => vec![
                LayerStack {
                    prefix: t5::ENCODER_BLOCKS,
                    layers: variant.encoder_layers,
                    field: "num_layers",
                },
                decoder(t5::DECODER_BLOCKS, "num_decoder_layers"),
            ],
        }
    }

    /// Returns names, shapes and roles of the weights in memory, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let mut list = ParameterList::default();
        match &self.architecture {
            Architecture::Llama(variant) => {
                DecoderKind::Llama(variant).add_parameters(&mut list, self)
            }
            Architecture::Gpt2 => DecoderKind::Gpt2.add_parameters(&mut list, self),
            Architecture::T5(variant) => t5::add_parameters(&mut list, self, variant),
        }
        if !self.tie_word_embeddings {
            let shape = [self.vocab_size, self.hidden_size];
            list.add(LM_HEAD, &shape, ParameterRole::Table);
        }
        list.into_inner()
    }

    /// Returns the standard deviation of the initial values of the table or projection `name`.
    pub(super) fn initial_deviation(&self, name: &str) -> f64 {
        match &self.architecture {
            Architecture::Llama(_) | Architecture::Gpt2 => self.initializer_range,
            Architecture::T5(variant) => t5::initial_deviation(self, variant, name),
        }
    }

    /// Returns the number of elements of all weights. A tied LM head is not counted again.
    pub(crate) fn parameter_count(&self) -> usize {
        self.parameters()
            .iter()
            .map(ParameterSpec::element_count)
            .sum()
    }

    /// Returns the names that the weights may have in the files.
    fn stored_names(&self) -> BTreeSet<String> {
        let names = self
            .parameters()
            .into_iter()
            .map(|parameter| parameter.name);
        match self.architecture {
            Architecture::Llama(_) => names.collect(),
            Architecture::T5(_) => names.chain(t5::TABLES.map(String::from)).collect(),
            Architecture::Gpt2 => names.map(gpt2::stored_name).collect(),
        }
    }

    /// Converts weights from the layout of the files to the layout in memory. Shapes are not checked
    /// here, but when a model is built.
    ///
    /// # Errors
    /// Where a tensor cannot be split or copied.
    pub fn to_memory_layout(&self, stored: Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) | Architecture::T5(_) => Ok(stored),
            Architecture::Gpt2 => gpt2::to_memory_layout(stored),
        }
    }

    /// Converts weights from the layout in memory to the layout of the files.
    ///
    /// # Errors
    /// Where one of several weights that the files store as one tensor is missing, such as queries, keys and values.
    pub fn to_file_layout(&self, tensors: &Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) | Architecture::T5(_) => Ok(tensors.clone()),
            Architecture::Gpt2 => gpt2::to_file_layout(tensors),
        }
    }
}

/// Reads the shape and the weights of a Hugging Face folder. Logs the names of unused tensors.
///
/// # Errors
/// Where a file is missing or malformed, the weights have more layers than `config.json`, two tensors have the same
/// name, or the folder contains an adapter.
pub fn load(dir: &Path) -> Result<(ModelConfig, Tensors)> {
    if dir.join(ADAPTER_CONFIG).exists() {
        bail!(Exit::Usage(format!(
            "{} holds an adapter ({ADAPTER_CONFIG}), which cannot be loaded: merge it into the weights with \
             peft's `merge_and_unload` and `save_pretrained`",
            dir.display()
        )));
    }
    if !dir.join("config.json").exists() {
        bail!(Exit::Usage(format!(
            "{} has no config.json: give the path of a Hugging Face model folder",
            dir.display()
        )));
    }
    let mut config = ModelConfig::load(dir)?;
    let mut load_tensors = || {
        let stored_names = config.stored_names();
        // transformers accepts weight names with and without the prefix.
        let full_name = |name: &str| {
            let with_prefix = format!("{}{name}", config.names().prefix);
            let candidates = [name.to_owned(), with_prefix];
            candidates
                .into_iter()
                .find(|name| stored_names.contains(name))
        };
        let LoadedTensors {
            mut tensors,
            unused,
        } = weights::load(dir, full_name)?;
        for stack in config.layer_stacks() {
            weights::check_layers(&unused, stack.prefix, stack.layers, stack.field)?;
        }
        if !unused.is_empty() {
            tracing::warn!(
                "unused tensors in {} (a {} model with this config.json does not have them): {}",
                dir.display(),
                config.model_type(),
                weights::name_patterns(&unused).join(", ")
            );
        }
        if config.is_encoder_decoder() {
            t5::resolve_tables(&mut config, &mut tensors)?;
        }
        config.to_memory_layout(tensors)
    };
    let tensors = load_tensors().with_context(|| format!("cannot load {}", dir.display()))?;
    Ok((config, tensors))
}
