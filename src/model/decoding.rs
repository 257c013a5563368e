//! Incremental decoding: forward passes over new tokens, with the keys and values of earlier ones from a cache.

use anyhow::{Result, bail};

use crate::model::Model;
use crate::model::kv_cache::KvCache;
use crate::model::tape::{Activations, KeyValueSource, Tape};
use crate::ops::CpuValues;

impl Model {
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
        let keys = KeyValueSource::Caches(caches);
        let mut tape = Tape::new(self.tape_settings(), &segments, keys, Activations::Discard);
        let root = self.decoder.hidden(&mut tape, &input_ids, &last)?;
        let hidden = tape.value(&root)?;
        drop(tape);
        for (segment, cache) in segments.iter().zip(caches.iter_mut()) {
            cache.len += segment.len();
        }
        let mut logits = vec![0.0; segments.len() * self.config.vocab_size];
        let weight = CpuValues::new(self.decoder.head())?;
        self.head_layer()
            .forward(&hidden, &weight, None, &mut logits, false);
        Ok(logits)
    }
}
