//! Causal grouped-query attention over segments laid end to end. The rotary embedding is already applied to the
//! queries and keys.
//!
//! For each query row: o = softmax(scale q K^T) V over the visible keys of its segment. A row sees
//! itself and the rows before it; with a sliding window of w, only the last w of these. Queries are
//! processed in blocks, so no (T x T) matrix is stored. The backward pass recomputes the
//! probabilities of a block from the log-sum-exp of its scores (Dao et al., arXiv 2205.14135).
//!
//! Shapes in addition to the legend in `ops`: t rows of a block, s keys that these rows see.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use std::ops::Range;

use rayon::prelude::*;

use super::math::{self, dot, exp};
use super::matmul::{Precision, matmul};
use super::{GradientMut, ROWS_PER_TASK, segment_rows, simd, split_segments};
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};

/// Query rows per block.
const BLOCK: usize = 64;

/// The head counts and the head width of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Number of query heads (H), a multiple of `key_value`.
    pub query: usize,
    /// Number of key/value heads (G).
    pub key_value: usize,
    /// Width of a head (C).
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

    /// Factor of the scores: 1 / sqrt(C).
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Number of query heads that share a key/value head: H / G.
    pub fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// Returns the first column of query head `head` and the first column of its key/value head.
    fn columns(&self, head: usize) -> (usize, usize) {
        (head * self.head_dim, head / self.group() * self.head_dim)
    }
}

/// An attention layer over the segments of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    pub heads: Heads,
    /// The segments, which cover all rows in order.
    pub segments: &'a [Range<usize>],
    /// Sliding window: the maximum number of keys that a query sees, including its own. None: no window.
    pub window: Option<usize>,
    pub precision: Precision,
}

/// Inputs and results of a forward pass that the backward pass needs.
#[derive(Clone, Copy)]
pub struct AttentionForward<'a> {
    pub q_THC: &'a [f32],
    pub k_TGC: &'a [f32],
    pub v_TGC: &'a [f32],
    pub out_THC: &'a [f32],
    /// Log-sum-exp of the scores of each row and head.
    pub lse_TH: &'a [f32],
}

impl Attention<'_> {
    /// Computes the output and the log-sum-exp of the scores of each row and head.
    pub fn forward(
        &self,
        q_THC: &[f32],
        k_TGC: &[f32],
        v_TGC: &[f32],
        out_THC: &mut [f32],
        lse_TH: &mut [f32],
    ) {
        let q_width = self.heads.query_width();
        let kv_width = self.heads.key_value_width();
        let segment_outputs = split_segments(out_THC, self.segments, q_width);
        let segment_lses = split_segments(lse_TH, self.segments, self.heads.query);
        self.segments
            .par_iter()
            .zip(segment_outputs)
            .zip(segment_lses)
            .for_each(|((segment, out_SHC), lse_SH)| {
                let attention = CachedAttention {
                    heads: self.heads,
                    window: self.window,
                    precision: self.precision,
                    k_SGC: segment_rows(k_TGC, segment, kv_width),
                    v_SGC: segment_rows(v_TGC, segment, kv_width),
                };
                let q_SHC = segment_rows(q_THC, segment, q_width);
                attention.attend(q_SHC, out_SHC, Some(lse_SH));
            });
    }

    /// Computes the gradients of q, k and v. With P the probabilities and dP = dO V^T:
    /// dV = P^T dO, dS = scale P (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
    ///
    /// `scratch` has `Attention::scratch_len` values.
    pub fn backward(
        &self,
        forward: AttentionForward,
        dout_THC: &[f32],
        scratch: &mut [f32],
        [dq_THC, dk_TGC, dv_TGC]: [GradientMut; 3],
    ) {
        let q_width = self.heads.query_width();
        let kv_width = self.heads.key_value_width();
        let head_dim = self.heads.head_dim;
        // One task per segment and query head. Each writes its own dQ, dK and dV, because the query
        // heads of a group would otherwise write to the same key/value head.
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
                self.backward_head(&forward, dout_THC, segment, head, scratch);
            });
        let group = self.heads.group();
        self.gather(scratch, ScratchPart::Query, 1, q_width, dq_THC);
        self.gather(scratch, ScratchPart::Key, group, kv_width, dk_TGC);
        self.gather(scratch, ScratchPart::Value, group, kv_width, dv_TGC);
    }

    /// Returns the number of scratch values that a backward pass over T tokens needs: 3 T H C.
    pub(crate) fn scratch_len(&self) -> usize {
        let tokens = self.segments.last().map_or(0, |last| last.end);
        3 * tokens * self.heads.query_width()
    }

    /// Computes dQ, dK and dV of one query head over one segment (S x C each), and writes them to `scratch`
    /// in the order of [`ScratchPart`].
    fn backward_head(
        &self,
        forward: &AttentionForward,
        dout_THC: &[f32],
        segment: &Range<usize>,
        head: usize,
        scratch: &mut [f32],
    ) {
        let heads = self.heads;
        let q_width = heads.query_width();
        let kv_width = heads.key_value_width();
        let head_dim = heads.head_dim;
        let scale = heads.scale();
        let (column, kv_column) = heads.columns(head);
        let rows = segment.len();
        scratch.fill(0.0);
        let (dq_SC, dkv_SC) = scratch.split_at_mut(rows * head_dim);
        let (dk_SC, dv_SC) = dkv_SC.split_at_mut(rows * head_dim);
        let max_keys = keys_of_block(BLOCK.min(rows), rows, rows, self.window).len();
        let mut p_ts = vec![0.0; BLOCK.min(rows) * max_keys];
        let mut ds_ts = p_ts.clone();
        let product = |out: MatMut, a: Mat, b: Mat, add: bool| {
            matmul(out, a, b, add, Threads::One, self.precision);
        };
        for start in (0..rows).step_by(BLOCK) {
            let block = BLOCK.min(rows - start);
            let keys = keys_of_block(block, start + block, rows, self.window);
            let first = keys.start;
            let count = keys.len();
            let q_start = (segment.start + start) * q_width + column;
            let kv_start = (segment.start + first) * kv_width + kv_column;
            let p_ts = &mut p_ts[..block * count];
            let ds_ts = &mut ds_ts[..block * count];
            let q_tC = Mat::strided(&forward.q_THC[q_start..], block, head_dim, q_width);
            let k_sC = Mat::strided(&forward.k_TGC[kv_start..], count, head_dim, kv_width);
            let v_sC = Mat::strided(&forward.v_TGC[kv_start..], count, head_dim, kv_width);
            let dout_tC = Mat::strided(&dout_THC[q_start..], block, head_dim, q_width);
            product(MatMut::new(p_ts, count), q_tC, k_sC.t(), false);
            product(MatMut::new(ds_ts, count), dout_tC, v_sC.t(), false);
            let block_rows = p_ts
                .chunks_exact_mut(count)
                .zip(ds_ts.chunks_exact_mut(count));
            for (row, (p_s, ds_s)) in block_rows.enumerate() {
                let lse = forward.lse_TH[(segment.start + start + row) * heads.query + head];
                let row_channels = q_start + row * q_width..q_start + row * q_width + head_dim;
                let visible = keys_of_row(start + row, first, self.window);
                softmax_backward(
                    &mut p_s[visible.clone()],
                    &mut ds_s[visible.clone()],
                    &dout_THC[row_channels.clone()],
                    &forward.out_THC[row_channels],
                    scale,
                    lse,
                );
                for values in [p_s, ds_s] {
                    values[..visible.start].fill(0.0);
                    values[visible.end..].fill(0.0);
                }
            }
            let p_ts = Mat::new(p_ts, count);
            let ds_ts = Mat::new(ds_ts, count);
            let key_channels = first * head_dim..(first + count) * head_dim;
            let dv_sC = MatMut::new(&mut dv_SC[key_channels.clone()], head_dim);
            product(dv_sC, p_ts.t(), dout_tC, true);
            let dk_sC = MatMut::new(&mut dk_SC[key_channels], head_dim);
            product(dk_sC, ds_ts.t(), q_tC, true);
            let dq_tC = &mut dq_SC[start * head_dim..(start + block) * head_dim];
            product(MatMut::new(dq_tC, head_dim), ds_ts, k_sC, false);
        }
    }

    /// Writes the gradient `part` of all query heads from `scratch` to the rows of `gradient`, of `width` values each.
    /// Sums over groups of `group` query heads. `group` is 1 for dQ, and H / G for dK and dV, because H / G query heads
    /// share a key/value head.
    fn gather(
        &self,
        scratch: &[f32],
        part: ScratchPart,
        group: usize,
        width: usize,
        gradient: GradientMut,
    ) {
        let head_dim = self.heads.head_dim;
        let scratch_width = 3 * self.heads.query_width();
        for (rows, segment) in split_segments(gradient.values, self.segments, width)
            .into_iter()
            .zip(self.segments)
        {
            let scratch = segment_rows(scratch, segment, scratch_width);
            let head_gradient = |head: usize| {
                let start = (3 * head + part as usize) * segment.len() * head_dim;
                &scratch[start..start + segment.len() * head_dim]
            };
            rows.par_chunks_mut(width)
                .enumerate()
                .with_min_len(ROWS_PER_TASK)
                .for_each(|(row, values)| {
                    if !gradient.add {
                        values.fill(0.0);
                    }
                    for (index, values) in values.chunks_mut(head_dim).enumerate() {
                        for head in index * group..(index + 1) * group {
                            let row = &head_gradient(head)[row * head_dim..(row + 1) * head_dim];
                            values
                                .iter_mut()
                                .zip(row)
                                .for_each(|(sum, value)| *sum += value);
                        }
                    }
                });
        }
    }
}

/// The gradients of one query head, in their order in the scratch space of [`Attention::backward`].
#[derive(Clone, Copy)]
enum ScratchPart {
    Query,
    Key,
    Value,
}

/// Attention over the keys and values of one sequence of S tokens. The rotary embedding is already applied to the
/// keys.
#[derive(Clone, Copy)]
pub(crate) struct CachedAttention<'a> {
    pub heads: Heads,
    pub window: Option<usize>,
    pub precision: Precision,
    pub k_SGC: &'a [f32],
    pub v_SGC: &'a [f32],
}

impl CachedAttention<'_> {
    /// Computes the output for the queries of the last t rows of the sequence. Stores the log-sum-exp
    /// of the scores in `lse_tH`, if it is given.
    pub(crate) fn attend(&self, q_tHC: &[f32], out_tHC: &mut [f32], lse_tH: Option<&mut [f32]>) {
        let q_width = self.heads.query_width();
        let rows = q_tHC.len() / q_width;
        let mut unused_lse = Vec::new();
        let lse_tH = lse_tH.unwrap_or_else(|| {
            unused_lse.resize(rows * self.heads.query, 0.0);
            &mut unused_lse
        });
        out_tHC
            .par_chunks_mut(BLOCK * q_width)
            .zip(q_tHC.par_chunks(BLOCK * q_width))
            .zip(lse_tH.par_chunks_mut(BLOCK * self.heads.query))
            .enumerate()
            .for_each(|(index, ((out_tHC, q_tHC), lse_tH))| {
                self.attend_block(q_tHC, index * BLOCK, rows, out_tHC, lse_tH)
            });
    }

    /// Computes the output of the block `q_tHC` of queries. The queries belong to the last `rows` rows of
    /// the sequence; the block begins `start` rows after the first of these.
    fn attend_block(
        &self,
        q_tHC: &[f32],
        start: usize,
        rows: usize,
        out_tHC: &mut [f32],
        lse_tH: &mut [f32],
    ) {
        let heads = self.heads;
        let q_width = heads.query_width();
        let kv_width = heads.key_value_width();
        let block = q_tHC.len() / q_width;
        let all_keys = self.k_SGC.len() / kv_width;
        let first_row = all_keys - rows + start;
        let keys = keys_of_block(block, first_row + block, all_keys, self.window);
        let first = keys.start;
        let count = keys.len();
        let mut scores_ts = vec![0.0; block * count];
        for head in 0..heads.query {
            let (column, kv_column) = heads.columns(head);
            let kv_start = first * kv_width + kv_column;
            let q_tC = Mat::strided(&q_tHC[column..], block, heads.head_dim, q_width);
            let k_sC = Mat::strided(&self.k_SGC[kv_start..], count, heads.head_dim, kv_width);
            let v_sC = Mat::strided(&self.v_SGC[kv_start..], count, heads.head_dim, kv_width);
            let product = |out: MatMut, a: Mat, b: Mat| {
                matmul(out, a, b, false, Threads::One, self.precision);
            };
            product(MatMut::new(&mut scores_ts, count), q_tC, k_sC.t());
            for (row, scores_s) in scores_ts.chunks_exact_mut(count).enumerate() {
                let visible = keys_of_row(first_row + row, first, self.window);
                lse_tH[row * heads.query + head] =
                    softmax(&mut scores_s[visible.clone()], heads.scale());
                scores_s[..visible.start].fill(0.0);
                scores_s[visible.end..].fill(0.0);
            }
            let out_tC = MatMut::strided(&mut out_tHC[column..], q_width);
            product(out_tC, Mat::new(&scores_ts, count), v_sC);
        }
    }
}

/// Returns the keys, out of `all_keys`, that at least one of the `block` rows before row `end` sees.
fn keys_of_block(block: usize, end: usize, all_keys: usize, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |window| (end + 1).saturating_sub(block + window));
    first..end.min(all_keys)
}

/// Returns the keys that `row` sees, as indices relative to key `first`.
fn keys_of_row(row: usize, first: usize, window: Option<usize>) -> Range<usize> {
    let start = window.map_or(0, |window| (row + 1).saturating_sub(window));
    start - first..row + 1 - first
}

/// Replaces the unscaled scores `p_s` of one query by its probabilities P, and the gradients `ds_s` of P by the
/// gradients of the unscaled scores. `dout_C` and `out_C` are the rows of dO and O of the query.
fn softmax_backward(
    p_s: &mut [f32],
    ds_s: &mut [f32],
    dout_C: &[f32],
    out_C: &[f32],
    scale: f32,
    lse: f32,
) {
    simd!(|p_s: &mut [f32],
           ds_s: &mut [f32],
           dout_C: &[f32],
           out_C: &[f32],
           scale: f32,
           lse: f32| {
        let delta = dot(dout_C, out_C);
        for (p, ds) in p_s.iter_mut().zip(ds_s) {
            *p = exp(*p * scale - lse);
            *ds = *p * (*ds - delta) * scale;
        }
    });
}

/// Computes the softmax of `scale * scores_s` in place and returns the log-sum-exp.
fn softmax(scores_s: &mut [f32], scale: f32) -> f32 {
    simd!(|scores_s: &mut [f32], scale: f32| -> f32 {
        let max = math::max(scores_s) * scale;
        let total = math::exp_sum(scores_s, scale, max);
        let inverse = 1.0 / total;
        scores_s.iter_mut().for_each(|p| *p *= inverse);
        max + total.ln()
    })
}
