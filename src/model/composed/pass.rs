//! A pass through the LM head and the loss on any device.
//!
//! The loss of a position is the same code as on the CPU: a chunk of logits is brought there, turned
//! into its gradient, and taken back. What comes before the head is differentiated by candle.

use std::ops::Range;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::model::gradients::Gradients;
use crate::ops::head_loss::Units;

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
    let units = Units::new(hidden.dim(0)?, &[]);
    let rows = |range: Range<usize>, logits: &mut [f32]| vec![row(range.start, logits)];
    chunks(hidden, head, &units, rows, |_, _| Ok(()))
}

/// Calls `rows` with each unit of rows, which it turns into their gradient: adds the gradients of the
/// head and of the variables that `hidden` was made of.
///
/// # Errors
/// Where the device fails.
pub fn train_pass<R: Send>(
    hidden: &Tensor,
    head: &Tensor,
    units: &Units,
    rows: impl Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync,
    gradients: &mut Gradients,
) -> Result<Vec<R>> {
    let weight = head.detach();
    let mut parts = Vec::new();
    let reports = chunks(hidden, head, units, rows, |hidden, dlogits| {
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

/// Hands `rows` the logits of a chunk of units, and `then` the chunk's hidden states and what `rows`
/// made of its logits; and so on. Returns what `rows` said.
fn chunks<R: Send>(
    hidden: &Tensor,
    head: &Tensor,
    units: &Units,
    rows: impl Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync,
    mut then: impl FnMut(&Tensor, Tensor) -> Result<()>,
) -> Result<Vec<R>> {
    let vocabulary = head.dim(0)?;
    let (all, weight) = (hidden.detach(), head.detach());
    let weight = weight.to_dtype(hidden.dtype())?.t()?;
    let mut reports = Vec::with_capacity(units.positions());
    let mut start = 0;
    for chunk in units.chunks() {
        let count = chunk.positions();
        let hidden = all.narrow(0, start, count)?;
        let logits = hidden.matmul(&weight)?.to_dtype(DType::F32)?;
        let mut logits: Vec<f32> = logits.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        reports.extend(chunk.map(start, &mut logits, vocabulary, &rows));
        let shape = (count, vocabulary);
        then(&hidden, Tensor::from_vec(logits, shape, hidden.device())?)?;
        start += count;
    }
    Ok(reports)
}
