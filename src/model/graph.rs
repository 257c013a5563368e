//! The operations of a model. An architecture is written once, over [`Graph`], and runs on every
//! implementation of it.
//!
//! | graph | runs on | used for |
//! |---|---|---|
//! | [`Tape`](super::tape::Tape) | CPU, fused operations | training and generation |
//! | [`CandleGraph`](crate::model::candle_graph::CandleGraph) | every device, candle's autograd | training on other devices; reference of the tests |

use std::ops::Range;

use anyhow::Result;
use candle_core::Tensor;

use super::position_bias::PositionBias;
use super::projection::Projection;
use crate::ops::activation::Activation;

/// Error if [`Graph::rope`] is called for a model whose config has no rotary embedding.
pub(super) const NO_ROPE: &str = "this architecture has no rotary embedding";

/// The sequences of a batch, as ranges that cover all rows in order.
#[derive(Debug, Clone, Copy)]
pub struct Segments<'a> {
    /// The sequences of the decoder.
    pub decoder: &'a [Range<usize>],
    /// The source of each of these sequences, in an encoder-decoder; else empty.
    pub source: &'a [Range<usize>],
}

/// The queries and keys of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKind {
    /// Self-attention of a decoder: a query sees its own position and the positions before it, at most `window` of
    /// them. None: no window.
    Causal { window: Option<usize> },
    /// Self-attention of an encoder: a query sees its whole source.
    Encoder,
    /// Attention of a decoder over its source.
    Cross,
}

impl<'a> Segments<'a> {
    /// Returns the segments of the queries and those of the keys.
    pub(super) fn of_attention(self, kind: AttentionKind) -> [&'a [Range<usize>]; 2] {
        match kind {
            AttentionKind::Causal { .. } => [self.decoder; 2],
            AttentionKind::Encoder => [self.source; 2],
            AttentionKind::Cross => [self.decoder, self.source],
        }
    }
}

/// The properties of an attention layer, without its projections.
#[derive(Clone)]
pub struct AttentionLayer {
    /// Selects the layer's part of the cache in incremental decoding.
    pub index: usize,
    pub kind: AttentionKind,
    /// Bias of the scores by relative position.
    pub bias: Option<PositionBias>,
}

/// The operations that architectures call, over activations of (T x width).
///
/// A graph stores the sequence and the position of every row. Weights are tensors; variables among them
/// receive gradients. An operation that takes ownership of its input may overwrite it: pass a clone to
/// use the input again.
///
/// # Errors
/// All operations fail where shapes do not fit or memory runs out.
pub trait Graph {
    /// The handle of an activation.
    type Value: Clone;

    /// Returns rows `ids` (T) of `table` (V x D).
    fn embed(&mut self, table: &Tensor, ids: &[u32]) -> Result<Self::Value>;

    /// Returns rows `positions` (N) of `x`.
    fn select_rows(&mut self, x: Self::Value, positions: &[u32]) -> Result<Self::Value>;

    /// `x / sqrt(mean(x^2) + epsilon) * weight`, over each group of `weight.len()` channels: a row or a head.
    fn rms_norm(&mut self, x: &Self::Value, weight: &Tensor, epsilon: f64) -> Result<Self::Value>;

    /// `(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias`, over rows.
    fn layer_norm(
        &mut self,
        x: &Self::Value,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
    ) -> Result<Self::Value>;

    /// `x W^T + b`, plus the output of the adapter, if the layer has one.
    fn linear(&mut self, x: &Self::Value, layer: &Projection) -> Result<Self::Value>;

    /// `residual` plus the result of [`Graph::linear`].
    fn add_linear(
        &mut self,
        residual: Self::Value,
        x: &Self::Value,
        layer: &Projection,
    ) -> Result<Self::Value>;

    /// `f(x)`, with the function `activation`.
    fn activate(&mut self, activation: Activation, x: Self::Value) -> Result<Self::Value>;

    /// `f(gate) * up`, with the function `activation`.
    fn activate_gated(
        &mut self,
        activation: Activation,
        gate: Self::Value,
        up: Self::Value,
    ) -> Result<Self::Value>;

    /// `factor * x`.
    fn scale(&mut self, x: Self::Value, factor: f32) -> Result<Self::Value>;

    /// Adds to each row of `x` the row of `table` (positions x D) for its position in the sequence.
    fn add_positions(&mut self, x: Self::Value, table: &Tensor) -> Result<Self::Value>;

    /// Applies the rotary embedding to every head in `x`.
    fn rope(&mut self, x: Self::Value) -> Result<Self::Value>;

    /// Attention of q (T x H C) over k and v (rows x G C). Without k and v, they are the keys and values of the source in
    /// the cache, which only [`AttentionKind::Cross`] in incremental decoding has.
    fn attention(
        &mut self,
        layer: &AttentionLayer,
        q: Self::Value,
        kv: Option<[Self::Value; 2]>,
    ) -> Result<Self::Value>;

    /// Marks `x`, the input of a layer: activation checkpointing keeps it and recomputes other activations.
    fn mark_checkpoint(&mut self, _x: &Self::Value) {}
}
