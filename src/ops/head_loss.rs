//! The LM head and its loss in one operation, chunked over the supervised positions.
//!
//! The logits (N x V) are the largest tensor of a step and are never stored: a chunk of rows is
//! computed, turned into its loss and gradient in place, multiplied back, and overwritten by the
//! next. Both gradients are ready when the forward pass ends.

use rayon::prelude::*;

use super::linear::Linear;
use super::{Gradient, simd};

/// Rows of logits that exist at a time: enough that packing the head's weight is little work beside
/// multiplying with it.
pub const CHUNK: usize = 512;

/// The loss of `hidden` (N x D) under the head `weight` (V x D), a linear layer from D to V.
///
/// `row` gets a position's index and its logits (V), turns these into their gradient in place, and
/// returns what it says of the position. `logits` has room for [`CHUNK`] rows, or N if that is
/// less. Gradients that nobody asks for are not computed.
pub fn head_loss<R: Send>(
    head: Linear,
    hidden: &[f32],
    weight: &[f32],
    logits: &mut [f32],
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
    (dhidden, mut dweight): (&mut [f32], Option<Gradient>),
) -> Vec<R> {
    let (width, vocabulary) = (head.inputs, head.outputs);
    if let Some(Gradient { values, add: false }) = &mut dweight
        && hidden.is_empty()
    {
        values.fill(0.0);
    }
    let mut reports = Vec::with_capacity(hidden.len() / width);
    let chunks = hidden
        .chunks(CHUNK * width)
        .zip(dhidden.chunks_mut(CHUNK * width));
    for (chunk, (hidden, dhidden)) in chunks.enumerate() {
        let logits = &mut logits[..hidden.len() / width * vocabulary];
        reports.extend(chunk_of_rows(head, hidden, weight, logits, chunk, &row));
        let dhidden = Gradient {
            values: dhidden,
            add: false,
        };
        head.backward_input(logits, weight, dhidden);
        if let Some(dweight) = &mut dweight {
            let add = dweight.add || chunk > 0;
            let dweight = Gradient {
                values: dweight.values,
                add,
            };
            head.backward_weight(logits, hidden, dweight);
        }
    }
    reports
}

/// Calls `row` with each row of logits (V) of `hidden` (N x D), a chunk at a time, and collects
/// what it returns in order.
pub fn map_logits<R: Send>(
    head: Linear,
    hidden: &[f32],
    weight: &[f32],
    logits: &mut [f32],
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let (width, vocabulary) = (head.inputs, head.outputs);
    let mut reports = Vec::with_capacity(hidden.len() / width);
    for (chunk, hidden) in hidden.chunks(CHUNK * width).enumerate() {
        let logits = &mut logits[..hidden.len() / width * vocabulary];
        reports.extend(chunk_of_rows(head, hidden, weight, logits, chunk, &row));
    }
    reports
}

/// The logits of a chunk of rows, handed to `row`.
fn chunk_of_rows<R: Send>(
    head: Linear,
    hidden: &[f32],
    weight: &[f32],
    logits: &mut [f32],
    chunk: usize,
    row: &(impl Fn(usize, &mut [f32]) -> R + Sync),
) -> Vec<R> {
    head.forward(hidden, weight, None, logits, false);
    logits
        .par_chunks_mut(head.outputs)
        .enumerate()
        .map(|(line, logits)| simd(|| row(chunk * CHUNK + line, logits)))
        .collect()
}
