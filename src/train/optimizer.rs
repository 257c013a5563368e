//! AdamW over named parameters, with clipping of the gradients by their global norm. Unlike the state of candle's
//! optimizer, its state can be saved.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var};
use rayon::prelude::*;
use regex::Regex;

use super::trainable::TrainableModel;
use crate::config::Parsed;
use crate::config::TrainConfig;
use crate::model::Backend;
use crate::model::gradients::Gradients;
use crate::model::weights::{SafetensorsFile, TensorEntry};
use crate::ops::arena::{Arena, Buffer};
use crate::ops::{CpuValues, adamw};

/// Minimum factor of the learning rate with `train.scale_parameter`, so that parameters near 0 can grow.
const MIN_SCALE: f64 = 1e-3;

/// Prefixes of the names of the moments in a checkpoint.
const FIRST_MOMENT: &str = "first_moment";
const SECOND_MOMENT: &str = "second_moment";
/// Values per block of the gradient norm. Fixed, so that the sum does not depend on the number of threads.
const VALUES_PER_BLOCK: usize = 1 << 16;

/// Parameters and their moments.
pub struct Optimizer {
    parameters: Vec<Parameter>,
    /// Number of completed steps.
    step: u64,
}

struct Parameter {
    name: String,
    var: Var,
    moments: Moments,
    has_weight_decay: bool,
}

/// Running means of the gradient and of its square.
enum Moments {
    /// With [`Backend::CpuTape`].
    Tape([Buffer; 2]),
    /// With [`Backend::Candle`], on the device of the parameter.
    Candle([Tensor; 2]),
}

/// Gradient of a parameter, from the tape or from candle.
enum GradientRef<'a> {
    Tape(&'a [f32]),
    Candle(&'a Tensor),
}

impl Optimizer {
    /// Creates an optimizer with zero moments. Norm weights, biases and parameters that match `no_decay` have no weight
    /// decay.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn new(student: &TrainableModel, no_decay: &[Parsed<Regex>]) -> Result<Self> {
        // A separate arena: long-lived buffers must not fragment the memory of the passes.
        let arena = Arena::default();
        let parameter = |(name, var): (&String, &Var)| {
            let zeros = || arena.zeros(var.elem_count());
            let moments = match student.model.backend() {
                Backend::CpuTape => Moments::Tape([zeros()?, zeros()?]),
                Backend::Candle => Moments::Candle([var.zeros_like()?, var.zeros_like()?]),
            };
            Ok(Parameter {
                name: name.clone(),
                var: var.clone(),
                moments,
                has_weight_decay: var.rank() > 1
                    && !no_decay.iter().any(|pattern| pattern.is_match(name)),
            })
        };
        Ok(Self {
            parameters: student.vars.iter().map(parameter).collect::<Result<_>>()?,
            step: 0,
        })
    }

    /// Returns the number of completed steps.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Returns the global norm of the gradients.
    ///
    /// # Errors
    /// If a parameter received no gradient, which means that the loss does not depend on it.
    pub fn gradient_norm(&self, gradients: &Gradients) -> Result<f64> {
        let mut sum = 0.0;
        for parameter in &self.parameters {
            sum += match parameter.gradient(gradients)? {
                GradientRef::Tape(values) => sum_of_squares(values),
                GradientRef::Candle(tensor) => {
                    f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?)
                }
            };
        }
        Ok(sum.sqrt())
    }

    /// Counts a step without supervised positions, which changes no parameter.
    pub fn skip(&mut self) {
        self.step += 1;
    }

    /// Updates every parameter. `norm` is the global norm of the gradients; they are clipped to `train.max_grad_norm`,
    /// unless that is 0.
    ///
    /// # Errors
    /// If a parameter is not a contiguous f32 tensor, or has no gradient.
    pub fn update(
        &mut self,
        train: &TrainConfig,
        learning_rate: f64,
        norm: f64,
        gradients: &Gradients,
    ) -> Result<()> {
        self.step += 1;
        let must_clip = train.max_grad_norm > 0.0 && norm > train.max_grad_norm;
        let gradient_scale = if must_clip {
            train.max_grad_norm / norm
        } else {
            1.0
        };
        for parameter in &mut self.parameters {
            let scale = if train.scale_parameter {
                parameter.root_mean_square()?.max(MIN_SCALE)
            } else {
                1.0
            };
            let step = adamw::AdamWStep {
                number: self.step,
                learning_rate: (learning_rate * scale) as f32,
                beta1: train.beta1 as f32,
                beta2: train.beta2 as f32,
                epsilon: train.epsilon as f32,
                weight_decay: if parameter.has_weight_decay {
                    train.weight_decay as f32
                } else {
                    0.0
                },
                gradient_scale: gradient_scale as f32,
            };
            parameter.update(gradients, step)?;
        }
        Ok(())
    }

    /// Returns the moments, named `first_moment.NAME` and `second_moment.NAME`.
    ///
    /// # Errors
    /// If a device fails.
    pub fn state(&self) -> Result<BTreeMap<String, TensorEntry<'_>>> {
        let mut entries = BTreeMap::new();
        for parameter in &self.parameters {
            let shape = parameter.var.dims();
            let moments = match &parameter.moments {
                Moments::Tape([first, second]) => [
                    TensorEntry::new(shape, first),
                    TensorEntry::new(shape, second),
                ],
                Moments::Candle([first, second]) => [
                    TensorEntry::from_device(first)?,
                    TensorEntry::from_device(second)?,
                ],
            };
            for (kind, entry) in [FIRST_MOMENT, SECOND_MOMENT].iter().zip(moments) {
                entries.insert(format!("{kind}.{}", parameter.name), entry);
            }
        }
        Ok(entries)
    }

    /// Restores the moments that [`Optimizer::state`] returned after `step` steps.
    ///
    /// # Errors
    /// If a moment is missing or has another shape.
    pub fn restore(&mut self, file: &SafetensorsFile, step: u64) -> Result<()> {
        for parameter in &mut self.parameters {
            for (index, kind) in [FIRST_MOMENT, SECOND_MOMENT].iter().enumerate() {
                let name = format!("{kind}.{}", parameter.name);
                let tensor = file.tensor(&name)?;
                if tensor.dims() != parameter.var.dims() {
                    bail!("{name} has another shape in the checkpoint");
                }
                match &mut parameter.moments {
                    Moments::Tape(moments) => {
                        moments[index].copy_from_slice(&CpuValues::new(&tensor)?);
                    }
                    Moments::Candle(moments) => {
                        moments[index] = tensor.to_device(parameter.var.device())?;
                    }
                }
            }
        }
        self.step = step;
        Ok(())
    }
}

/// Returns the sum of the squares of `values`. It does not depend on the number of threads.
fn sum_of_squares(values: &[f32]) -> f64 {
    let blocks = values.par_chunks(VALUES_PER_BLOCK);
    let blocks = blocks.map(adamw::sum_of_squares);
    blocks.collect::<Vec<f64>>().iter().sum()
}

impl Parameter {
    fn gradient<'a>(&self, gradients: &'a Gradients) -> Result<GradientRef<'a>> {
        let tape_gradient = gradients.get_tape(&self.var).map(GradientRef::Tape);
        tape_gradient
            .or_else(|| gradients.get_candle(&self.var).map(GradientRef::Candle))
            .with_context(|| format!("parameter {} received no gradient", self.name))
    }

    /// Returns the root mean square of the values.
    fn root_mean_square(&self) -> Result<f64> {
        let sum = match &self.moments {
            Moments::Tape(_) => sum_of_squares(&CpuValues::new(&self.var)?),
            Moments::Candle(_) => f64::from(self.var.sqr()?.sum_all()?.to_scalar::<f32>()?),
        };
        Ok((sum / self.var.elem_count() as f64).sqrt())
    }

    fn update(&mut self, gradients: &Gradients, step: adamw::AdamWStep) -> Result<()> {
        let gradient = self.gradient(gradients)?;
        match (&mut self.moments, gradient) {
            (Moments::Tape([first, second]), GradientRef::Tape(values)) => {
                adamw::adamw(&self.var, values, first, second, step)?;
            }
            (Moments::Candle(moments), GradientRef::Candle(tensor)) => {
                adamw::adamw_candle(&self.var, tensor, moments, step)?;
            }
            _ => bail!(
                "internal error: the gradient of {} is on another device than its moments",
                self.name
            ),
        }
        Ok(())
    }
}
