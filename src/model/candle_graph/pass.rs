//! A pass through the LM head and the loss on any device.
//!
//! The loss of a position is the same code as on the CPU: a chunk of logits is brought there, turned
//! into its gradient, and taken back. What comes before the head is differentiated by candle.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::model::gradients::Gradients;
use crate::ops::head_loss::{Rows, Units, chunk_rows};

/// Hands `rows` the logits of `hidden` (N x D) under the head (V x D), which it turns into their
/// gradient: adds the gradients of the head and of the variables that `hidden` was made of. Returns what
/// `rows` said.
///
/// # Errors
/// Where the device fails, or `rows` cannot get ready.
pub(crate) fn train_pass<R: Rows>(
    hidden: &Tensor,
    head: &Tensor,
    units: &Units,
    rows: &mut R,
    gradients: &mut Gradients,
) -> Result<Vec<R::Report>> {
    let vocabulary = head.dim(0)?;
    let (all, weight) = (hidden.detach(), head.detach().to_dtype(hidden.dtype())?);
    let mut parts = Vec::new();
    let mut reports = Vec::with_capacity(units.positions());
    let mut start = 0;
    for chunk in units.chunks(chunk_rows(vocabulary)) {
        let count = chunk.positions();
        rows.begin(start..start + count)?;
        let part = all.narrow(0, start, count)?;
        let logits = part.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
        let mut logits: Vec<f32> = logits.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        reports.extend(chunk.map(start, &mut logits, vocabulary, rows));
        let dlogits = Tensor::from_vec(logits, (count, vocabulary), hidden.device())?;
        let dlogits = dlogits.to_dtype(hidden.dtype())?;
        parts.push(dlogits.matmul(&weight)?);
        if head.is_variable() {
            let dweight = dlogits.t()?.matmul(&part)?.to_dtype(DType::F32)?;
            gradients.add(head.id(), &dweight)?;
        }
        start += count;
    }
    if parts.is_empty() {
        return Ok(reports);
    }
    // The gradient of this sum is what backward has to begin with.
    let begin = (hidden * Tensor::cat(&parts, 0)?.detach())?;
    let store = begin.to_dtype(DType::F32)?.sum_all()?.backward()?;
    gradients.add_all(&store)?;
    Ok(reports)
}
