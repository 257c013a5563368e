//! T5 (Raffel et al., arXiv 1910.10683), T5 v1.1 and flan-T5 (gated feed-forward, untied head), mT5 (Xue et al., arXiv
//! 2010.11934): an encoder reads the source, and a decoder writes the answer. Written once over [`Graph`].
//!
//! Scores of attention are not scaled. The first block of each stack holds the table of relative position biases for
//! all its blocks; cross-attention has none. Dropout is not applied, even if `config.json` sets it.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::Result;
use candle_core::Tensor;

use super::graph::{AttentionKind, AttentionLayer, Graph};
use super::input::ModelInput;
use super::norm::Norm;
use super::parameters::{CheckedWeights, LM_HEAD, ParameterList, ParameterRole, WeightNames};
use super::position_bias::PositionBias;
use super::projection::Projection;
use super::weights::Tensors;
use crate::model::config::shape::{Architecture, ModelConfig, T5Variant};
use crate::ops::CpuValues;
use crate::ops::activation::Activation;
use crate::ops::attention::RelativeBuckets;

const SHARED: &str = "shared.weight";
/// Begins of the names of the layers' weights.
pub(super) const ENCODER_BLOCKS: &str = "encoder.block.";
pub(super) const DECODER_BLOCKS: &str = "decoder.block.";
const POSITION_BIAS: &str = "layer.0.SelfAttention.relative_attention_bias.weight";
const ENCODER_NORM: &str = "encoder.final_layer_norm";
const DECODER_NORM: &str = "decoder.final_layer_norm";

/// Copies of the token embedding in older files. transformers uses `shared.weight`, or else the first of them.
const EMBEDDING_COPIES: [&str; 2] = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
/// All tables of the vocabulary that files may have.
pub(super) const TABLES: [&str; 4] = [SHARED, EMBEDDING_COPIES[0], EMBEDDING_COPIES[1], LM_HEAD];

pub(super) const NAMES: WeightNames = WeightNames {
    prefix: "",
    embedding: SHARED,
    position_embedding: None,
    final_norm: DECODER_NORM,
    final_norm_has_bias: false,
};

/// The weights of an encoder-decoder.
pub(crate) struct T5 {
    /// Token embedding of both stacks.
    shared_VD: Tensor,
    encoder: Vec<EncoderBlock>,
    encoder_norm: Norm,
    decoder: Vec<DecoderBlock>,
    decoder_norm: Norm,
    /// Factor of the hidden states before the head: D^-0.5 if the head is tied to the embedding.
    output_scale: Option<f32>,
    /// Weight of the LM head: the token embedding, if both are tied.
    head_VD: Tensor,
}

struct EncoderBlock {
    attention: AttentionBlock,
    feed_forward: FeedForward,
}

struct DecoderBlock {
    attention: AttentionBlock,
    cross: AttentionBlock,
    feed_forward: FeedForward,
}

/// Attention with the norm before it.
struct AttentionBlock {
    norm: Norm,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    layer: AttentionLayer,
}

/// A feed-forward network with the norm before it.
struct FeedForward {
    norm: Norm,
    inner: InnerProjection,
    wo: Projection,
}

enum InnerProjection {
    Relu { wi: Projection },
    GatedGelu { wi_0: Projection, wi_1: Projection },
}

/// Name of the sub-layer `module` of a block. `blocks` is [`ENCODER_BLOCKS`] or [`DECODER_BLOCKS`].
fn module_name(blocks: &str, block: usize, module: &str) -> String {
    format!("{blocks}{block}.{module}")
}

/// Returns the name of the table of relative position biases of a stack, whose layers' names begin with `blocks`.
pub(super) fn position_bias_name(blocks: &str) -> String {
    module_name(blocks, 0, POSITION_BIAS)
}

/// Adds the weights of both stacks, in the order of the forward pass.
pub(super) fn add_parameters(list: &mut ParameterList, config: &ModelConfig, variant: &T5Variant) {
    let hidden = config.hidden_size;
    let embedding_shape = [config.vocab_size, hidden];
    list.add(SHARED, &embedding_shape, ParameterRole::Table);
    let add_attention = |list: &mut ParameterList, name: &dyn Fn(&str) -> String, index, kind| {
        list.add_norm(&name(&format!("layer.{index}.layer_norm")), hidden, false);
        let inner = config.heads.query_width();
        for (module, shape) in [
            ("q", [inner, hidden]),
            ("k", [inner, hidden]),
            ("v", [inner, hidden]),
            ("o", [hidden, inner]),
        ] {
            let module = name(&format!("layer.{index}.{kind}.{module}"));
            list.add_projection(&module, shape, false);
        }
    };
    let add_feed_forward = |list: &mut ParameterList, name: &dyn Fn(&str) -> String, index| {
        list.add_norm(&name(&format!("layer.{index}.layer_norm")), hidden, false);
        let inner = config.intermediate_size;
        let module = |module: &str| name(&format!("layer.{index}.DenseReluDense.{module}"));
        let inner_modules: &[&str] = if variant.is_gated {
            &["wi_0", "wi_1"]
        } else {
            &["wi"]
        };
        for inner_module in inner_modules {
            list.add_projection(&module(inner_module), [inner, hidden], false);
        }
        list.add_projection(&module("wo"), [hidden, inner], false);
    };
    let bias_shape = [variant.buckets, config.heads.query];
    for block in 0..variant.encoder_layers {
        let name = |module: &str| module_name(ENCODER_BLOCKS, block, module);
        add_attention(list, &name, 0, "SelfAttention");
        if block == 0 {
            list.add(name(POSITION_BIAS), &bias_shape, ParameterRole::Table);
        }
        add_feed_forward(list, &name, 1);
    }
    list.add_norm(ENCODER_NORM, hidden, false);
    for block in 0..config.num_hidden_layers {
        let name = |module: &str| module_name(DECODER_BLOCKS, block, module);
        add_attention(list, &name, 0, "SelfAttention");
        if block == 0 {
            list.add(name(POSITION_BIAS), &bias_shape, ParameterRole::Table);
        }
        add_attention(list, &name, 1, "EncDecAttention");
        add_feed_forward(list, &name, 2);
    }
    list.add_norm(DECODER_NORM, hidden, false);
}

/// Removes the copies of the token embedding from `tensors`, and unties the head of `config` if the weights have one of
/// their own. transformers 5 writes `tie_word_embeddings = true` for such weights too, and version 4 ignores their head.
/// Warns about copies that differ from the embedding.
///
/// # Errors
/// Where a table is not a contiguous f32 tensor on the CPU.
pub(super) fn resolve_tables(config: &mut ModelConfig, tensors: &mut Tensors) -> Result<()> {
    let Architecture::T5(T5Variant {
        allows_own_head, ..
    }) = config.architecture
    else {
        return Ok(());
    };
    if !tensors.contains_key(SHARED)
        && let Some(copy) = tensors.remove(EMBEDDING_COPIES[0])
    {
        tensors.insert(SHARED.into(), copy);
    }
    let Some(shared) = tensors.get(SHARED).cloned() else {
        // `Network::new` names the missing embedding.
        return Ok(());
    };
    let mut differing = Vec::new();
    for name in &TABLES[1..] {
        let is_head = *name == LM_HEAD;
        if is_head && !config.tie_word_embeddings {
            continue;
        }
        let Some(copy) = tensors.get(*name) else {
            continue;
        };
        let is_equal =
            copy.dims() == shared.dims() && *CpuValues::new(copy)? == *CpuValues::new(&shared)?;
        if is_head && !is_equal && allows_own_head {
            config.tie_word_embeddings = false;
            continue;
        }
        tensors.remove(*name);
        if !is_equal {
            differing.push(*name);
        }
    }
    if !differing.is_empty() {
        tracing::warn!(
            "not used, because the embeddings are tied, although they differ from {SHARED}: {}",
            differing.join(", ")
        );
    }
    Ok(())
}

/// Returns the standard deviation of the initial values of a table or projection, as transformers draws them
/// (`T5PreTrainedModel._init_weights`).
pub(super) fn initial_deviation(config: &ModelConfig, variant: &T5Variant, name: &str) -> f64 {
    let hidden = config.hidden_size as f64;
    let module = name.trim_end_matches(".weight");
    let module = module.rsplit('.').next().unwrap_or_default();
    let inputs = match module {
        "shared" | "lm_head" => 1.0,
        "q" => hidden * config.heads.head_dim as f64,
        "o" => config.heads.query_width() as f64,
        "wo" => config.intermediate_size as f64,
        // k, v, wi, wi_0, wi_1, relative_attention_bias
        _ => hidden,
    };
    variant.initializer_factor * inputs.powf(-0.5)
}

impl T5 {
    /// Builds an encoder-decoder from `weights`.
    ///
    /// # Errors
    /// Where a LoRA adapter has only one of its two weights.
    pub(super) fn new(
        config: &ModelConfig,
        variant: &T5Variant,
        weights: &CheckedWeights,
    ) -> Result<Self> {
        let position_bias = |blocks, is_bidirectional| -> Result<PositionBias> {
            Ok(PositionBias {
                table_EH: weights.get(&position_bias_name(blocks))?,
                buckets: RelativeBuckets {
                    count: variant.buckets,
                    max_distance: variant.max_distance,
                    is_bidirectional,
                },
            })
        };
        let encoder_bias = position_bias(ENCODER_BLOCKS, true)?;
        let decoder_bias = position_bias(DECODER_BLOCKS, false)?;
        let encoder_block = |index| -> Result<EncoderBlock> {
            let name = |module: &str| module_name(ENCODER_BLOCKS, index, module);
            let layer = AttentionLayer {
                index,
                kind: AttentionKind::Encoder,
                bias: Some(encoder_bias.clone()),
            };
            Ok(EncoderBlock {
                attention: AttentionBlock::new(&name("layer.0"), "SelfAttention", layer, weights)?,
                feed_forward: FeedForward::new(&name("layer.1"), variant, weights)?,
            })
        };
        let decoder_block = |index| -> Result<DecoderBlock> {
            let name = |module: &str| module_name(DECODER_BLOCKS, index, module);
            let layer = AttentionLayer {
                index,
                kind: AttentionKind::Causal { window: None },
                bias: Some(decoder_bias.clone()),
            };
            let cross = AttentionLayer {
                index,
                kind: AttentionKind::Cross,
                bias: None,
            };
            Ok(DecoderBlock {
                attention: AttentionBlock::new(&name("layer.0"), "SelfAttention", layer, weights)?,
                cross: AttentionBlock::new(&name("layer.1"), "EncDecAttention", cross, weights)?,
                feed_forward: FeedForward::new(&name("layer.2"), variant, weights)?,
            })
        };
        let head_name = if config.tie_word_embeddings {
            SHARED
        } else {
            LM_HEAD
        };
        Ok(Self {
            shared_VD: weights.get(SHARED)?,
            encoder: (0..variant.encoder_layers)
                .map(encoder_block)
                .collect::<Result<_>>()?,
            encoder_norm: weights.norm(ENCODER_NORM, false)?,
            decoder: (0..config.num_hidden_layers)
                .map(decoder_block)
                .collect::<Result<_>>()?,
            decoder_norm: weights.norm(DECODER_NORM, false)?,
            output_scale: variant
                .scales_outputs
                .then(|| (config.hidden_size as f64).powf(-0.5) as f32),
            head_VD: weights.get(head_name)?,
        })
    }

    /// Returns the weight of the LM head (V x D).
    pub(super) fn head(&self) -> &Tensor {
        &self.head_VD
    }

    /// Runs the encoder over `source_ids_U` (U tokens of all sources, end to end) and the decoder over the input. In
    /// incremental decoding, the input has no source: the keys and values of the source are in the cache. Returns the
    /// hidden states of the decoder (N x D) at `positions_N`, ready for the head.
    ///
    /// # Errors
    /// Where an id is outside the vocabulary, or the graph fails.
    pub(super) fn hidden<G: Graph>(&self, graph: &mut G, input: ModelInput) -> Result<G::Value> {
        let source_UD = if input.source.ids_U.is_empty() {
            None
        } else {
            Some(self.encode(graph, input.source.ids_U)?)
        };
        let mut x_TD = graph.embed(&self.shared_VD, input.input_ids_T)?;
        for block in &self.decoder {
            graph.mark_checkpoint(&x_TD);
            x_TD = block.attention.forward(graph, x_TD)?;
            x_TD = block.cross.forward_cross(graph, x_TD, source_UD.as_ref())?;
            x_TD = block.feed_forward.forward(graph, x_TD)?;
        }
        drop(source_UD);
        let x_ND = graph.select_rows(x_TD, input.positions_N)?;
        let hidden_ND = self.decoder_norm.forward(graph, &x_ND)?;
        drop(x_ND);
        match self.output_scale {
            Some(factor) => graph.scale(hidden_ND, factor),
            None => Ok(hidden_ND),
        }
    }

    /// Runs the encoder. Returns its output (U x D).
    fn encode<G: Graph>(&self, graph: &mut G, source_ids_U: &[u32]) -> Result<G::Value> {
        let mut x_UD = graph.embed(&self.shared_VD, source_ids_U)?;
        for block in &self.encoder {
            graph.mark_checkpoint(&x_UD);
            x_UD = block.attention.forward(graph, x_UD)?;
            x_UD = block.feed_forward.forward(graph, x_UD)?;
        }
        self.encoder_norm.forward(graph, &x_UD)
    }

    /// Runs the encoder. Returns the keys and values of the cross-attention (U x H C each) of each decoder layer.
    ///
    /// # Errors
    /// As [`T5::hidden`].
    pub(super) fn source_keys_values<G: Graph>(
        &self,
        graph: &mut G,
        source_ids_U: &[u32],
    ) -> Result<Vec<[G::Value; 2]>> {
        let source_UD = self.encode(graph, source_ids_U)?;
        self.decoder
            .iter()
            .map(|block| block.cross.keys_values(graph, &source_UD))
            .collect()
    }
}

impl AttentionBlock {
    /// Builds the block of the modules `name.layer_norm` and `name.kind.{q,k,v,o}`.
    fn new(
        name: &str,
        kind: &str,
        layer: AttentionLayer,
        weights: &CheckedWeights,
    ) -> Result<Self> {
        let projection = |module| weights.projection(&format!("{name}.{kind}.{module}"), false);
        Ok(Self {
            norm: weights.norm(&format!("{name}.layer_norm"), false)?,
            q: projection("q")?,
            k: projection("k")?,
            v: projection("v")?,
            o: projection("o")?,
            layer,
        })
    }

    /// Attention of the rows of `x_TD` over each other.
    fn forward<G: Graph>(&self, graph: &mut G, x_TD: G::Value) -> Result<G::Value> {
        let normed_TD = self.norm.forward(graph, &x_TD)?;
        let q_THC = graph.linear(&normed_TD, &self.q)?;
        let kv_THC = self.keys_values(graph, &normed_TD)?;
        drop(normed_TD);
        let heads_THC = graph.attention(&self.layer, q_THC, Some(kv_THC))?;
        graph.add_linear(x_TD, &heads_THC, &self.o)
    }

    /// Attention of the rows of `x_TD` over the output of the encoder, or over its cached keys and values.
    fn forward_cross<G: Graph>(
        &self,
        graph: &mut G,
        x_TD: G::Value,
        source_UD: Option<&G::Value>,
    ) -> Result<G::Value> {
        let normed_TD = self.norm.forward(graph, &x_TD)?;
        let q_THC = graph.linear(&normed_TD, &self.q)?;
        drop(normed_TD);
        let kv_UHC = source_UD.map(|source_UD| self.keys_values(graph, source_UD));
        let heads_THC = graph.attention(&self.layer, q_THC, kv_UHC.transpose()?)?;
        graph.add_linear(x_TD, &heads_THC, &self.o)
    }

    fn keys_values<G: Graph>(&self, graph: &mut G, x: &G::Value) -> Result<[G::Value; 2]> {
        Ok([graph.linear(x, &self.k)?, graph.linear(x, &self.v)?])
    }
}

impl FeedForward {
    /// Builds the block of the modules `name.layer_norm` and `name.DenseReluDense`.
    fn new(name: &str, variant: &T5Variant, weights: &CheckedWeights) -> Result<Self> {
        let projection =
            |module| weights.projection(&format!("{name}.DenseReluDense.{module}"), false);
        let inner = if variant.is_gated {
            InnerProjection::GatedGelu {
                wi_0: projection("wi_0")?,
                wi_1: projection("wi_1")?,
            }
        } else {
            InnerProjection::Relu {
                wi: projection("wi")?,
            }
        };
        Ok(Self {
            norm: weights.norm(&format!("{name}.layer_norm"), false)?,
            inner,
            wo: projection("wo")?,
        })
    }

    fn forward<G: Graph>(&self, graph: &mut G, x_TD: G::Value) -> Result<G::Value> {
        let normed_TD = self.norm.forward(graph, &x_TD)?;
        let inner_TF = match &self.inner {
            InnerProjection::Relu { wi } => {
                let inner_TF = graph.linear(&normed_TD, wi)?;
                drop(normed_TD);
                graph.activate(Activation::Relu, inner_TF)?
            }
            InnerProjection::GatedGelu { wi_0, wi_1 } => {
                let gate_TF = graph.linear(&normed_TD, wi_0)?;
                let up_TF = graph.linear(&normed_TD, wi_1)?;
                drop(normed_TD);
                graph.activate_gated(Activation::Gelu, gate_TF, up_TF)?
            }
        };
        graph.add_linear(x_TD, &inner_TF, &self.wo)
    }
}
