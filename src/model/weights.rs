//! Named tensors in safetensors files.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::Deserialize;

use crate::exit::Exit;
use crate::ops::Values;
use crate::ops::map::Map;

/// Tensors by name, in the order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Tensors of a model folder.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Those that are used, by the names that `load` was given for them.
    pub tensors: Tensors,
    /// Names of the others in the files.
    pub unused: BTreeSet<String>,
}

/// Reads tensors of a model folder as f32: of `model.safetensors`, or of the shards that
/// `model.safetensors.index.json` names. `name` returns what a tensor of the files is called, or None if it is not
/// used: it is not read then, and may be of any type.
///
/// # Errors
/// Where a file is missing or malformed, the index names a file outside of the folder, or two tensors have the same
/// name.
pub fn load(dir: &Path, name: impl Fn(&str) -> Option<String>) -> Result<Loaded> {
    let mut loaded = Loaded::default();
    for path in files(dir)? {
        with_file(&path, |file| {
            for stored in file.tensors.names() {
                match name(stored) {
                    Some(name) if loaded.tensors.contains_key(&name) => {
                        bail!(Exit::Usage(format!(
                            "the weights have {name} twice, perhaps with a prefix and without, and programs differ in \
                             which they use: remove one"
                        )))
                    }
                    Some(name) => {
                        loaded.tensors.insert(name, file.tensor(stored)?);
                    }
                    None => {
                        loaded.unused.insert(stored.to_owned());
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(loaded)
}

/// Names with `*` in place of the numbers in them, each once, with its count.
pub fn patterns(names: &BTreeSet<String>) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        let parts = name.split('.').map(|part| match part.parse::<u64>() {
            Ok(_) => "*",
            Err(_) => part,
        });
        let pattern = parts.collect::<Vec<_>>().join(".");
        *counts.entry(pattern).or_default() += 1;
    }
    let shown = counts.into_iter().map(|(pattern, count)| match count {
        1 => pattern,
        _ => format!("{pattern} ({count})"),
    });
    shown.collect()
}

/// Refuses weights with more layers than are to be built: the rest would be left out in silence.
///
/// # Errors
/// Where a tensor belongs to a layer from `layers` on.
pub fn check_layers(names: &BTreeSet<String>, layers: usize) -> Result<()> {
    let layer = |name: &str| -> Option<usize> {
        let own = ["model.", "transformer."];
        let own = own.iter().find_map(|prefix| name.strip_prefix(prefix));
        let own = own.unwrap_or(name);
        let rest = own.strip_prefix("layers.").or(own.strip_prefix("h."))?;
        rest.split('.').next()?.parse().ok()
    };
    match names
        .iter()
        .find(|name| layer(name).is_some_and(|layer| layer >= layers))
    {
        None => Ok(()),
        Some(name) => bail!(
            "config.json says `num_hidden_layers` = {layers}, and the weights have {name}: set it to the \
             number of layers that are there"
        ),
    }
}

/// Reads one safetensors file as f32.
///
/// # Errors
/// Where it is missing, malformed, or holds a data type that is no float.
pub fn load_file(path: &Path) -> Result<Tensors> {
    with_file(path, |file| {
        let names = file.tensors.names();
        let load = |name: &str| Ok((name.to_string(), file.tensor(name)?));
        names.into_iter().map(load).collect()
    })
}

/// A safetensors file, of which tensors are read one by one.
pub struct File<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl File<'_> {
    /// The tensor `name` as f32.
    ///
    /// # Errors
    /// Where it is missing, or holds a data type that is no float.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let read = || -> Result<Tensor> {
            let view = self.tensors.tensor(name)?;
            let values = to_f32(view.dtype(), view.data())?;
            Ok(Tensor::from_vec(values, view.shape(), &Device::Cpu)?)
        };
        read().with_context(|| format!("tensor {name} of {}", self.path.display()))
    }
}

/// Calls `read` with the safetensors file at `path`.
///
/// # Errors
/// Where it is missing or malformed.
pub fn with_file<R>(path: &Path, read: impl FnOnce(&File) -> Result<R>) -> Result<R> {
    crate::fs::check_is_file(path)?;
    let map = std::fs::File::open(path)
        .and_then(|file| Map::of(&file))
        .with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&map)
        .with_context(|| format!("{} is no valid safetensors file", path.display()))?;
    read(&File { path, tensors })
}

/// A tensor to be written.
pub struct Entry<'a> {
    shape: Vec<usize>,
    values: Box<dyn Deref<Target = [f32]> + 'a>,
    dtype: Dtype,
}

impl<'a> Entry<'a> {
    /// Values of a shape as f32.
    pub fn new(shape: &[usize], values: &'a [f32]) -> Self {
        Self {
            shape: shape.to_vec(),
            values: Box::new(values),
            dtype: Dtype::F32,
        }
    }

    /// A tensor of another device, brought here, as f32.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn copy_of(tensor: &Tensor) -> Result<Self> {
        let here = tensor.to_device(&Device::Cpu)?.flatten_all()?;
        Ok(Self {
            shape: tensor.dims().to_vec(),
            values: Box::new(here.to_vec1::<f32>()?),
            dtype: Dtype::F32,
        })
    }

    /// A contiguous f32 tensor on the CPU as `dtype`.
    ///
    /// # Errors
    /// Where it is none, or `dtype` is no float.
    pub fn of(tensor: &'a Tensor, dtype: DType) -> Result<Self> {
        let dtype = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => bail!("cannot write weights as {other:?}"),
        };
        Ok(Self {
            shape: tensor.dims().to_vec(),
            values: Box::new(Values::of(tensor)?),
            dtype,
        })
    }
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        fn render<const N: usize>(values: &[f32], bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
            values.iter().flat_map(|v| bytes(*v)).collect()
        }
        match self.dtype {
            Dtype::F16 => render(&self.values, |v| half::f16::from_f32(v).to_le_bytes()).into(),
            Dtype::BF16 => render(&self.values, |v| half::bf16::from_f32(v).to_le_bytes()).into(),
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

/// Writes a safetensors file, one tensor in memory at a time, into a folder that
/// [`crate::fs::write_dir_with`] fills.
///
/// # Errors
/// Where it cannot be written.
pub fn write(path: &Path, entries: BTreeMap<String, Entry>) -> Result<()> {
    let metadata = [("format".to_string(), "pt".to_string())];
    crate::fs::create_with(path, || {
        safetensors::serialize_to_file(entries, Some(metadata.into()), path)
            .with_context(|| format!("could not write {}", path.display()))
    })
}

/// A hash of names and values.
///
/// # Errors
/// Where one is no contiguous f32 tensor, or the device fails.
pub fn hash(tensors: &Tensors) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for (name, tensor) in tensors {
        hash.update(name.as_bytes());
        for values in Values::of(&tensor.to_device(&Device::Cpu)?)?.chunks(1 << 16) {
            hash.update_rayon(&le_bytes(values));
        }
    }
    Ok(hash.finalize().to_hex().to_string())
}

/// The tensors on `device`.
///
/// # Errors
/// Where there is no room for them.
pub fn to_device(tensors: &Tensors, device: &Device) -> Result<Tensors> {
    let moved = |(name, tensor): (&String, &Tensor)| -> Result<_> {
        Ok((name.clone(), tensor.to_device(device)?))
    };
    tensors.iter().map(moved).collect()
}

/// Tensors as entries of the given float type.
///
/// # Errors
/// Where a tensor is not contiguous f32 on the CPU.
pub fn entries(tensors: &Tensors, dtype: DType) -> Result<BTreeMap<String, Entry<'_>>> {
    let entry = |(name, tensor): (&String, _)| Ok((name.clone(), Entry::of(tensor, dtype)?));
    tensors.iter().map(entry).collect()
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
