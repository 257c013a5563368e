//! The key/value cache of incremental decoding.

/// Keys and values of one sequence, per layer (len x G C each). The rotary embedding is already applied to
/// the keys.
#[derive(Default)]
pub struct KvCache {
    pub(super) layers: Vec<(Vec<f32>, Vec<f32>)>,
    pub(super) len: usize,
}

impl KvCache {
    /// Number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if the cache holds no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the keys and values of a layer.
    pub(super) fn layer(&mut self, layer: usize) -> (&mut Vec<f32>, &mut Vec<f32>) {
        let (keys, values) = &mut self.layers[layer];
        (keys, values)
    }
}
