//! SwiGLU (Shazeer, arXiv 2002.05202): `y = silu(gate) * up`, with silu(z) = z sigmoid(z).

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::math::sigmoid;
use super::{VALUES_PER_TASK, simd};

/// Computes `y_TF` from `gate_TF` and `up_TF`.
pub(crate) fn forward(gate_TF: &[f32], up_TF: &[f32], y_TF: &mut [f32]) {
    y_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(gate_TF.par_chunks(VALUES_PER_TASK))
        .zip(up_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|((y, gate), up)| {
            simd!(|y: &mut [f32], gate: &[f32], up: &[f32]| {
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(*gate) * up;
                }
            });
        });
}

/// Overwrites `gate_TF` and `up_TF` with their gradients:
/// dup = dy silu(gate), dgate = dy up s (1 + gate (1 - s)) with s = sigmoid(gate).
pub(crate) fn backward(gate_TF: &mut [f32], up_TF: &mut [f32], dy_TF: &[f32]) {
    gate_TF
        .par_chunks_mut(VALUES_PER_TASK)
        .zip(up_TF.par_chunks_mut(VALUES_PER_TASK))
        .zip(dy_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|((gate, up), dy)| {
            simd!(|gate: &mut [f32], up: &mut [f32], dy: &[f32]| {
                for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                    let z = *gate;
                    let s = sigmoid(z);
                    *gate = dy * *up * s * (1.0 + z * (1.0 - s));
                    *up = dy * z * s;
                }
            });
        });
}
