//! The model under training, and the folder that it becomes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Var};
use regex::Regex;

use super::{device, folder};
use crate::config::{Config, Init, SaveDtype};
use crate::exit::Exit;
use crate::fs;
use crate::model::config::shape::ModelConfig;
use crate::model::parameters::random_weights;
use crate::model::weights::{self, Tensors};
use crate::model::{Model, decoder, lora};
use crate::tokenizer::Tokenizer;

/// A model whose weights, or whose adapters, are variables, but for those that are frozen.
pub struct Student {
    pub model: Model,
    pub vars: BTreeMap<String, Var>,
    frozen: Tensors,
}

impl Student {
    /// The student that the config describes, before its first step.
    ///
    /// # Errors
    /// Where the folder does not load, or its tokenizer has ids past its embedding.
    pub fn initial(config: &Config, tokenizer: &Tokenizer) -> Result<Self> {
        let (settings, train) = (&config.student, &config.train);
        let (mut shape, weights) = match settings.init {
            Init::Pretrained => decoder::load(&settings.path)?,
            Init::Random => {
                let (size, stop) = (tokenizer.vocab_size(), tokenizer.stop_ids());
                let shape = ModelConfig::of_student(settings, size, stop)?;
                let weights = random_weights(&shape, train.seed)?;
                (shape, weights)
            }
        };
        tokenizer.check_fits(shape.vocab_size)?;
        let device = device::of(train)?;
        let adapters = match config.lora.rank {
            0 => Tensors::new(),
            rank => {
                shape.adapter_scale = config.lora.alpha / rank as f64;
                lora::adapters(&shape, rank, &patterns(&config.lora.targets)?, train.seed)?
            }
        };
        if config.lora.rank > 0 && adapters.is_empty() {
            bail!(Exit::Usage(format!(
                "lora.targets finds no linear layer in the student: its layers are named like {}",
                lora::example(&shape)
            )));
        }
        let weights = weights::to_device(&weights, &device)?;
        let adapters = weights::to_device(&adapters, &device)?;
        let mut student = Self::new(shape, weights, adapters, &patterns(&train.freeze)?)
            .with_context(|| format!("cannot load the student {}", settings.path.display()))?;
        let is_known = |pattern: &Regex| {
            let names = student.vars.keys().chain(student.frozen.keys());
            names.into_iter().any(|name| pattern.is_match(name))
        };
        for pattern in patterns(&train.freeze)? {
            if !is_known(&pattern) {
                bail!(Exit::Usage(format!(
                    "train.freeze names {:?}, which matches no parameter",
                    pattern.as_str()
                )));
            }
        }
        if student.vars.is_empty() {
            bail!(Exit::Usage(
                "train.freeze leaves no parameter to train".into()
            ));
        }
        student.model.set_precision(device::precision(train));
        Ok(student)
    }

    /// A student over the given weights. All of them are trained, or the adapters alone where there
    /// are any; those that a pattern finds are not.
    ///
    /// # Errors
    /// Where weights are missing or have other shapes than `config` says.
    pub fn new(
        config: ModelConfig,
        mut weights: Tensors,
        adapters: Tensors,
        freeze: &[Regex],
    ) -> Result<Self> {
        let mut vars = BTreeMap::new();
        let mut frozen = Tensors::new();
        let all_weights_train = adapters.is_empty();
        let names = config
            .parameters()
            .into_iter()
            .map(|parameter| parameter.name);
        // A missing one is named by the model below.
        let weights = names.filter_map(|name| weights.remove_entry(&name));
        for (is_adapter, (name, tensor)) in weights
            .map(|weight| (false, weight))
            .chain(adapters.into_iter().map(|adapter| (true, adapter)))
        {
            let trains = all_weights_train || is_adapter;
            if trains && !freeze.iter().any(|pattern| pattern.is_match(&name)) {
                vars.insert(name, Var::from_tensor(&tensor)?);
            } else {
                frozen.insert(name, tensor);
            }
        }
        let mut all = frozen.clone();
        all.extend(tensors(&vars));
        Ok(Self {
            model: Model::new(config, &all)?,
            vars,
            frozen,
        })
    }

    /// The weights that are trained, as they are now, on the CPU.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn trained(&self) -> Result<Tensors> {
        weights::to_device(&tensors(&self.vars), &Device::Cpu)
    }

    /// All weights, with `trained` as those that are trained.
    pub fn with(&self, trained: Tensors) -> Tensors {
        let mut all = self.frozen.clone();
        all.extend(trained);
        all
    }

    /// A hash of the weights that are not trained.
    ///
    /// # Errors
    /// Where one is no contiguous f32 tensor, or the device fails.
    pub fn hash_of_frozen(&self) -> Result<String> {
        weights::hash(&self.frozen)
    }

    /// Writes a student as a Hugging Face folder with the given weights, adapters merged into them;
    /// an older one is replaced whole.
    ///
    /// Files of the tokenizer come from `tokenizer_dir`; `card` is the text of the README. Returns how these files
    /// differ from those that were read.
    ///
    /// # Errors
    /// Where a file cannot be read or written.
    pub fn save(
        &self,
        dir: &Path,
        weights: &Tensors,
        dtype: SaveDtype,
        (tokenizer_dir, tokenizer): (&Path, &Tokenizer),
        card: &str,
    ) -> Result<Vec<String>> {
        let (dtype, name) = match dtype {
            SaveDtype::F32 => (DType::F32, "float32"),
            SaveDtype::F16 => (DType::F16, "float16"),
            SaveDtype::Bf16 => (DType::BF16, "bfloat16"),
        };
        let shape = self.model.config();
        let folder::Files { files, changes } =
            folder::files(shape, name, (tokenizer_dir, tokenizer), card)?;
        let weights = weights::to_device(weights, &Device::Cpu)?;
        let weights = shape.export(&lora::merged(shape, &weights)?)?;
        fs::write_dir_with(dir, |folder| {
            for (name, bytes) in &files {
                fs::write_in(folder, name, bytes)?;
            }
            let entries = weights::entries(&weights, dtype)?;
            weights::write(&folder.join("model.safetensors"), entries)?;
            fs::copy_foreign_entries(dir, folder, |name| {
                folder::TOKENIZER_FILES.contains(&name)
                    || name.starts_with("model") && name.contains(".safetensors")
            })
        })?;
        Ok(changes)
    }
}

/// Variables as tensors.
pub fn tensors(vars: &BTreeMap<String, Var>) -> Tensors {
    let tensor = |(name, var): (&String, &Var)| (name.clone(), var.as_tensor().clone());
    vars.iter().map(tensor).collect()
}

/// Sets variables from a checkpoint.
///
/// # Errors
/// Where one is missing or has another shape.
pub fn restore(vars: &BTreeMap<String, Var>, file: &weights::File) -> Result<()> {
    for (name, var) in vars {
        var.set(&file.tensor(name)?.to_device(var.device())?)
            .with_context(|| format!("{name} has another shape in the checkpoint"))?;
    }
    Ok(())
}

/// Regular expressions of the config.
///
/// # Errors
/// Where one is none.
pub fn patterns(texts: &[String]) -> Result<Vec<Regex>> {
    let pattern = |text: &String| {
        Regex::new(text).map_err(|error| {
            Exit::Usage(format!("{text:?} is no regular expression: {error}")).into()
        })
    };
    texts.iter().map(pattern).collect()
}
