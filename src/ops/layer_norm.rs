//! LayerNorm (Ba, Kiros and Hinton, arXiv 1607.06450):
//! `y = (x - mean(x)) / sqrt(var(x) + eps) * w + b`.

use rayon::prelude::*;

use super::math::{dot, sum};
use super::{GradientMut, ROWS_PER_TASK, simd, sum_partials};

/// Normalises the rows of `x` (T x D), scales them by `weight` (D) and adds `bias` (D).
///
/// Stores the mean and 1 / sqrt(var + eps) of each row in `statistics` (T x 2), for the backward
/// pass.
pub(crate) fn forward(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    epsilon: f32,
    y: &mut [f32],
    statistics: &mut [f32],
) {
    let width = weight.len();
    let task = width * ROWS_PER_TASK;
    y.par_chunks_mut(task)
        .zip(x.par_chunks(task))
        .zip(statistics.par_chunks_mut(2 * ROWS_PER_TASK))
        .for_each(|((y, x), statistics)| {
            simd!(|y: &mut [f32],
                   x: &[f32],
                   statistics: &mut [f32],
                   weight: &[f32],
                   bias: &[f32],
                   epsilon: f32| {
                let width = weight.len();
                let rows = y.chunks_mut(width).zip(x.chunks(width));
                for ((y, x), statistics) in rows.zip(statistics.chunks_mut(2)) {
                    let mean = sum(x) / width as f32;
                    for (y, x) in y.iter_mut().zip(x) {
                        *y = x - mean;
                    }
                    // From the differences: mean(x^2) - mean^2 would lose precision by cancellation.
                    let scale = 1.0 / (dot(y, y) / width as f32 + epsilon).sqrt();
                    statistics.copy_from_slice(&[mean, scale]);
                    for ((y, w), b) in y.iter_mut().zip(weight).zip(bias) {
                        *y = *y * scale * w + b;
                    }
                }
            });
        });
}

/// Computes the gradients of x and w. With r the scale of a row, n = (x - mean) r and g = dy * w:
/// dx = r (g - mean(g) - n mean(g n)), dw = sum over rows of dy n; the gradient of b is
/// [`sum_rows`](super::sum_rows) of dy.
pub(crate) fn backward(
    x: &[f32],
    weight: &[f32],
    statistics: &[f32],
    dy: &[f32],
    dx: GradientMut,
    dweight: Option<GradientMut>,
) {
    let width = weight.len();
    let task = width * ROWS_PER_TASK;
    let add = dx.add;
    let partials: Vec<Vec<f32>> = dx
        .values
        .par_chunks_mut(task)
        .zip(x.par_chunks(task))
        .zip(dy.par_chunks(task))
        .zip(statistics.par_chunks(2 * ROWS_PER_TASK))
        .map(|(((dx, x), dy), statistics)| {
            let mut partial = vec![0.0; width];
            let dweight = &mut partial[..];
            simd!(|dx: &mut [f32],
                   x: &[f32],
                   dy: &[f32],
                   statistics: &[f32],
                   weight: &[f32],
                   dweight: &mut [f32],
                   add: bool| {
                let width = weight.len();
                let rows = dx
                    .chunks_mut(width)
                    .zip(x.chunks(width))
                    .zip(dy.chunks(width))
                    .zip(statistics.chunks(2));
                let mut g = vec![0.0; width];
                let mut n = vec![0.0; width];
                for (((dx, x), dy), statistics) in rows {
                    let mean = statistics[0];
                    let scale = statistics[1];
                    for i in 0..width {
                        n[i] = (x[i] - mean) * scale;
                        g[i] = dy[i] * weight[i];
                        dweight[i] += dy[i] * n[i];
                    }
                    let mean_g = sum(&g) / width as f32;
                    let mean_gn = dot(&g, &n) / width as f32;
                    for ((dx, g), n) in dx.iter_mut().zip(&g).zip(&n) {
                        let d = (g - mean_g - n * mean_gn) * scale;
                        *dx = if add { *dx + d } else { d };
                    }
                }
            });
            partial
        })
        .collect();
    if let Some(dweight) = dweight {
        sum_partials(&partials, dweight);
    }
}
