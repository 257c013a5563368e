//! LayerNorm (Ba, Kiros and Hinton, arXiv 1607.06450):
//! `y = (x - mean(x)) / sqrt(var(x) + eps) * w + b`.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use rayon::prelude::*;

use super::math::{dot, sum};
use super::{GradientMut, NormTask, ROWS_PER_TASK, norm_backward, simd};

/// Number of statistics per row: the mean and the scale.
pub(crate) const STATISTICS: usize = 2;

/// Normalises the rows of `x_TD`, scales them by `weight_D` and adds `bias_D`.
///
/// Stores the mean and 1 / sqrt(var + eps) of each row in `statistics_T2`, for the backward pass.
pub(crate) fn forward(
    x_TD: &[f32],
    weight_D: &[f32],
    bias_D: &[f32],
    epsilon: f32,
    y_TD: &mut [f32],
    statistics_T2: &mut [f32],
) {
    let task_len = weight_D.len() * ROWS_PER_TASK;
    y_TD.par_chunks_mut(task_len)
        .zip(x_TD.par_chunks(task_len))
        .zip(statistics_T2.par_chunks_mut(STATISTICS * ROWS_PER_TASK))
        .for_each(|((y_tD, x_tD), statistics_t2)| {
            simd!(|y_tD: &mut [f32],
                   x_tD: &[f32],
                   statistics_t2: &mut [f32],
                   weight_D: &[f32],
                   bias_D: &[f32],
                   epsilon: f32| {
                let width = weight_D.len();
                let rows = y_tD.chunks_mut(width).zip(x_tD.chunks(width));
                for ((y_D, x_D), statistics) in rows.zip(statistics_t2.chunks_mut(STATISTICS)) {
                    let mean = sum(x_D) / width as f32;
                    for (y, x) in y_D.iter_mut().zip(x_D) {
                        *y = x - mean;
                    }
                    // From the differences: mean(x^2) - mean^2 would lose precision by cancellation.
                    let scale = 1.0 / (dot(y_D, y_D) / width as f32 + epsilon).sqrt();
                    statistics.copy_from_slice(&[mean, scale]);
                    for ((y, w), b) in y_D.iter_mut().zip(weight_D).zip(bias_D) {
                        *y = *y * scale * w + b;
                    }
                }
            });
        });
}

/// Computes the gradients of x and w. With r the scale of a row, n = (x - mean) r and g = dy * w:
/// dx = r (g - mean(g) - n mean(g n)), dw = sum over rows of dy n. The gradient of b is
/// [`sum_rows`](super::sum_rows) of dy.
pub(crate) fn backward(
    x_TD: &[f32],
    weight_D: &[f32],
    statistics_T2: &[f32],
    dy_TD: &[f32],
    dx_TD: GradientMut,
    dweight_D: Option<GradientMut>,
) {
    let statistics = (statistics_T2, STATISTICS);
    norm_backward(
        x_TD,
        dy_TD,
        statistics,
        dx_TD,
        dweight_D,
        weight_D,
        |task| {
            let NormTask {
                x_tD,
                dy_tD,
                statistics: statistics_t2,
                dx_tD,
                add,
                dweight_D,
            } = task;
            simd!(|dx_tD: &mut [f32],
                   x_tD: &[f32],
                   dy_tD: &[f32],
                   statistics_t2: &[f32],
                   weight_D: &[f32],
                   dweight_D: &mut [f32],
                   add: bool| {
                let width = weight_D.len();
                let rows = dx_tD
                    .chunks_mut(width)
                    .zip(x_tD.chunks(width))
                    .zip(dy_tD.chunks(width))
                    .zip(statistics_t2.chunks(STATISTICS));
                let mut g_D = vec![0.0; width];
                let mut n_D = vec![0.0; width];
                for (((dx_D, x_D), dy_D), statistics) in rows {
                    let mean = statistics[0];
                    let scale = statistics[1];
                    for i in 0..width {
                        n_D[i] = (x_D[i] - mean) * scale;
                        g_D[i] = dy_D[i] * weight_D[i];
                        dweight_D[i] += dy_D[i] * n_D[i];
                    }
                    let mean_g = sum(&g_D) / width as f32;
                    let mean_gn = dot(&g_D, &n_D) / width as f32;
                    for ((dx, g), n) in dx_D.iter_mut().zip(&g_D).zip(&n_D) {
                        let d = (g - mean_g - n * mean_gn) * scale;
                        *dx = if add { *dx + d } else { d };
                    }
                }
            });
        },
    );
}
