//! A batch through the model and the loss: with gradients for training, without for evaluation.

use std::ops::Range;

use anyhow::Result;

use super::loss;
use super::metrics::{Means, Sums};
use crate::data::batch::Batch;
use crate::data::dataset::Examples;
use crate::model::forward::HiddenStates;
use crate::model::gradients::Gradients;
use crate::model::tape::Activations;
use crate::model::{Model, ModelInput};
use crate::ops::head_loss::{LogitsVisitor, PositionGroups, chunk_rows};
use crate::train::loss::row::{Row, RowLoss, Weights};

/// Who learns, and from whom.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    pub student: &'a Model,
    /// A teacher on this machine, whose distributions are the soft labels; without one they are those
    /// of the batch.
    pub teacher: Option<&'a Model>,
}

impl Models<'_> {
    /// The longest example that all of them can read, in tokens.
    pub fn context(&self) -> usize {
        let models = [Some(self.student), self.teacher].into_iter().flatten();
        let contexts = models.map(|model| model.config().max_position_embeddings);
        contexts.min().unwrap_or(usize::MAX)
    }
}

impl<'a> From<&'a Model> for Models<'a> {
    fn from(student: &'a Model) -> Self {
        Self {
            student,
            teacher: None,
        }
    }
}

/// Adds the gradients of a micro-batch to `gradients`; returns its loss and the unscaled terms of
/// its positions.
///
/// # Errors
/// Where an example does not fit a model.
pub fn gradients<'a>(
    models: impl Into<Models<'a>>,
    batch: &Batch,
    weights: Weights,
    activations: Activations,
    gradients: &mut Gradients,
) -> Result<(f64, Vec<RowLoss>)> {
    let models = models.into();
    let mut objective = Objective::new(models, batch, weights)?;
    let groups = PositionGroups::new(batch.labels.len(), &objective.spans);
    let rows = models.student.forward_backward(
        input(batch),
        &groups,
        activations,
        &mut objective,
        gradients,
    )?;
    let loss: f64 = rows.iter().map(|row| f64::from(row.loss)).sum();
    Ok((loss * f64::from(weights.scale), rows))
}

/// What is made of the logits of a batch.
struct Objective<'a> {
    batch: &'a Batch,
    weights: Weights,
    /// Positions that are seen together: chunks, where these count.
    spans: Vec<Range<usize>>,
    teacher: Option<Dense<'a>>,
}

/// What a teacher on this machine says of the positions that are next.
struct Dense<'a> {
    hidden: HiddenStates<'a>,
    vocabulary: usize,
    /// The first of them.
    start: usize,
    logits: Vec<f32>,
}

impl<'a> Objective<'a> {
    fn new(models: Models<'a>, batch: &'a Batch, weights: Weights) -> Result<Self> {
        let rows = chunk_rows(models.student.config().vocab_size).min(batch.labels.len());
        let teacher = models.teacher.map(|teacher| -> Result<_> {
            let vocabulary = teacher.config().vocab_size;
            Ok(Dense {
                hidden: teacher.hidden(input(batch))?,
                vocabulary,
                start: 0,
                logits: vec![0.0; rows * vocabulary],
            })
        });
        let teacher = teacher.transpose()?;
        let spans = match weights.alm > 0.0 && teacher.is_none() {
            true => batch.chunks.iter().map(|chunk| chunk.0.clone()).collect(),
            false => Vec::new(),
        };
        Ok(Self {
            batch,
            weights,
            spans,
            teacher,
        })
    }

    /// What supervised position `n` teaches.
    fn target(&self, n: usize) -> Row<'_> {
        let dense = self.teacher.as_ref().map(|teacher| {
            let at = n - teacher.start;
            &teacher.logits[at * teacher.vocabulary..(at + 1) * teacher.vocabulary]
        });
        Row {
            dense,
            ..target(self.batch, n)
        }
    }
}

impl LogitsVisitor for Objective<'_> {
    type Output = RowLoss;

    fn prepare(&mut self, positions: Range<usize>) -> candle_core::Result<()> {
        if let Some(teacher) = &mut self.teacher {
            teacher.start = positions.start;
            let logits = &mut teacher.logits[..positions.len() * teacher.vocabulary];
            teacher.hidden.logits(positions, logits)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn visit(&self, positions: Range<usize>, logits: &mut [f32]) -> Vec<RowLoss> {
        let chunks = &self.batch.chunks;
        let found = chunks.binary_search_by_key(&positions.start, |chunk| chunk.0.start);
        match found {
            Ok(at) if !self.spans.is_empty() => {
                let rows: Vec<Row> = positions.map(|n| self.target(n)).collect();
                loss::chunk(logits, &rows, chunks[at].1, self.weights)
            }
            _ => vec![loss::row(
                logits,
                self.target(positions.start),
                self.weights,
            )],
        }
    }
}

fn input(batch: &Batch) -> ModelInput<'_> {
    ModelInput {
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
        drawn: batch.sampled_logprob.get(n).copied().flatten(),
        exact: batch.is_exact_sample.get(n).copied().unwrap_or_default(),
        lists_end: batch.lists_end.get(n).copied().flatten(),
        ..Row::default()
    }
}

/// Mean terms of a model on examples, without gradients; soft labels are those of `models.teacher`
/// where there is one.
///
/// # Errors
/// Where an example does not fit a model.
pub fn evaluate<'a>(
    models: impl Into<Models<'a>>,
    examples: Examples,
    batch_size: usize,
) -> Result<Means> {
    let models = models.into();
    let weights = Weights::default();
    let mut sums = Sums::default();
    for start in (0..examples.len()).step_by(batch_size) {
        let batch = Batch::new(examples.iter().skip(start).take(batch_size));
        let mut objective = Objective::new(models, &batch, weights)?;
        sums.add(&models.student.visit_logits(input(&batch), &mut objective)?);
    }
    Ok(sums.means())
}
