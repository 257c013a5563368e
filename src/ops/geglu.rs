//! GEGLU (Shazeer, arXiv 2002.05202): `y = gelu(gate) * up`, with the GELU of [`gelu`](super::gelu).

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::gelu::{derivative, gelu};
use super::{VALUES_PER_TASK, simd};

/// Computes `y_TF` from `gate_TF` and `up_TF`.
pub(crate) fn forward(gate_TF: &[f32], up_TF: &[f32], y_TF: &mut [f32]) {
    y_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(gate_TF.par_chunks(VALUES_PER_TASK))
        .zip(up_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|((y, gate), up)| {
            simd!(|y: &mut [f32], gate: &[f32], up: &[f32]| {
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gelu(*gate) * up;
                }
            });
        });
}

/// Overwrites `gate_TF` and `up_TF` with their gradients: dup = dy gelu(gate), dgate = dy up gelu'(gate).
pub(crate) fn backward(gate_TF: &mut [f32], up_TF: &mut [f32], dy_TF: &[f32]) {
    gate_TF
        .par_chunks_mut(VALUES_PER_TASK)
        .zip(up_TF.par_chunks_mut(VALUES_PER_TASK))
        .zip(dy_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|((gate, up), dy)| {
            simd!(|gate: &mut [f32], up: &mut [f32], dy: &[f32]| {
                for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                    let z = *gate;
                    *gate = dy * *up * derivative(z);
                    *up = dy * gelu(z);
                }
            });
        });
}
