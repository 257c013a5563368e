//! Incremental decoding: forward passes over new tokens, with the keys and values of earlier tokens from a
//! cache.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use anyhow::{Result, bail, ensure};

use crate::model::Model;
use crate::model::kv_cache::{KvCache, LayerCache};
use crate::model::tape::{Activations, KeyValueSource, Tape};
use crate::ops::CpuValues;

impl Model {
    /// Creates an empty cache for a new sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache {
            layers: vec![LayerCache::default(); self.config.num_hidden_layers],
            len: 0,
        }
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
        let key_value_source = KeyValueSource::Caches(caches);
        let mut tape = Tape::new(
            self.tape_settings(),
            &segments_B,
            key_value_source,
            Activations::Discard,
        );
        let root = self
            .decoder
            .hidden(&mut tape, &input_ids_T, &last_positions_B)?;
        let hidden_BD = tape.value(&root)?;
        drop(tape);
        for (segment, cache) in segments_B.iter().zip(caches.iter_mut()) {
            cache.len += segment.len();
        }
        let mut logits_BV = vec![0.0; segments_B.len() * self.config.vocab_size];
        let weight_VD = CpuValues::new(self.decoder.head())?;
        self.head_layer()
            .forward(&hidden_BD, &weight_VD, None, &mut logits_BV, false);
        Ok(logits_BV)
    }
}
