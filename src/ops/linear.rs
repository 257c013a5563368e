//! `y = x W^T`, without a transposed copy of the weight in either direction.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::gemm::{Mat, MatMut, Threads, matmul};
use super::{values, with_values};

struct Linear;

/// Applies a linear layer: `x_TI` (T x I) and `weight_OI` (O x I, as Hugging Face stores it) give
/// (T x O).
///
/// # Errors
/// Where the inner sizes differ.
#[expect(non_snake_case, reason = "tensors carry their shape in their name")]
pub fn linear(x_TI: &Tensor, weight_OI: &Tensor) -> Result<Tensor> {
    x_TI.apply_op2(weight_OI, Linear)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, inputs) = x_layout.shape().dims2()?;
        let (outputs, weight_inputs) = weight_layout.shape().dims2()?;
        if inputs != weight_inputs {
            candle_core::bail!("linear: {inputs} inputs for a weight of {weight_inputs}");
        }
        let mut y = vec![0.0; tokens * outputs];
        matmul(
            MatMut::strided(&mut y, outputs),
            Mat::new(values(x, x_layout)?, tokens, inputs),
            Mat::new(values(weight, weight_layout)?, outputs, inputs).t(),
            false,
            Threads::All,
        );
        Ok((CpuStorage::F32(y), (tokens, outputs).into()))
    }

    /// dx = dy W, dW = dy^T x.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (tokens, inputs) = x.dims2()?;
        let outputs = weight.dim(0)?;
        let grad = grad.contiguous()?;
        let mut dx = vec![0.0; tokens * inputs];
        let mut dweight = vec![0.0; outputs * inputs];
        with_values(&grad, |grad| -> Result<()> {
            let grad = Mat::new(grad, tokens, outputs);
            with_values(weight, |weight| {
                let weight = Mat::new(weight, outputs, inputs);
                let dx = MatMut::strided(&mut dx, inputs);
                matmul(dx, grad, weight, false, Threads::All);
            })?;
            with_values(x, |x| {
                let dweight = MatMut::strided(&mut dweight, inputs);
                let x = Mat::new(x, tokens, inputs);
                matmul(dweight, grad.t(), x, false, Threads::All);
            })
        })??;
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dweight, weight.shape(), x.device())?),
        ))
    }
}
