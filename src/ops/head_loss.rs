//! The LM head and the loss in one operation, chunked over the supervised positions.
//!
//! The logits (N x V) are the largest tensor of a step and are never stored whole. One chunk of rows
//! is computed and turned into its gradient in place. From it, the gradients of the hidden states and of the head's
//! weight are computed. Then the next chunk overwrites it. Both gradients are ready when the forward pass ends.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

use super::GradientMut;
use super::linear::Linear;

/// Maximum number of rows per chunk. With this number, packing the head's weight costs little compared with
/// multiplying by it.
const MAX_CHUNK_ROWS: usize = 512;
/// Minimum number of rows per chunk, reached by vocabularies of 262,144 tokens and more.
const MIN_CHUNK_ROWS: usize = 128;
/// Target number of logits per chunk: 128 MiB.
const TARGET_CHUNK_LOGITS: usize = 1 << 25;

/// Returns the number of rows of logits per chunk.
pub(crate) fn chunk_rows(vocabulary: usize) -> usize {
    (TARGET_CHUNK_LOGITS / vocabulary.max(1)).clamp(MIN_CHUNK_ROWS, MAX_CHUNK_ROWS)
}

/// Processes the logits of positions, for example into a loss and its gradient.
pub trait LogitsVisitor: Sync {
    /// The result for one position.
    type Output: Send;

    /// Prepares for `positions`, before any of their logits are visited.
    ///
    /// # Errors
    /// Where the preparation fails.
    fn prepare(&mut self, _positions: Range<usize>) -> Result<()> {
        Ok(())
    }

    /// Visits the logits (n x V) of one group of `positions`, and may overwrite them with their
    /// gradient. Returns one result per position.
    fn visit(&self, positions: Range<usize>, logits_nV: &mut [f32]) -> Vec<Self::Output>;
}

impl<R: Send, F: Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync> LogitsVisitor for F {
    type Output = R;

    #[inline(always)]
    fn visit(&self, positions: Range<usize>, logits_nV: &mut [f32]) -> Vec<R> {
        self(positions, logits_nV)
    }
}

/// A partition of N positions into groups. The logits of a group are visited together, so that a loss
/// can combine them. Most groups hold one position.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionGroups {
    /// End of each group, exclusive.
    ends: Vec<usize>,
}

impl PositionGroups {
    /// Groups `positions` (N) positions: each of `spans` is one group, and every other position is a group of its
    /// own. `spans` are in order, disjoint, and at most `MIN_CHUNK_ROWS` positions long.
    pub fn new(positions: usize, spans: &[Range<usize>]) -> Self {
        let mut ends = Vec::with_capacity(positions);
        let mut spans = spans.iter().peekable();
        let mut end = 0;
        while end < positions {
            end = match spans.next_if(|span| span.start == end) {
                Some(span) => span.end.min(positions).max(end + 1),
                None => end + 1,
            };
            ends.push(end);
        }
        Self { ends }
    }

    /// Cuts the groups into consecutive chunks of whole groups. Each chunk has at most `rows` positions.
    pub fn chunks(&self, rows: usize) -> impl Iterator<Item = PositionGroups> {
        let mut remaining = &self.ends[..];
        let mut start = 0;
        std::iter::from_fn(move || {
            let count = remaining.partition_point(|&end| end <= start + rows);
            let (chunk, later_ends) = remaining.split_at(count);
            let ends = chunk.iter().map(|end| end - start).collect();
            remaining = later_ends;
            start = *chunk.last()?;
            Some(PositionGroups { ends })
        })
    }

    /// Returns the number of positions (N).
    pub fn positions(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Calls `visitor` with the logits of each group and collects the results in order. The visitor's
    /// position numbers start at `first`; each position has `vocabulary` logits.
    pub fn visit<R: LogitsVisitor>(
        &self,
        first: usize,
        mut logits_NV: &mut [f32],
        vocabulary: usize,
        visitor: &R,
    ) -> Vec<R::Output> {
        let mut start = 0;
        let mut groups = Vec::with_capacity(self.ends.len());
        for &end in &self.ends {
            let (logits_nV, later_logits) =
                std::mem::take(&mut logits_NV).split_at_mut((end - start) * vocabulary);
            groups.push((first + start..first + end, logits_nV));
            logits_NV = later_logits;
            start = end;
        }
        let outputs = groups
            .into_par_iter()
            .flat_map_iter(|(positions, logits_nV)| {
                pulp::Arch::new().dispatch(GroupVisit {
                    visitor,
                    positions,
                    logits_nV,
                })
            });
        outputs.collect()
    }
}

/// The visit of one group, compiled for vector instructions. [`super::simd`] cannot be used here
/// because its loops cannot be generic.
struct GroupVisit<'a, R> {
    visitor: &'a R,
    positions: Range<usize>,
    logits_nV: &'a mut [f32],
}

impl<R: LogitsVisitor> pulp::WithSimd for GroupVisit<'_, R> {
    type Output = Vec<R::Output>;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
        self.visitor.visit(self.positions, self.logits_nV)
    }
}

/// The gradients that [`head_loss`] writes.
pub(crate) struct HeadGradients<'a> {
    pub dhidden_ND: &'a mut [f32],
    /// None: the gradient of the weight is not computed.
    pub dweight_VD: Option<GradientMut<'a>>,
}

/// Computes the loss of `hidden_ND` under the LM head `weight_VD`, a linear layer from D to V, and the gradients of
/// `hidden_ND` and `weight_VD`. `visitor` turns the logits of each group into their gradient and returns the loss of
/// each position.
///
/// `logits_chunk` is scratch space for [`chunk_rows`] rows of logits, or N rows if that is less.
///
/// # Errors
/// Where `visitor` fails to prepare.
pub(crate) fn head_loss<R: LogitsVisitor>(
    head: Linear,
    hidden_ND: &[f32],
    groups: &PositionGroups,
    weight_VD: &[f32],
    logits_chunk: &mut [f32],
    visitor: &mut R,
    gradients: HeadGradients,
) -> Result<Vec<R::Output>> {
    let HeadGradients {
        dhidden_ND,
        mut dweight_VD,
    } = gradients;
    let width = head.inputs;
    let vocabulary = head.outputs;
    if let Some(GradientMut { values, add: false }) = &mut dweight_VD
        && hidden_ND.is_empty()
    {
        values.fill(0.0);
    }
    let mut outputs = Vec::with_capacity(groups.positions());
    let mut start = 0;
    for chunk in groups.chunks(chunk_rows(vocabulary)) {
        let end = start + chunk.positions();
        visitor.prepare(start..end)?;
        let hidden_nD = &hidden_ND[start * width..end * width];
        let logits_nV = &mut logits_chunk[..(end - start) * vocabulary];
        head.forward(hidden_nD, weight_VD, None, logits_nV, false);
        outputs.extend(chunk.visit(start, logits_nV, vocabulary, visitor));
        let dlogits_nV = logits_nV;
        let dhidden_nD = GradientMut {
            values: &mut dhidden_ND[start * width..end * width],
            add: false,
        };
        head.backward_input(dlogits_nV, weight_VD, dhidden_nD);
        if let Some(dweight_VD) = &mut dweight_VD {
            let dweight_VD = GradientMut {
                add: dweight_VD.add || start > 0,
                values: dweight_VD.values,
            };
            head.backward_weight(dlogits_nV, hidden_nD, dweight_VD);
        }
        start = end;
    }
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_groups_keep_spans_whole_and_chunks_keep_groups_whole() {
        let groups = PositionGroups::new(7, &[1..3, 3..6]);
        assert_eq!(groups.ends, [1, 3, 6, 7]);
        let long = PositionGroups::new(
            MAX_CHUNK_ROWS + 300,
            &[0..2, MAX_CHUNK_ROWS - 1..MAX_CHUNK_ROWS + 2],
        );
        let sizes: Vec<usize> = long
            .chunks(MAX_CHUNK_ROWS)
            .map(|chunk| chunk.positions())
            .collect();
        assert_eq!(sizes, [MAX_CHUNK_ROWS - 1, 301]);
        let rows_of_large_vocabularies = [32_000, 131_072, 262_144, 1 << 24].map(chunk_rows);
        assert_eq!(rows_of_large_vocabularies, [512, 256, 128, 128]);
        assert_eq!(
            PositionGroups::new(0, &[]).chunks(MAX_CHUNK_ROWS).count(),
            0
        );

        let mut values = vec![0.0; 14];
        let visitor = |range: Range<usize>, part: &mut [f32]| {
            part.fill(range.len() as f32);
            range.collect::<Vec<_>>()
        };
        let outputs = groups.visit(10, &mut values, 2, &visitor);
        assert_eq!(outputs, (10..17).collect::<Vec<_>>());
        let expected = [1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 1.0];
        assert!(
            values
                .chunks(2)
                .zip(expected)
                .all(|(part, e)| part == [e, e])
        );
    }
}
