//! The parameters of a model (names, shapes and roles of its weights), random initial weights, and access
//! to weights whose shapes were checked.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};

use super::norm::Norm;
use super::projection::{LoraAdapter, Projection};
use super::weights::Tensors;
use crate::model::config::shape::ModelConfig;

/// The name, shape and role of a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSpec {
    pub name: String,
    pub shape: Vec<usize>,
    pub role: ParameterRole,
}

impl ParameterSpec {
    /// Returns the number of elements.
    pub(crate) fn element_count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The role of a weight, which determines its initial values and whether LoRA adapts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterRole {
    /// A table with one row per token or position: embeddings, and the LM head.
    Table,
    /// The weight of a linear layer (outputs x inputs). Only these have LoRA adapters.
    Projection,
    /// The scale of a norm.
    Norm,
    Bias,
}

/// A list of parameters under construction.
#[derive(Default)]
pub(super) struct ParameterList(Vec<ParameterSpec>);

impl ParameterList {
    pub(super) fn add(&mut self, name: impl Into<String>, shape: &[usize], role: ParameterRole) {
        self.0.push(ParameterSpec {
            name: name.into(),
            shape: shape.to_vec(),
            role,
        });
    }

    /// Adds `module.weight` (outputs x inputs), and `module.bias` (outputs) if `has_bias`.
    pub(super) fn add_projection(
        &mut self,
        module: &str,
        [outputs, inputs]: [usize; 2],
        has_bias: bool,
    ) {
        let weight = format!("{module}.weight");
        self.add(weight, &[outputs, inputs], ParameterRole::Projection);
        if has_bias {
            self.add(format!("{module}.bias"), &[outputs], ParameterRole::Bias);
        }
    }

    /// Adds `module.weight` (width), and `module.bias` (width) if `has_bias`.
    pub(super) fn add_norm(&mut self, module: &str, width: usize, has_bias: bool) {
        self.add(format!("{module}.weight"), &[width], ParameterRole::Norm);
        if has_bias {
            self.add(format!("{module}.bias"), &[width], ParameterRole::Bias);
        }
    }

    pub(super) fn into_inner(self) -> Vec<ParameterSpec> {
        self.0
    }
}

/// Creates initial weights. Tables and projections are normally distributed with mean 0 and the standard deviation
/// `initializer_range`, or in T5 one that depends on their inputs; norms are one and biases zero.
///
/// # Errors
/// Where a tensor cannot be allocated.
pub fn random_weights(config: &ModelConfig, seed: u64) -> Result<Tensors> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tensors = Tensors::new();
    for parameter in config.parameters() {
        let count = parameter.element_count();
        let values: Vec<f32> = match parameter.role {
            ParameterRole::Norm => vec![1.0; count],
            ParameterRole::Bias => vec![0.0; count],
            ParameterRole::Table | ParameterRole::Projection => {
                let deviation = config.initial_deviation(&parameter.name);
                let normal = |_| normal(&mut random) * deviation;
                (0..count).map(normal).map(|v| v as f32).collect()
            }
        };
        let tensor = Tensor::from_vec(values, parameter.shape, &Device::Cpu)?;
        tensors.insert(parameter.name, tensor);
    }
    Ok(tensors)
}

/// Draws a standard normal number (Box and Muller).
fn normal(random: &mut fastrand::Rng) -> f64 {
    let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * random.f64()).cos()
}

/// Weights that were checked against the parameters of a [`ModelConfig`].
pub(super) struct CheckedWeights<'a> {
    tensors: &'a Tensors,
    adapter_scale: f64,
    norm_eps: f64,
}

impl<'a> CheckedWeights<'a> {
    /// Checks `tensors` against `config`.
    ///
    /// # Errors
    /// Where a tensor is missing or its shape does not match. The error names the first such tensor.
    pub(super) fn new(config: &ModelConfig, tensors: &'a Tensors) -> Result<Self> {
        for ParameterSpec { name, shape, .. } in config.parameters() {
            let Some(tensor) = tensors.get(&name) else {
                bail!("tensor {name} is missing from the weights: config.json requires it");
            };
            if tensor.dims() != shape {
                bail!(
                    "tensor {name} has the shape {:?}; config.json requires {shape:?}",
                    tensor.dims()
                );
            }
        }
        Ok(Self {
            tensors,
            adapter_scale: config.adapter_scale,
            norm_eps: config.norm_eps,
        })
    }

    /// Returns the weight `name`.
    ///
    /// # Errors
    /// Where it is missing.
    pub(super) fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = self.tensors.get(name).cloned();
        tensor.with_context(|| format!("{name} is not a weight of this architecture"))
    }

    fn bias(&self, module: &str, has_bias: bool) -> Result<Option<Tensor>> {
        let bias = has_bias.then(|| self.get(&format!("{module}.bias")));
        bias.transpose()
    }

    /// Returns the norm `module`.
    ///
    /// # Errors
    /// As [`CheckedWeights::get`].
    pub(super) fn norm(&self, module: &str, has_bias: bool) -> Result<Norm> {
        Ok(Norm {
            weight: self.get(&format!("{module}.weight"))?,
            bias: self.bias(module, has_bias)?,
            epsilon: self.norm_eps,
        })
    }

    /// Returns the linear layer `module`, with its adapter if it has one.
    ///
    /// # Errors
    /// As [`CheckedWeights::get`], and where one of the two weights of an adapter is missing.
    pub(super) fn projection(&self, module: &str, has_bias: bool) -> Result<Projection> {
        let weight = |name: &str| self.tensors.get(&format!("{module}.{name}")).cloned();
        let adapter = match (weight("lora_A.weight"), weight("lora_B.weight")) {
            (Some(a), Some(b)) => Some(LoraAdapter {
                a,
                b,
                scale: self.adapter_scale,
            }),
            (None, None) => None,
            _ => bail!("one of the two adapter weights of {module} is missing"),
        };
        Ok(Projection {
            weight: self.get(&format!("{module}.weight"))?,
            bias: self.bias(module, has_bias)?,
            adapter,
        })
    }
}

/// Names of the weights outside the layers. Each architecture has one such table.
pub(super) struct WeightNames {
    /// Prefix of all names except that of the LM head. In the files it is optional.
    pub prefix: &'static str,
    pub embedding: &'static str,
    /// The table of learned position embeddings.
    pub position_embedding: Option<&'static str>,
    /// The module name of the norm after the last layer.
    pub final_norm: &'static str,
    pub final_norm_has_bias: bool,
}

/// Name of the LM head, in models where it is not tied to the embedding.
pub(super) const LM_HEAD: &str = "lm_head.weight";
