//! Decoders that train and generate.
//!
//! A [`Model`] is a Hugging Face folder in memory. [`llama`] holds the architecture, written once;
//! this file gives it the two kinds of attention: over the segments of a training batch, and over
//! the caches of sequences that are being generated.

pub mod batcher;
pub mod config;
pub mod generate;
pub mod llama;
pub mod sampling;
pub mod text_stream;
pub mod weights;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

pub use config::ModelConfig;
use llama::Llama;
use weights::Tensors;

use crate::ops::attention::{attend, attention, turn_rows};
use crate::ops::linear::linear;
use crate::ops::rope::{RopeTable, Turn};
use crate::ops::with_values;

/// A decoder with its weights on the CPU.
pub struct Model {
    config: ModelConfig,
    llama: Llama,
    rope: Arc<RopeTable>,
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
}

impl Model {
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// Where a file is missing or malformed, or tensors and `config.json` do not agree.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let tensors = weights::load(dir)?;
        Self::new(config, &tensors).with_context(|| format!("cannot load {}", dir.display()))
    }

    /// A decoder over the given tensors; trainable where these are variables.
    ///
    /// # Errors
    /// Where tensors are missing or have other shapes than `config` says.
    pub fn new(config: ModelConfig, tensors: &Tensors) -> Result<Self> {
        let frequencies = config.rope.inverse_frequencies(config.heads.channels);
        Ok(Self {
            llama: Llama::new(&config, tensors)?,
            rope: Arc::new(RopeTable::new(&frequencies, config.max_position_embeddings)),
            config,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The LM head's weight (V x D).
    pub fn head(&self) -> &Tensor {
        self.llama.head()
    }

    /// Hidden states (N x D), ready for the head, at `positions` (N) of a batch of segments laid
    /// end to end in `input_ids` (T). Differentiable where the weights are variables.
    ///
    /// # Errors
    /// Where an id is past the vocabulary or a segment longer than the model's context.
    pub fn hidden_at(
        &self,
        input_ids: &[u32],
        segments: &[Range<usize>],
        positions: &[u32],
    ) -> Result<Tensor> {
        let segments: Arc<[Range<usize>]> = segments.into();
        let hidden = self.llama.hidden(input_ids, |_, q, k, v| {
            let heads = self.config.heads;
            Ok(attention(q, k, v, heads, &self.rope, &segments)?)
        })?;
        let positions = Tensor::new(positions, &Device::Cpu)?;
        self.llama.normed(&hidden.index_select(&positions, 0)?)
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
        let hidden = self.llama.hidden(&input_ids, |layer, q, k, v| {
            self.attend_caches(layer, &segments, q, k, v, caches)
        })?;
        for (segment, cache) in segments.iter().zip(caches.iter_mut()) {
            cache.len += segment.len();
        }
        let last: Vec<u32> = segments.iter().map(|s| s.end as u32 - 1).collect();
        let last = hidden.index_select(&Tensor::new(last, &Device::Cpu)?, 0)?;
        let logits = linear(&self.llama.normed(&last)?, self.llama.head())?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    /// Attention of each segment's rows over its cache, to which its keys and values are added.
    fn attend_caches(
        &self,
        layer: usize,
        segments: &[Range<usize>],
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        caches: &mut [&mut KvCache],
    ) -> Result<Tensor> {
        let heads = self.config.heads;
        let (wide, narrow) = (heads.query_width(), heads.key_value_width());
        let outputs: Vec<Vec<f32>> = with_values(q, |q| {
            with_values(k, |k| {
                with_values(v, |v| {
                    segments
                        .par_iter()
                        .zip(caches.par_iter_mut())
                        .map(|(segment, cache)| {
                            let first = cache.len;
                            let (keys, values) = &mut cache.layers[layer];
                            keys.extend_from_slice(
                                &k[segment.start * narrow..segment.end * narrow],
                            );
                            values.extend_from_slice(
                                &v[segment.start * narrow..segment.end * narrow],
                            );
                            let fresh = &mut keys[first * narrow..];
                            turn_rows(&self.rope, fresh, narrow, first, Turn::Forward);
                            let mut q = q[segment.start * wide..segment.end * wide].to_vec();
                            turn_rows(&self.rope, &mut q, wide, first, Turn::Forward);
                            let mut out = vec![0.0; q.len()];
                            attend(heads, &q, keys, values, &mut out, None);
                            out
                        })
                        .collect()
                })
            })
        })???;
        Ok(Tensor::from_vec(outputs.concat(), q.shape(), q.device())?)
    }
}
