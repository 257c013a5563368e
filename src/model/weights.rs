//! Reads and writes named tensors in safetensors files.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::Deserialize;

use crate::exit::Exit;
use crate::ops::CpuValues;
use crate::ops::mapped_file::MappedFile;

/// Tensors by name, in the order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

#[derive(Deserialize)]
struct WeightIndex {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of a model folder.
#[derive(Debug, Default)]
pub struct LoadedTensors {
    /// Tensors by the names that `full_name` of [`load`] returned.
    pub tensors: Tensors,
    /// Names in the files of the tensors without a full name.
    pub unused: BTreeSet<String>,
}

/// Reads the tensors of a model folder as f32, from `model.safetensors` or from the shards that
/// `model.safetensors.index.json` lists. `full_name` maps the name of a tensor in the files to its full name, or to
/// None if the tensor is not used. Unused tensors are not read and may have any type.
///
/// # Errors
/// Where a file is missing or malformed, the index lists a file outside the folder, two tensors have the same full
/// name, or a used tensor is not f32, f16, bf16 or f64.
pub fn load(dir: &Path, full_name: impl Fn(&str) -> Option<String>) -> Result<LoadedTensors> {
    let mut loaded = LoadedTensors::default();
    for path in weight_files(dir)? {
        with_safetensors(&path, |file| {
            for stored_name in file.tensors.names() {
                match full_name(stored_name) {
                    Some(name) if loaded.tensors.contains_key(&name) => {
                        bail!(Exit::Usage(format!(
                            "the weights contain {name} twice (perhaps with and without a prefix), and programs \
                             differ in which one they use: remove one"
                        )))
                    }
                    Some(name) => {
                        loaded.tensors.insert(name, file.tensor(stored_name)?);
                    }
                    None => {
                        loaded.unused.insert(stored_name.to_owned());
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(loaded)
}

/// Groups names that differ only in numbers. Returns one text per group: the name with `*` for the numbers,
/// and the size of the group if it is not 1, as in `model.layers.*.bias (12)`.
pub(crate) fn name_patterns(names: &BTreeSet<String>) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        let parts = name.split('.').map(|part| match part.parse::<u64>() {
            Ok(_) => "*",
            Err(_) => part,
        });
        let pattern = parts.collect::<Vec<_>>().join(".");
        *counts.entry(pattern).or_default() += 1;
    }
    let texts = counts.into_iter().map(|(pattern, count)| match count {
        1 => pattern,
        _ => format!("{pattern} ({count})"),
    });
    texts.collect()
}

/// Checks that no unused tensor belongs to a layer that the model does not have. The names of the layers' tensors begin
/// with `prefix`, whose first part is optional, and the index of the layer. There are `layers` layers, as `field` of
/// `config.json` says.
///
/// # Errors
/// Where the index of a tensor's layer is `layers` or more.
pub fn check_layers(
    unused: &BTreeSet<String>,
    prefix: &str,
    layers: usize,
    field: &str,
) -> Result<()> {
    let without_first_part = prefix.split_once('.').map_or(prefix, |parts| parts.1);
    let layer_index = |name: &str| -> Option<usize> {
        let name = name
            .strip_prefix(prefix)
            .or_else(|| name.strip_prefix(without_first_part))?;
        name.split('.').next()?.parse().ok()
    };
    match unused
        .iter()
        .find(|name| layer_index(name).is_some_and(|index| index >= layers))
    {
        None => Ok(()),
        Some(name) => bail!(
            "config.json has `{field}` = {layers}, but the weights contain {name}: set it to the number of layers in the \
             weights"
        ),
    }
}

/// Reads one safetensors file as f32.
///
/// # Errors
/// Where the file is missing or malformed, or a tensor is not f32, f16, bf16 or f64.
pub fn load_file(path: &Path) -> Result<Tensors> {
    with_safetensors(path, |file| {
        let names = file.tensors.names();
        let load = |name: &str| Ok((name.to_string(), file.tensor(name)?));
        names.into_iter().map(load).collect()
    })
}

/// A safetensors file whose tensors are read one by one.
pub struct SafetensorsFile<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl SafetensorsFile<'_> {
    /// Reads the tensor `name` as f32.
    ///
    /// # Errors
    /// Where it is missing, or not f32, f16, bf16 or f64.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let read = || -> Result<Tensor> {
            let view = self.tensors.tensor(name)?;
            let values = to_f32(view.dtype(), view.data())?;
            Ok(Tensor::from_vec(values, view.shape(), &Device::Cpu)?)
        };
        read().with_context(|| format!("cannot read tensor {name} of {}", self.path.display()))
    }
}

/// Calls `read` with the safetensors file at `path`.
///
/// # Errors
/// Where the file is missing or malformed, or `read` fails.
pub fn with_safetensors<R>(
    path: &Path,
    read: impl FnOnce(&SafetensorsFile) -> Result<R>,
) -> Result<R> {
    crate::fs::check_is_file(path)?;
    let map = std::fs::File::open(path)
        .and_then(|file| MappedFile::new(&file))
        .with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&map)
        .with_context(|| format!("{} is not a valid safetensors file", path.display()))?;
    read(&SafetensorsFile { path, tensors })
}

/// A tensor to write.
pub struct TensorEntry<'a> {
    shape: Vec<usize>,
    values: Box<dyn Deref<Target = [f32]> + 'a>,
    dtype: Dtype,
}

impl<'a> TensorEntry<'a> {
    /// Creates an entry of f32 values.
    pub fn new(shape: &[usize], values: &'a [f32]) -> Self {
        Self {
            shape: shape.to_vec(),
            values: Box::new(values),
            dtype: Dtype::F32,
        }
    }

    /// Creates an entry from an f32 tensor on any device, which is copied to the CPU.
    ///
    /// # Errors
    /// Where the device fails.
    pub(crate) fn from_device(tensor: &Tensor) -> Result<Self> {
        let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
        Ok(Self {
            shape: tensor.dims().to_vec(),
            values: Box::new(flat.to_vec1::<f32>()?),
            dtype: Dtype::F32,
        })
    }

    /// Creates an entry that is written as `dtype`, from a contiguous f32 tensor on the CPU.
    ///
    /// # Errors
    /// Where `tensor` is not contiguous f32 on the CPU, or `dtype` is not f32, f16 or bf16.
    pub fn from_tensor(tensor: &'a Tensor, dtype: DType) -> Result<Self> {
        let dtype = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => bail!("cannot write weights as {other:?}: expected f32, f16 or bf16"),
        };
        Ok(Self {
            shape: tensor.dims().to_vec(),
            values: Box::new(CpuValues::new(tensor)?),
            dtype,
        })
    }
}

impl View for TensorEntry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        fn encode<const N: usize>(values: &[f32], bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
            values.iter().flat_map(|v| bytes(*v)).collect()
        }
        match self.dtype {
            Dtype::F16 => encode(&self.values, |v| half::f16::from_f32(v).to_le_bytes()).into(),
            Dtype::BF16 => encode(&self.values, |v| half::bf16::from_f32(v).to_le_bytes()).into(),
            _ => le_bytes(&self.values),
        }
    }

    fn data_len(&self) -> usize {
        self.values.len() * if self.dtype == Dtype::F32 { 4 } else { 2 }
    }
}

fn le_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice(values).into()
    } else {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes());
        bytes.collect::<Vec<u8>>().into()
    }
}

/// Writes a safetensors file. Converts one tensor at a time, to save memory. Call it within
/// [`crate::fs::write_dir_with`].
///
/// # Errors
/// Where it cannot be written.
pub fn write(path: &Path, entries: BTreeMap<String, TensorEntry>) -> Result<()> {
    let metadata = [("format".to_string(), "pt".to_string())];
    crate::fs::create_with(path, || {
        safetensors::serialize_to_file(entries, Some(metadata.into()), path)
            .with_context(|| format!("could not write {}", path.display()))
    })
}

/// Number of values that [`hash`] hashes at a time.
const HASHED_VALUES: usize = 1 << 16;

/// Returns the BLAKE3 hash of names and values, in hexadecimal.
///
/// # Errors
/// Where a tensor is not contiguous f32, or the device fails.
pub fn hash(tensors: &Tensors) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for (name, tensor) in tensors {
        hash.update(name.as_bytes());
        for values in CpuValues::new(&tensor.to_device(&Device::Cpu)?)?.chunks(HASHED_VALUES) {
            hash.update_rayon(&le_bytes(values));
        }
    }
    Ok(hash.finalize().to_hex().to_string())
}

/// Copies the tensors to `device`.
///
/// # Errors
/// Where the device runs out of memory.
pub(crate) fn to_device(tensors: &Tensors, device: &Device) -> Result<Tensors> {
    let copy = |(name, tensor): (&String, &Tensor)| -> Result<_> {
        Ok((name.clone(), tensor.to_device(device)?))
    };
    tensors.iter().map(copy).collect()
}

/// Returns the entries of `tensors` for [`write()`], which writes them as `dtype`.
///
/// # Errors
/// Where a tensor is not contiguous f32 on the CPU.
pub fn entries(tensors: &Tensors, dtype: DType) -> Result<BTreeMap<String, TensorEntry<'_>>> {
    let entry =
        |(name, tensor): (&String, _)| Ok((name.clone(), TensorEntry::from_tensor(tensor, dtype)?));
    tensors.iter().map(entry).collect()
}

/// Returns the safetensors files of a model folder.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        bail!(Exit::Usage(format!(
            "{} contains no model.safetensors: convert other weight formats with transformers' \
             `save_pretrained`",
            dir.display()
        )));
    }
    let text = std::fs::read_to_string(&index)
        .with_context(|| format!("cannot read {}", index.display()))?;
    let index: WeightIndex = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a valid weight index", index.display()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    names
        .into_iter()
        .map(|name| {
            let path = Path::new(name);
            let is_inside = path.components().all(|c| matches!(c, Component::Normal(_)));
            if !is_inside {
                bail!("the weight index lists {name:?}, which is not inside the model folder");
            }
            Ok(dir.join(path))
        })
        .collect()
}

/// Decodes little-endian values of `dtype` to f32.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    fn read<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|b| value(*b)).collect()
    }
    Ok(match dtype {
        Dtype::F32 => read(bytes, f32::from_le_bytes),
        Dtype::F16 => read(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => read(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        Dtype::F64 => read(bytes, |b| f64::from_le_bytes(b) as f32),
        other => bail!("data type {other:?} is not supported; expected f32, f16, bf16 or f64"),
    })
}
