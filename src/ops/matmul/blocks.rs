//! A product cut into blocks: `out` in strips of rows, one task each; the sum over k in parts, of
//! which the right factor's is packed once for all strips.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use crate::ops::matmul::matrix::{Mat, MatMut, Threads};

/// About so many rows make a strip: its packed rows must stay in the second-level cache.
const STRIP: usize = 96;
/// At most so many columns of the right factor are packed at a time.
const COLUMNS: usize = 2048;
/// Panels of the right factor that one task packs.
const PANELS: usize = 8;

/// `out = a b`, or `out += a b` where `add`, all checked.
pub(crate) struct Product<'a> {
    pub out: MatMut<'a>,
    pub a: Mat<'a>,
    pub b: Mat<'a>,
    pub add: bool,
    pub threads: Threads,
}

/// Computes tiles of [`Kernel::ROWS`] x [`Kernel::COLS`] values from packed panels.
///
/// A panel holds that many lanes (rows of the left factor, columns of the right one); for each
/// [`Kernel::STEP`] terms of the sum there is one element a lane, side by side. Panels follow each
/// other; lanes and terms past the end of a factor are zero.
pub(crate) trait Kernel: Copy + Sync {
    const ROWS: usize;
    const COLS: usize;
    /// Terms in an element.
    const STEP: usize;
    /// At most so many terms of a sum are taken at a time: a panel of columns must stay near while
    /// it meets the rows of a strip.
    const DEPTH: usize;
    type Element: Copy + Default + Send + Sync + 'static;

    fn pack_rows(self, part: FactorPart, to: &mut [Self::Element]);
    fn pack_cols(self, part: FactorPart, to: &mut [Self::Element]);

    /// Adds the product of packed `rows` and `cols`, of `depth` elements a lane, to `strip`.
    fn multiply(
        self,
        rows: &[Self::Element],
        cols: &[Self::Element],
        depth: usize,
        strip: OutputStrip,
    );

    /// Buffers of this thread for packed rows and columns.
    fn buffers() -> &'static std::thread::LocalKey<[Cell<Vec<Self::Element>>; 2]>;
}

/// The part of a factor that becomes panels: lane l, term t is `values[l * lane + t * term]`.
#[derive(Clone, Copy)]
pub(crate) struct FactorPart<'a> {
    pub values: &'a [f32],
    /// Distance of two lanes, and of two terms.
    pub lane: usize,
    pub term: usize,
    pub lanes: usize,
    pub terms: usize,
}

/// Where a product goes: columns `first .. first + cols` of `rows` rows, `stride` values apart.
pub(crate) struct OutputStrip<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
    pub first: usize,
    pub rows: usize,
    pub cols: usize,
    /// Is it added to what is there?
    pub add: bool,
}

impl OutputStrip<'_> {
    /// `count` lines from `first` on, as far as they go.
    pub(crate) fn lines(&self, first: usize, count: usize) -> impl Iterator<Item = &[f32]> {
        self.values[first * self.stride..]
            .chunks(self.stride)
            .take(count)
    }
}

impl Product<'_> {
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
        let depth = even_chunk(k, K::DEPTH, K::STEP);
        let columns = even_chunk(n, COLUMNS, K::COLS);
        let buffers = K::buffers();
        // Taken out, not borrowed: while this thread waits, it may be given another product.
        let mut cols_buffer = buffers.with(|[_, cols]| cols.take());
        let elements = depth / K::STEP;
        grow(&mut cols_buffer, columns * elements);
        for first in (0..n).step_by(columns) {
            let cols = columns.min(n - first);
            for start in (0..k).step_by(depth) {
                let terms = depth.min(k - start);
                let elements = terms.div_ceil(K::STEP);
                let packed = &mut cols_buffer[..cols.next_multiple_of(K::COLS) * elements];
                let pack = |(index, to): (usize, &mut [K::Element])| {
                    let lane = index * PANELS * K::COLS;
                    let lanes = (to.len() / elements).min(cols - lane);
                    kernel.pack_cols(b.part(first + lane, lanes, start, terms), to);
                };
                match threads {
                    Threads::One => pack((0, packed)),
                    Threads::All => packed
                        .par_chunks_mut(PANELS * K::COLS * elements)
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
    /// Columns `lane .. lane + lanes` and rows `start .. start + terms`.
    fn part(&self, lane: usize, lanes: usize, start: usize, terms: usize) -> FactorPart<'a> {
        FactorPart {
            values: &self.values[lane * self.col_stride + start * self.row_stride..],
            lane: self.col_stride,
            term: self.row_stride,
            lanes,
            terms,
        }
    }
}

/// `size` in equal parts of at most `most`, rounded up to a multiple of `multiple`.
fn even_chunk(size: usize, most: usize, multiple: usize) -> usize {
    let parts = size.div_ceil(most);
    size.div_ceil(parts).next_multiple_of(multiple)
}

/// The rows in strips as equal as panels allow, and a multiple of 4 of them, so that threads end
/// together.
fn strips<K: Kernel>(
    rows: usize,
    mut values: &mut [f32],
    stride: usize,
) -> Vec<(Range<usize>, &mut [f32])> {
    let panels = rows.div_ceil(K::ROWS);
    let count = rows.div_ceil(STRIP).next_multiple_of(4).min(panels);
    let end = |strip: usize| (strip * panels / count * K::ROWS).min(rows);
    (0..count)
        .map(|strip| {
            let range = end(strip)..end(strip + 1);
            // The last row may end before its stride does.
            let len = (range.len() * stride).min(values.len());
            let (strip, rest) = std::mem::take(&mut values).split_at_mut(len);
            values = rest;
            (range, strip)
        })
        .collect()
}

fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}
