//! Causal grouped-query attention over segments laid end to end, the rotary embedding done.
//!
//! For each query row: o = softmax(scale q K^T) V over the keys of its segment that it sees: those
//! at or before it, and with a sliding window of w only the last w of them. Queries are taken in
//! blocks, so no (T x T) matrix is stored; the backward pass computes a block's probabilities again
//! from the log-sum-exp of its scores (Dao et al., arXiv 2205.14135).

use std::ops::Range;

use rayon::prelude::*;

use super::math::{self, dot, exp};
use super::matmul::{Precision, matmul};
use super::{Gradient, ROWS_PER_TASK, segment_rows, simd, split_segments};
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};

/// Query rows of one block.
const BLOCK: usize = 64;

/// The shape of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads (H), a multiple of `key_value`.
    pub query: usize,
    /// Key/value heads (G).
    pub key_value: usize,
    /// Channels of a head (C).
    pub head_dim: usize,
}

impl Heads {
    /// Width of a row of queries: H x C.
    pub fn query_width(&self) -> usize {
        self.query * self.head_dim
    }

    /// Width of a row of keys or values: G x C.
    pub fn key_value_width(&self) -> usize {
        self.key_value * self.head_dim
    }

    /// What scores are multiplied by: 1 / sqrt(C).
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// The columns of query head `head`, and those of the key/value head that it reads.
    fn columns(&self, head: usize) -> (usize, usize) {
        (head * self.head_dim, head / self.group() * self.head_dim)
    }
}

/// An attention layer and what it sees.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    pub heads: Heads,
    /// Cover all rows in order.
    pub segments: &'a [Range<usize>],
    /// Keys that a query sees at most, itself included; None for all.
    pub window: Option<usize>,
    pub precision: Precision,
}

/// A forward pass, as the backward pass reads it.
#[derive(Clone, Copy)]
pub struct AttentionForward<'a> {
    /// (T x H C)
    pub q: &'a [f32],
    /// (T x G C), as the values.
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// (T x H C)
    pub out: &'a [f32],
    /// (T x H)
    pub lse: &'a [f32],
}

impl Attention<'_> {
    /// `q` (T x H C), `k` and `v` (T x G C) give `out` (T x H C) and the log-sum-exp of the scores of
    /// each row and head, `lse` (T x H).
    pub fn forward(&self, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32], lse: &mut [f32]) {
        let (q_width, kv_width) = (self.heads.query_width(), self.heads.key_value_width());
        let outs = split_segments(out, self.segments, q_width);
        let lses = split_segments(lse, self.segments, self.heads.query);
        self.segments
            .par_iter()
            .zip(outs)
            .zip(lses)
            .for_each(|((segment, out), lse)| {
                let cached = CachedAttention {
                    heads: self.heads,
                    window: self.window,
                    precision: self.precision,
                    k: segment_rows(k, segment, kv_width),
                    v: segment_rows(v, segment, kv_width),
                };
                cached.attend(segment_rows(q, segment, q_width), out, Some(lse));
            });
    }

    /// With P the probabilities and dP = dO V^T:
    /// dV = P^T dO, dS = scale P (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
    ///
    /// `scratch` has [`Attention::scratch`] values.
    pub fn backward(
        &self,
        forward: AttentionForward,
        dout: &[f32],
        scratch: &mut [f32],
        [dq, dk, dv]: [Gradient; 3],
    ) {
        let (q_width, head_dim) = (self.heads.query_width(), self.heads.head_dim);
        // One task a head of a segment, with dQ, dK and dV of its own: no two write the same place.
        let tasks: Vec<(&Range<usize>, usize, &mut [f32])> =
            split_segments(scratch, self.segments, 3 * q_width)
                .into_iter()
                .zip(self.segments)
                .flat_map(|(scratch, segment)| {
                    let heads = scratch.chunks_mut(3 * head_dim * segment.len().max(1));
                    heads
                        .enumerate()
                        .map(move |(head, scratch)| (segment, head, scratch))
                })
                .collect();
        tasks
            .into_par_iter()
            .with_max_len(1)
            .for_each(|(segment, head, scratch)| {
                self.backward_head(&forward, dout, segment, head, scratch);
            });
        self.gather(scratch, 1, 0, q_width, dq);
        let kv_width = self.heads.key_value_width();
        self.gather(scratch, self.heads.group(), 1, kv_width, dk);
        self.gather(scratch, self.heads.group(), 2, kv_width, dv);
    }

    /// Values of scratch that a backward pass over T tokens needs: 3 T H C.
    pub fn scratch(&self) -> usize {
        let tokens = self.segments.last().map_or(0, |last| last.end);
        3 * tokens * self.heads.query_width()
    }

    fn backward_head(
        &self,
        forward: &AttentionForward,
        dout: &[f32],
        segment: &Range<usize>,
        head: usize,
        scratch: &mut [f32],
    ) {
        let heads = self.heads;
        let (q_width, kv_width) = (heads.query_width(), heads.key_value_width());
        let (head_dim, scale) = (heads.head_dim, heads.scale());
        let (column, kv_column) = heads.columns(head);
        let rows = segment.len();
        scratch.fill(0.0);
        let (dq, rest) = scratch.split_at_mut(rows * head_dim);
        let (dk, dv) = rest.split_at_mut(rows * head_dim);
        let span = visible(BLOCK.min(rows), rows, rows, self.window).len();
        let mut p = vec![0.0; BLOCK.min(rows) * span];
        let mut ds = p.clone();
        let product = |out: MatMut, a: Mat, b: Mat, add: bool| {
            matmul(out, a, b, add, Threads::One, self.precision);
        };
        for start in (0..rows).step_by(BLOCK) {
            let block = BLOCK.min(rows - start);
            let keys = visible(block, start + block, rows, self.window);
            let (first, count) = (keys.start, keys.len());
            let at = (segment.start + start) * q_width + column;
            let kv_at = (segment.start + first) * kv_width + kv_column;
            let (p, ds) = (&mut p[..block * count], &mut ds[..block * count]);
            let q = Mat::strided(&forward.q[at..], block, head_dim, q_width);
            let k = Mat::strided(&forward.k[kv_at..], count, head_dim, kv_width);
            let v = Mat::strided(&forward.v[kv_at..], count, head_dim, kv_width);
            let dout_block = Mat::strided(&dout[at..], block, head_dim, q_width);
            product(MatMut::new(p, count), q, k.t(), false);
            product(MatMut::new(ds, count), dout_block, v.t(), false);
            let lines = p.chunks_exact_mut(count).zip(ds.chunks_exact_mut(count));
            for (row, (p, ds)) in lines.enumerate() {
                let lse = forward.lse[(segment.start + start + row) * heads.query + head];
                let here = at + row * q_width..at + row * q_width + head_dim;
                let seen = seen(start + row, first, self.window);
                let seen_of = (&mut p[seen.clone()], &mut ds[seen.clone()]);
                let outputs = (&dout[here.clone()], &forward.out[here]);
                softmax_backward(seen_of, outputs, scale, lse);
                for values in [p, ds] {
                    values[..seen.start].fill(0.0);
                    values[seen.end..].fill(0.0);
                }
            }
            let (p, ds) = (Mat::new(p, count), Mat::new(ds, count));
            let keys = first * head_dim..(first + count) * head_dim;
            product(
                MatMut::new(&mut dv[keys.clone()], head_dim),
                p.t(),
                dout_block,
                true,
            );
            product(MatMut::new(&mut dk[keys], head_dim), ds.t(), q, true);
            let dq = &mut dq[start * head_dim..(start + block) * head_dim];
            product(MatMut::new(dq, head_dim), ds, k, false);
        }
    }

    /// Brings one of the three gradients of all heads from `scratch` into rows of `width`, summing
    /// the `group` query heads that share a head.
    fn gather(&self, scratch: &[f32], group: usize, which: usize, width: usize, to: Gradient) {
        let head_dim = self.heads.head_dim;
        let q_width = 3 * self.heads.query_width();
        for (rows, segment) in split_segments(to.values, self.segments, width)
            .into_iter()
            .zip(self.segments)
        {
            let from = segment_rows(scratch, segment, q_width);
            let head_of = |head: usize| {
                let at = (3 * head + which) * segment.len() * head_dim;
                &from[at..at + segment.len() * head_dim]
            };
            rows.par_chunks_mut(width)
                .enumerate()
                .with_min_len(ROWS_PER_TASK)
                .for_each(|(row, values)| {
                    if !to.add {
                        values.fill(0.0);
                    }
                    for (index, values) in values.chunks_mut(head_dim).enumerate() {
                        for head in index * group..(index + 1) * group {
                            let from = &head_of(head)[row * head_dim..(row + 1) * head_dim];
                            values
                                .iter_mut()
                                .zip(from)
                                .for_each(|(sum, part)| *sum += part);
                        }
                    }
                });
        }
    }
}

/// Keys and values of one sequence of s tokens (s x G C), the rotary embedding done.
#[derive(Clone, Copy)]
pub struct CachedAttention<'a> {
    pub heads: Heads,
    pub window: Option<usize>,
    pub precision: Precision,
    pub k: &'a [f32],
    pub v: &'a [f32],
}

impl CachedAttention<'_> {
    /// The last rows' queries `q` (t x H C) over the keys that each sees; `lse`, where asked for,
    /// receives (t x H).
    pub fn attend(&self, q: &[f32], out: &mut [f32], lse: Option<&mut [f32]>) {
        let q_width = self.heads.query_width();
        let rows = q.len() / q_width;
        let mut no_lse = Vec::new();
        let lse = lse.unwrap_or_else(|| {
            no_lse.resize(rows * self.heads.query, 0.0);
            &mut no_lse
        });
        out.par_chunks_mut(BLOCK * q_width)
            .zip(q.par_chunks(BLOCK * q_width))
            .zip(lse.par_chunks_mut(BLOCK * self.heads.query))
            .enumerate()
            .for_each(|(index, ((out, q), lse))| {
                self.attend_block(q, index * BLOCK, rows, out, lse)
            });
    }

    /// Rows `start..` of the last `rows` rows.
    fn attend_block(&self, q: &[f32], start: usize, rows: usize, out: &mut [f32], lse: &mut [f32]) {
        let heads = self.heads;
        let (q_width, kv_width) = (heads.query_width(), heads.key_value_width());
        let (block, all) = (q.len() / q_width, self.k.len() / kv_width);
        let before = all - rows + start;
        let keys = visible(block, before + block, all, self.window);
        let (first, count) = (keys.start, keys.len());
        let mut scores = vec![0.0; block * count];
        for head in 0..heads.query {
            let (column, kv_column) = heads.columns(head);
            let kv_at = first * kv_width + kv_column;
            let q = Mat::strided(&q[column..], block, heads.head_dim, q_width);
            let k = Mat::strided(&self.k[kv_at..], count, heads.head_dim, kv_width);
            let v = Mat::strided(&self.v[kv_at..], count, heads.head_dim, kv_width);
            let product = |out: MatMut, a: Mat, b: Mat| {
                matmul(out, a, b, false, Threads::One, self.precision);
            };
            product(MatMut::new(&mut scores, count), q, k.t());
            for (row, scores) in scores.chunks_exact_mut(count).enumerate() {
                let seen = seen(before + row, first, self.window);
                lse[row * heads.query + head] = softmax(&mut scores[seen.clone()], heads.scale());
                scores[..seen.start].fill(0.0);
                scores[seen.end..].fill(0.0);
            }
            let out = MatMut::strided(&mut out[column..], q_width);
            product(out, Mat::new(&scores, count), v);
        }
    }
}

/// The keys that a block of `block` rows before row `end` sees, of `all`.
fn visible(block: usize, end: usize, all: usize, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |window| (end + 1).saturating_sub(block + window));
    first..end.min(all)
}

/// The keys that `row` sees, counted from key `first` on.
fn seen(row: usize, first: usize, window: Option<usize>) -> Range<usize> {
    let from = window.map_or(0, |window| (row + 1).saturating_sub(window));
    from - first..row + 1 - first
}

/// Turns the products of a query with keys, `p`, into probabilities, and their gradients `ds` into those of
/// the products. `dout` and `out` are the query's rows of dO and O.
fn softmax_backward(
    (p, ds): (&mut [f32], &mut [f32]),
    (dout, out): (&[f32], &[f32]),
    scale: f32,
    lse: f32,
) {
    simd!(
        |p: &mut [f32], ds: &mut [f32], dout: &[f32], out: &[f32], scale: f32, lse: f32| {
            let along = dot(dout, out);
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = exp(*p * scale - lse);
                *ds = *p * (*ds - along) * scale;
            }
        }
    );
}

/// Softmax of `scale * scores`, in place; returns the log-sum-exp.
fn softmax(scores: &mut [f32], scale: f32) -> f32 {
    simd!(|scores: &mut [f32], scale: f32| -> f32 {
        let max = math::max(scores) * scale;
        let total = math::exp_sum(scores, scale, max);
        let inverse = 1.0 / total;
        scores.iter_mut().for_each(|p| *p *= inverse);
        max + total.ln()
    })
}
