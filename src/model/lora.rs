//! LoRA adapters of the linear layers of a decoder (Hu et al., arXiv 2106.09685), with the name endings, initial
//! values and scale of PEFT.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use regex::Regex;

use super::parameters::ParameterRole;
use super::weights::Tensors;
use crate::config::Parsed;
use crate::exit::Exit;
use crate::model::config::shape::ModelConfig;
use crate::ops::CpuValues;
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};
use crate::ops::matmul::{Precision, matmul};

/// Name endings of a weight W and of the two weights of its adapter.
const WEIGHT: &str = ".weight";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// Creates adapters of rank `rank` for the linear layers whose weight name, such as
/// `model.layers.0.mlp.up_proj.weight`, matches one of `targets`. If `targets` is empty, all linear layers get one.
/// A is uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs), and B is zero, so that new adapters do not change the
/// decoder's output.
///
/// # Errors
/// Where a tensor cannot be allocated.
pub fn new_adapters(
    config: &ModelConfig,
    rank: usize,
    targets: &[Parsed<Regex>],
    seed: u64,
) -> Result<Tensors> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tensors = Tensors::new();
    for parameter in config.parameters() {
        let is_target = parameter.role == ParameterRole::Projection
            && (targets.is_empty() || targets.iter().any(|t| t.is_match(&parameter.name)));
        let (Some(module), &[outputs, inputs]) =
            (parameter.name.strip_suffix(WEIGHT), &parameter.shape[..])
        else {
            continue;
        };
        if !is_target {
            continue;
        }
        let bound = 1.0 / (inputs as f32).sqrt();
        let a: Vec<f32> = (0..rank * inputs)
            .map(|_| (2.0 * random.f32() - 1.0) * bound)
            .collect();
        let a = Tensor::from_vec(a, (rank, inputs), &Device::Cpu)?;
        let b = Tensor::from_vec(vec![0.0f32; outputs * rank], (outputs, rank), &Device::Cpu)?;
        tensors.insert(format!("{module}{A}"), a);
        tensors.insert(format!("{module}{B}"), b);
    }
    Ok(tensors)
}

/// Checks that each of `targets` matches the weight of a linear layer.
///
/// # Errors
/// [`Exit::Usage`] that names the first pattern without a match.
pub(crate) fn check_targets(config: &ModelConfig, targets: &[Parsed<Regex>]) -> Result<()> {
    let parameters = config.parameters();
    let projections: Vec<&str> = parameters
        .iter()
        .filter(|parameter| parameter.role == ParameterRole::Projection)
        .map(|parameter| parameter.name.as_str())
        .collect();
    for target in targets {
        if !projections.iter().any(|name| target.is_match(name)) {
            bail!(Exit::Usage(format!(
                "`lora.targets`: {:?} matches no linear layer of the student; its layers are named like {}",
                target.as_str(),
                projections.first().copied().unwrap_or_default()
            )));
        }
    }
    Ok(())
}

/// Merges every adapter into its weight: W + s B A. Other weights are returned unchanged.
///
/// # Errors
/// Where a weight with an adapter, or the adapter, is not a contiguous f32 matrix on the CPU.
pub fn merge(config: &ModelConfig, tensors: &Tensors) -> Result<Tensors> {
    let mut merged = Tensors::new();
    for (name, tensor) in tensors {
        if name.ends_with(A) || name.ends_with(B) {
            continue;
        }
        let adapter =
            |ending: &str| tensors.get(&format!("{}{ending}", name.strip_suffix(WEIGHT)?));
        let tensor = match (adapter(A), adapter(B)) {
            (Some(a), Some(b)) => merge_adapter(tensor, a, b, config.adapter_scale as f32)?,
            _ => tensor.clone(),
        };
        merged.insert(name.clone(), tensor);
    }
    Ok(merged)
}

/// Computes W + s B A.
fn merge_adapter(weight_OI: &Tensor, a_RI: &Tensor, b_OR: &Tensor, scale: f32) -> Result<Tensor> {
    let (outputs, inputs) = weight_OI.dims2()?;
    let rank = a_RI.dim(0)?;
    let mut sum_OI = CpuValues::new(weight_OI)?.to_vec();
    let b_OR = CpuValues::new(b_OR)?;
    let scaled_b_OR: Vec<f32> = b_OR.iter().map(|value| value * scale).collect();
    let a_RI = CpuValues::new(a_RI)?;
    matmul(
        MatMut::new(&mut sum_OI, inputs),
        Mat::new(&scaled_b_OR, rank),
        Mat::new(&a_RI, inputs),
        true,
        Threads::All,
        Precision::F32,
    );
    Ok(Tensor::from_vec(sum_OI, (outputs, inputs), &Device::Cpu)?)
}
