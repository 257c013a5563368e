//! The low-rank adapter of a linear layer: `y += s (x A^T) B^T` (Hu et al., arXiv 2106.09685). The
//! weight of the layer stays frozen.

// Tensor names carry their shape; see the legend in `ops`.
#![allow(non_snake_case)]

use super::Gradient;
use super::linear::Linear;
use super::matmul::Precision;

/// An adapter of rank R between I inputs and O outputs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoraLayer {
    pub inputs: usize,
    pub rank: usize,
    pub outputs: usize,
    /// s: alpha / R.
    pub scale: f32,
    pub precision: Precision,
}

impl LoraLayer {
    /// The projection from I to R.
    fn down(self) -> Linear {
        Linear {
            inputs: self.inputs,
            outputs: self.rank,
            precision: self.precision,
        }
    }

    /// The projection from R to O.
    fn up(self) -> Linear {
        Linear {
            inputs: self.rank,
            outputs: self.outputs,
            precision: self.precision,
        }
    }

    /// Adds the adapter's output for `x_TI` to `y_TO`. Stores s x A^T in `low_TR` for the backward
    /// pass.
    pub(crate) fn forward(
        self,
        x_TI: &[f32],
        a_RI: &[f32],
        b_OR: &[f32],
        low_TR: &mut [f32],
        y_TO: &mut [f32],
    ) {
        self.down().forward(x_TI, a_RI, None, low_TR, false);
        low_TR.iter_mut().for_each(|value| *value *= self.scale);
        self.up().forward(low_TR, b_OR, None, y_TO, true);
    }

    /// Computes the gradient of x A^T: s dy B.
    pub(crate) fn backward_low(self, dy_TO: &[f32], b_OR: &[f32], dlow_TR: &mut [f32]) {
        let to = Gradient {
            values: &mut *dlow_TR,
            add: false,
        };
        self.up().backward_input(dy_TO, b_OR, to);
        dlow_TR.iter_mut().for_each(|value| *value *= self.scale);
    }

    /// dB = dy^T (s x A^T).
    pub(crate) fn backward_b(self, dy_TO: &[f32], low_TR: &[f32], db_OR: Gradient) {
        self.up().backward_weight(dy_TO, low_TR, db_OR);
    }

    /// dA = dlow^T x.
    pub(crate) fn backward_a(self, dlow_TR: &[f32], x_TI: &[f32], da_RI: Gradient) {
        self.down().backward_weight(dlow_TR, x_TI, da_RI);
    }

    /// The adapter's share of dx: dlow A.
    pub(crate) fn backward_input(self, dlow_TR: &[f32], a_RI: &[f32], dx_TI: Gradient) {
        self.down().backward_input(dlow_TR, a_RI, dx_TI);
    }
}
