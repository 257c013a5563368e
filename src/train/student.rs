//! The model under training, and the folder that it becomes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Var};
use regex::Regex;
use serde_json::json;

use crate::config::{self, ComputeDtype, Init, SaveDtype};
use crate::data::tokenizer::Tokenizer;
use crate::exit::Exit;
use crate::fs;
use crate::model::weights::{self, Tensors};
use crate::model::{Model, ModelConfig, llama};
use crate::ops::matmul::Precision;

/// Names the tokens that end an answer.
const GENERATION_CONFIG: &str = "generation_config.json";

/// Files of the source folder that belong to the tokenizer and go along unchanged.
const TOKENIZER_FILES: [&str; 9] = [
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];

/// A model whose weights are variables, but for those that are frozen.
pub struct Student {
    pub model: Model,
    pub vars: BTreeMap<String, Var>,
    frozen: Tensors,
}

impl Student {
    /// The student that `[student]` describes, before its first step.
    ///
    /// # Errors
    /// Where the folder does not load, or its tokenizer has ids past its embedding.
    pub fn initial(
        settings: &config::Student,
        train: &config::Train,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let (config, tensors) = match settings.init {
            Init::Pretrained => (
                ModelConfig::load(&settings.path)?,
                weights::load(&settings.path)?,
            ),
            Init::Random => {
                let (size, stop) = (tokenizer.vocab_size(), tokenizer.stop_ids());
                let config = ModelConfig::of_student(settings, size, stop)?;
                let tensors = llama::random_weights(&config, train.seed)?;
                (config, tensors)
            }
        };
        tokenizer.check_fits(config.vocab_size)?;
        let mut student = Self::new(config, tensors, &patterns(&train.freeze)?)
            .with_context(|| format!("cannot load the student {}", settings.path.display()))?;
        if student.vars.is_empty() {
            bail!(Exit::Usage(
                "train.freeze leaves no parameter to train".into()
            ));
        }
        student.model.set_precision(precision(train.dtype));
        Ok(student)
    }

    /// A student over the given weights, of which those that a pattern finds are not trained.
    ///
    /// # Errors
    /// Where weights are missing or have other shapes than `config` says.
    pub fn new(config: ModelConfig, mut tensors: Tensors, freeze: &[Regex]) -> Result<Self> {
        let mut vars = BTreeMap::new();
        let mut frozen = Tensors::new();
        let mut all = Tensors::new();
        for (name, _) in llama::parameters(&config) {
            // A missing one is named by the model below.
            let Some(tensor) = tensors.remove(&name) else {
                continue;
            };
            if freeze.iter().any(|pattern| pattern.is_match(&name)) {
                all.insert(name.clone(), tensor.clone());
                frozen.insert(name, tensor);
                continue;
            }
            let var = Var::from_tensor(&tensor)?;
            all.insert(name.clone(), var.as_tensor().clone());
            vars.insert(name, var);
        }
        Ok(Self {
            model: Model::new(config, &all)?,
            vars,
            frozen,
        })
    }

    /// The current weights.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = self.frozen.clone();
        let trained = self.vars.iter();
        tensors.extend(trained.map(|(name, var)| (name.clone(), var.as_tensor().clone())));
        tensors
    }

    /// Writes a student as a Hugging Face folder with the given weights; an older one is replaced
    /// whole.
    ///
    /// `tokenizer_dir` is the folder that the tokenizer came from, `card` the text of its README.
    ///
    /// # Errors
    /// Where a file cannot be read or written.
    pub fn save(
        &self,
        dir: &Path,
        weights: &Tensors,
        dtype: SaveDtype,
        (tokenizer_dir, stop_ids): (&Path, &[u32]),
        card: &str,
    ) -> Result<()> {
        let (dtype, name) = match dtype {
            SaveDtype::F32 => (DType::F32, "float32"),
            SaveDtype::F16 => (DType::F16, "float16"),
            SaveDtype::Bf16 => (DType::BF16, "bfloat16"),
        };
        let config = serde_json::to_vec_pretty(&self.model.config().to_json(name))?;
        let mut files: Vec<(&str, Vec<u8>)> =
            vec![("config.json", config), ("README.md", card.into())];
        for name in TOKENIZER_FILES {
            let path = tokenizer_dir.join(name);
            if path.exists() {
                let bytes = std::fs::read(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                files.push((name, bytes));
            }
        }
        if !files.iter().any(|(name, _)| *name == GENERATION_CONFIG) {
            let generation = serde_json::to_vec_pretty(&json!({ "eos_token_id": stop_ids }))?;
            files.push((GENERATION_CONFIG, generation));
        }
        fs::write_dir_with(dir, |folder| {
            for (name, bytes) in &files {
                fs::write_in(folder, name, bytes)?;
            }
            let entries = weights::entries(weights, dtype)?;
            weights::write(&folder.join("model.safetensors"), entries)
        })
    }
}

/// Sets variables from a checkpoint.
///
/// # Errors
/// Where one is missing or has another shape.
pub fn restore(vars: &BTreeMap<String, Var>, file: &weights::File) -> Result<()> {
    for (name, var) in vars {
        var.set(&file.tensor(name)?)
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

/// What this CPU computes in.
pub fn precision(dtype: ComputeDtype) -> Precision {
    match dtype {
        ComputeDtype::Auto => Precision::fastest(),
        ComputeDtype::F32 => Precision::F32,
        ComputeDtype::Bf16 => Precision::Bf16,
    }
}
