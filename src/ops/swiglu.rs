//! `y = silu(gate) * up` (Shazeer, arXiv 2002.05202), with silu(z) = z sigmoid(z).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::math::exp;
use super::{values, with_values};

/// Values that one task works on.
const TASK: usize = 1 << 14;

struct SwiGlu;

/// `gate_TF` and `up_TF` (T x F) give (T x F).
#[expect(non_snake_case, reason = "tensors carry their shape in their name")]
pub fn swiglu(gate_TF: &Tensor, up_TF: &Tensor) -> Result<Tensor> {
    gate_TF.apply_op2(up_TF, SwiGlu)
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values(gate, gate_layout)?, values(up, up_layout)?);
        let mut y = vec![0.0; gate.len()];
        y.par_chunks_mut(TASK)
            .zip(gate.par_chunks(TASK))
            .zip(up.par_chunks(TASK))
            .for_each(|((y, gate), up)| {
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(*gate) * up;
                }
            });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    /// dup = dy silu(gate), dgate = dy up s (1 + gate (1 - s)) with s = sigmoid(gate).
    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let mut dgate = vec![0.0; gate.elem_count()];
        let mut dup = vec![0.0; gate.elem_count()];
        with_values(gate, |gate| {
            with_values(up, |up| {
                with_values(&grad, |grad| {
                    dgate
                        .par_chunks_mut(TASK)
                        .zip(dup.par_chunks_mut(TASK))
                        .zip(gate.par_chunks(TASK))
                        .zip(up.par_chunks(TASK))
                        .zip(grad.par_chunks(TASK))
                        .for_each(|((((dgate, dup), gate), up), grad)| {
                            for i in 0..gate.len() {
                                let s = sigmoid(gate[i]);
                                dup[i] = grad[i] * gate[i] * s;
                                dgate[i] = grad[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                            }
                        })
                })
            })
        })???;
        Ok((
            Some(Tensor::from_vec(dgate, gate.shape(), gate.device())?),
            Some(Tensor::from_vec(dup, up.shape(), up.device())?),
        ))
    }
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}
