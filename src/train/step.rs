//! One optimizer step: the passes over its micro-batches, and the update.

use anyhow::{Result, bail};

use super::checkpoint::Parts;
use super::loss::Weights;
use super::loss::divergence::Divergence;
use super::metrics::Sums;
use super::objective;
use crate::config::{Config, Train};
use crate::data::batch::{Batch, micro_batches};
use crate::data::prepared::ExampleView;
use crate::model::gradients::Gradients;
use crate::model::tape::Memory;

/// How steps are taken.
pub struct Stepper<'a> {
    settings: &'a Train,
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

impl<'a> Stepper<'a> {
    /// With `divergence` of [`soft_labels`](super::soft_labels).
    pub fn new(config: &'a Config, divergence: Option<[Divergence; 2]>, parts: &Parts) -> Self {
        let kd = divergence.map_or(0.0, |_| config.loss.kd_weight as f32);
        Self {
            settings: &config.train,
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
            gradients: parts.student.model.gradients(),
        }
    }

    /// Takes step `step` on `examples`, at `learning_rate`.
    ///
    /// # Errors
    /// Where a loss or a gradient is not finite, before anything is updated; names the examples.
    pub fn take(
        &mut self,
        parts: &mut Parts,
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
        for micro in micro_batches(examples, self.settings) {
            let batch = Batch::new(micro);
            taken.tokens += batch.input_ids.len() as u64;
            let model = &parts.student.model;
            let (loss, rows) =
                objective::gradients(model, &batch, weights, self.memory, &mut self.gradients)?;
            if !loss.is_finite() {
                bail!(not_finite("loss", step, &batch.keys));
            }
            taken.loss += loss;
            taken.sums.add(&rows);
        }
        let norm = parts.optimizer.gradient_norm(&self.gradients)?;
        if !norm.is_finite() {
            let keys: Vec<String> = examples.iter().map(|e| e.key().to_owned()).collect();
            bail!(not_finite("gradient", step, &keys));
        }
        taken.gradient_norm = norm;
        parts
            .optimizer
            .update(self.settings, learning_rate, norm, &self.gradients)?;
        self.gradients.clear();
        if let Some(ema) = &parts.ema {
            ema.update(&parts.student, step)?;
        }
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
