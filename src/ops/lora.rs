//! The low-rank adapter of a linear layer: `y += s (x A^T) B^T` (Hu et al., arXiv 2106.09685).

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use super::GradientMut;
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

    /// Adds the adapter's output for `x_TI` to `y_TO`. Stores s x A^T in `xa_TR` for the backward
    /// pass.
    pub(crate) fn forward(
        self,
        x_TI: &[f32],
        a_RI: &[f32],
        b_OR: &[f32],
        xa_TR: &mut [f32],
        y_TO: &mut [f32],
    ) {
        self.down().forward(x_TI, a_RI, None, xa_TR, false);
        xa_TR.iter_mut().for_each(|value| *value *= self.scale);
        self.up().forward(xa_TR, b_OR, None, y_TO, true);
    }

    /// Computes the gradient of x A^T: dxa = s dy B.
    pub(crate) fn backward_xa(self, dy_TO: &[f32], b_OR: &[f32], dxa_TR: &mut [f32]) {
        let gradient = GradientMut {
            values: &mut *dxa_TR,
            add: false,
        };
        self.up().backward_input(dy_TO, b_OR, gradient);
        dxa_TR.iter_mut().for_each(|value| *value *= self.scale);
    }

    /// dB = dy^T (s x A^T).
    pub(crate) fn backward_b(self, dy_TO: &[f32], xa_TR: &[f32], db_OR: GradientMut) {
        self.up().backward_weight(dy_TO, xa_TR, db_OR);
    }

    /// dA = dxa^T x.
    pub(crate) fn backward_a(self, dxa_TR: &[f32], x_TI: &[f32], da_RI: GradientMut) {
        self.down().backward_weight(dxa_TR, x_TI, da_RI);
    }

    /// Computes the adapter's part of dx: dxa A.
    pub(crate) fn backward_input(self, dxa_TR: &[f32], a_RI: &[f32], dx_TI: GradientMut) {
        self.down().backward_input(dxa_TR, a_RI, dx_TI);
    }
}
