//! The model under training, and the folder that it becomes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Var};
use serde_json::json;

use crate::config::{self, Init, SaveDtype};
use crate::data::tokenizer::Tokenizer;
use crate::fs;
use crate::model::weights::{self, Tensors};
use crate::model::{Model, ModelConfig, llama};

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

/// A model whose weights are variables.
pub struct Student {
    pub model: Model,
    pub vars: BTreeMap<String, Var>,
}

impl Student {
    /// The student that `[student]` describes, before its first step.
    ///
    /// # Errors
    /// Where the folder does not load, or its tokenizer has ids past its embedding.
    pub fn initial(settings: &config::Student, tokenizer: &Tokenizer, seed: u64) -> Result<Self> {
        let (config, tensors) = match settings.init {
            Init::Pretrained => (
                ModelConfig::load(&settings.path)?,
                weights::load(&settings.path)?,
            ),
            Init::Random => {
                let (size, stop) = (tokenizer.vocab_size(), tokenizer.stop_ids());
                let config = ModelConfig::of_student(settings, size, stop)?;
                let tensors = llama::random_weights(&config, seed)?;
                (config, tensors)
            }
        };
        tokenizer.check_fits(config.vocab_size)?;
        Self::new(config, tensors)
            .with_context(|| format!("cannot load the student {}", settings.path.display()))
    }

    /// A student over the given weights.
    ///
    /// # Errors
    /// Where weights are missing or have other shapes than `config` says.
    pub fn new(config: ModelConfig, mut tensors: Tensors) -> Result<Self> {
        let mut vars = BTreeMap::new();
        let mut trainable = Tensors::new();
        for (name, _) in llama::parameters(&config) {
            // A missing one is named by the model below.
            let Some(tensor) = tensors.remove(&name) else {
                continue;
            };
            let var = Var::from_tensor(&tensor)?;
            trainable.insert(name.clone(), var.as_tensor().clone());
            vars.insert(name, var);
        }
        Ok(Self {
            model: Model::new(config, &trainable)?,
            vars,
        })
    }

    /// The current weights.
    pub fn tensors(&self) -> Tensors {
        self.vars
            .iter()
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
            .collect()
    }

    /// Replaces the weights.
    ///
    /// # Errors
    /// Where one is missing or has another shape.
    pub fn restore(&self, tensors: &Tensors) -> Result<()> {
        for (name, var) in &self.vars {
            let tensor = tensors
                .get(name)
                .with_context(|| format!("the checkpoint lacks {name}"))?;
            var.set(tensor)
                .with_context(|| format!("{name} has another shape in the checkpoint"))?;
        }
        Ok(())
    }

    /// Writes the student as a Hugging Face folder; an older one is replaced whole.
    ///
    /// `tokenizer_dir` is the folder that the tokenizer came from, `card` the text of its README.
    ///
    /// # Errors
    /// Where a file cannot be read or written.
    pub fn save(
        &self,
        dir: &Path,
        dtype: SaveDtype,
        tokenizer_dir: &Path,
        stop_ids: &[u32],
        card: &str,
    ) -> Result<()> {
        let (dtype, name) = match dtype {
            SaveDtype::F32 => (DType::F32, "float32"),
            SaveDtype::F16 => (DType::F16, "float16"),
            SaveDtype::Bf16 => (DType::BF16, "bfloat16"),
        };
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let weights = weights::serialize(&self.tensors(), dtype, metadata)?;
        let config = serde_json::to_vec_pretty(&self.model.config().to_json(name))?;
        let mut files: Vec<(&str, Vec<u8>)> = vec![
            ("model.safetensors", weights),
            ("config.json", config),
            ("README.md", card.into()),
        ];
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
        let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (*n, b.as_slice())).collect();
        fs::write_dir(dir, &files)
    }
}
