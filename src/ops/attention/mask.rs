//! The keys that a query sees.

use std::ops::Range;

/// The keys of a segment that its queries see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// A query sees its own position and the positions before it, at most `window` of them. None: no window.
    Causal { window: Option<usize> },
    /// A query sees all keys: the self-attention of an encoder, and the attention of a decoder over a source.
    Full,
}

impl Mask {
    /// Returns the position of the first of `queries` queries over `keys` keys. Causal queries are the last positions
    /// of the sequence; others begin at position 0.
    pub(super) fn first_position(self, queries: usize, keys: usize) -> usize {
        match self {
            Mask::Causal { .. } => keys - queries,
            Mask::Full => 0,
        }
    }

    /// Returns the keys, out of `keys`, that at least one of the queries at `positions` sees.
    pub(super) fn keys_of_block(self, positions: Range<usize>, keys: usize) -> Range<usize> {
        match self {
            Mask::Causal { window } => {
                let first = window.map_or(0, |window| (positions.start + 1).saturating_sub(window));
                first..positions.end.min(keys)
            }
            Mask::Full => 0..keys,
        }
    }

    /// Returns the keys, out of `keys`, that the query at `position` sees, as indices relative to the first of `keys`.
    pub(super) fn keys_of_row(self, position: usize, keys: &Range<usize>) -> Range<usize> {
        match self {
            Mask::Causal { window } => {
                let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
                first - keys.start..position + 1 - keys.start
            }
            Mask::Full => 0..keys.len(),
        }
    }
}
