//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467): `y = x / sqrt(mean(x^2) + eps) * w`.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::math::dot;
use super::{GradientMut, NormTask, ROWS_PER_TASK, norm_backward, simd};

/// Normalises the rows of `x_TD` and scales them by `weight_D`.
///
/// Stores 1 / sqrt(mean(x^2) + eps) of each row in `scale_T`, for the backward pass.
pub(crate) fn forward(
    x_TD: &[f32],
    weight_D: &[f32],
    epsilon: f32,
    y_TD: &mut [f32],
    scale_T: &mut [f32],
) {
    let task_len = weight_D.len() * ROWS_PER_TASK;
    y_TD.par_chunks_mut(task_len)
        .zip(x_TD.par_chunks(task_len))
        .zip(scale_T.par_chunks_mut(ROWS_PER_TASK))
        .for_each(|((y_tD, x_tD), scale_t)| {
            simd!(|y_tD: &mut [f32],
                   x_tD: &[f32],
                   scale_t: &mut [f32],
                   weight_D: &[f32],
                   epsilon: f32| {
                let width = weight_D.len();
                let rows = y_tD.chunks_mut(width).zip(x_tD.chunks(width)).zip(scale_t);
                for ((y_D, x_D), scale) in rows {
                    *scale = 1.0 / (dot(x_D, x_D) / width as f32 + epsilon).sqrt();
                    for ((y, x), w) in y_D.iter_mut().zip(x_D).zip(weight_D) {
                        *y = x * *scale * w;
                    }
                }
            });
        });
}

/// Computes the gradients of x and w. With r the scale of a row and g = dy * w:
/// dx = r g - x r^3 (g . x) / D, dw = sum over rows of dy x r.
pub(crate) fn backward(
    x_TD: &[f32],
    weight_D: &[f32],
    scale_T: &[f32],
    dy_TD: &[f32],
    dx_TD: GradientMut,
    dweight_D: Option<GradientMut>,
) {
    norm_backward(
        x_TD,
        dy_TD,
        (scale_T, 1),
        dx_TD,
        dweight_D,
        weight_D,
        |task| {
            let NormTask {
                x_tD,
                dy_tD,
                statistics: scale_t,
                dx_tD,
                add,
                dweight_D,
            } = task;
            simd!(|dx_tD: &mut [f32],
                   x_tD: &[f32],
                   dy_tD: &[f32],
                   scale_t: &[f32],
                   weight_D: &[f32],
                   dweight_D: &mut [f32],
                   add: bool| {
                let width = weight_D.len();
                let rows = dx_tD
                    .chunks_mut(width)
                    .zip(x_tD.chunks(width))
                    .zip(dy_tD.chunks(width))
                    .zip(scale_t);
                let mut g_D = vec![0.0; width];
                for (((dx_D, x_D), dy_D), &r) in rows {
                    for (((g, dy), w), (dw, x)) in g_D
                        .iter_mut()
                        .zip(dy_D)
                        .zip(weight_D)
                        .zip(dweight_D.iter_mut().zip(x_D))
                    {
                        *g = dy * w;
                        *dw += dy * x * r;
                    }
                    let x_factor = dot(&g_D, x_D) * r * r * r / width as f32;
                    for ((dx, x), g) in dx_D.iter_mut().zip(x_D).zip(&g_D) {
                        let d = g * r - x_factor * x;
                        *dx = if add { *dx + d } else { d };
                    }
                }
            });
        },
    );
}
