//! What a low-rank adapter adds to a linear layer: `y += s (x A^T) B^T` (Hu et al., arXiv
//! 2106.09685). The weight itself stays as it is.

use super::Gradient;
use super::linear::Linear;
use super::matmul::Precision;

/// An adapter of rank R between I inputs and O outputs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lora {
    pub inputs: usize,
    pub rank: usize,
    pub outputs: usize,
    /// s: alpha / R.
    pub scale: f32,
    pub precision: Precision,
}

impl Lora {
    /// I to R.
    fn down(self) -> Linear {
        Linear {
            inputs: self.inputs,
            outputs: self.rank,
            precision: self.precision,
        }
    }

    /// R to O.
    fn up(self) -> Linear {
        Linear {
            inputs: self.rank,
            outputs: self.outputs,
            precision: self.precision,
        }
    }

    /// Adds the adapter's part for `x` (T x I), with `a` (R x I) and `b` (O x R), to `y` (T x O).
    ///
    /// `low` (T x R) receives s x A^T, for the backward pass.
    pub(crate) fn forward(self, x: &[f32], a: &[f32], b: &[f32], low: &mut [f32], y: &mut [f32]) {
        self.down().forward(x, a, None, low, false);
        low.iter_mut().for_each(|value| *value *= self.scale);
        self.up().forward(low, b, None, y, true);
    }

    /// The gradient of x A^T: s dy B, into `dlow` (T x R).
    pub(crate) fn backward_low(self, dy: &[f32], b: &[f32], dlow: &mut [f32]) {
        let to = Gradient {
            values: &mut *dlow,
            add: false,
        };
        self.up().backward_input(dy, b, to);
        dlow.iter_mut().for_each(|value| *value *= self.scale);
    }

    /// dB = dy^T (s x A^T).
    pub(crate) fn backward_b(self, dy: &[f32], low: &[f32], db: Gradient) {
        self.up().backward_weight(dy, low, db);
    }

    /// dA = dlow^T x.
    pub(crate) fn backward_a(self, dlow: &[f32], x: &[f32], da: Gradient) {
        self.down().backward_weight(dlow, x, da);
    }

    /// The adapter's part of dx: dlow A.
    pub(crate) fn backward_input(self, dlow: &[f32], a: &[f32], dx: Gradient) {
        self.down().backward_input(dlow, a, dx);
    }
}
