//! The norms of a model.

use anyhow::Result;
use candle_core::Tensor;

use super::graph::Graph;

/// The weights of a norm: of a LayerNorm if it has a bias, else of an RMSNorm.
pub(crate) struct Norm {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub epsilon: f64,
}

impl Norm {
    /// Normalises each group of `weight.len()` channels: a row or a head.
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
