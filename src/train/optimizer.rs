//! AdamW over named parameters, with global-norm clipping. Its state can be saved, which that of
//! candle's own optimizer cannot.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::Var;
use rayon::prelude::*;
use regex::Regex;

use crate::config::Train;
use crate::model::tape::Gradients;
use crate::model::weights::{Entry, File};
use crate::ops::arena::{Arena, Buffer};
use crate::ops::{Values, adamw};

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
    /// The running means of the gradient and of its square.
    moments: [Buffer; 2],
    decays: bool,
}

impl Optimizer {
    /// Zero moments for the given variables. Weights of norms and biases are left out of the decay,
    /// as is the custom, and those that a pattern of `no_decay` finds.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn new(vars: &BTreeMap<String, Var>, no_decay: &[Regex]) -> Result<Self> {
        // Apart from the memory of the passes: what stays must not lie between what comes and goes.
        let arena = Arena::default();
        let parameter = |(name, var): (&String, &Var)| {
            let zeros = || arena.zeros(var.elem_count());
            Ok(Parameter {
                name: name.clone(),
                var: var.clone(),
                moments: [zeros()?, zeros()?],
                decays: var.rank() > 1 && !no_decay.iter().any(|pattern| pattern.is_match(name)),
            })
        };
        Ok(Self {
            parameters: vars.iter().map(parameter).collect::<Result<_>>()?,
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
            // In blocks of fixed size, so that the sum does not depend on the number of threads.
            let blocks: Vec<f64> = parameter
                .gradient(gradients)?
                .par_chunks(1 << 16)
                .map(adamw::sum_of_squares)
                .collect();
            sum += blocks.iter().sum::<f64>();
        }
        Ok(sum.sqrt())
    }

    /// Updates every parameter at `learning_rate` with gradients clipped from `norm` to
    /// `train.max_grad_norm`.
    ///
    /// # Errors
    /// Where a parameter is no contiguous f32 tensor, or has no gradient.
    pub fn update(
        &mut self,
        train: &Train,
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
            let step = adamw::Step {
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
            let gradient = parameter.gradient(gradients)?;
            let [first, second] = &mut parameter.moments;
            adamw::adamw(&parameter.var, gradient, first, second, step)?;
        }
        Ok(())
    }

    /// The moments, as `first_moment.NAME` and `second_moment.NAME`.
    pub fn state(&self) -> BTreeMap<String, Entry<'_>> {
        let mut entries = BTreeMap::new();
        for parameter in &self.parameters {
            let shape = parameter.var.dims();
            for (kind, values) in [FIRST, SECOND].iter().zip(&parameter.moments) {
                let name = format!("{kind}.{}", parameter.name);
                entries.insert(name, Entry::new(shape, values));
            }
        }
        entries
    }

    /// Takes back what [`Optimizer::state`] gave after `step` updates.
    ///
    /// # Errors
    /// Names a moment that is missing or has another shape.
    pub fn restore(&mut self, file: &File, step: u64) -> Result<()> {
        for parameter in &mut self.parameters {
            for (kind, values) in [FIRST, SECOND].iter().zip(&mut parameter.moments) {
                let name = format!("{kind}.{}", parameter.name);
                let tensor = file.tensor(&name)?;
                if tensor.dims() != parameter.var.dims() {
                    bail!("the checkpoint has {name} in another shape");
                }
                values.copy_from_slice(&Values::of(&tensor)?);
            }
        }
        self.step = step;
        Ok(())
    }
}

impl Parameter {
    fn gradient<'a>(&self, gradients: &'a Gradients) -> Result<&'a [f32]> {
        gradients
            .get(&self.var)
            .with_context(|| format!("parameter {} received no gradient", self.name))
    }
}
