//! `y = x / sqrt(mean(x^2) + eps) * w` (Zhang and Sennrich, arXiv 1910.07467).

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::math::dot;
use super::{ROWS_PER_TASK, lock, values, with_values};

struct RmsNorm {
    epsilon: f32,
    /// 1 / sqrt(mean(x^2) + eps) of each row (T), from the forward for the backward pass.
    scale: Mutex<Vec<f32>>,
}

/// Normalises the rows of `x_TD` (T x D) and scales them by `weight_D` (D).
#[expect(non_snake_case, reason = "tensors carry their shape in their name")]
pub fn rms_norm(x_TD: &Tensor, weight_D: &Tensor, epsilon: f64) -> Result<Tensor> {
    let op = RmsNorm {
        epsilon: epsilon as f32,
        scale: Mutex::default(),
    };
    x_TD.apply_op2(weight_D, op)
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (values(x, x_layout)?, values(weight, weight_layout)?);
        let width = weight.len();
        let mut y = vec![0.0; x.len()];
        let scale: Vec<f32> = y
            .par_chunks_mut(width)
            .zip(x.par_chunks(width))
            .with_min_len(ROWS_PER_TASK)
            .map(|(y, x)| {
                let scale = 1.0 / (dot(x, x) / width as f32 + self.epsilon).sqrt();
                for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * scale * w;
                }
                scale
            })
            .collect();
        *lock(&self.scale) = scale;
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    /// With r the row's scale and g = dy * w:
    /// dx = r g - x r^3 (g . x) / D, dw = sum over rows of dy x r.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let width = weight.elem_count();
        let scale = lock(&self.scale);
        let mut dx = vec![0.0; x.elem_count()];
        let task = width * ROWS_PER_TASK;
        // One partial sum a task, added in order: the same bits whatever the number of threads.
        let partials: Vec<Vec<f32>> = with_values(x, |x| {
            with_values(weight, |weight| {
                with_values(&grad, |grad| {
                    dx.par_chunks_mut(task)
                        .zip(x.par_chunks(task))
                        .zip(grad.par_chunks(task))
                        .zip(scale.par_chunks(ROWS_PER_TASK))
                        .map(|(((dx, x), grad), scale)| backward_rows(dx, x, grad, weight, scale))
                        .collect()
                })
            })
        })???;
        let mut dweight = vec![0.0; width];
        for partial in partials {
            for (sum, part) in dweight.iter_mut().zip(partial) {
                *sum += part;
            }
        }
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dweight, weight.shape(), x.device())?),
        ))
    }
}

fn backward_rows(
    dx: &mut [f32],
    x: &[f32],
    grad: &[f32],
    weight: &[f32],
    scale: &[f32],
) -> Vec<f32> {
    let width = weight.len();
    let mut dweight = vec![0.0; width];
    let rows = dx
        .chunks_mut(width)
        .zip(x.chunks(width))
        .zip(grad.chunks(width))
        .zip(scale);
    for (((dx, x), grad), &scale) in rows {
        for ((dx, grad), w) in dx.iter_mut().zip(grad).zip(weight) {
            *dx = grad * w;
        }
        let along = dot(dx, x) * scale * scale * scale / width as f32;
        for (((dx, x), grad), dw) in dx.iter_mut().zip(x).zip(grad).zip(&mut dweight) {
            *dx = *dx * scale - along * x;
            *dw += grad * x * scale;
        }
    }
    dweight
}
