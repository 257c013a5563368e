//! Activation functions, and their products with a linear layer (Shazeer, arXiv 2002.05202): `y = f(x)`, and
//! `y = f(gate) * up`, which is SwiGLU with SiLU and GEGLU with GELU.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::math::sigmoid;
use super::{VALUES_PER_TASK, simd};

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x sigmoid(x)
    Silu,
    /// GELU (Hendrycks and Gimpel, arXiv 1606.08415) in the approximation that GPT-2 was trained with:
    /// x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3). As 1 + tanh(u) = 2 sigmoid(2u), it is x sigmoid(2u).
    Gelu,
}

/// The formulas of an activation function.
trait Function {
    fn value(x: f32) -> f32;

    /// Returns the value and the derivative.
    fn with_derivative(x: f32) -> (f32, f32);
}

struct Relu;
struct Silu;
struct Gelu;

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        // NaN must stay NaN, which `f32::max` would turn into 0.
        if x < 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn with_derivative(x: f32) -> (f32, f32) {
        (Self::value(x), if x > 0.0 { 1.0 } else { 0.0 })
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn with_derivative(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        (x * s, s * (1.0 + x * (1.0 - s)))
    }
}

/// 2 sqrt(2/pi): the slope of 2u at 0.
const GELU_SLOPE: f32 = 1.595_769;
/// The coefficient of x^3 in the parentheses of u.
const GELU_CUBIC: f32 = 0.044_715;

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(GELU_SLOPE * x * (1.0 + GELU_CUBIC * x * x))
    }

    #[inline(always)]
    fn with_derivative(x: f32) -> (f32, f32) {
        let square = x * x;
        let s = sigmoid(GELU_SLOPE * x * (1.0 + GELU_CUBIC * square));
        let slope = GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * square);
        (x * s, s * (1.0 + x * (1.0 - s) * slope))
    }
}

/// Calls `$run::<F>` with the formulas of `$activation`.
macro_rules! dispatch {
    ($activation:expr, $run:ident($($argument:expr),*)) => {
        match $activation {
            Activation::Relu => $run::<Relu>($($argument),*),
            Activation::Silu => $run::<Silu>($($argument),*),
            Activation::Gelu => $run::<Gelu>($($argument),*),
        }
    };
}

/// Computes `y_TF` from `x_TF`.
pub(crate) fn forward(activation: Activation, x_TF: &[f32], y_TF: &mut [f32]) {
    dispatch!(activation, plain_forward(x_TF, y_TF));
}

/// Overwrites `x_TF` with its gradient: dx = dy f'(x).
pub(crate) fn backward(activation: Activation, x_TF: &mut [f32], dy_TF: &[f32]) {
    dispatch!(activation, plain_backward(x_TF, dy_TF));
}

/// Computes `y_TF` = f(`gate_TF`) * `up_TF`.
pub(crate) fn gated_forward(
    activation: Activation,
    gate_TF: &[f32],
    up_TF: &[f32],
    y_TF: &mut [f32],
) {
    dispatch!(activation, product_forward(gate_TF, up_TF, y_TF));
}

/// Overwrites `gate_TF` and `up_TF` with their gradients: dgate = dy up f'(gate), dup = dy f(gate).
pub(crate) fn gated_backward(
    activation: Activation,
    gate_TF: &mut [f32],
    up_TF: &mut [f32],
    dy_TF: &[f32],
) {
    dispatch!(activation, product_backward(gate_TF, up_TF, dy_TF));
}

fn plain_forward<F: Function>(x_TF: &[f32], y_TF: &mut [f32]) {
    y_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(x_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|(y, x)| {
            simd!(<F: Function> |y: &mut [f32], x: &[f32]| {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = F::value(x);
                }
            });
        });
}

fn plain_backward<F: Function>(x_TF: &mut [f32], dy_TF: &[f32]) {
    x_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(dy_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|(x, dy)| {
            simd!(<F: Function> |x: &mut [f32], dy: &[f32]| {
                for (x, dy) in x.iter_mut().zip(dy) {
                    *x = dy * F::with_derivative(*x).1;
                }
            });
        });
}

fn product_forward<F: Function>(gate_TF: &[f32], up_TF: &[f32], y_TF: &mut [f32]) {
    y_TF.par_chunks_mut(VALUES_PER_TASK)
        .zip(gate_TF.par_chunks(VALUES_PER_TASK))
        .zip(up_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|((y, gate), up)| {
            simd!(<F: Function> |y: &mut [f32], gate: &[f32], up: &[f32]| {
                for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = F::value(gate) * up;
                }
            });
        });
}

fn product_backward<F: Function>(gate_TF: &mut [f32], up_TF: &mut [f32], dy_TF: &[f32]) {
    gate_TF
        .par_chunks_mut(VALUES_PER_TASK)
        .zip(up_TF.par_chunks_mut(VALUES_PER_TASK))
        .zip(dy_TF.par_chunks(VALUES_PER_TASK))
        .for_each(|((gate, up), dy)| {
            simd!(<F: Function> |gate: &mut [f32], up: &mut [f32], dy: &[f32]| {
                for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                    let (value, derivative) = F::with_derivative(*gate);
                    *gate = dy * *up * derivative;
                    *up = dy * value;
                }
            });
        });
}
