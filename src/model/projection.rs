//! A linear layer of a decoder.

use candle_core::Tensor;

/// The weights of a linear layer: `y = x W^T + b`, plus `s (x A^T) B^T` with an adapter.
#[derive(Clone)]
pub struct Projection {
    /// (O x I)
    pub weight: Tensor,
    /// (O)
    pub bias: Option<Tensor>,
    pub adapter: Option<LoraAdapter>,
}

/// The weights of a low-rank adapter (LoRA).
#[derive(Clone)]
pub struct LoraAdapter {
    /// (R x I)
    pub a: Tensor,
    /// (O x R)
    pub b: Tensor,
    /// alpha / R.
    pub scale: f64,
}

impl Projection {
    /// A layer without bias and adapter.
    pub fn new(weight: &Tensor) -> Self {
        Self {
            weight: weight.clone(),
            bias: None,
            adapter: None,
        }
    }

    /// Returns true if any of the weights is trainable.
    pub fn requires_grad(&self) -> bool {
        let adapter = self
            .adapter
            .iter()
            .flat_map(|adapter| [&adapter.a, &adapter.b]);
        let mut weights = [&self.weight].into_iter().chain(&self.bias).chain(adapter);
        weights.any(Tensor::is_variable)
    }
}
