//! A batch through the model and the loss: with gradients for training, without for evaluation.

use std::ops::Range;

use anyhow::Result;

use super::loss::divergence::Divergence;
use super::loss::{self, Row, RowLoss, Weights};
use super::metrics::{Means, Sums};
use crate::data::batch::Batch;
use crate::data::dataset::Examples;
use crate::model::gradients::Gradients;
use crate::model::tape::Memory;
use crate::model::{Input, Model};
use crate::ops::head_loss::Units;

/// Adds the gradients of a micro-batch to `gradients`; returns its loss and the unscaled terms of
/// its positions.
///
/// # Errors
/// Where an example does not fit the model.
pub fn gradients(
    model: &Model,
    batch: &Batch,
    weights: Weights,
    memory: Memory,
    gradients: &mut Gradients,
) -> Result<(f64, Vec<RowLoss>)> {
    let spans: Vec<Range<usize>> = match weights.alm > 0.0 {
        true => batch.chunks.iter().map(|chunk| chunk.0.clone()).collect(),
        false => Vec::new(),
    };
    let units = Units::new(batch.labels.len(), &spans);
    let rows = |positions: Range<usize>, logits: &mut [f32]| {
        let found = batch
            .chunks
            .binary_search_by_key(&positions.start, |chunk| chunk.0.start);
        match found {
            Ok(at) if !spans.is_empty() => {
                let rows: Vec<Row> = positions.map(|n| target(batch, n)).collect();
                loss::chunk(logits, &rows, batch.chunks[at].1, weights)
            }
            _ => vec![loss::row(logits, target(batch, positions.start), weights)],
        }
    };
    let rows = model.train_pass(input(batch), &units, memory, rows, gradients)?;
    let loss: f64 = rows.iter().map(|row| f64::from(row.loss)).sum();
    Ok((loss * f64::from(weights.scale), rows))
}

fn input(batch: &Batch) -> Input<'_> {
    Input {
        input_ids: &batch.input_ids,
        segments: &batch.segments,
        positions: &batch.positions,
    }
}

/// What supervised position `n` of a batch teaches.
fn target(batch: &Batch, n: usize) -> Row<'_> {
    let soft = batch.soft_offsets[n]..batch.soft_offsets[n + 1];
    Row {
        label: batch.labels[n],
        soft_ids: &batch.soft_ids[soft.clone()],
        soft_logprobs: &batch.soft_logprobs[soft],
        drawn: batch.drawn.get(n).copied().flatten(),
        exact: batch.exact.get(n).copied().unwrap_or_default(),
        chunk: 0.0,
    }
}

/// Mean terms of a model on examples, without gradients.
///
/// # Errors
/// Where an example does not fit the model.
pub fn evaluate(model: &Model, examples: Examples, batch_size: usize) -> Result<Means> {
    let weights = Weights {
        kd: 0.0,
        divergence: [Divergence::Tail; 2],
        alm: 0.0,
        label_smoothing: 0.0,
        scale: 1.0,
    };
    let mut sums = Sums::default();
    for start in (0..examples.len()).step_by(batch_size) {
        let batch = Batch::new(examples.iter().skip(start).take(batch_size));
        let rows = model.map_logits(input(&batch), |n, logits| {
            loss::row(logits, target(&batch, n), weights)
        })?;
        sums.add(&rows);
    }
    Ok(sums.means())
}
