//! Forward pass and loss of a batch: with gradients for training, without for evaluation.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::ops::Range;

use anyhow::Result;

use super::loss;
use super::metrics::{MetricMeans, MetricSums};
use crate::data::batch::Batch;
use crate::data::dataset::Examples;
use crate::model::forward::HiddenStates;
use crate::model::gradients::Gradients;
use crate::model::tape::Activations;
use crate::model::{Model, ModelInput, SourceInput};
use crate::ops::head_loss::{LogitsVisitor, PositionGroups, chunk_rows};
use crate::train::loss::position::{LossWeights, PositionLoss, PositionTarget};

/// The student, and the local teacher if there is one.
#[derive(Clone, Copy)]
pub struct ModelPair<'a> {
    pub student: &'a Model,
    /// Local teacher whose distributions replace the soft labels of the batch.
    pub teacher: Option<&'a Model>,
}

impl ModelPair<'_> {
    /// Returns the maximum length of an example that both models can read, in tokens.
    pub fn context(&self) -> usize {
        let models = [Some(self.student), self.teacher].into_iter().flatten();
        let contexts = models.map(|model| model.config().max_position_embeddings);
        contexts.min().unwrap_or(usize::MAX)
    }
}

impl<'a> From<&'a Model> for ModelPair<'a> {
    fn from(student: &'a Model) -> Self {
        Self {
            student,
            teacher: None,
        }
    }
}

/// Adds the gradients of a micro-batch to `gradients`. Returns its loss, multiplied by `weights.scale`, and the
/// unscaled loss terms of its positions.
///
/// # Errors
/// If an example does not fit a model.
pub fn gradients<'a>(
    models: impl Into<ModelPair<'a>>,
    batch: &Batch,
    weights: LossWeights,
    activations: Activations,
    gradients: &mut Gradients,
) -> Result<(f64, Vec<PositionLoss>)> {
    let models = models.into();
    let mut objective = Objective::new(models, batch, weights)?;
    let groups = PositionGroups::new(batch.labels_N.len(), &objective.spans);
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

/// The loss of a batch, computed from its logits.
struct Objective<'a> {
    batch: &'a Batch,
    weights: LossWeights,
    /// Ranges of positions that must be processed together: the chunks, if their weight is not 0. Empty with a
    /// local teacher.
    spans: Vec<Range<usize>>,
    teacher: Option<TeacherLogits<'a>>,
}

/// Logits of a local teacher at the current positions: the n positions of the last call of `prepare`.
struct TeacherLogits<'a> {
    hidden: HiddenStates<'a>,
    vocab_size: usize,
    /// First of the current positions.
    start: usize,
    /// Logits of the current positions, row by row. May have unused rows at the end.
    logits_nV: Vec<f32>,
}

impl<'a> Objective<'a> {
    fn new(models: ModelPair<'a>, batch: &'a Batch, weights: LossWeights) -> Result<Self> {
        let rows = chunk_rows(models.student.config().vocab_size).min(batch.labels_N.len());
        let teacher = models.teacher.map(|teacher| -> Result<_> {
            let vocab_size = teacher.config().vocab_size;
            Ok(TeacherLogits {
                hidden: teacher.hidden(input(batch))?,
                vocab_size,
                start: 0,
                logits_nV: vec![0.0; rows * vocab_size],
            })
        });
        let teacher = teacher.transpose()?;
        let spans = if weights.alm > 0.0 && teacher.is_none() {
            batch.chunks_C.iter().map(|chunk| chunk.0.clone()).collect()
        } else {
            Vec::new()
        };
        Ok(Self {
            batch,
            weights,
            spans,
            teacher,
        })
    }

    /// Returns the training target of supervised position `n`.
    fn target(&self, n: usize) -> PositionTarget<'_> {
        let teacher_logits_V = self.teacher.as_ref().map(|teacher| {
            let row = n - teacher.start;
            &teacher.logits_nV[row * teacher.vocab_size..(row + 1) * teacher.vocab_size]
        });
        PositionTarget {
            teacher_logits_V,
            ..target(self.batch, n)
        }
    }
}

impl LogitsVisitor for Objective<'_> {
    type Output = PositionLoss;

    fn prepare(&mut self, positions: Range<usize>) -> candle_core::Result<()> {
        if let Some(teacher) = &mut self.teacher {
            teacher.start = positions.start;
            let logits_nV = &mut teacher.logits_nV[..positions.len() * teacher.vocab_size];
            teacher.hidden.logits(positions, logits_nV)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn visit(&self, positions: Range<usize>, logits_nV: &mut [f32]) -> Vec<PositionLoss> {
        let chunks_C = &self.batch.chunks_C;
        let chunk_index = chunks_C.binary_search_by_key(&positions.start, |chunk| chunk.0.start);
        match chunk_index {
            Ok(index) if !self.spans.is_empty() => {
                let targets: Vec<PositionTarget> = positions.map(|n| self.target(n)).collect();
                loss::chunk(logits_nV, &targets, chunks_C[index].1, self.weights)
            }
            _ => vec![loss::position(
                logits_nV,
                self.target(positions.start),
                self.weights,
            )],
        }
    }
}

fn input(batch: &Batch) -> ModelInput<'_> {
    ModelInput {
        input_ids_T: &batch.input_ids_T,
        segments_B: &batch.segments_B,
        positions_N: &batch.positions_N,
        source: SourceInput {
            ids_U: &batch.source_ids_U,
            segments_B: &batch.source_segments_B,
        },
    }
}

/// Returns the training target of supervised position `n` of a batch, without a local teacher.
fn target(batch: &Batch, n: usize) -> PositionTarget<'_> {
    let soft = batch.soft_offsets_N1[n]..batch.soft_offsets_N1[n + 1];
    PositionTarget {
        label: batch.labels_N[n],
        soft_ids_K: &batch.soft_ids_NK[soft.clone()],
        soft_logprobs_K: &batch.soft_logprobs_NK[soft],
        sampled_logprob: batch.sampled_logprobs_N.get(n).copied().flatten(),
        is_exact_sample: batch.is_exact_sample_N.get(n).copied().unwrap_or_default(),
        lists_end: batch.lists_end_N.get(n).copied().flatten(),
        ..PositionTarget::default()
    }
}

/// Returns the mean metrics of a model on examples, without gradients. `check_stop` is called before each batch; its
/// error ends the evaluation.
///
/// # Errors
/// If an example does not fit a model, or `check_stop` fails.
pub fn evaluate<'a>(
    models: impl Into<ModelPair<'a>>,
    examples: Examples,
    batch_size: usize,
    check_stop: impl Fn() -> Result<()>,
) -> Result<MetricMeans> {
    let models = models.into();
    let weights = LossWeights::default();
    let mut sums = MetricSums::default();
    for start in (0..examples.len()).step_by(batch_size) {
        check_stop()?;
        let batch = Batch::new(examples.iter().skip(start).take(batch_size));
        let mut objective = Objective::new(models, &batch, weights)?;
        sums.add(&models.student.visit_logits(input(&batch), &mut objective)?);
    }
    Ok(sums.means())
}
