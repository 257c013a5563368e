//! A running average of the weights, which generalises better than the last of them (Polyak and
//! Juditsky, SIAM J. Control Optim. 30(4), 1992).

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Device, Var};

use super::student::{self, Student};
use crate::model::weights::{self, Tensors};
use crate::model::{Backend, Model};
use crate::ops::ema::ema_update;

/// The average of the trained weights, as a model to evaluate.
pub struct Ema {
    decay: f64,
    vars: BTreeMap<String, Var>,
    pub model: Model,
}

impl Ema {
    /// Begins at the student's weights.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn new(student: &Student, decay: f64) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, var) in &student.vars {
            vars.insert(name.clone(), Var::from_tensor(&var.as_tensor().copy()?)?);
        }
        let all = student.with(student::tensors(&vars));
        Ok(Self {
            decay,
            vars,
            model: student.model.with_weights(&all)?,
        })
    }

    /// Takes in the weights after `step` updates. Early steps weigh more, so that the weights at
    /// the start are soon forgotten.
    ///
    /// # Errors
    /// Where the student has other weights.
    pub fn update(&self, student: &Student, step: u64) -> Result<()> {
        let decay = self.decay.min((1.0 + step as f64) / (10.0 + step as f64));
        for (name, var) in &self.vars {
            let value = student.vars.get(name).context("the student has changed")?;
            match student.model.backend() {
                Backend::CpuTape => ema_update(var.as_tensor(), value.as_tensor(), decay as f32)?,
                Backend::Candle => {
                    let past = (var.as_tensor() * decay)?;
                    var.set(&(past + (value.as_tensor() * (1.0 - decay))?)?.detach())?;
                }
            }
        }
        Ok(())
    }

    /// The averages, on the CPU.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn tensors(&self) -> Result<Tensors> {
        weights::to_device(&student::tensors(&self.vars), &Device::Cpu)
    }

    /// Takes back what [`Ema::tensors`] gave.
    ///
    /// # Errors
    /// Where one is missing or has another shape.
    pub fn restore(&self, file: &crate::model::weights::SafetensorsFile) -> Result<()> {
        student::restore(&self.vars, file)
    }
}
