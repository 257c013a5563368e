//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467): `y = x / sqrt(mean(x^2) + eps) * w`.

use rayon::prelude::*;

use super::math::dot;
use super::{GradientMut, ROWS_PER_TASK, simd, sum_partials};

/// Normalises the rows of `x` (T x D) and scales them by `weight` (D).
///
/// Stores 1 / sqrt(mean(x^2) + eps) of each row in `scale` (T), for the backward pass.
pub(crate) fn forward(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32], scale: &mut [f32]) {
    let width = weight.len();
    let task = width * ROWS_PER_TASK;
    y.par_chunks_mut(task)
        .zip(x.par_chunks(task))
        .zip(scale.par_chunks_mut(ROWS_PER_TASK))
        .for_each(|((y, x), scale)| {
            simd!(
                |y: &mut [f32], x: &[f32], scale: &mut [f32], weight: &[f32], epsilon: f32| {
                    let width = weight.len();
                    let rows = y.chunks_mut(width).zip(x.chunks(width)).zip(scale);
                    for ((y, x), scale) in rows {
                        *scale = 1.0 / (dot(x, x) / width as f32 + epsilon).sqrt();
                        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                            *y = x * *scale * w;
                        }
                    }
                }
            );
        });
}

/// Computes the gradients of x and w. With r the scale of a row and g = dy * w:
/// dx = r g - x r^3 (g . x) / D, dw = sum over rows of dy x r.
pub(crate) fn backward(
    x: &[f32],
    weight: &[f32],
    scale: &[f32],
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
        .zip(scale.par_chunks(ROWS_PER_TASK))
        .map(|(((dx, x), dy), scale)| {
            let mut partial = vec![0.0; width];
            let dweight = &mut partial[..];
            simd!(|dx: &mut [f32],
                   x: &[f32],
                   dy: &[f32],
                   scale: &[f32],
                   weight: &[f32],
                   dweight: &mut [f32],
                   add: bool| {
                let width = weight.len();
                let rows = dx
                    .chunks_mut(width)
                    .zip(x.chunks(width))
                    .zip(dy.chunks(width))
                    .zip(scale);
                let mut g = vec![0.0; width];
                for (((dx, x), dy), &r) in rows {
                    for (((g, dy), w), (dw, x)) in g
                        .iter_mut()
                        .zip(dy)
                        .zip(weight)
                        .zip(dweight.iter_mut().zip(x))
                    {
                        *g = dy * w;
                        *dw += dy * x * r;
                    }
                    let x_factor = dot(&g, x) * r * r * r / width as f32;
                    for ((dx, x), g) in dx.iter_mut().zip(x).zip(&g) {
                        let d = g * r - x_factor * x;
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
