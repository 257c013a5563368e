//! Named tensors in safetensors files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::Deserialize;

use crate::exit::Exit;

/// Tensors by name, in the order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads all tensors of a model folder as f32: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` names.
///
/// # Errors
/// Where a file is missing or malformed, or the index names a file outside of the folder.
pub fn load(dir: &Path) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for file in files(dir)? {
        tensors.extend(load_file(&file)?);
    }
    Ok(tensors)
}

/// Reads one safetensors file as f32.
///
/// # Errors
/// Where it is missing, malformed, or holds a data type that is no float.
pub fn load_file(path: &Path) -> Result<Tensors> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("{} is no valid safetensors file", path.display()))?;
    file.iter()
        .map(|(name, view)| {
            let values = to_f32(view.dtype(), view.data())
                .with_context(|| format!("tensor {name} of {}", path.display()))?;
            let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu)?;
            Ok((name.to_string(), tensor))
        })
        .collect()
}

/// Renders tensors as a safetensors file of the given float type, with `metadata`.
///
/// # Errors
/// Where a tensor is not f32 on the CPU.
pub fn serialize(
    tensors: &Tensors,
    dtype: DType,
    metadata: BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let views: Vec<(&String, Rendered)> = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, Rendered::new(tensor, dtype)?)))
        .collect::<Result<_>>()?;
    Ok(safetensors::serialize(
        views,
        Some(metadata.into_iter().collect()),
    )?)
}

/// The safetensors files of a model folder.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        bail!(Exit::Usage(format!(
            "{} holds no model.safetensors: convert other weight formats with transformers' \
             save_pretrained first",
            dir.display()
        )));
    }
    let text = std::fs::read_to_string(&index)
        .with_context(|| format!("cannot read {}", index.display()))?;
    let index: Index = serde_json::from_str(&text)
        .with_context(|| format!("{} is no weight index", index.display()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    names
        .into_iter()
        .map(|name| {
            let path = Path::new(name);
            let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
            if !plain {
                bail!("the weight index names {name:?}, which is not inside the model folder");
            }
            Ok(dir.join(path))
        })
        .collect()
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    fn read<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|b| value(*b)).collect()
    }
    Ok(match dtype {
        Dtype::F32 => read(bytes, f32::from_le_bytes),
        Dtype::F16 => read(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => read(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        Dtype::F64 => read(bytes, |b| f64::from_le_bytes(b) as f32),
        other => bail!("data type {other:?} is not supported: weights are f32, f16 or bf16"),
    })
}

/// A tensor as bytes of a safetensors file.
struct Rendered {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Rendered {
    fn new(tensor: &Tensor, dtype: DType) -> Result<Self> {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let (dtype, bytes) = match dtype {
            DType::F32 => (Dtype::F32, render(&values, f32::to_le_bytes)),
            DType::F16 => (
                Dtype::F16,
                render(&values, |v| half::f16::from_f32(v).to_le_bytes()),
            ),
            DType::BF16 => (
                Dtype::BF16,
                render(&values, |v| half::bf16::from_f32(v).to_le_bytes()),
            ),
            other => bail!("cannot write weights as {other:?}"),
        };
        Ok(Self {
            dtype,
            shape: tensor.dims().to_vec(),
            bytes,
        })
    }
}

fn render<const N: usize>(values: &[f32], bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|v| bytes(*v)).collect()
}

impl View for Rendered {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
