//! The LM head and its loss in one operation, chunked over the supervised positions.
//!
//! The logits (N x V) are the largest tensor of a step and are never stored: a chunk of rows is
//! computed, turned into its loss and gradient in place, multiplied back, and overwritten by the
//! next. Both gradients are ready when the forward pass ends.

use std::ops::Range;

use rayon::prelude::*;

use super::linear::Linear;
use super::{Gradient, simd};

/// Rows of logits that exist at a time: enough that packing the head's weight is little work beside
/// multiplying with it.
pub const CHUNK: usize = 512;

/// How N positions are handed out: one by one, but for spans of them that must be seen together.
#[derive(Debug, Clone, PartialEq)]
pub struct Units {
    /// Where each unit ends.
    ends: Vec<usize>,
}

impl Units {
    /// Of `positions` (N) of which `spans` belong together: in order, apart from each other, each of
    /// at most [`CHUNK`].
    pub fn new(positions: usize, spans: &[Range<usize>]) -> Self {
        let mut ends = Vec::with_capacity(positions);
        let mut spans = spans.iter().peekable();
        let mut at = 0;
        while at < positions {
            at = match spans.next_if(|span| span.start == at) {
                Some(span) => span.end.min(positions).max(at + 1),
                None => at + 1,
            };
            ends.push(at);
        }
        Self { ends }
    }

    /// Whole units of at most [`CHUNK`] positions in all, and after these the next ones.
    pub fn chunks(&self) -> impl Iterator<Item = Units> {
        let mut left = &self.ends[..];
        let mut start = 0;
        std::iter::from_fn(move || {
            let count = left.partition_point(|&end| end <= start + CHUNK);
            let (chunk, rest) = left.split_at(count);
            let ends = chunk.iter().map(|end| end - start).collect();
            (left, start) = (rest, *chunk.last()?);
            Some(Units { ends })
        })
    }

    /// N
    pub fn positions(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Calls `rows` with each unit, counted from `first` on, and with its part of `values`, which has
    /// `width` for a position; collects what it returns, in order.
    pub fn map<R: Send>(
        &self,
        first: usize,
        mut values: &mut [f32],
        width: usize,
        rows: &(impl Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync),
    ) -> Vec<R> {
        let mut start = 0;
        let mut parts = Vec::with_capacity(self.ends.len());
        for &end in &self.ends {
            let (part, rest) = std::mem::take(&mut values).split_at_mut((end - start) * width);
            parts.push((first + start..first + end, part));
            (values, start) = (rest, end);
        }
        let reports = parts
            .into_par_iter()
            .flat_map_iter(|(range, part)| simd(|| rows(range, part)));
        reports.collect()
    }
}

/// The loss of `hidden` (N x D) under the head `weight` (V x D), a linear layer from D to V.
///
/// `rows` gets the indices of a unit's positions and their logits (n x V), turns these into their
/// gradient in place, and returns what it says of each position. `logits` has room for [`CHUNK`]
/// rows, or N if that is less. Gradients that nobody asks for are not computed.
pub fn head_loss<R: Send>(
    head: Linear,
    (hidden, units): (&[f32], &Units),
    weight: &[f32],
    logits: &mut [f32],
    rows: impl Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync,
    (dhidden, mut dweight): (&mut [f32], Option<Gradient>),
) -> Vec<R> {
    let (width, vocabulary) = (head.inputs, head.outputs);
    if let Some(Gradient { values, add: false }) = &mut dweight
        && hidden.is_empty()
    {
        values.fill(0.0);
    }
    let mut reports = Vec::with_capacity(units.positions());
    let mut start = 0;
    for chunk in units.chunks() {
        let end = start + chunk.positions();
        let hidden = &hidden[start * width..end * width];
        let logits = &mut logits[..(end - start) * vocabulary];
        head.forward(hidden, weight, None, logits, false);
        reports.extend(chunk.map(start, logits, vocabulary, &rows));
        let dhidden = Gradient {
            values: &mut dhidden[start * width..end * width],
            add: false,
        };
        head.backward_input(logits, weight, dhidden);
        if let Some(dweight) = &mut dweight {
            let add = dweight.add || start > 0;
            let dweight = Gradient {
                values: dweight.values,
                add,
            };
            head.backward_weight(logits, hidden, dweight);
        }
        start = end;
    }
    reports
}

/// Calls `row` with each row of logits (V) of `hidden` (N x D), a chunk at a time, and collects
/// what it returns in order.
pub fn map_logits<R: Send>(
    head: Linear,
    hidden: &[f32],
    weight: &[f32],
    logits: &mut [f32],
    row: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let (width, vocabulary) = (head.inputs, head.outputs);
    let rows = |range: Range<usize>, logits: &mut [f32]| vec![row(range.start, logits)];
    let mut reports = Vec::with_capacity(hidden.len() / width);
    for (chunk, hidden) in hidden.chunks(CHUNK * width).enumerate() {
        let positions = hidden.len() / width;
        let logits = &mut logits[..positions * vocabulary];
        head.forward(hidden, weight, None, logits, false);
        let units = Units::new(positions, &[]);
        reports.extend(units.map(chunk * CHUNK, logits, vocabulary, &rows));
    }
    reports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_keep_spans_whole_and_chunks_keep_units_whole() {
        let units = Units::new(7, &[1..3, 3..6]);
        assert_eq!(units.ends, [1, 3, 6, 7]);
        let long = Units::new(CHUNK + 300, &[0..2, CHUNK - 1..CHUNK + 2]);
        let sizes: Vec<usize> = long.chunks().map(|chunk| chunk.positions()).collect();
        assert_eq!(sizes, [CHUNK - 1, 301]);
        assert_eq!(Units::new(0, &[]).chunks().count(), 0);

        let mut values = vec![0.0; 14];
        let reports = units.map(10, &mut values, 2, &|range, part| {
            part.fill(range.len() as f32);
            range.collect::<Vec<_>>()
        });
        assert_eq!(reports, (10..17).collect::<Vec<_>>());
        let expected = [1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 1.0];
        assert!(
            values
                .chunks(2)
                .zip(expected)
                .all(|(part, e)| part == [e, e])
        );
    }
}
