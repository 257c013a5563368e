//! A model under training, and its Hugging Face folder.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Var};
use regex::Regex;

use super::{device, folder};
use crate::config::{LoraConfig, SaveDtype, StudentConfig, StudentInit, TrainConfig};
use crate::exit::Exit;
use crate::fs;
use crate::model::config::shape::{Architecture, ModelConfig};
use crate::model::layer_selection::{KeptLayers, keep_layers};
use crate::model::parameters::random_weights;
use crate::model::weights::{self, Tensors};
use crate::model::{Model, lora, network};
use crate::tokenizer::Tokenizer;
use crate::train::model_card::model_name;

/// A model, its trained parameters (all weights, or only the adapters) and its frozen parameters.
pub struct TrainableModel {
    pub model: Model,
    /// Trained parameters by name.
    pub vars: BTreeMap<String, Var>,
    /// Parameters that are not trained, by name.
    frozen: Tensors,
    /// Layers of the folder's model that a student with `init = "layers"` was made of.
    pub(super) kept_layers: Option<KeptLayers>,
}

/// Minimum learning rate with `train.scale_parameter` that is not an obvious mistake: most weights of a T5 are below 0.1.
const MIN_SCALED_LEARNING_RATE: f64 = 1e-3;

/// Warns about learning rates with which a T5 does not learn.
fn warn_of_learning_rate(init: StudentInit, shape: &ModelConfig, train: &TrainConfig) {
    if train.scale_parameter {
        if train.learning_rate < MIN_SCALED_LEARNING_RATE {
            tracing::warn!(
                "`train.learning_rate` = {} is small with `train.scale_parameter`, which multiplies it by the size of each \
                 parameter: rates of about 0.01 are usual",
                train.learning_rate
            );
        }
    } else if init == StudentInit::Random && shape.is_encoder_decoder() {
        tracing::warn!(
            "a T5 with random weights hardly learns without `train.scale_parameter` = true, and a `train.learning_rate` of \
             about 0.01"
        );
    }
}

impl TrainableModel {
    /// Loads or initialises the student.
    ///
    /// # Errors
    /// If the folder does not load, the tokenizer has ids beyond the embedding, a pattern of `lora.targets` or
    /// `train.freeze` matches nothing, or `train.freeze` leaves nothing to train.
    pub fn student(
        settings: &StudentConfig,
        adapters: &LoraConfig,
        train: &TrainConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let mut kept_layers = None;
        let (mut shape, weights) = match settings.init {
            StudentInit::Pretrained => network::load(&settings.path)?,
            StudentInit::Layers => {
                let (shape, weights) = network::load(&settings.path)?;
                let (shape, weights, kept) = keep_layers(&shape, weights, settings)?;
                kept_layers = Some(kept);
                (shape, weights)
            }
            StudentInit::Random => {
                let size = tokenizer.vocab_size();
                let stop = tokenizer.stop_ids();
                let start = tokenizer.decoder_start();
                let shape = ModelConfig::from_student(settings, size, stop, start)?;
                let weights = random_weights(&shape, train.seed)?;
                (shape, weights)
            }
        };
        tokenizer.check_fits(shape.vocab_size)?;
        if let Architecture::T5(variant) = &shape.architecture
            && shape.num_hidden_layers > variant.encoder_layers
        {
            tracing::warn!(
                "the student's decoder has more layers ({}) than its encoder ({}): transformers 4 and 5 generate with such \
                 a model only with `use_cache=False`",
                shape.num_hidden_layers,
                variant.encoder_layers
            );
        }
        warn_of_learning_rate(settings.init, &shape, train);
        let device = device::open(train)?;
        let new_adapters = match adapters.rank {
            0 => Tensors::new(),
            rank => {
                shape.adapter_scale = adapters.alpha / rank as f64;
                lora::new_adapters(&shape, rank, &adapters.targets, train.seed)?
            }
        };
        if adapters.rank > 0 {
            lora::check_targets(&shape, &adapters.targets)?;
        }
        let weights = weights::to_device(&weights, &device)?;
        let new_adapters = weights::to_device(&new_adapters, &device)?;
        let mut student = Self::new(shape, weights, new_adapters, |name| {
            train.freeze.iter().any(|pattern| pattern.is_match(name))
        })
        .with_context(|| format!("cannot load the student {}", settings.path.display()))?;
        let matches_parameter = |pattern: &Regex| {
            let names = student.vars.keys().chain(student.frozen.keys());
            names.into_iter().any(|name| pattern.is_match(name))
        };
        for pattern in &train.freeze {
            if !matches_parameter(pattern) {
                let mut names = student.vars.keys().chain(student.frozen.keys());
                bail!(Exit::Usage(format!(
                    "`train.freeze`: {:?} matches no parameter; the student's parameters are named like {}",
                    pattern.as_str(),
                    names.next().map_or("", String::as_str)
                )));
            }
        }
        if student.vars.is_empty() {
            bail!(Exit::Usage(
                "`train.freeze` leaves no parameter to train".into()
            ));
        }
        student.model.set_precision(device::precision(train));
        student.kept_layers = kept_layers;
        Ok(student)
    }

    /// Creates a model from `weights` and `adapters`. All weights are trained, or only the adapters if there are any.
    /// Parameters for which `is_frozen` returns true are not trained.
    ///
    /// # Errors
    /// If weights are missing or their shapes differ from `config`.
    pub fn new(
        config: ModelConfig,
        mut weights: Tensors,
        adapters: Tensors,
        is_frozen: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut vars = BTreeMap::new();
        let mut frozen = Tensors::new();
        let has_adapters = !adapters.is_empty();
        let names = config
            .parameters()
            .into_iter()
            .map(|parameter| parameter.name);
        // `Model::new` reports missing weights.
        let weights = names.filter_map(|name| weights.remove_entry(&name));
        for (is_adapter, (name, tensor)) in weights
            .map(|weight| (false, weight))
            .chain(adapters.into_iter().map(|adapter| (true, adapter)))
        {
            let is_trained = !has_adapters || is_adapter;
            if is_trained && !is_frozen(&name) {
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
            kept_layers: None,
        })
    }

    /// Returns the current values of the trained weights, on the CPU.
    ///
    /// # Errors
    /// If the device fails.
    pub fn trained(&self) -> Result<Tensors> {
        weights::to_device(&tensors(&self.vars), &Device::Cpu)
    }

    /// Returns all weights: the frozen weights and `trained`.
    pub fn with(&self, trained: Tensors) -> Tensors {
        let mut all = self.frozen.clone();
        all.extend(trained);
        all
    }

    /// Describes the initial weights of a student that was made of some layers of the model in `dir`; None for another
    /// student.
    pub(super) fn initial_weights(&self, dir: &Path) -> Option<String> {
        let kept = self.kept_layers.as_ref();
        kept.map(|kept| format!("{kept} of {}", model_name(dir)))
    }

    /// Returns the hash of the frozen weights.
    ///
    /// # Errors
    /// If a weight is not a contiguous f32 tensor, or the device fails.
    pub(crate) fn hash_of_frozen(&self) -> Result<String> {
        weights::hash(&self.frozen)
    }

    /// Writes a Hugging Face folder with the given weights; adapters are merged into them. An older folder is replaced
    /// atomically; files of other programs in it are kept.
    ///
    /// The tokenizer's files are copied from `tokenizer_dir`; `card` is the text of the README. Returns the
    /// differences between the copies and their sources.
    ///
    /// # Errors
    /// If a file cannot be read or written.
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
        let folder::StudentFiles { files, mut changes } =
            folder::files(shape, name, (tokenizer_dir, tokenizer), card)?;
        if shape.is_encoder_decoder() && dtype == DType::F16 {
            changes.push(
                "model.safetensors: f16, in which the feed-forward networks of T5 overflow; load it as f32 or bf16, or \
                 set `student.save_dtype` to \"bf16\""
                    .into(),
            );
        }
        let weights = weights::to_device(weights, &Device::Cpu)?;
        let weights = shape.to_file_layout(&lora::merge(shape, &weights)?)?;
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

/// Returns the tensors of the variables, by name.
pub fn tensors(vars: &BTreeMap<String, Var>) -> Tensors {
    let tensor = |(name, var): (&String, &Var)| (name.clone(), var.as_tensor().clone());
    vars.iter().map(tensor).collect()
}

/// Sets variables from a checkpoint.
///
/// # Errors
/// If a tensor is missing or has another shape.
pub fn restore(vars: &BTreeMap<String, Var>, file: &weights::SafetensorsFile) -> Result<()> {
    for (name, var) in vars {
        var.set(&file.tensor(name)?.to_device(var.device())?)
            .with_context(|| format!("{name} has another shape in the checkpoint"))?;
    }
    Ok(())
}
