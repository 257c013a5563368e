//! The LM head and the loss on any device.
//!
//! Each chunk of logits is copied to the CPU, where the code that the tape also uses computes its gradient.
//! The gradient is copied back. candle differentiates everything before the head.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::model::gradients::Gradients;
use crate::ops::head_loss::{LogitsVisitor, PositionGroups, chunk_rows};

/// Computes the logits of `hidden_ND` with the LM head `head_VD`. `visitor` turns the logits of each group of
/// positions into their gradient. Adds the gradients of the head and of all variables that `hidden_ND`
/// depends on to `gradients`. Returns the results of `visitor`, in order.
///
/// # Errors
/// Where the device or the preparation of `visitor` fails.
pub(crate) fn forward_backward<R: LogitsVisitor>(
    hidden_ND: &Tensor,
    head_VD: &Tensor,
    groups: &PositionGroups,
    visitor: &mut R,
    gradients: &mut Gradients,
) -> Result<Vec<R::Output>> {
    let vocabulary = head_VD.dim(0)?;
    let detached_ND = hidden_ND.detach();
    let weight_VD = head_VD.detach().to_dtype(hidden_ND.dtype())?;
    let mut dhidden_chunks = Vec::new();
    let mut outputs = Vec::with_capacity(groups.positions());
    let mut start = 0;
    for chunk in groups.chunks(chunk_rows(vocabulary)) {
        let count = chunk.positions();
        visitor.prepare(start..start + count)?;
        let hidden_nD = detached_ND.narrow(0, start, count)?;
        let logits_nV = hidden_nD.matmul(&weight_VD.t()?)?.to_dtype(DType::F32)?;
        let logits_nV = logits_nV.to_device(&Device::Cpu)?.flatten_all()?;
        let mut logits_nV: Vec<f32> = logits_nV.to_vec1()?;
        outputs.extend(chunk.visit(start, &mut logits_nV, vocabulary, visitor));
        let dlogits_nV = Tensor::from_vec(logits_nV, (count, vocabulary), hidden_ND.device())?;
        let dlogits_nV = dlogits_nV.to_dtype(hidden_ND.dtype())?;
        dhidden_chunks.push(dlogits_nV.matmul(&weight_VD)?);
        if head_VD.is_variable() {
            let dweight_VD = dlogits_nV.t()?.matmul(&hidden_nD)?.to_dtype(DType::F32)?;
            gradients.add(head_VD.id(), &dweight_VD)?;
        }
        start += count;
    }
    if dhidden_chunks.is_empty() {
        return Ok(outputs);
    }
    // candle's `backward` needs a scalar. The gradient of this sum with respect to `hidden_ND` is dhidden.
    let product_ND = (hidden_ND * Tensor::cat(&dhidden_chunks, 0)?.detach())?;
    let store = product_ND.to_dtype(DType::F32)?.sum_all()?.backward()?;
    gradients.add_all(&store)?;
    Ok(outputs)
}
