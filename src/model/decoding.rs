//! Incremental decoding: forward passes over new tokens, with the keys and values of earlier tokens from a
//! cache.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::{Result, bail, ensure};

use crate::model::graph::Segments;
use crate::model::kv_cache::{KvCache, LayerCache};
use crate::model::network::Network;
use crate::model::tape::{Activations, KeyValueSource, Tape};
use crate::model::{Model, ModelInput, SourceInput};
use crate::ops::{CpuValues, segment_rows};

impl Model {
    /// Creates an empty cache for a new sequence of a decoder.
    pub fn new_cache(&self) -> KvCache {
        KvCache {
            layers: vec![LayerCache::default(); self.config.num_hidden_layers],
            source_layers: Vec::new(),
            len: 0,
        }
    }

    /// Runs the encoder of an encoder-decoder over each of `sources`. Returns a cache per source, which holds the keys
    /// and values for the cross-attention and no tokens.
    ///
    /// # Errors
    /// Where the model is a decoder, an id is outside the vocabulary, or a source is empty or longer than the context.
    pub fn encode_sources(&self, sources: &[&[u32]]) -> Result<Vec<KvCache>> {
        let Network::T5(t5) = &self.network else {
            bail!(
                "internal error: a {} model has no encoder",
                self.config.model_type()
            );
        };
        let context = self.config.max_position_embeddings;
        let mut segments_B = Vec::with_capacity(sources.len());
        let mut ids_U = Vec::new();
        for source in sources {
            ensure!(
                (1..=context).contains(&source.len()),
                "a source has {} tokens; expected 1 to {context}",
                source.len()
            );
            let start = ids_U.len();
            ids_U.extend_from_slice(source);
            segments_B.push(start..ids_U.len());
        }
        let segments = Segments {
            decoder: &[],
            source: &segments_B,
        };
        let mut tape = Tape::new(
            self.tape_settings(),
            segments,
            KeyValueSource::Batch,
            Activations::Discard,
        );
        let width = self.config.heads.key_value_width();
        let mut caches: Vec<KvCache> = sources.iter().map(|_| self.new_cache()).collect();
        for [k, v] in t5.source_keys_values(&mut tape, &ids_U)? {
            let (k_UHC, v_UHC) = (tape.value(&k)?, tape.value(&v)?);
            for (segment, cache) in segments_B.iter().zip(&mut caches) {
                cache.source_layers.push(LayerCache {
                    k_SGC: segment_rows(&k_UHC, segment, width).to_vec(),
                    v_SGC: segment_rows(&v_UHC, segment, width).to_vec(),
                });
            }
        }
        Ok(caches)
    }

    /// Appends `tokens[i]` to the sequence of `caches[i]`. Returns the logits after the last token of each sequence
    /// (B x V). Sequences may have different numbers of new tokens: prompts and single tokens can share a step.
    ///
    /// # Errors
    /// Where an id is outside the vocabulary, a sequence exceeds the context, a sequence has no new tokens, or the
    /// weights are not on the CPU.
    pub fn step(&self, tokens: &[&[u32]], caches: &mut [&mut KvCache]) -> Result<Vec<f32>> {
        let mut segments_B = Vec::with_capacity(tokens.len());
        let mut input_ids_T = Vec::new();
        for (tokens, cache) in tokens.iter().zip(caches.iter()) {
            let context = self.config.max_position_embeddings;
            ensure!(
                !tokens.is_empty(),
                "a sequence of the batch has no new tokens"
            );
            if cache.len + tokens.len() > context {
                bail!(
                    "cannot append {} tokens to a sequence of {}: the context has {context} tokens",
                    tokens.len(),
                    cache.len
                );
            }
            let start = input_ids_T.len();
            input_ids_T.extend_from_slice(tokens);
            segments_B.push(start..input_ids_T.len());
        }
        let last_positions_B: Vec<u32> = segments_B
            .iter()
            .map(|segment| segment.end as u32 - 1)
            .collect();
        let input = ModelInput {
            input_ids_T: &input_ids_T,
            segments_B: &segments_B,
            positions_N: &last_positions_B,
            source: SourceInput::default(),
        };
        let key_value_source = KeyValueSource::Caches(caches);
        let segments = Segments {
            decoder: &segments_B,
            source: &[],
        };
        let mut tape = Tape::new(
            self.tape_settings(),
            segments,
            key_value_source,
            Activations::Discard,
        );
        let root = self.network.hidden(&mut tape, input)?;
        let hidden_BD = tape.value(&root)?;
        drop(tape);
        for (segment, cache) in segments_B.iter().zip(caches.iter_mut()) {
            cache.len += segment.len();
        }
        let mut logits_BV = vec![0.0; segments_B.len() * self.config.vocab_size];
        let weight_VD = CpuValues::new(self.network.head())?;
        self.head_layer()
            .forward(&hidden_BD, &weight_VD, None, &mut logits_BV, false);
        Ok(logits_BV)
    }
}
