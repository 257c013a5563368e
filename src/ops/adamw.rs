//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one pass over memory.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, Var};
use rayon::prelude::*;
use std::sync::Mutex;

use super::{lock, simd};

/// Values per task of an update.
const UPDATES_PER_TASK: usize = 1 << 16;

/// The constants of one optimizer step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Number of this step, counted from 1, for the bias correction of the moments.
    pub number: u64,
    pub learning_rate: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
    /// Factor that clips the gradients by their norm; 1 if they are not clipped.
    pub gradient_scale: f32,
}

impl AdamWStep {
    /// Returns the bias correction of a moment with decay `beta`: 1 / (1 - beta^number).
    fn correction(&self, beta: f32) -> f32 {
        (1.0 / (1.0 - f64::from(beta).powf(self.number as f64))) as f32
    }
}

/// Updates `parameter` and both moments in place. `gradient` and the moments have one value per value of the
/// parameter.
///
/// # Errors
/// Where the parameter is not a contiguous f32 tensor on the CPU, or the sizes differ.
pub fn adamw(
    parameter: &Tensor,
    gradient: &[f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
    step: AdamWStep,
) -> Result<()> {
    parameter.inplace_op1(&AdamW {
        gradient,
        moments: Mutex::new((first_moment, second_moment)),
        step,
    })
}

struct AdamW<'a> {
    gradient: &'a [f32],
    /// A mutex, because candle takes the operation by shared reference.
    moments: Mutex<(&'a mut [f32], &'a mut [f32])>,
    step: AdamWStep,
}

impl InplaceOp1 for AdamW<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("adamw: parameters must be contiguous f32 tensors");
        };
        let values = &mut values[start..end];
        let mut moments = lock(&self.moments);
        let (first, second) = &mut *moments;
        if [self.gradient.len(), first.len(), second.len()] != [values.len(); 3] {
            candle_core::bail!("adamw: the sizes of parameter, gradient and moments differ");
        }
        let step = self.step;
        values
            .par_chunks_mut(UPDATES_PER_TASK)
            .zip(self.gradient.par_chunks(UPDATES_PER_TASK))
            .zip(first.par_chunks_mut(UPDATES_PER_TASK))
            .zip(second.par_chunks_mut(UPDATES_PER_TASK))
            .for_each(|(((values, gradient), first), second)| {
                simd!(|values: &mut [f32],
                       gradient: &[f32],
                       first: &mut [f32],
                       second: &mut [f32],
                       step: AdamWStep| {
                    update(values, gradient, first, second, step);
                });
            });
        Ok(())
    }
}

/// Updates `parameter` and `moments` like [`adamw`], in candle's own operations, on any device.
///
/// # Errors
/// Where the device fails.
pub fn adamw_candle(
    parameter: &Var,
    gradient: &Tensor,
    moments: &mut [Tensor; 2],
    step: AdamWStep,
) -> Result<()> {
    let gradient = (gradient * f64::from(step.gradient_scale))?;
    let moving_average = |average: &Tensor, beta: f32, value: Tensor| -> Result<Tensor> {
        (average * f64::from(beta))? + (value * f64::from(1.0 - beta))?
    };
    let first = moving_average(&moments[0], step.beta1, gradient.clone())?;
    let second = moving_average(&moments[1], step.beta2, gradient.sqr()?)?;
    let corrected = |moment: &Tensor, beta: f32| moment * f64::from(step.correction(beta));
    let root = corrected(&second, step.beta2)?.sqrt()?;
    let direction = (corrected(&first, step.beta1)? / (root + f64::from(step.epsilon))?)?;
    let rate = f64::from(step.learning_rate);
    let decayed = (parameter.as_tensor() * (1.0 - rate * f64::from(step.weight_decay)))?;
    parameter.set(&(decayed - (direction * rate)?)?.detach())?;
    *moments = [first.detach(), second.detach()];
    Ok(())
}

/// Number of partial sums of [`sum_of_squares`]. Several sums let the compiler use vector registers.
const LANES: usize = 8;

/// Returns the sum of the squares of `values`.
pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
    simd!(|values: &[f32]| -> f64 {
        let mut sums = [0.0f64; LANES];
        let (chunks, tail) = values.as_chunks::<LANES>();
        for chunk in chunks {
            for (sum, value) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(*value) * f64::from(*value);
            }
        }
        let tail = tail.iter().map(|value| f64::from(*value).powi(2));
        sums.iter().sum::<f64>() + tail.sum::<f64>()
    })
}

/// Updates the moments m and v and the parameter p in step t, with the scaled gradient g, the learning rate lr
/// and the weight decay wd: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
/// p = p (1 - lr wd) - lr m^ / (sqrt(v^) + eps), with m^ = m / (1 - b1^t), v^ = v / (1 - b2^t).
#[inline(always)]
fn update(
    values: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    step: AdamWStep,
) {
    let first_scale = step.correction(step.beta1);
    let second_scale = step.correction(step.beta2);
    let decay = 1.0 - step.learning_rate * step.weight_decay;
    for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
        let g = g * step.gradient_scale;
        *m = step.beta1 * *m + (1.0 - step.beta1) * g;
        *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
        let direction = *m * first_scale / ((*v * second_scale).sqrt() + step.epsilon);
        *p = *p * decay - step.learning_rate * direction;
    }
}
