//! A pass through the LM head and the loss on any device.
//!
//! The loss of a position is the same code as on the CPU: a chunk of logits is brought there, turned
//! into its gradient, and taken back. What comes before the head is differentiated by candle.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::model::gradients::Gradients;
use crate::ops::head_loss::CHUNK;

/// Calls `row` with each row of logits (V) of `hidden` (N x D) under the head (V x D), and collects
/// what it returns in order.
///
/// # Errors
/// Where the device fails.
pub fn map_logits<R: Send>(
    hidden: &Tensor,
    head: &Tensor,
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> Result<Vec<R>> {
    let mut reports = Vec::with_capacity(hidden.dim(0)?);
    chunks(hidden, head, row, &mut reports, |_, _| Ok(()))?;
    Ok(reports)
}

/// As [`map_logits`], where `row` turns logits into their gradient: adds the gradients of the head
/// and of the variables that `hidden` was made of.
///
/// # Errors
/// Where the device fails.
pub fn train_pass<R: Send>(
    hidden: &Tensor,
    head: &Tensor,
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
    gradients: &mut Gradients,
) -> Result<Vec<R>> {
    let mut reports = Vec::with_capacity(hidden.dim(0)?);
    let weight = head.detach();
    let mut parts = Vec::new();
    chunks(hidden, head, row, &mut reports, |hidden, dlogits| {
        let narrow = dlogits.to_dtype(hidden.dtype())?;
        parts.push(narrow.matmul(&weight.to_dtype(hidden.dtype())?)?);
        if head.is_variable() {
            let dweight = narrow.t()?.matmul(hidden)?.to_dtype(DType::F32)?;
            gradients.add(head.id(), &dweight)?;
        }
        Ok(())
    })?;
    if parts.is_empty() {
        return Ok(reports);
    }
    // The gradient of this sum is what backward has to begin with.
    let begin = (hidden * Tensor::cat(&parts, 0)?.detach())?;
    let store = begin.to_dtype(DType::F32)?.sum_all()?.backward()?;
    gradients.add_all(&store)?;
    Ok(reports)
}

/// Hands `row` the logits of a chunk of rows at a time, and `then` the chunk's hidden states and what
/// `row` made of its logits.
fn chunks<R: Send>(
    hidden: &Tensor,
    head: &Tensor,
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
    reports: &mut Vec<R>,
    mut then: impl FnMut(&Tensor, Tensor) -> Result<()>,
) -> Result<()> {
    let (rows, vocabulary) = (hidden.dim(0)?, head.dim(0)?);
    let (all, weight) = (hidden.detach(), head.detach());
    let weight = weight.to_dtype(hidden.dtype())?.t()?;
    for start in (0..rows).step_by(CHUNK) {
        let hidden = all.narrow(0, start, CHUNK.min(rows - start))?;
        let logits = hidden.matmul(&weight)?.to_dtype(DType::F32)?;
        let mut logits: Vec<f32> = logits.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let of_chunk = logits.par_chunks_mut(vocabulary).enumerate();
        reports.par_extend(of_chunk.map(|(line, logits)| row(start + line, logits)));
        let shape = (hidden.dim(0)?, vocabulary);
        then(&hidden, Tensor::from_vec(logits, shape, hidden.device())?)?;
    }
    Ok(())
}
