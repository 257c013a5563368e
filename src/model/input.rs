//! The input of a pass over whole sequences.

use std::ops::Range;

/// Sources of an encoder-decoder, end to end: one per sequence of the decoder. Empty for a decoder.
#[allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SourceInput<'a> {
    /// Token ids.
    pub ids_U: &'a [u32],
    /// Ranges of the sources, which cover `ids_U` in order.
    pub segments_B: &'a [Range<usize>],
}

/// Tokens of one or more sequences, end to end, and the positions whose outputs are needed.
#[allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]
#[derive(Debug, Clone, Copy)]
pub struct ModelInput<'a> {
    /// Token ids.
    pub input_ids_T: &'a [u32],
    /// Ranges of the sequences, which cover `input_ids_T` in order. Attention does not cross their bounds.
    pub segments_B: &'a [Range<usize>],
    /// Indices in `input_ids_T` of the positions whose outputs are needed.
    pub positions_N: &'a [u32],
    pub source: SourceInput<'a>,
}
