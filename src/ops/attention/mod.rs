//! Grouped-query attention over segments laid end to end. The rotary embedding is already applied to the queries and
//! keys.
//!
//! For each query row: o = softmax(scale q K^T + bias) V over the visible keys of its segment. The [`Mask`] decides
//! which keys are visible; the keys are those of the same sequence, or of its source (cross-attention). Queries are
//! processed in blocks, so no (T x T) matrix is stored. The backward pass recomputes the probabilities of a block
//! from the log-sum-exp of its scores (Dao et al., arXiv 2205.14135).
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | the forward pass, over whole sequences or over a cache |
//! | `backward.rs` | the backward pass |
//! | `mask.rs` | the keys that a query sees |
//! | `relative_bias.rs` | the bias of T5, by the distance between query and key |
//!
//! Shapes in addition to the legend in `ops`: t rows of a block, s keys that these rows see, E buckets of relative
//! positions, J relative positions.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

pub(crate) mod backward;
pub(crate) mod mask;
pub(crate) mod relative_bias;

use std::ops::Range;

use rayon::prelude::*;

use super::math;
use super::matmul::{Precision, matmul};
use super::{segment_rows, simd, split_segments};
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};
pub(crate) use backward::AttentionForward;
pub use mask::Mask;
pub(crate) use relative_bias::RelativeBias;
pub use relative_bias::RelativeBuckets;

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
    /// Factor of the scores: 1 / sqrt(C), or 1 in T5.
    pub scale: f32,
}

impl Heads {
    /// Creates heads with the usual scale, 1 / sqrt(C).
    pub fn new(query: usize, key_value: usize, head_dim: usize) -> Self {
        Self {
            query,
            key_value,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }

    /// Width of a row of queries: H x C.
    pub fn query_width(&self) -> usize {
        self.query * self.head_dim
    }

    /// Width of a row of keys or values: G x C.
    pub fn key_value_width(&self) -> usize {
        self.key_value * self.head_dim
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
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub heads: Heads,
    /// The segments of the queries, which cover all rows in order.
    pub query_segments: &'a [Range<usize>],
    /// The segments of the keys and values, one per segment of the queries.
    pub key_segments: &'a [Range<usize>],
    pub mask: Mask,
    pub bias: Option<&'a RelativeBias>,
    pub precision: Precision,
}

impl Attention<'_> {
    /// Computes the output and the log-sum-exp of the scores of each row and head.
    pub(crate) fn forward(
        &self,
        q_THC: &[f32],
        k_TGC: &[f32],
        v_TGC: &[f32],
        out_THC: &mut [f32],
        lse_TH: &mut [f32],
    ) {
        let q_width = self.heads.query_width();
        let kv_width = self.heads.key_value_width();
        let segment_outputs = split_segments(out_THC, self.query_segments, q_width);
        let segment_lses = split_segments(lse_TH, self.query_segments, self.heads.query);
        self.query_segments
            .par_iter()
            .zip(self.key_segments)
            .zip(segment_outputs)
            .zip(segment_lses)
            .for_each(|(((query_segment, key_segment), out_SHC), lse_SH)| {
                let attention = CachedAttention {
                    heads: self.heads,
                    mask: self.mask,
                    bias: self.bias,
                    precision: self.precision,
                    k_SGC: segment_rows(k_TGC, key_segment, kv_width),
                    v_SGC: segment_rows(v_TGC, key_segment, kv_width),
                };
                let q_SHC = segment_rows(q_THC, query_segment, q_width);
                attention.attend(q_SHC, out_SHC, Some(lse_SH));
            });
    }
}

/// Attention over the keys and values of one sequence of S tokens. The rotary embedding is already applied to the
/// keys.
#[derive(Clone, Copy)]
pub(crate) struct CachedAttention<'a> {
    pub heads: Heads,
    pub mask: Mask,
    pub bias: Option<&'a RelativeBias>,
    pub precision: Precision,
    pub k_SGC: &'a [f32],
    pub v_SGC: &'a [f32],
}

impl CachedAttention<'_> {
    /// Computes the output for the queries of t rows: with a causal mask, the last rows of the sequence. Stores the
    /// log-sum-exp of the scores in `lse_tH`, if it is given.
    pub(crate) fn attend(&self, q_tHC: &[f32], out_tHC: &mut [f32], lse_tH: Option<&mut [f32]>) {
        let q_width = self.heads.query_width();
        let rows = q_tHC.len() / q_width;
        let keys = self.k_SGC.len() / self.heads.key_value_width();
        let first_position = self.mask.first_position(rows, keys);
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
                self.attend_block(q_tHC, first_position + index * BLOCK, keys, out_tHC, lse_tH)
            });
    }

    /// Computes the output of the block `q_tHC` of queries, the first of which is at position `first_row`. `all_keys`
    /// is the number of keys.
    fn attend_block(
        &self,
        q_tHC: &[f32],
        first_row: usize,
        all_keys: usize,
        out_tHC: &mut [f32],
        lse_tH: &mut [f32],
    ) {
        let heads = self.heads;
        let q_width = heads.query_width();
        let kv_width = heads.key_value_width();
        let block = q_tHC.len() / q_width;
        let keys = self
            .mask
            .keys_of_block(first_row..first_row + block, all_keys);
        let count = keys.len();
        let mut scores_ts = vec![0.0; block * count];
        for head in 0..heads.query {
            let (column, kv_column) = heads.columns(head);
            let kv_start = keys.start * kv_width + kv_column;
            let q_tC = Mat::strided(&q_tHC[column..], block, heads.head_dim, q_width);
            let k_sC = Mat::strided(&self.k_SGC[kv_start..], count, heads.head_dim, kv_width);
            let v_sC = Mat::strided(&self.v_SGC[kv_start..], count, heads.head_dim, kv_width);
            let product = |out: MatMut, a: Mat, b: Mat| {
                matmul(out, a, b, false, Threads::One, self.precision);
            };
            product(MatMut::new(&mut scores_ts, count), q_tC, k_sC.t());
            for (row, scores_s) in scores_ts.chunks_exact_mut(count).enumerate() {
                let visible = self.mask.keys_of_row(first_row + row, &keys);
                let visible_scores = &mut scores_s[visible.clone()];
                let mut scale = heads.scale;
                if let Some(bias) = self.bias {
                    let positions = keys.start + visible.start..keys.start + visible.end;
                    let range = bias.range(first_row + row, positions);
                    add_bias(visible_scores, scale, bias.row(head, range));
                    scale = 1.0;
                }
                lse_tH[row * heads.query + head] = softmax(visible_scores, scale);
                scores_s[..visible.start].fill(0.0);
                scores_s[visible.end..].fill(0.0);
            }
            let out_tC = MatMut::strided(&mut out_tHC[column..], q_width);
            product(out_tC, Mat::new(&scores_ts, count), v_sC);
        }
    }
}

/// Replaces the scores by `scale * scores_s + bias_s`.
fn add_bias(scores_s: &mut [f32], scale: f32, bias_s: &[f32]) {
    for (score, bias) in scores_s.iter_mut().zip(bias_s) {
        *score = *score * scale + bias;
    }
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
