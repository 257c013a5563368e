//! One optimizer step: the passes over its micro-batches, and the update.

use anyhow::{Result, bail};

use super::loss::divergence::Divergence;
use super::metrics::MetricSums;
use super::objective::{self, ModelPair};
use super::optimizer::Optimizer;
use super::soft_labels::SoftLabelChoice;
use super::trainable::TrainableModel;
use crate::config::{LossConfig, TrainConfig};
use crate::data::batch::{Batch, micro_batches};
use crate::data::prepared::shard::ExampleView;
use crate::model::Model;
use crate::model::gradients::Gradients;
use crate::model::tape::Activations;
use crate::train::loss::position::{LossWeights, SoftTerm};

/// Settings and buffers of optimizer steps.
pub(crate) struct Stepper {
    settings: TrainConfig,
    weights: LossWeights,
    /// Loss weights of answers that the student generated.
    on_policy_weights: LossWeights,
    activations: Activations,
    /// Accumulated gradients of the current step; empty between two steps.
    gradients: Gradients,
}

/// Training data of one step.
pub(crate) struct StepBatch<'a> {
    /// Examples of the data set.
    pub examples: &'a [ExampleView<'a>],
    /// Answers that the student generated, with the teacher's soft labels.
    pub on_policy: Vec<Batch>,
}

impl<'a> StepBatch<'a> {
    /// Creates the data of a step without generated answers.
    pub(crate) fn from_examples(examples: &'a [ExampleView<'a>]) -> Self {
        Self {
            examples,
            on_policy: Vec::new(),
        }
    }

    /// Returns the number of supervised positions.
    fn position_count(&self) -> usize {
        let examples: usize = self
            .examples
            .iter()
            .map(|example| example.supervised())
            .sum();
        let on_policy: usize = self
            .on_policy
            .iter()
            .map(|batch| batch.labels_N.len())
            .sum();
        examples + on_policy
    }

    fn keys(&self) -> Vec<String> {
        let examples = self.examples.iter().map(|example| example.key().to_owned());
        let on_policy = self.on_policy.iter().flat_map(|batch| batch.keys_B.clone());
        examples.chain(on_policy).collect()
    }
}

/// Loss, metrics and size of one step.
#[derive(Debug, Default)]
pub struct StepResult {
    /// The minimised loss, computed before the update; `None` if the step had no supervised positions.
    pub loss: Option<f64>,
    /// Sums over the examples of the data set.
    pub sums: MetricSums,
    /// Sums over the answers that the student generated.
    pub on_policy_sums: MetricSums,
    /// Global norm of the gradient before clipping; `None` if the step had no supervised positions.
    pub gradient_norm: Option<f64>,
    /// Number of tokens in the step, supervised or not.
    pub tokens: u64,
}

impl Stepper {
    /// Creates a stepper for `model`. `soft_labels` selects the loss terms of the examples, `on_policy` the divergences
    /// of generated answers.
    pub(crate) fn new(
        train: &TrainConfig,
        loss: &LossConfig,
        soft_labels: &SoftLabelChoice,
        on_policy: Option<[Divergence; 2]>,
        model: &Model,
    ) -> Self {
        let defaults = LossWeights::default();
        let on_policy = on_policy.unwrap_or([Divergence::ReverseKl; 2]);
        Self {
            settings: train.clone(),
            weights: LossWeights {
                soft: soft_labels.terms.unwrap_or(defaults.soft),
                alm: soft_labels.terms.map_or(0.0, |_| loss.alm_weight as f32),
                label_smoothing: loss.label_smoothing as f32,
                end: soft_labels.end,
                // `run` sets the scale of each step.
                scale: 1.0,
            },
            on_policy_weights: LossWeights {
                soft: on_policy.map(|divergence| SoftTerm {
                    divergence,
                    weight: 1.0,
                }),
                ..defaults
            },
            activations: if train.activation_checkpointing {
                Activations::Recompute
            } else {
                Activations::Keep
            },
            gradients: model.gradients(),
        }
    }

    /// Runs step `step` (from 1) on `batch`. The distributions of the local `teacher` replace the soft labels of the
    /// batch.
    ///
    /// # Errors
    /// If an example does not fit a model, or a loss or gradient is not finite. If not finite, the error names the
    /// examples. No parameter has changed.
    pub(crate) fn run(
        &mut self,
        (student, optimizer): (&TrainableModel, &mut Optimizer),
        teacher: Option<&Model>,
        step: u64,
        batch: &StepBatch,
        learning_rate: f64,
    ) -> Result<StepResult> {
        if batch.position_count() == 0 {
            // The student generated all answers, and the teacher scored none of them.
            optimizer.skip();
            return Ok(StepResult::default());
        }
        let scale = 1.0 / batch.position_count() as f32;
        let models = ModelPair {
            student: &student.model,
            teacher,
        };
        let mut result = StepResult::default();
        let mut add_gradients =
            |micro_batch: &Batch, weights: LossWeights, sums: &mut MetricSums| {
                let weights = LossWeights { scale, ..weights };
                let (loss, rows) = objective::gradients(
                    models,
                    micro_batch,
                    weights,
                    self.activations,
                    &mut self.gradients,
                )?;
                if !loss.is_finite() {
                    bail!(not_finite("loss", step, &micro_batch.keys_B));
                }
                *result.loss.get_or_insert_default() += loss;
                result.tokens += micro_batch.tokens() as u64;
                sums.add(&rows);
                Ok(())
            };
        let mut sums = MetricSums::default();
        let mut on_policy_sums = MetricSums::default();
        for micro_batch in micro_batches(batch.examples, &self.settings) {
            add_gradients(&Batch::new(micro_batch), self.weights, &mut sums)?;
        }
        for micro_batch in &batch.on_policy {
            add_gradients(micro_batch, self.on_policy_weights, &mut on_policy_sums)?;
        }
        result.sums = sums;
        result.on_policy_sums = on_policy_sums;
        let norm = optimizer.gradient_norm(&self.gradients)?;
        if !norm.is_finite() {
            bail!(not_finite("gradient", step, &batch.keys()));
        }
        result.gradient_norm = Some(norm);
        optimizer.update(&self.settings, learning_rate, norm, &self.gradients)?;
        self.gradients.clear();
        Ok(result)
    }
}

fn not_finite(quantity: &str, step: u64, keys: &[String]) -> String {
    format!(
        "the {quantity} of step {step} is not finite; nothing was updated. Lower `train.learning_rate`, \
         or inspect these examples: {}",
        keys.join(", ")
    )
}
