//! ReLU: `y = max(x, 0)`.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::VALUES_PER_TASK;

/// Computes `y_TF` from `x_TF`.
pub(crate) fn forward(x_TF: &[f32], y_TF: &mut [f32]) {
    y_TF.par_iter_mut()
        .with_min_len(VALUES_PER_TASK)
        .zip(x_TF)
        // NaN must stay NaN, which `f32::max` would turn into 0.
        .for_each(|(y, &x)| *y = if x < 0.0 { 0.0 } else { x });
}

/// Overwrites `x_TF` with its gradient: dy where x is above 0, else 0.
pub(crate) fn backward(x_TF: &mut [f32], dy_TF: &[f32]) {
    x_TF.par_iter_mut()
        .with_min_len(VALUES_PER_TASK)
        .zip(dy_TF)
        .for_each(|(x, &dy)| *x = if *x > 0.0 { dy } else { 0.0 });
}
