//! The blocking of a product. The output is cut into strips of rows, one task each. The sum over the inner
//! dimension is cut into parts; each part of the right factor is packed once for all strips.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use crate::ops::matmul::matrix::{Mat, MatMut, Threads};

/// Approximate number of rows of a strip: its packed rows must stay in the second-level cache.
const STRIP_ROWS: usize = 96;
/// Maximum number of columns of the right factor that are packed at a time.
const MAX_COLUMNS: usize = 2048;
/// Number of panels of the right factor packed by one task.
const PANELS_PER_TASK: usize = 8;

/// A checked product: `out = a b`, or `out += a b` with `add`.
pub(crate) struct Product<'a> {
    pub out: MatMut<'a>,
    pub a: Mat<'a>,
    pub b: Mat<'a>,
    pub add: bool,
    pub threads: Threads,
}

/// A kernel, which computes tiles of [`Kernel::ROWS`] x [`Kernel::COLS`] values from packed panels.
///
/// A lane is a row of the left factor or a column of the right one. A term is an index of the inner dimension. A
/// panel holds [`Kernel::ROWS`] lanes of the left factor or [`Kernel::COLS`] lanes of the right one. An element
/// holds [`Kernel::STEP`] consecutive terms of one lane. Elements with the same terms are adjacent, lane after
/// lane. Lanes and terms past the end of a factor are zero. Within a tile of columns, the AMX kernel has another order:
/// see `amx`.
pub(crate) trait Kernel: Copy + Sync {
    /// Rows of a tile.
    const ROWS: usize;
    /// Columns of a tile.
    const COLS: usize;
    /// Terms per element.
    const STEP: usize;
    /// Maximum number of terms per part of a sum: a panel of columns must stay in the cache while it is
    /// multiplied with all rows of a strip.
    const MAX_TERMS: usize;
    type Element: Copy + Default + Send + Sync + 'static;

    /// Packs a part of the left factor.
    fn pack_rows(self, part: FactorPart, packed: &mut [Self::Element]);
    /// Packs a part of the right factor.
    fn pack_cols(self, part: FactorPart, packed: &mut [Self::Element]);

    /// Multiplies packed `rows` and `cols`, of `depth` elements per lane, into `strip`.
    fn multiply(
        self,
        rows: &[Self::Element],
        cols: &[Self::Element],
        depth: usize,
        strip: OutputStrip,
    );

    /// This thread's buffers for packed rows and packed columns.
    fn buffers() -> &'static std::thread::LocalKey<[Cell<Vec<Self::Element>>; 2]>;
}

/// A part of a factor to pack. Term t of lane l is `values[l * lane_stride + t * term_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct FactorPart<'a> {
    pub values: &'a [f32],
    pub lane_stride: usize,
    pub term_stride: usize,
    pub lanes: usize,
    pub terms: usize,
}

/// The output of a kernel: columns `first .. first + cols` of `rows` rows, `stride` values apart.
pub(crate) struct OutputStrip<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
    pub first: usize,
    pub rows: usize,
    pub cols: usize,
    /// Add to the values instead of overwriting them.
    pub add: bool,
}

impl OutputStrip<'_> {
    /// Returns `count` rows from `first_row`, or fewer at the end, with all their columns.
    pub(crate) fn rows(&self, first_row: usize, count: usize) -> impl Iterator<Item = &[f32]> {
        self.values[first_row * self.stride..]
            .chunks(self.stride)
            .take(count)
    }
}

impl Product<'_> {
    /// Computes the product with `kernel`.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        let Self {
            out,
            a,
            b,
            add,
            threads,
        } = self;
        let (m, k, n) = (a.rows, a.cols, b.cols);
        if k == 0 {
            let rows = out.values.chunks_mut(out.row_stride).take(m);
            rows.filter(|_| !add).for_each(|row| row[..n].fill(0.0));
            return;
        }
        let part_terms = even_chunk(k, K::MAX_TERMS, K::STEP);
        let columns = even_chunk(n, MAX_COLUMNS, K::COLS);
        let buffers = K::buffers();
        // The buffer is taken, not borrowed: while this thread waits for tasks, it may run another product.
        let mut cols_buffer = buffers.with(|[_, cols]| cols.take());
        let elements = part_terms / K::STEP;
        grow(&mut cols_buffer, columns * elements);
        for first in (0..n).step_by(columns) {
            let cols = columns.min(n - first);
            for start in (0..k).step_by(part_terms) {
                let terms = part_terms.min(k - start);
                let elements = terms.div_ceil(K::STEP);
                let packed = &mut cols_buffer[..cols.next_multiple_of(K::COLS) * elements];
                let pack = |(task, packed): (usize, &mut [K::Element])| {
                    let lane = task * PANELS_PER_TASK * K::COLS;
                    let lanes = (packed.len() / elements).min(cols - lane);
                    kernel.pack_cols(b.part(first + lane, lanes, start, terms), packed);
                };
                match threads {
                    Threads::One => pack((0, packed)),
                    Threads::All => packed
                        .par_chunks_mut(PANELS_PER_TASK * K::COLS * elements)
                        .enumerate()
                        .for_each(pack),
                }
                let packed = &*packed;
                let multiply = |(strip, values): (Range<usize>, &mut [f32])| {
                    let mut buffer = buffers.with(|[rows, _]| rows.take());
                    let rows = strip.len();
                    let size = rows.next_multiple_of(K::ROWS) * elements;
                    grow(&mut buffer, size);
                    let part = a.t().part(strip.start, rows, start, terms);
                    kernel.pack_rows(part, &mut buffer[..size]);
                    let strip = OutputStrip {
                        values,
                        stride: out.row_stride,
                        first,
                        rows,
                        cols,
                        add: add || start > 0,
                    };
                    kernel.multiply(&buffer[..size], packed, elements, strip);
                    buffers.with(|[rows, _]| rows.set(buffer));
                };
                let strips = strips::<K>(m, out.values, out.row_stride);
                match threads {
                    Threads::One => strips.into_iter().for_each(multiply),
                    Threads::All => strips.into_par_iter().with_max_len(1).for_each(multiply),
                }
            }
        }
        buffers.with(|[_, cols]| cols.set(cols_buffer));
    }
}

impl<'a> Mat<'a> {
    /// Returns columns `lane .. lane + lanes` of rows `start .. start + terms`.
    fn part(&self, lane: usize, lanes: usize, start: usize, terms: usize) -> FactorPart<'a> {
        FactorPart {
            values: &self.values[lane * self.col_stride + start * self.row_stride..],
            lane_stride: self.col_stride,
            term_stride: self.row_stride,
            lanes,
            terms,
        }
    }
}

/// Returns the chunk size that divides `size` into the fewest equal chunks of at most `max`, rounded up to
/// a multiple of `multiple`.
fn even_chunk(size: usize, max: usize, multiple: usize) -> usize {
    let parts = size.div_ceil(max);
    size.div_ceil(parts).next_multiple_of(multiple)
}

/// Cuts the rows of the output into strips of whole panels, as equal as possible. The number of strips is a
/// multiple of 4 if there are enough panels, so that threads finish at the same time. Returns the row range
/// and the values of each strip.
fn strips<K: Kernel>(
    rows: usize,
    mut values: &mut [f32],
    stride: usize,
) -> Vec<(Range<usize>, &mut [f32])> {
    let panels = rows.div_ceil(K::ROWS);
    let count = rows.div_ceil(STRIP_ROWS).next_multiple_of(4).min(panels);
    let end = |strip: usize| (strip * panels / count * K::ROWS).min(rows);
    (0..count)
        .map(|strip| {
            let range = end(strip)..end(strip + 1);
            // The last row may be shorter than the stride.
            let len = (range.len() * stride).min(values.len());
            let (strip, later_rows) = std::mem::take(&mut values).split_at_mut(len);
            values = later_rows;
            (range, strip)
        })
        .collect()
}

fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}
