//! Exponential moving average of the weights, which is often more accurate than the last weights. For averages of SGD
//! iterates see Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Device, Var};

use super::trainable::{self, TrainableModel};
use crate::model::weights::{self, Tensors};
use crate::model::{Backend, Model};
use crate::ops::ema::ema_update;

/// The average of the trained weights, as a model that can be evaluated.
pub struct Ema {
    decay: f64,
    vars: BTreeMap<String, Var>,
    pub model: Model,
}

impl Ema {
    /// Creates an average that starts at the student's weights.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn new(student: &TrainableModel, decay: f64) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, var) in &student.vars {
            vars.insert(name.clone(), Var::from_tensor(&var.as_tensor().copy()?)?);
        }
        let weights = student.with(trainable::tensors(&vars));
        Ok(Self {
            decay,
            vars,
            model: student.model.with_weights(&weights)?,
        })
    }

    /// Updates the average with the student's weights: `average = decay * average + (1 - decay) * weights`. `step` is
    /// the number of completed optimizer steps. The decay is at most (1 + step) / (10 + step), so that the initial
    /// weights lose their influence within a few steps.
    ///
    /// # Errors
    /// If the student lacks a weight of the average, or the device fails.
    pub fn update(&self, student: &TrainableModel, step: u64) -> Result<()> {
        let decay = self.decay.min((1.0 + step as f64) / (10.0 + step as f64));
        for (name, var) in &self.vars {
            let value = student
                .vars
                .get(name)
                .with_context(|| format!("internal error: the student has no weight {name}"))?;
            match student.model.backend() {
                Backend::CpuTape => ema_update(var.as_tensor(), value.as_tensor(), decay as f32)?,
                Backend::Candle => {
                    let decayed = (var.as_tensor() * decay)?;
                    var.set(&(decayed + (value.as_tensor() * (1.0 - decay))?)?.detach())?;
                }
            }
        }
        Ok(())
    }

    /// Returns copies of the averages on the CPU.
    ///
    /// # Errors
    /// If the device fails.
    pub fn tensors(&self) -> Result<Tensors> {
        weights::to_device(&trainable::tensors(&self.vars), &Device::Cpu)
    }

    /// Restores the averages from a checkpoint.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&self, file: &weights::SafetensorsFile) -> Result<()> {
        trainable::restore(&self.vars, file)
    }
}
