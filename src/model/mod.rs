//! Models that train and generate: decoders, and encoder-decoders.
//!
//! A [`Model`] is a Hugging Face folder in memory. An architecture is written once, over the operations
//! of a [`graph`]. [`tape`] runs them on the CPU, [`candle_graph`] on every device.
//!
//! | file | content |
//! |---|---|
//! | `config/` | the shape of a model, read from `config.json` |
//! | `weights`, `parameters`, `lora` | safetensors files; names, shapes and initial values; adapters |
//! | `network`, `layer_selection` | the weights of any architecture, loading of a model folder; a smaller model from some of its layers |
//! | `llama`, `gpt2`, `decoder` | the layers of each architecture; the decoder around them |
//! | `t5` | an encoder-decoder |
//! | `projection`, `norm`, `position_bias` | the weights of a linear layer, of a norm, of a relative position bias |
//! | `graph`, `tape/`, `candle_graph/`, `gradients` | the operations, their two implementations, the gradients |
//! | `input`, `forward`, `decoding`, `kv_cache` | the input of a pass; passes over whole sequences; incremental decoding |
//! | `batcher`, `sampling`, `text_stream`, `generate`, `score` | continuous batching, sampling, answers, scores |
//!
//! Invariants: both graphs compute the same function, which the tests in `tests/it/gradients` check.
//! The files of a student have the names and layouts of transformers. No code here reads the network.
//!
//! # How to add an architecture
//!
//! 1. `config/<name>.rs`: `parse` reads `config.json`; add its `model_type` to `ModelConfig::from_json`.
//! 2. `config/shape.rs`: add a variant to [`Architecture`](config::shape::Architecture), or a field to
//!    [`LlamaVariant`](config::LlamaVariant) for a small difference from llama.
//! 3. `<name>.rs`: the weight names (`NAMES`), `add_layer_parameters`, and the layer with `new` and
//!    `forward` over [`Graph`](graph::Graph). Add them to each `match` in `decoder.rs` and `network.rs`.
//! 4. A new operation: a method of `Graph`, an `Op` in `tape/` (forward and backward), its
//!    arithmetic in `ops/`, and the same operation with candle in `candle_graph/mod.rs`.
//! 5. If the files have another layout: `to_memory_layout` and `to_file_layout`, as in `gpt2.rs`.
//! 6. Tests: add a case to `tests/python/make_gradient_golden.py`, which writes the golden files in
//!    `tests/it/golden/gradients/`, and its name to `CASES` in `tests/it/gradients/torch.rs`.
//!
//! Tensor names end in their shape: B batch, T tokens (all segments of a batch, end to end), S tokens of one
//! sequence, D model width, H heads, G key/value heads, C head width, F feed-forward width, N supervised
//! positions, V vocabulary, K top-k, L layers, U source tokens (all sources of a batch, end to end), E buckets of
//! relative positions; I and O are the inputs and outputs of a linear layer, R the rank
//! of its adapter. W is any width of a row: D, F, H C or G C. A lower-case letter is a part of its dimension:
//! `logits_nV` are n of N rows, c is C / 2. The prefix `d` marks the gradient of the loss with respect to a
//! tensor: `dy_TW` for `y_TW`.

pub mod batcher;
pub mod candle_graph;
pub mod config;
pub(crate) mod decoder;
pub(crate) mod decoding;
pub(crate) mod forward;
pub mod generate;
pub(crate) mod gpt2;
pub mod gradients;
pub mod graph;
pub mod input;
pub(crate) mod kv_cache;
pub mod layer_selection;
pub(crate) mod llama;
pub mod lora;
pub mod network;
pub(crate) mod norm;
pub mod parameters;
pub mod position_bias;
pub mod projection;
pub mod sampling;
pub(crate) mod score;
pub(crate) mod t5;
pub mod tape;
pub(crate) mod text_stream;
pub mod weights;

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;

pub use crate::model::config::shape::ModelConfig;
pub use crate::model::forward::HiddenStates;
pub use crate::model::input::{ModelInput, SourceInput};
pub use crate::model::kv_cache::KvCache;
use network::Network;
use tape::TapeSettings;
use weights::Tensors;

use crate::ops::arena::Arena;
use crate::ops::linear::Linear;
use crate::ops::matmul::Precision;
use crate::ops::rope::RopeTable;

/// A model with its weights.
pub struct Model {
    config: ModelConfig,
    network: Network,
    rope: Option<RopeTable>,
    arena: Arena,
    precision: Precision,
    backend: Backend,
}

/// The implementation that runs the operations of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The fused operations of [`tape`], on the CPU only.
    CpuTape,
    /// The candle operations of [`candle_graph`], on every device.
    Candle,
}

impl Model {
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// Where a file is missing or malformed, or the tensors do not match `config.json`.
    pub fn load(dir: &Path) -> Result<Self> {
        let (config, tensors) = network::load(dir)?;
        Self::new(config, &tensors).with_context(|| format!("cannot load {}", dir.display()))
    }

    /// Builds a model from `tensors`, on their device. Tensors that are variables are trainable.
    ///
    /// # Errors
    /// Where tensors are missing or their shapes do not match `config`.
    pub fn new(config: ModelConfig, tensors: &Tensors) -> Result<Self> {
        // Built first, because it checks the sizes in `config` against the weights: a wrong size would
        // allocate a wrong table below.
        let network = Network::new(&config, tensors)?;
        let rope = config.rope().map(|rope| {
            let frequencies = rope.inverse_frequencies(config.heads.head_dim);
            RopeTable::new(&frequencies, config.max_position_embeddings)
        });
        Ok(Self {
            backend: if network.head().device().is_cpu() {
                Backend::CpuTape
            } else {
                Backend::Candle
            },
            network,
            rope,
            arena: Arena::default(),
            precision: Precision::F32,
            config,
        })
    }

    /// Builds a model of the same shape from `tensors`, which are copied to this model's device.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub(crate) fn with_weights(&self, tensors: &Tensors) -> Result<Self> {
        let tensors = weights::to_device(tensors, self.head().device())?;
        Ok(Self {
            config: self.config.clone(),
            network: Network::new(&self.config, &tensors)?,
            rope: self.rope.clone(),
            arena: self.arena.clone(),
            precision: self.precision,
            backend: self.backend,
        })
    }

    /// Sets the backend. The default is [`Backend::CpuTape`] for weights on the CPU, else [`Backend::Candle`].
    pub fn set_backend(&mut self, backend: Backend) {
        self.backend = backend;
    }

    /// Returns the backend.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Sets the precision of matrix products, and of activations with [`Backend::Candle`]. The default is f32.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// Returns the shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the weight of the LM head (V x D).
    pub fn head(&self) -> &Tensor {
        self.network.head()
    }

    /// Returns the settings of a tape over this model.
    fn tape_settings(&self) -> TapeSettings<'_> {
        TapeSettings {
            arena: &self.arena,
            heads: self.config.heads,
            rope: self.rope.as_ref(),
            precision: self.precision,
        }
    }

    /// Returns the LM head as a linear layer, from D to V.
    fn head_layer(&self) -> Linear {
        Linear {
            inputs: self.config.hidden_size,
            outputs: self.config.vocab_size,
            precision: self.precision,
        }
    }
}
