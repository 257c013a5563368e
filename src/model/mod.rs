//! Decoders that train and generate.
//!
//! A [`Model`] is a Hugging Face folder in memory. An architecture ([`llama`], [`gpt2`]) is written
//! once, over the operations of a [`graph`]; [`tape`] runs them on the CPU, [`composed`] everywhere.

pub mod batcher;
pub mod composed;
pub mod config;
pub mod decoder;
pub mod generate;
pub mod gpt2;
pub mod graph;
pub mod llama;
pub mod lora;
pub mod parameters;
pub mod projection;
pub mod sampling;
pub mod tape;
pub mod text_stream;
pub mod weights;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};

use composed::Composed;
pub use config::ModelConfig;
use decoder::Decoder;
use tape::{Gradients, Keys, Memory, Setting, Tape};
use weights::Tensors;

use crate::ops::Values;
use crate::ops::arena::{Arena, Buffer};
use crate::ops::head_loss::{self, CHUNK};
use crate::ops::linear::Linear;
use crate::ops::matmul::Precision;
use crate::ops::rope::RopeTable;

/// A decoder with its weights on the CPU.
pub struct Model {
    config: ModelConfig,
    decoder: Decoder,
    rope: Option<RopeTable>,
    arena: Arena,
    precision: Precision,
}

/// Tokens laid end to end, and the positions among them that are asked about.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// (T)
    pub input_ids: &'a [u32],
    /// Cover `input_ids` in order; attention stays inside of each.
    pub segments: &'a [Range<usize>],
    /// (N)
    pub positions: &'a [u32],
}

/// Keys (the rotary embedding done) and values of one sequence, layer by layer (len x G C each).
#[derive(Default)]
pub struct KvCache {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    len: usize,
}

impl KvCache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keys and values of a layer.
    fn layer(&mut self, layer: usize) -> (&mut Vec<f32>, &mut Vec<f32>) {
        let (keys, values) = &mut self.layers[layer];
        (keys, values)
    }
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

    /// A decoder over the given tensors; trainable where these are variables.
    ///
    /// # Errors
    /// Where tensors are missing or have other shapes than `config` says.
    pub fn new(config: ModelConfig, tensors: &Tensors) -> Result<Self> {
        let rope = config.rope().map(|rope| {
            let frequencies = rope.inverse_frequencies(config.heads.channels);
            RopeTable::new(&frequencies, config.max_position_embeddings)
        });
        Ok(Self {
            decoder: Decoder::new(&config, tensors)?,
            rope,
            arena: Arena::default(),
            precision: Precision::F32,
            config,
        })
    }

    /// The same decoder over other weights.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub fn with_weights(&self, tensors: &Tensors) -> Result<Self> {
        Ok(Self {
            config: self.config.clone(),
            decoder: Decoder::new(&self.config, tensors)?,
            rope: self.rope.clone(),
            arena: self.arena.clone(),
            precision: self.precision,
        })
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
    fn setting(&self) -> Setting<'_> {
        Setting {
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

    /// Gradients of the variables among the weights: none yet.
    pub fn gradients(&self) -> Gradients {
        Gradients::new(self.arena.clone())
    }

    /// One training pass: calls `row` with the index and the logits (V) of each position, which it
    /// turns into their gradient, adds the gradients of all variables to `gradients`, and returns
    /// what `row` said, in order. No more than a chunk of logits exists at a time.
    ///
    /// `memory` is [`Memory::Record`] or [`Memory::Checkpoint`].
    ///
    /// # Errors
    /// Where an id is past the vocabulary or a segment longer than the model's context.
    pub fn train_pass<R: Send>(
        &self,
        input: Input,
        memory: Memory,
        row: impl Fn(usize, &mut [f32]) -> R + Sync,
        gradients: &mut Gradients,
    ) -> Result<Vec<R>> {
        self.check(&input)?;
        let mut tape = Tape::new(self.setting(), input.segments, Keys::Batch, memory);
        let root = self
            .decoder
            .hidden(&mut tape, input.input_ids, input.positions)?;
        let hidden = tape.value(&root)?;
        let head = self.head_layer();
        let mut dhidden = self.arena.take(hidden.len())?;
        let reports = {
            let mut logits = self.chunk_of_logits(input.positions.len())?;
            let dweight = gradients.of(self.decoder.head())?;
            let weight = Values::of(self.decoder.head())?;
            let to = (&mut *dhidden, dweight);
            head_loss::head_loss(head, &hidden, &weight, &mut logits, row, to)
        };
        drop(hidden);
        tape.backward(root, dhidden, gradients)?;
        Ok(reports)
    }

    /// Calls `row` with the index and the logits (V) of each position, in no order, and returns
    /// what it says, in order.
    ///
    /// # Errors
    /// As [`Model::train_pass`].
    pub fn map_logits<R: Send>(
        &self,
        input: Input,
        row: impl Fn(usize, &mut [f32]) -> R + Sync,
    ) -> Result<Vec<R>> {
        self.check(&input)?;
        let mut tape = Tape::new(self.setting(), input.segments, Keys::Batch, Memory::Forget);
        let root = self
            .decoder
            .hidden(&mut tape, input.input_ids, input.positions)?;
        let hidden = tape.value(&root)?;
        let mut logits = self.chunk_of_logits(input.positions.len())?;
        let weight = Values::of(self.decoder.head())?;
        let head = self.head_layer();
        Ok(head_loss::map_logits(
            head,
            &hidden,
            &weight,
            &mut logits,
            row,
        ))
    }

    /// Hidden states (N x D), ready for the head, in candle's operations: differentiable by candle
    /// where the weights are variables.
    ///
    /// # Errors
    /// As [`Model::train_pass`].
    pub fn composed_hidden(&self, input: Input) -> Result<Tensor> {
        self.check(&input)?;
        let heads = self.config.heads;
        let device = self.decoder.head().device();
        let mut graph = Composed::new(
            heads,
            self.rope.as_ref(),
            input.segments,
            DType::F32,
            device,
        )?;
        self.decoder
            .hidden(&mut graph, input.input_ids, input.positions)
    }

    fn chunk_of_logits(&self, positions: usize) -> Result<Buffer> {
        Ok(self
            .arena
            .take(positions.min(CHUNK) * self.config.vocab_size)?)
    }

    fn check(&self, input: &Input) -> Result<()> {
        let context = self.config.max_position_embeddings;
        let mut next = 0;
        for segment in input.segments {
            if segment.start != next || segment.len() > context {
                bail!("segment {segment:?} has no place: the model's context is {context}");
            }
            next = segment.end;
        }
        if next != input.input_ids.len() {
            bail!("segments cover {next} tokens of {}", input.input_ids.len());
        }
        Ok(())
    }

    /// An empty cache for a new sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache {
            layers: vec![Default::default(); self.config.num_hidden_layers],
            len: 0,
        }
    }

    /// Appends `tokens[i]` to the sequence of `caches[i]` and returns the logits after the last
    /// token of each, row-major (B x V). Lengths may differ; prompts and single tokens may mix.
    ///
    /// # Errors
    /// Where an id is past the vocabulary, a sequence grows past the context, or one gets no token.
    pub fn step(&self, tokens: &[&[u32]], caches: &mut [&mut KvCache]) -> Result<Vec<f32>> {
        let mut segments = Vec::with_capacity(tokens.len());
        let mut input_ids = Vec::new();
        for (tokens, cache) in tokens.iter().zip(caches.iter()) {
            let context = self.config.max_position_embeddings;
            if tokens.is_empty() || cache.len + tokens.len() > context {
                bail!(
                    "a sequence of {} tokens does not take {} more in a context of {context}",
                    cache.len,
                    tokens.len()
                );
            }
            let start = input_ids.len();
            input_ids.extend_from_slice(tokens);
            segments.push(start..input_ids.len());
        }
        let last: Vec<u32> = segments.iter().map(|s| s.end as u32 - 1).collect();
        let keys = Keys::Caches(caches);
        let mut tape = Tape::new(self.setting(), &segments, keys, Memory::Forget);
        let root = self.decoder.hidden(&mut tape, &input_ids, &last)?;
        let hidden = tape.value(&root)?;
        drop(tape);
        for (segment, cache) in segments.iter().zip(caches.iter_mut()) {
            cache.len += segment.len();
        }
        let mut logits = vec![0.0; segments.len() * self.config.vocab_size];
        let weight = Values::of(self.decoder.head())?;
        self.head_layer()
            .forward(&hidden, &weight, None, &mut logits, false);
        Ok(logits)
    }
}
