//! A decoder: embedding, the layers of its architecture, final norm and LM head. Lists its parameters, and
//! loads its weights from a Hugging Face folder.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::graph::Graph;
use super::norm::Norm;
use super::parameters::{
    CheckedWeights, LM_HEAD, ParameterList, ParameterRole, ParameterSpec, WeightNames,
};
use super::weights::{self, Tensors};
use super::{gpt2, llama};
use crate::exit::Exit;
use crate::model::config::shape::{Architecture, ModelConfig};

/// The weights of a decoder.
pub(crate) struct Decoder {
    /// Token embedding.
    embedding_VD: Tensor,
    /// Learned position embedding (positions x D), in architectures that have one.
    position_embedding: Option<Tensor>,
    layers: Vec<DecoderLayer>,
    final_norm: Norm,
    /// Weight of the LM head: the token embedding, if both are tied.
    head_VD: Tensor,
}

enum DecoderLayer {
    Llama(llama::LlamaLayer),
    Gpt2(gpt2::Gpt2Layer),
}

/// The file that marks a PEFT folder, which holds an adapter without the weights of its base model.
const ADAPTER_CONFIG: &str = "adapter_config.json";

impl Decoder {
    /// Builds a decoder from `tensors`. Tensors that are variables are trainable.
    ///
    /// # Errors
    /// Where a tensor is missing or its shape does not match `config`; the error names the first such tensor. Where a
    /// LoRA adapter has only one of its two weights.
    pub(crate) fn new(config: &ModelConfig, tensors: &Tensors) -> Result<Self> {
        let weights = CheckedWeights::new(config, tensors)?;
        let new_layer = |index| {
            Ok(match &config.architecture {
                Architecture::Llama(variant) => {
                    DecoderLayer::Llama(llama::LlamaLayer::new(index, variant, &weights)?)
                }
                Architecture::Gpt2 => DecoderLayer::Gpt2(gpt2::Gpt2Layer::new(index, &weights)?),
            })
        };
        let names = config.names();
        let head_name = if config.tie_word_embeddings {
            names.embedding
        } else {
            LM_HEAD
        };
        let position_embedding = names.position_embedding;
        Ok(Self {
            embedding_VD: weights.get(names.embedding)?,
            position_embedding: position_embedding
                .map(|name| weights.get(name))
                .transpose()?,
            layers: (0..config.num_hidden_layers)
                .map(new_layer)
                .collect::<Result<_>>()?,
            final_norm: weights.norm(names.final_norm, names.final_norm_has_bias)?,
            head_VD: weights.get(head_name)?,
        })
    }

    /// Returns the weight of the LM head (V x D). Logits are hidden states times its transpose.
    pub(crate) fn head(&self) -> &Tensor {
        &self.head_VD
    }

    /// Runs the decoder over `input_ids_T`, up to and including the final norm. Returns the hidden states (N x D) at
    /// `positions_N`, which are indices in `input_ids_T`.
    ///
    /// # Errors
    /// Where an id is outside the vocabulary, or the graph fails.
    pub(crate) fn hidden<G: Graph>(
        &self,
        graph: &mut G,
        input_ids_T: &[u32],
        positions_N: &[u32],
    ) -> Result<G::Value> {
        let mut x_TD = graph.embed(&self.embedding_VD, input_ids_T)?;
        if let Some(table) = &self.position_embedding {
            x_TD = graph.add_positions(x_TD, table)?;
        }
        for layer in &self.layers {
            graph.mark_checkpoint(&x_TD);
            x_TD = match layer {
                DecoderLayer::Llama(layer) => layer.forward(graph, x_TD)?,
                DecoderLayer::Gpt2(layer) => layer.forward(graph, x_TD)?,
            };
        }
        let x_ND = graph.select_rows(x_TD, positions_N)?;
        self.final_norm.forward(graph, &x_ND)
    }
}

impl ModelConfig {
    fn names(&self) -> &'static WeightNames {
        match self.architecture {
            Architecture::Llama(_) => &llama::NAMES,
            Architecture::Gpt2 => &gpt2::NAMES,
        }
    }

    /// Returns names, shapes and roles of the weights in memory, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let names = self.names();
        let embedding_shape = [self.vocab_size, self.hidden_size];
        let mut list = ParameterList::default();
        list.add(names.embedding, &embedding_shape, ParameterRole::Table);
        if let Some(name) = names.position_embedding {
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
        list.add_norm(
            names.final_norm,
            self.hidden_size,
            names.final_norm_has_bias,
        );
        if !self.tie_word_embeddings {
            list.add(LM_HEAD, &embedding_shape, ParameterRole::Table);
        }
        list.into_inner()
    }

    /// Returns the number of elements of all weights. A tied LM head is not counted again.
    pub(crate) fn parameter_count(&self) -> usize {
        self.parameters()
            .iter()
            .map(ParameterSpec::element_count)
            .sum()
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

    /// Converts weights from the layout of the files to the layout in memory. Shapes are not checked
    /// here, but when a model is built.
    ///
    /// # Errors
    /// Where a tensor cannot be split or copied.
    pub fn to_memory_layout(&self, stored: Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) => Ok(stored),
            Architecture::Gpt2 => gpt2::to_memory_layout(stored),
        }
    }

    /// Converts weights from the layout in memory to the layout of the files.
    ///
    /// # Errors
    /// Where one of several weights that the files store as one tensor is missing, such as queries, keys and values.
    pub fn to_file_layout(&self, tensors: &Tensors) -> Result<Tensors> {
        match self.architecture {
            Architecture::Llama(_) => Ok(tensors.clone()),
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
    let config = ModelConfig::load(dir)?;
    let load_tensors = || {
        let stored_names = config.stored_names();
        // transformers accepts weight names with and without the prefix.
        let full_name = |name: &str| {
            let with_prefix = format!("{}{name}", config.names().prefix);
            let candidates = [name.to_owned(), with_prefix];
            candidates
                .into_iter()
                .find(|name| stored_names.contains(name))
        };
        let loaded = weights::load(dir, full_name)?;
        weights::check_layers(&loaded.unused, config.num_hidden_layers)?;
        if !loaded.unused.is_empty() {
            tracing::warn!(
                "unused tensors in {} (a {} model with this config.json does not have them): {}",
                dir.display(),
                config.model_type(),
                weights::name_patterns(&loaded.unused).join(", ")
            );
        }
        config.to_memory_layout(loaded.tensors)
    };
    let tensors = load_tensors().with_context(|| format!("cannot load {}", dir.display()))?;
    Ok((config, tensors))
}
