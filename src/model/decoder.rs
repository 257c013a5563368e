//! A decoder: embedding, the layers of its architecture, final norm and LM head.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::Result;
use candle_core::Tensor;

use super::graph::Graph;
use super::norm::Norm;
use super::parameters::{CheckedWeights, LM_HEAD, ParameterList, ParameterRole, WeightNames};
use super::{gpt2, llama};
use crate::model::config::LlamaVariant;
use crate::model::config::shape::ModelConfig;

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

/// The architecture of a decoder.
#[derive(Clone, Copy)]
pub(super) enum DecoderKind<'a> {
    Llama(&'a LlamaVariant),
    Gpt2,
}

impl DecoderKind<'_> {
    pub(super) fn names(self) -> &'static WeightNames {
        match self {
            DecoderKind::Llama(_) => &llama::NAMES,
            DecoderKind::Gpt2 => &gpt2::NAMES,
        }
    }

    /// Adds the weights of a decoder to `list`, in the order of the forward pass.
    pub(super) fn add_parameters(self, list: &mut ParameterList, config: &ModelConfig) {
        let names = self.names();
        list.add(
            names.embedding,
            &[config.vocab_size, config.hidden_size],
            ParameterRole::Table,
        );
        if let Some(name) = names.position_embedding {
            let shape = [config.max_position_embeddings, config.hidden_size];
            list.add(name, &shape, ParameterRole::Table);
        }
        for layer in 0..config.num_hidden_layers {
            match self {
                DecoderKind::Llama(variant) => {
                    llama::add_layer_parameters(list, layer, config, variant)
                }
                DecoderKind::Gpt2 => gpt2::add_layer_parameters(list, layer, config),
            }
        }
        list.add_norm(
            names.final_norm,
            config.hidden_size,
            names.final_norm_has_bias,
        );
    }
}

impl Decoder {
    /// Builds a decoder from `weights`.
    ///
    /// # Errors
    /// Where a LoRA adapter has only one of its two weights.
    pub(super) fn new(
        config: &ModelConfig,
        kind: DecoderKind,
        weights: &CheckedWeights,
    ) -> Result<Self> {
        let new_layer = |index| {
            Ok(match kind {
                DecoderKind::Llama(variant) => {
                    DecoderLayer::Llama(llama::LlamaLayer::new(index, variant, weights)?)
                }
                DecoderKind::Gpt2 => DecoderLayer::Gpt2(gpt2::Gpt2Layer::new(index, weights)?),
            })
        };
        let names = kind.names();
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
