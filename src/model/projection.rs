//! A linear layer of a model: I inputs, O outputs, and an adapter of rank R.

use candle_core::Tensor;

/// The weights of a linear layer, which computes `y = x W^T + b`, plus `s (x A^T) B^T` with an adapter.
#[derive(Clone)]
pub struct Projection {
    /// W (O x I).
    pub weight: Tensor,
    /// b (O).
    pub bias: Option<Tensor>,
    pub adapter: Option<LoraAdapter>,
}

/// The weights of a low-rank adapter (LoRA).
#[derive(Clone)]
pub struct LoraAdapter {
    /// A (R x I).
    pub a: Tensor,
    /// B (O x R).
    pub b: Tensor,
    /// s: alpha / R.
    pub scale: f64,
}

impl Projection {
    /// Creates a layer without a bias or an adapter.
    pub fn new(weight: &Tensor) -> Self {
        Self {
            weight: weight.clone(),
            bias: None,
            adapter: None,
        }
    }

    /// Returns true if any of the weights is trainable.
    pub(crate) fn requires_grad(&self) -> bool {
        let adapter_weights = self
            .adapter
            .iter()
            .flat_map(|adapter| [&adapter.a, &adapter.b]);
        let mut weights = [&self.weight]
            .into_iter()
            .chain(&self.bias)
            .chain(adapter_weights);
        weights.any(Tensor::is_variable)
    }
}
