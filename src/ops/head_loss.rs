//! The LM head and its loss in one operation, chunked over the supervised positions.
//!
//! The logits (N x V) are the largest tensor of a step and are never stored: a chunk of rows is
//! computed, turned into its loss and gradient in place, multiplied back, and overwritten by the
//! next. Both gradients are ready when the forward pass ends.

use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

use super::Gradient;
use super::linear::Linear;

/// Rows of logits that exist at a time: enough that packing the head's weight is little work beside
/// multiplying with it.
const CHUNK: usize = 512;
/// The same for large vocabularies, where 512 rows would be most of the memory.
const SMALLEST_CHUNK: usize = 128;
/// Number of logits up to which there are more than that: 128 MiB.
const CHUNK_LOGITS: usize = 1 << 25;

/// Rows of logits that exist at a time.
pub(crate) fn chunk_rows(vocabulary: usize) -> usize {
    (CHUNK_LOGITS / vocabulary.max(1)).clamp(SMALLEST_CHUNK, CHUNK)
}

/// What is made of the logits of positions.
pub trait Rows: Sync {
    /// What there is to say of a position.
    type Report: Send;

    /// Told which positions are next, before the logits of any of them are handed out.
    ///
    /// # Errors
    /// Where it cannot get ready for them.
    fn begin(&mut self, _positions: Range<usize>) -> Result<()> {
        Ok(())
    }

    /// Gets the indices of a unit's positions and their logits (n x V), which it may turn into their
    /// gradient, and reports on each.
    fn rows(&self, positions: Range<usize>, logits: &mut [f32]) -> Vec<Self::Report>;
}

impl<R: Send, F: Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync> Rows for F {
    type Report = R;

    #[inline(always)]
    fn rows(&self, positions: Range<usize>, logits: &mut [f32]) -> Vec<R> {
        self(positions, logits)
    }
}

/// How N positions are handed out: one by one, but for spans of them that must be seen together.
#[derive(Debug, Clone, PartialEq)]
pub struct Units {
    /// Where each unit ends.
    ends: Vec<usize>,
}

impl Units {
    /// Of `positions` (N) of which `spans` belong together: in order, apart from each other, each of
    /// at most 128.
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

    /// Whole units of at most `rows` positions in all, and after these the next ones.
    pub fn chunks(&self, rows: usize) -> impl Iterator<Item = Units> {
        let mut left = &self.ends[..];
        let mut start = 0;
        std::iter::from_fn(move || {
            let count = left.partition_point(|&end| end <= start + rows);
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
    pub fn map<R: Rows>(
        &self,
        first: usize,
        mut values: &mut [f32],
        width: usize,
        rows: &R,
    ) -> Vec<R::Report> {
        let mut start = 0;
        let mut parts = Vec::with_capacity(self.ends.len());
        for &end in &self.ends {
            let (part, rest) = std::mem::take(&mut values).split_at_mut((end - start) * width);
            parts.push((first + start..first + end, part));
            (values, start) = (rest, end);
        }
        let reports = parts
            .into_par_iter()
            .flat_map_iter(|(range, part)| pulp::Arch::new().dispatch(Unit { rows, range, part }));
        reports.collect()
    }
}

/// A loop for vector instructions as [`super::simd`] makes it, which cannot be generic.
struct Unit<'a, R> {
    rows: &'a R,
    range: Range<usize>,
    part: &'a mut [f32],
}

impl<R: Rows> pulp::WithSimd for Unit<'_, R> {
    type Output = Vec<R::Report>;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
        self.rows.rows(self.range, self.part)
    }
}

/// The loss of `hidden` (N x D) under the head `weight` (V x D), a linear layer from D to V, which is
/// what `rows` makes of it. `logits` has room for [`chunk_rows`], or N if that is less. Gradients that
/// nobody asks for are not computed.
///
/// # Errors
/// Where `rows` cannot get ready.
pub(crate) fn head_loss<R: Rows>(
    head: Linear,
    (hidden, units): (&[f32], &Units),
    weight: &[f32],
    logits: &mut [f32],
    rows: &mut R,
    (dhidden, mut dweight): (&mut [f32], Option<Gradient>),
) -> Result<Vec<R::Report>> {
    let (width, vocabulary) = (head.inputs, head.outputs);
    if let Some(Gradient { values, add: false }) = &mut dweight
        && hidden.is_empty()
    {
        values.fill(0.0);
    }
    let mut reports = Vec::with_capacity(units.positions());
    let mut start = 0;
    for chunk in units.chunks(chunk_rows(vocabulary)) {
        let end = start + chunk.positions();
        rows.begin(start..end)?;
        let hidden = &hidden[start * width..end * width];
        let logits = &mut logits[..(end - start) * vocabulary];
        head.forward(hidden, weight, None, logits, false);
        reports.extend(chunk.map(start, logits, vocabulary, rows));
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
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_keep_spans_whole_and_chunks_keep_units_whole() {
        let units = Units::new(7, &[1..3, 3..6]);
        assert_eq!(units.ends, [1, 3, 6, 7]);
        let long = Units::new(CHUNK + 300, &[0..2, CHUNK - 1..CHUNK + 2]);
        let sizes: Vec<usize> = long.chunks(CHUNK).map(|chunk| chunk.positions()).collect();
        assert_eq!(sizes, [CHUNK - 1, 301]);
        let of_large = [32_000, 131_072, 262_144, 1 << 24].map(chunk_rows);
        assert_eq!(of_large, [512, 256, 128, 128]);
        assert_eq!(Units::new(0, &[]).chunks(CHUNK).count(), 0);

        let mut values = vec![0.0; 14];
        let rows = |range: Range<usize>, part: &mut [f32]| {
            part.fill(range.len() as f32);
            range.collect::<Vec<_>>()
        };
        let reports = units.map(10, &mut values, 2, &rows);
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
