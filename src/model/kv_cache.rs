//! The key/value cache of incremental decoding.

/// Keys and values of one sequence of S tokens.
#[derive(Default)]
pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
    /// Keys and values of the source for the cross-attention of each layer, in an encoder-decoder; else empty.
    pub(super) source_layers: Vec<LayerCache>,
    /// S. While a step runs, the layers may already contain its tokens.
    pub(super) len: usize,
}

/// Keys and values of one layer. The rotary embedding is already applied to the keys.
#[allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]
#[derive(Clone, Default)]
pub(super) struct LayerCache {
    pub k_SGC: Vec<f32>,
    pub v_SGC: Vec<f32>,
}

impl KvCache {
    /// Returns the number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if the cache holds no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
