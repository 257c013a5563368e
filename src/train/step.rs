//! One optimizer step: the passes over its micro-batches, and the update.

use anyhow::{Result, bail};

use super::loss::divergence::Divergence;
use super::metrics::Sums;
use super::objective::{self, Models};
use super::optimizer::Optimizer;
use super::soft_labels::Choice;
use super::student::Student;
use crate::config::{Config, TrainConfig};
use crate::data::batch::{Batch, micro_batches};
use crate::data::prepared::shard::ExampleView;
use crate::model::Model;
use crate::model::gradients::Gradients;
use crate::model::tape::Activations;
use crate::train::loss::row::{SoftTerm, Weights};

/// How steps are taken.
pub(crate) struct Stepper {
    settings: TrainConfig,
    weights: Weights,
    /// Of what the student wrote itself.
    on_policy: Weights,
    activations: Activations,
    /// Of the step under way; none between two.
    gradients: Gradients,
}

/// What a step is taken on.
pub(crate) struct Lesson<'a> {
    /// Examples as they are.
    pub given: &'a [ExampleView<'a>],
    /// What the student wrote itself, for the teacher to judge.
    pub written: Vec<Batch>,
}

impl<'a> Lesson<'a> {
    /// These examples, as they are.
    pub(crate) fn of(examples: &'a [ExampleView<'a>]) -> Self {
        Self {
            given: examples,
            written: Vec::new(),
        }
    }

    fn positions(&self) -> usize {
        let given: usize = self.given.iter().map(|e| e.supervised()).sum();
        let written: usize = self.written.iter().map(|batch| batch.labels.len()).sum();
        given + written
    }

    fn keys(&self) -> Vec<String> {
        let given = self.given.iter().map(|example| example.key().to_owned());
        let written = self.written.iter().flat_map(|batch| batch.keys.clone());
        given.chain(written).collect()
    }
}

/// What a step did.
#[derive(Debug, Default)]
pub struct Taken {
    /// What was minimised, before the update.
    pub loss: f64,
    pub sums: Sums,
    /// Of what the student wrote itself.
    pub written: Sums,
    /// Global norm of the gradient, before clipping.
    pub gradient_norm: f64,
    pub tokens: u64,
}

impl Stepper {
    /// For `model`, with `soft_labels` as chosen for the data, and with `on_policy` for what the student writes
    /// itself.
    pub(crate) fn new(
        config: &Config,
        soft_labels: &Choice,
        on_policy: Option<[Divergence; 2]>,
        model: &Model,
    ) -> Self {
        let plain = Weights::default();
        Self {
            settings: config.train.clone(),
            weights: Weights {
                soft: soft_labels.terms.unwrap_or(plain.soft),
                alm: soft_labels
                    .terms
                    .map_or(0.0, |_| config.loss.alm_weight as f32),
                label_smoothing: config.loss.label_smoothing as f32,
                end: soft_labels.end,
                // Each step sets its own.
                scale: 1.0,
            },
            on_policy: Weights {
                soft: on_policy
                    .unwrap_or([Divergence::ReverseKl; 2])
                    .map(|divergence| SoftTerm {
                        divergence,
                        weight: 1.0,
                    }),
                ..plain
            },
            activations: match config.train.activation_checkpointing {
                true => Activations::Recompute,
                false => Activations::Keep,
            },
            gradients: model.gradients(),
        }
    }

    /// Takes step `step` on `lesson`, at `learning_rate`; soft labels are those of `teacher` where
    /// there is one.
    ///
    /// # Errors
    /// Where a loss or a gradient is not finite, before anything is updated; names the examples.
    pub(crate) fn take(
        &mut self,
        (student, optimizer): (&Student, &mut Optimizer),
        teacher: Option<&Model>,
        step: u64,
        lesson: &Lesson,
        learning_rate: f64,
    ) -> Result<Taken> {
        if lesson.positions() == 0 {
            // All was written by the student, and nobody says anything of it.
            optimizer.skip();
            return Ok(Taken::default());
        }
        let scale = 1.0 / lesson.positions() as f32;
        let models = Models {
            student: &student.model,
            teacher,
        };
        let mut taken = Taken::default();
        let mut pass = |batch: &Batch, weights: Weights, sums: &mut Sums| {
            let weights = Weights { scale, ..weights };
            let (activations, gradients) = (self.activations, &mut self.gradients);
            let (loss, rows) =
                objective::gradients(models, batch, weights, activations, gradients)?;
            if !loss.is_finite() {
                bail!(not_finite("loss", step, &batch.keys));
            }
            taken.loss += loss;
            taken.tokens += batch.input_ids.len() as u64;
            sums.add(&rows);
            Ok(())
        };
        let (mut sums, mut written) = (Sums::default(), Sums::default());
        for micro in micro_batches(lesson.given, &self.settings) {
            pass(&Batch::new(micro), self.weights, &mut sums)?;
        }
        for batch in &lesson.written {
            pass(batch, self.on_policy, &mut written)?;
        }
        (taken.sums, taken.written) = (sums, written);
        let norm = optimizer.gradient_norm(&self.gradients)?;
        if !norm.is_finite() {
            bail!(not_finite("gradient", step, &lesson.keys()));
        }
        taken.gradient_norm = norm;
        optimizer.update(&self.settings, learning_rate, norm, &self.gradients)?;
        self.gradients.clear();
        Ok(taken)
    }
}

fn not_finite(what: &str, step: u64, keys: &[String]) -> String {
    format!(
        "the {what} of step {step} is not finite; nothing was updated. Lower train.learning_rate, \
         or look at these examples: {}",
        keys.join(", ")
    )
}
