//! Decoders that train and generate.
//!
//! A [`Model`] is a Hugging Face folder in memory. An architecture ([`llama`], [`gpt2`]) is written
//! once, over the operations of a [`graph`]; [`tape`] runs them on the CPU, [`composed`] everywhere.

pub mod batcher;
pub mod candle_graph;
pub mod config;
pub mod decoder;
pub(crate) mod decoding;
pub(crate) mod forward;
pub mod generate;
pub(crate) mod gpt2;
pub mod gradients;
pub mod graph;
pub(crate) mod kv_cache;
pub(crate) mod llama;
pub mod lora;
pub(crate) mod norm;
pub mod parameters;
pub mod projection;
pub mod sampling;
pub(crate) mod score;
pub mod tape;
pub(crate) mod text_stream;
pub mod weights;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

pub use crate::model::config::shape::ModelConfig;
pub use crate::model::forward::HiddenStates;
pub use crate::model::kv_cache::KvCache;
use decoder::Decoder;
use tape::TapeSettings;
use weights::Tensors;

use crate::ops::arena::Arena;
use crate::ops::linear::Linear;
use crate::ops::matmul::Precision;
use crate::ops::rope::RopeTable;

/// A decoder with its weights.
pub struct Model {
    config: ModelConfig,
    decoder: Decoder,
    rope: Option<RopeTable>,
    arena: Arena,
    precision: Precision,
    backend: Backend,
}

/// What runs the operations of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The [`tape`]: on the CPU.
    CpuTape,
    /// The [`composed`] operations: on every device.
    Candle,
}

/// Tokens laid end to end, and the positions among them that are asked about.
#[derive(Debug, Clone, Copy)]
pub struct ModelInput<'a> {
    /// (T)
    pub input_ids: &'a [u32],
    /// Cover `input_ids` in order; attention stays inside of each.
    pub segments: &'a [Range<usize>],
    /// (N)
    pub positions: &'a [u32],
}

impl Model {
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// Where a file is missing or malformed, or tensors and `config.json` do not agree.
    pub fn load(dir: &Path) -> Result<Self> {
        let (config, tensors) = decoder::load(dir)?;
        Self::new(config, &tensors).with_context(|| format!("cannot load {}", dir.display()))
    }

    /// A decoder over the given tensors, on their device; trainable where these are variables.
    ///
    /// # Errors
    /// Where tensors are missing or have other shapes than `config` says.
    pub fn new(config: ModelConfig, tensors: &Tensors) -> Result<Self> {
        // First of all, as it finds out whether the shapes are those of the weights.
        let decoder = Decoder::new(&config, tensors)?;
        let rope = config.rope().map(|rope| {
            let frequencies = rope.inverse_frequencies(config.heads.head_dim);
            RopeTable::new(&frequencies, config.max_position_embeddings)
        });
        Ok(Self {
            backend: match decoder.head().device() {
                Device::Cpu => Backend::CpuTape,
                _ => Backend::Candle,
            },
            decoder,
            rope,
            arena: Arena::default(),
            precision: Precision::F32,
            config,
        })
    }

    /// The same decoder over other weights, which are brought to its device.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub fn with_weights(&self, tensors: &Tensors) -> Result<Self> {
        let tensors = weights::to_device(tensors, self.head().device())?;
        Ok(Self {
            config: self.config.clone(),
            decoder: Decoder::new(&self.config, &tensors)?,
            rope: self.rope.clone(),
            arena: self.arena.clone(),
            precision: self.precision,
            backend: self.backend,
        })
    }

    /// Runs in `frame` from now on; a new model runs on the tape where it can.
    pub fn set_backend(&mut self, backend: Backend) {
        self.backend = backend;
    }

    /// What runs it.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Computes in `precision` from now on; a new model computes in f32.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The LM head's weight (V x D).
    pub fn head(&self) -> &Tensor {
        self.decoder.head()
    }

    /// What a tape needs to know.
    fn tape_settings(&self) -> TapeSettings<'_> {
        TapeSettings {
            arena: &self.arena,
            heads: self.config.heads,
            rope: self.rope.as_ref(),
            precision: self.precision,
        }
    }

    /// The LM head as a linear layer, from D to V.
    fn head_layer(&self) -> Linear {
        Linear {
            inputs: self.config.hidden_size,
            outputs: self.config.vocab_size,
            precision: self.precision,
        }
    }
}
