//! Decoders that train and generate.

pub mod generate;

use std::path::Path;

use anyhow::Result;

/// The shape of a decoder.
pub struct ModelConfig {
    pub vocab_size: usize,
}

/// Keys and values of one sequence.
#[derive(Default)]
pub struct KvCache {
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

/// PLACEHOLDER for the contract; the real one replaces this file.
pub struct Model {
    config: ModelConfig,
}

impl Model {
    pub fn load(_dir: &Path) -> Result<Model> {
        anyhow::bail!("placeholder")
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn new_cache(&self) -> KvCache {
        KvCache::default()
    }

    pub fn step(&self, tokens: &[&[u32]], caches: &mut [&mut KvCache]) -> Result<Vec<f32>> {
        for (tokens, cache) in tokens.iter().zip(caches.iter_mut()) {
            cache.len += tokens.len();
        }
        Ok(vec![0.0; tokens.len() * self.config.vocab_size])
    }
}
