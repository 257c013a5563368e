//! AdamW over named parameters, with global-norm clipping. Its state can be saved, which that of
//! candle's own optimizer cannot.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var};
use rayon::prelude::*;
use regex::Regex;

use super::student::Student;
use crate::config::TrainConfig;
use crate::model::Backend;
use crate::model::gradients::Gradients;
use crate::model::weights::{SafetensorsFile, TensorEntry};
use crate::ops::arena::{Arena, Buffer};
use crate::ops::{CpuValues, adamw};

const FIRST: &str = "first_moment";
const SECOND: &str = "second_moment";

/// Parameters and their moments.
pub struct Optimizer {
    parameters: Vec<Parameter>,
    /// Updates done.
    step: u64,
}

struct Parameter {
    name: String,
    var: Var,
    moments: Moments,
    decays: bool,
}

/// The running means of the gradient and of its square.
enum Moments {
    /// Where the tape runs.
    Here([Buffer; 2]),
    /// Where candle's operations do: on the device of their parameter.
    Elsewhere([Tensor; 2]),
}

/// What a parameter was given.
enum Given<'a> {
    Here(&'a [f32]),
    Elsewhere(&'a Tensor),
}

impl Optimizer {
    /// Zero moments for the student's variables. Weights of norms and biases are left out of the decay,
    /// as is the custom, and those that a pattern of `no_decay` finds.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn new(student: &Student, no_decay: &[Regex]) -> Result<Self> {
        // Apart from the memory of the passes: what stays must not lie between what comes and goes.
        let arena = Arena::default();
        let parameter = |(name, var): (&String, &Var)| {
            let zeros = || arena.zeros(var.elem_count());
            let moments = match student.model.backend() {
                Backend::CpuTape => Moments::Here([zeros()?, zeros()?]),
                Backend::Candle => Moments::Elsewhere([var.zeros_like()?, var.zeros_like()?]),
            };
            Ok(Parameter {
                name: name.clone(),
                var: var.clone(),
                moments,
                decays: var.rank() > 1 && !no_decay.iter().any(|pattern| pattern.is_match(name)),
            })
        };
        Ok(Self {
            parameters: student.vars.iter().map(parameter).collect::<Result<_>>()?,
            step: 0,
        })
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The global norm of the gradients.
    ///
    /// # Errors
    /// Names a parameter that received none: the graph is cut somewhere.
    pub fn gradient_norm(&self, gradients: &Gradients) -> Result<f64> {
        let mut sum = 0.0;
        for parameter in &self.parameters {
            sum += match parameter.gradient(gradients)? {
                Given::Here(values) => {
                    // In blocks of fixed size, so that the sum does not depend on the number of
                    // threads.
                    let blocks = values.par_chunks(1 << 16).map(adamw::sum_of_squares);
                    blocks.collect::<Vec<f64>>().iter().sum::<f64>()
                }
                Given::Elsewhere(tensor) => f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?),
            };
        }
        Ok(sum.sqrt())
    }

    /// Counts a step in which there was nothing to learn.
    pub fn skip(&mut self) {
        self.step += 1;
    }

    /// Updates every parameter at `learning_rate` with gradients clipped from `norm` to
    /// `train.max_grad_norm`.
    ///
    /// # Errors
    /// Where a parameter is no contiguous f32 tensor, or has no gradient.
    pub fn update(
        &mut self,
        train: &TrainConfig,
        learning_rate: f64,
        norm: f64,
        gradients: &Gradients,
    ) -> Result<()> {
        self.step += 1;
        let clip = train.max_grad_norm > 0.0 && norm > train.max_grad_norm;
        let gradient_scale = if clip {
            train.max_grad_norm / norm
        } else {
            1.0
        };
        for parameter in &mut self.parameters {
            let step = adamw::AdamWStep {
                number: self.step,
                learning_rate: learning_rate as f32,
                beta1: train.beta1 as f32,
                beta2: train.beta2 as f32,
                epsilon: train.epsilon as f32,
                weight_decay: if parameter.decays {
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

    /// The moments, as `first_moment.NAME` and `second_moment.NAME`.
    ///
    /// # Errors
    /// Where a device fails.
    pub fn state(&self) -> Result<BTreeMap<String, TensorEntry<'_>>> {
        let mut entries = BTreeMap::new();
        for parameter in &self.parameters {
            let shape = parameter.var.dims();
            let of_parameter = match &parameter.moments {
                Moments::Here([first, second]) => [
                    TensorEntry::new(shape, first),
                    TensorEntry::new(shape, second),
                ],
                Moments::Elsewhere([first, second]) => [
                    TensorEntry::from_device(first)?,
                    TensorEntry::from_device(second)?,
                ],
            };
            for (kind, entry) in [FIRST, SECOND].iter().zip(of_parameter) {
                entries.insert(format!("{kind}.{}", parameter.name), entry);
            }
        }
        Ok(entries)
    }

    /// Takes back what [`Optimizer::state`] gave after `step` updates.
    ///
    /// # Errors
    /// Names a moment that is missing or has another shape.
    pub fn restore(&mut self, file: &SafetensorsFile, step: u64) -> Result<()> {
        for parameter in &mut self.parameters {
            for (index, kind) in [FIRST, SECOND].iter().enumerate() {
                let name = format!("{kind}.{}", parameter.name);
                let tensor = file.tensor(&name)?;
                if tensor.dims() != parameter.var.dims() {
                    bail!("the checkpoint has {name} in another shape");
                }
                match &mut parameter.moments {
                    Moments::Here(moments) => {
                        moments[index].copy_from_slice(&CpuValues::new(&tensor)?);
                    }
                    Moments::Elsewhere(moments) => {
                        moments[index] = tensor.to_device(parameter.var.device())?;
                    }
                }
            }
        }
        self.step = step;
        Ok(())
    }
}

impl Parameter {
    fn gradient<'a>(&self, gradients: &'a Gradients) -> Result<Given<'a>> {
        let here = gradients.get(&self.var).map(Given::Here);
        here.or_else(|| gradients.get_on_device(&self.var).map(Given::Elsewhere))
            .with_context(|| format!("parameter {} received no gradient", self.name))
    }

    fn update(&mut self, gradients: &Gradients, step: adamw::AdamWStep) -> Result<()> {
        let given = self.gradient(gradients)?;
        match (&mut self.moments, given) {
            (Moments::Here([first, second]), Given::Here(values)) => {
                adamw::adamw(&self.var, values, first, second, step)?;
            }
            (Moments::Elsewhere(moments), Given::Elsewhere(tensor)) => {
                adamw::adamw_candle(&self.var, tensor, moments, step)?;
            }
            _ => bail!("the gradient of {} is in another frame", self.name),
        }
        Ok(())
    }
}
