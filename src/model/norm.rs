//! The norms of a decoder.

use anyhow::Result;
use candle_core::Tensor;

use super::graph::Graph;

/// The weights of a norm: LayerNorm with a bias, RMSNorm without.
pub(crate) struct Norm {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub epsilon: f64,
}

impl Norm {
    /// Normalises groups of as many channels as there are weights.
    ///
    /// # Errors
    /// Where the graph fails.
    pub(crate) fn forward<G: Graph>(&self, graph: &mut G, x: &G::Value) -> Result<G::Value> {
        match &self.bias {
            Some(bias) => graph.layer_norm(x, &self.weight, bias, self.epsilon),
            None => graph.rms_norm(x, &self.weight, self.epsilon),
        }
    }
}
