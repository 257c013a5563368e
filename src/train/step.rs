//! One optimizer step: the passes over its micro-batches, and the update.

use anyhow::{Result, bail};

use super::loss::Weights;
use super::loss::divergence::Divergence;
use super::metrics::Sums;
use super::objective::{self, Models};
use super::optimizer::Optimizer;
use super::student::Student;
use crate::config::{Config, Train};
use crate::data::batch::{Batch, micro_batches};
use crate::data::prepared::ExampleView;
use crate::model::Model;
use crate::model::gradients::Gradients;
use crate::model::tape::Memory;

/// How steps are taken.
pub struct Stepper {
    settings: Train,
    weights: Weights,
    memory: Memory,
    /// Of the step under way; none between two.
    gradients: Gradients,
}

/// What a step did.
#[derive(Debug, Default)]
pub struct Taken {
    /// What was minimised, before the update.
    pub loss: f64,
    pub sums: Sums,
    /// Global norm of the gradient, before clipping.
    pub gradient_norm: f64,
    pub tokens: u64,
}

impl Stepper {
    /// For `model`, with `divergence` of [`soft_labels`](super::soft_labels).
    pub fn new(config: &Config, divergence: Option<[Divergence; 2]>, model: &Model) -> Self {
        let kd = divergence.map_or(0.0, |_| config.loss.kd_weight as f32);
        Self {
            settings: config.train.clone(),
            weights: Weights {
                kd,
                divergence: divergence.unwrap_or([Divergence::Tail; 2]),
                alm: divergence.map_or(0.0, |_| config.loss.alm_weight as f32),
                label_smoothing: config.loss.label_smoothing as f32,
                // Each step sets its own.
                scale: 1.0,
            },
            memory: match config.train.activation_checkpointing {
                true => Memory::Checkpoint,
                false => Memory::Record,
            },
            gradients: model.gradients(),
        }
    }

    /// Takes step `step` on `examples`, at `learning_rate`; soft labels are those of `teacher` where
    /// there is one.
    ///
    /// # Errors
    /// Where a loss or a gradient is not finite, before anything is updated; names the examples.
    pub fn take(
        &mut self,
        (student, optimizer): (&Student, &mut Optimizer),
        teacher: Option<&Model>,
        step: u64,
        examples: &[ExampleView],
        learning_rate: f64,
    ) -> Result<Taken> {
        let positions: usize = examples.iter().map(|e| e.supervised()).sum();
        let weights = Weights {
            scale: 1.0 / positions as f32,
            ..self.weights
        };
        let mut taken = Taken::default();
        for micro in micro_batches(examples, &self.settings) {
            let batch = Batch::new(micro);
            taken.tokens += batch.input_ids.len() as u64;
            let models = Models {
                student: &student.model,
                teacher,
            };
            let (loss, rows) =
                objective::gradients(models, &batch, weights, self.memory, &mut self.gradients)?;
            if !loss.is_finite() {
                bail!(not_finite("loss", step, &batch.keys));
            }
            taken.loss += loss;
            taken.sums.add(&rows);
        }
        let norm = optimizer.gradient_norm(&self.gradients)?;
        if !norm.is_finite() {
            let keys: Vec<String> = examples.iter().map(|e| e.key().to_owned()).collect();
            bail!(not_finite("gradient", step, &keys));
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
