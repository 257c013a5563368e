//! GELU (Hendrycks and Gimpel, arXiv 1606.08415) in the approximation that GPT-2 was trained with:
//! `y = x/2 (1 + tanh(u))`, u = sqrt(2/pi) (x + 0.044715 x^3). As 1 + tanh(u) = 2 sigmoid(2u),
//! y = x sigmoid(2u).

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::math::sigmoid;
use super::{VALUES_PER_TASK, simd};

/// 2 sqrt(2/pi): the slope of 2u at 0.
const SLOPE: f32 = 1.595_769;
/// The coefficient of x^3 in the parentheses of u.
const CUBIC: f32 = 0.044_715;

/// Returns GELU(x).
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * sigmoid(SLOPE * x * (1.0 + CUBIC * x * x))
}

/// Returns the derivative of GELU at x: s (1 + x (1 - s) 2u') with s = sigmoid(2u).
#[inline(always)]
pub(super) fn derivative(x: f32) -> f32 {
    let square = x * x;
    let s = sigmoid(SLOPE * x * (1.0 + CUBIC * square));
    let slope = SLOPE * (1.0 + 3.0 * CUBIC * square);
    s * (1.0 + x * (1.0 - s) * slope)
}

/// Computes `y_TF` from `x_TF`.
pub(crate) fn forward(x_TF: &[f32], y_TF: &mut [f32]) {
    y_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(x_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|(y, x)| {
            simd!(|y: &mut [f32], x: &[f32]| {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = gelu(*x);
                }
            });
        });
}

/// Overwrites `x_TF` with its gradient.
pub(crate) fn backward(x_TF: &mut [f32], dy_TF: &[f32]) {
    x_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(dy_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|(x, dy)| {
            simd!(|x: &mut [f32], dy: &[f32]| {
                for (x, dy) in x.iter_mut().zip(dy) {
                    *x = dy * derivative(*x);
                }
            });
        });
}
