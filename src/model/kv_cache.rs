//! Keys and values of earlier tokens.

/// Keys (the rotary embedding done) and values of one sequence, layer by layer (len x G C each).
#[derive(Default)]
pub struct KvCache {
    pub(super) layers: Vec<(Vec<f32>, Vec<f32>)>,
    pub(super) len: usize,
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
    pub(super) fn layer(&mut self, layer: usize) -> (&mut Vec<f32>, &mut Vec<f32>) {
        let (keys, values) = &mut self.layers[layer];
        (keys, values)
    }
}
