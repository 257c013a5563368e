//! Relative position bias (Raffel et al., arXiv 1910.10683, section 2.1): a learned number per head for each range of
//! distances between a query and a key, added to their score.
//!
//! Shapes in addition to the legend in `ops`: E buckets, J relative positions (key position minus query position).

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use std::ops::Range;

use super::Mask;
use crate::ops::GradientMut;

/// The division of relative positions into buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelativeBuckets {
    /// Number of buckets (E).
    pub count: usize,
    /// Distances from this one on share the last bucket.
    pub max_distance: usize,
    /// True if keys after the query have buckets of their own, half of all. False if they count as distance 0.
    pub is_bidirectional: bool,
}

impl RelativeBuckets {
    /// Returns the bucket of `relative`, the position of the key minus the position of the query.
    ///
    /// Half of the buckets stand for one distance each, the others for ranges that grow logarithmically. Computed in f32
    /// and in the order of transformers' `_relative_position_bucket`, because rounding decides at the bounds.
    pub fn bucket(&self, relative: isize) -> usize {
        let (first, count) = match (self.is_bidirectional, relative > 0) {
            (true, true) => (self.count / 2, self.count / 2),
            (true, false) => (0, self.count / 2),
            (false, _) => (0, self.count),
        };
        let distance = if self.is_bidirectional {
            relative.unsigned_abs()
        } else {
            relative.min(0).unsigned_abs()
        };
        let exact = count / 2;
        if distance < exact {
            return first + distance;
        }
        let log_distance = (distance as f32 / exact as f32).ln();
        let log_max = (self.max_distance as f64 / exact as f64).ln() as f32;
        let steps = (log_distance / log_max * (count - exact) as f32) as usize;
        first + (exact + steps).min(count - 1)
    }
}

/// The bias of every head and relative position that occurs in a sequence.
pub(crate) struct RelativeBias {
    /// One row of J values per head.
    values_HJ: Vec<f32>,
    /// J
    width: usize,
    /// Index of the relative position 0 in a row.
    zero: usize,
}

impl RelativeBias {
    /// Computes the bias of sequences of at most `positions` positions from `table_EH`.
    pub(crate) fn new(
        table_EH: &[f32],
        buckets: RelativeBuckets,
        mask: Mask,
        positions: usize,
    ) -> Self {
        let heads = table_EH.len() / buckets.count;
        let zero = positions.saturating_sub(1);
        let width = match mask {
            Mask::Causal { .. } => zero + 1,
            Mask::Full => 2 * zero + 1,
        };
        let buckets_J: Vec<usize> = (0..width)
            .map(|index| buckets.bucket(index as isize - zero as isize))
            .collect();
        let values_HJ = (0..heads)
            .flat_map(|head| buckets_J.iter().map(move |bucket| bucket * heads + head))
            .map(|index| table_EH[index])
            .collect();
        Self {
            values_HJ,
            width,
            zero,
        }
    }

    /// J, the number of relative positions.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Returns the range of relative positions, as indices in a row, between the query at `position` and `keys`.
    pub(super) fn range(&self, position: usize, keys: Range<usize>) -> Range<usize> {
        self.zero + keys.start - position..self.zero + keys.end - position
    }

    /// Returns the bias of `head` at the relative positions in `range`.
    pub(super) fn row(&self, head: usize, range: Range<usize>) -> &[f32] {
        &self.values_HJ[head * self.width..][range]
    }

    /// Computes the gradient of the table from the gradient of the bias of each head and relative position.
    pub(crate) fn backward(
        &self,
        dbias_HJ: &[f32],
        buckets: RelativeBuckets,
        dtable_EH: GradientMut,
    ) {
        if !dtable_EH.add {
            dtable_EH.values.fill(0.0);
        }
        let heads = dtable_EH.values.len() / buckets.count;
        for (head, dbias_J) in dbias_HJ.chunks_exact(self.width).enumerate() {
            for (index, dbias) in dbias_J.iter().enumerate() {
                let bucket = buckets.bucket(index as isize - self.zero as isize);
                dtable_EH.values[bucket * heads + head] += dbias;
            }
        }
    }
}
