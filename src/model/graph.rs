//! The operations of a decoder. An architecture is written once, over [`Graph`], and runs on every
//! implementation of it.
//!
//! | graph | runs on | used for |
//! |---|---|---|
//! | [`Tape`](super::tape::Tape) | CPU, fused operations | training and generation |
//! | [`CandleGraph`](crate::model::candle_graph::CandleGraph) | every device, candle's autograd | training on other devices; reference of the tests |

use anyhow::Result;
use candle_core::Tensor;

use super::projection::Projection;

/// Error if [`Graph::rope`] is called for a model whose config has no rotary embedding.
pub(super) const NO_ROPE: &str = "this architecture has no rotary embedding";

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

    /// GELU, in the tanh approximation.
    fn gelu(&mut self, x: Self::Value) -> Result<Self::Value>;

    /// `silu(gate) * up`.
    fn swiglu(&mut self, gate: Self::Value, up: Self::Value) -> Result<Self::Value>;

    /// Adds to each row of `x` the row of `table` (positions x D) for its position in the sequence.
    fn add_positions(&mut self, x: Self::Value, table: &Tensor) -> Result<Self::Value>;

    /// Applies the rotary embedding to every head in `x`.
    fn rope(&mut self, x: Self::Value) -> Result<Self::Value>;

    /// Causal attention of q (T x H C) over k and v (T x G C). A query sees at most `window` keys. `layer`
    /// selects the layer's part of the cache in incremental decoding.
    fn attention(
        &mut self,
        layer: usize,
        qkv: [Self::Value; 3],
        window: Option<usize>,
    ) -> Result<Self::Value>;

    /// Marks `x`, the input of a layer: activation checkpointing keeps it and recomputes other activations.
    fn mark_checkpoint(&mut self, _x: &Self::Value) {}
}
