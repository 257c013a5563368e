//! A batch through the model and the loss: with gradients for training, without for evaluation.

use anyhow::Result;
use candle_core::Tensor;

use super::loss::{self, Row, RowLoss};
use super::metrics::{Means, Sums};
use crate::data::batch::Batch;
use crate::data::dataset::Examples;
use crate::model::Model;
use crate::ops::head_loss::{head_loss, map_logits};

/// The loss of a micro-batch, times `scale` and summed (a scalar), and the unscaled terms of its
/// positions.
///
/// # Errors
/// Where an example does not fit the model.
pub fn loss(
    model: &Model,
    batch: &Batch,
    kd_weight: f32,
    scale: f32,
) -> Result<(Tensor, Vec<RowLoss>)> {
    let hidden = model.hidden_at(&batch.input_ids, &batch.segments, &batch.positions)?;
    let batch = batch.clone();
    let row = move |n: usize, logits: &mut [f32]| {
        let row = loss::row(logits, target(&batch, n), kd_weight, scale);
        let weighted = match row.kd {
            Some(kd) => (1.0 - kd_weight) * row.ce + kd_weight * kd,
            None => row.ce,
        };
        (scale * weighted, row)
    };
    Ok(head_loss(&hidden, model.head(), row)?)
}

/// What supervised position `n` of a batch teaches.
fn target(batch: &Batch, n: usize) -> Row<'_> {
    let soft = batch.soft_offsets[n]..batch.soft_offsets[n + 1];
    Row {
        label: batch.labels[n],
        soft_ids: &batch.soft_ids[soft.clone()],
        soft_logprobs: &batch.soft_logprobs[soft],
    }
}

/// Mean terms of a model on examples, without gradients.
///
/// # Errors
/// Where an example does not fit the model.
pub fn evaluate(model: &Model, examples: Examples, batch_size: usize) -> Result<Means> {
    let mut sums = Sums::default();
    for start in (0..examples.len()).step_by(batch_size) {
        let batch = Batch::new(examples.iter().skip(start).take(batch_size));
        let hidden = model.hidden_at(&batch.input_ids, &batch.segments, &batch.positions)?;
        let rows = map_logits(&hidden, model.head(), |n, logits| {
            loss::row(logits, target(&batch, n), 0.0, 1.0)
        })?;
        sums.add(&rows);
    }
    Ok(sums.means())
}
