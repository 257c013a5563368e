//! AdamW over named parameters, with global-norm clipping. Its state can be saved, which that of
//! candle's own optimizer cannot.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::config::Train;
use crate::model::tape::Gradients;
use crate::model::weights::Tensors;
use crate::ops::adamw;

/// Parameters and their moments.
pub struct Optimizer {
    parameters: Vec<Parameter>,
    /// Updates done.
    step: u64,
}

struct Parameter {
    name: String,
    var: Var,
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
    /// Norm weights are left out of the decay, as is the custom.
    decays: bool,
}

impl Optimizer {
    /// Zero moments for the given variables.
    pub fn new(vars: &BTreeMap<String, Var>) -> Self {
        let parameters = vars
            .iter()
            .map(|(name, var)| {
                let zeros = vec![0.0; var.elem_count()];
                Parameter {
                    name: name.clone(),
                    var: var.clone(),
                    first_moment: zeros.clone(),
                    second_moment: zeros,
                    decays: var.rank() > 1,
                }
            })
            .collect();
        Self {
            parameters,
            step: 0,
        }
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
            adamw::adamw(
                &parameter.var,
                parameter.gradient(gradients)?,
                &mut parameter.first_moment,
                &mut parameter.second_moment,
                step,
            )?;
        }
        Ok(())
    }

    /// The moments, as `first_moment.NAME` and `second_moment.NAME`.
    ///
    /// # Errors
    /// Where a tensor cannot be allocated.
    pub fn state(&self) -> Result<Tensors> {
        let mut tensors = Tensors::new();
        for parameter in &self.parameters {
            for (kind, values) in [
                ("first_moment", &parameter.first_moment),
                ("second_moment", &parameter.second_moment),
            ] {
                let tensor = Tensor::from_slice(values, parameter.var.shape(), &Device::Cpu)?;
                tensors.insert(format!("{kind}.{}", parameter.name), tensor);
            }
        }
        Ok(tensors)
    }

    /// Takes back what [`Optimizer::state`] gave after `step` updates.
    ///
    /// # Errors
    /// Names a moment that is missing or has another shape.
    pub fn restore(&mut self, tensors: &Tensors, step: u64) -> Result<()> {
        for parameter in &mut self.parameters {
            for (kind, values) in [
                ("first_moment", &mut parameter.first_moment),
                ("second_moment", &mut parameter.second_moment),
            ] {
                let name = format!("{kind}.{}", parameter.name);
                match tensors.get(&name) {
                    Some(tensor) if tensor.dims() == parameter.var.dims() => {
                        *values = tensor.flatten_all()?.to_vec1()?;
                    }
                    _ => bail!("the checkpoint lacks {name} in the student's shape"),
                }
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
