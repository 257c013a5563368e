//! What a decoder is made of: an architecture is written once, over [`Graph`], and runs wherever
//! there is one.
//!
//! | graph | runs on | for |
//! |---|---|---|
//! | [`Tape`](super::tape::Tape) | CPU, fused operations | training and generation |
//! | [`CandleGraph`](crate::model::candle_graph::CandleGraph) | every device, candle's autograd | training elsewhere; the oracle of the tests |

use anyhow::Result;
use candle_core::Tensor;

use super::projection::Projection;

/// What is wrong where an architecture turns without angles.
pub(super) const NO_ROPE: &str = "this architecture has no rotary embedding";

/// The operations that architectures call, over activations of (T x width).
///
/// A graph knows where the rows stand: in which sequence, at which position. Weights are tensors;
/// those that are variables get gradients. CpuValues that an operation takes by value are done with:
/// pass a clone to keep one.
///
/// # Errors
/// All fail where shapes do not fit or there is no memory.
pub trait Graph {
    type Value: Clone;

    /// Rows `ids` (T) of `table` (V x D).
    fn embed(&mut self, table: &Tensor, ids: &[u32]) -> Result<Self::Value>;

    /// Rows `positions` (N) of `x`.
    fn select_rows(&mut self, x: Self::Value, positions: &[u32]) -> Result<Self::Value>;

    /// `x / sqrt(mean(x^2) + epsilon) * weight`, over groups of as many channels as `weight` has.
    fn rms_norm(&mut self, x: &Self::Value, weight: &Tensor, epsilon: f64) -> Result<Self::Value>;

    /// `(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias`, over rows.
    fn layer_norm(
        &mut self,
        x: &Self::Value,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
    ) -> Result<Self::Value>;

    /// `x W^T + b`, and what the layer's adapter adds.
    fn linear(&mut self, x: &Self::Value, layer: &Projection) -> Result<Self::Value>;

    /// `residual` and what [`Graph::linear`] gives.
    fn add_linear(
        &mut self,
        residual: Self::Value,
        x: &Self::Value,
        layer: &Projection,
    ) -> Result<Self::Value>;

    /// GELU, in the approximation by tanh.
    fn gelu(&mut self, x: Self::Value) -> Result<Self::Value>;

    /// `silu(gate) * up`.
    fn swiglu(&mut self, gate: Self::Value, up: Self::Value) -> Result<Self::Value>;

    /// `x` plus the row of `table` (positions x D) for each row's position in its sequence.
    fn add_positions(&mut self, x: Self::Value, table: &Tensor) -> Result<Self::Value>;

    /// The rotary embedding of every head in `x`.
    fn rope(&mut self, x: Self::Value) -> Result<Self::Value>;

    /// Causal attention of q (T x H C) over k and v (T x G C) in layer `layer`, where a query sees
    /// no more than `window` keys.
    fn attention(
        &mut self,
        layer: usize,
        qkv: [Self::Value; 3],
        window: Option<usize>,
    ) -> Result<Self::Value>;

    /// Marks a value that is worth its memory where activations are computed twice to save some:
    /// the input of a layer.
    fn mark_checkpoint(&mut self, _x: &Self::Value) {}
}
