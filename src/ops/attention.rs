//! Causal grouped-query attention with rotary embedding, over segments laid end to end.
//!
//! For each query row: o = softmax(scale q K^T) V over the keys at or before it in its segment.
//! Queries are taken in blocks, so no (T x T) matrix is stored; the backward pass computes a
//! block's probabilities again from the log-sum-exp of its scores (Dao et al., arXiv 2205.14135).

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, matmul};
use super::math::{dot, exp, sum};
use super::rope::{RopeTable, Turn};
use super::{lock, values, with_values};

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
    pub channels: usize,
}

impl Heads {
    /// Width of a row of queries: H x C.
    pub fn query_width(&self) -> usize {
        self.query * self.channels
    }

    /// Width of a row of keys or values: G x C.
    pub fn key_value_width(&self) -> usize {
        self.key_value * self.channels
    }

    fn scale(&self) -> f32 {
        1.0 / (self.channels as f32).sqrt()
    }

    /// The columns of query head `head`, and those of the key/value head that it reads.
    fn columns(&self, head: usize) -> (usize, usize) {
        let group = head / (self.query / self.key_value);
        (head * self.channels, group * self.channels)
    }
}

/// The attention of one training batch: `q_TE` (T x H C), `k_TE` and `v_TE` (T x G C), before the
/// rotary embedding, give (T x H C). `segments` cover 0..T in order; positions start at 0 in each.
///
/// # Errors
/// Where the segments do not cover the rows, or one is longer than the rotary table.
#[expect(non_snake_case, reason = "tensors carry their shape in their name")]
pub fn attention(
    q_TE: &Tensor,
    k_TE: &Tensor,
    v_TE: &Tensor,
    heads: Heads,
    rope: &Arc<RopeTable>,
    segments: &Arc<[Range<usize>]>,
) -> Result<Tensor> {
    let mut next = 0;
    for segment in segments.iter() {
        if segment.start != next || segment.len() > rope.positions() {
            candle_core::bail!("attention: segment {segment:?} has no place");
        }
        next = segment.end;
    }
    if next != q_TE.dim(0)? {
        candle_core::bail!("attention: segments cover {next} rows of {}", q_TE.dim(0)?);
    }
    let op = Attention {
        heads,
        rope: Arc::clone(rope),
        segments: Arc::clone(segments),
        saved: Mutex::default(),
    };
    q_TE.apply_op3(k_TE, v_TE, op)
}

struct Attention {
    heads: Heads,
    rope: Arc<RopeTable>,
    segments: Arc<[Range<usize>]>,
    saved: Mutex<Saved>,
}

/// What the backward pass needs of the forward pass.
#[derive(Default)]
struct Saved {
    /// Queries and keys after the rotary embedding.
    q: Vec<f32>,
    k: Vec<f32>,
    /// Log-sum-exp of each row's scores; segment by segment, (H x rows) in each.
    lse: Vec<f32>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut q = values(q, q_layout)?.to_vec();
        let mut k = values(k, k_layout)?.to_vec();
        let v = values(v, v_layout)?;
        let (wide, narrow) = (self.heads.query_width(), self.heads.key_value_width());
        let mut out = vec![0.0; q.len()];
        let mut lse = vec![0.0; q.len() / self.heads.channels];
        let q_parts = split(&mut q, &self.segments, wide);
        let k_parts = split(&mut k, &self.segments, narrow);
        let out_parts = split(&mut out, &self.segments, wide);
        let lse_parts = split(&mut lse, &self.segments, self.heads.query);
        self.segments
            .par_iter()
            .zip(q_parts)
            .zip(k_parts)
            .zip(out_parts)
            .zip(lse_parts)
            .for_each(|((((segment, q), k), out), lse)| {
                turn_rows(&self.rope, q, wide, 0, Turn::Forward);
                turn_rows(&self.rope, k, narrow, 0, Turn::Forward);
                let v = &v[segment.start * narrow..segment.end * narrow];
                attend(self.heads, q, k, v, out, Some(lse));
            });
        *lock(&self.saved) = Saved { q, k, lse };
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let saved = std::mem::take(&mut *lock(&self.saved));
        let (wide, narrow) = (self.heads.query_width(), self.heads.key_value_width());
        let mut dq = vec![0.0; q.elem_count()];
        let mut dk = vec![0.0; k.elem_count()];
        let mut dv = vec![0.0; v.elem_count()];
        let dq_parts = split(&mut dq, &self.segments, wide);
        let dk_parts = split(&mut dk, &self.segments, narrow);
        let dv_parts = split(&mut dv, &self.segments, narrow);
        with_values(v, |v| {
            with_values(out, |out| {
                with_values(&grad, |grad| {
                    self.segments
                        .par_iter()
                        .zip(dq_parts)
                        .zip(dk_parts)
                        .zip(dv_parts)
                        .for_each(|(((segment, dq), dk), dv)| {
                            let rows = |values, width| part(values, segment, width);
                            let forward = Forward {
                                q: rows(&saved.q, wide),
                                k: rows(&saved.k, narrow),
                                v: rows(v, narrow),
                                out: rows(out, wide),
                                lse: rows(&saved.lse, self.heads.query),
                            };
                            backward(self.heads, &forward, rows(grad, wide), dq, dk, dv);
                            turn_rows(&self.rope, dq, wide, 0, Turn::Backward);
                            turn_rows(&self.rope, dk, narrow, 0, Turn::Backward);
                        })
                })
            })
        })???;
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), q.device())?),
            Some(Tensor::from_vec(dk, k.shape(), k.device())?),
            Some(Tensor::from_vec(dv, v.shape(), v.device())?),
        ))
    }
}

/// Turns rows of `width` channels that stand at positions `first`, `first + 1`, ...
pub fn turn_rows(rope: &RopeTable, rows: &mut [f32], width: usize, first: usize, turn: Turn) {
    for (row, heads) in rows.chunks_exact_mut(width).enumerate() {
        rope.turn(heads, first + row, turn);
    }
}

/// Attention of one sequence's last queries over all of its keys, the rotary embedding done.
///
/// `q` and `out` hold the last rows (t x H C) of a sequence of s tokens, `k` and `v` all of them
/// (s x G C); `lse`, where asked for, receives (H x t).
pub fn attend(
    heads: Heads,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    mut lse: Option<&mut [f32]>,
) {
    let (wide, narrow) = (heads.query_width(), heads.key_value_width());
    let (rows, keys) = (q.len() / wide, k.len() / narrow);
    let mut scores = vec![0.0; BLOCK.min(rows) * keys];
    for head in 0..heads.query {
        let (column, kv_column) = heads.columns(head);
        for start in (0..rows).step_by(BLOCK) {
            let block = BLOCK.min(rows - start);
            let visible = keys - rows + start + block;
            let scores = &mut scores[..block * visible];
            let q = Mat::strided(&q[start * wide + column..], block, heads.channels, wide);
            let k = Mat::strided(&k[kv_column..], visible, heads.channels, narrow);
            let v = Mat::strided(&v[kv_column..], visible, heads.channels, narrow);
            matmul(
                MatMut::strided(scores, visible),
                q,
                k.t(),
                false,
                Threads::One,
            );
            for (row, scores) in scores.chunks_exact_mut(visible).enumerate() {
                let (seen, masked) = scores.split_at_mut(visible - block + row + 1);
                let row_lse = softmax(seen, heads.scale());
                masked.fill(0.0);
                if let Some(lse) = &mut lse {
                    lse[head * rows + start + row] = row_lse;
                }
            }
            let out = MatMut::strided(&mut out[start * wide + column..], wide);
            matmul(
                out,
                Mat::new(scores, block, visible),
                v,
                false,
                Threads::One,
            );
        }
    }
}

/// Softmax of `scale * scores`, in place; returns the log-sum-exp.
fn softmax(scores: &mut [f32], scale: f32) -> f32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max) * scale;
    for score in scores.iter_mut() {
        *score = exp(*score * scale - max);
    }
    let total = sum(scores);
    let inverse = 1.0 / total;
    scores.iter_mut().for_each(|p| *p *= inverse);
    max + total.ln()
}

/// One segment's forward pass, as its backward pass reads it.
struct Forward<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
}

/// With P the probabilities and dP = dO V^T:
/// dV = P^T dO, dS = scale P (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
fn backward(
    heads: Heads,
    forward: &Forward,
    grad: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (wide, narrow) = (heads.query_width(), heads.key_value_width());
    let (channels, scale) = (heads.channels, heads.scale());
    let rows = forward.q.len() / wide;
    let mut p = vec![0.0; BLOCK.min(rows) * rows];
    let mut ds = p.clone();
    for head in 0..heads.query {
        let (column, kv_column) = heads.columns(head);
        for start in (0..rows).step_by(BLOCK) {
            let block = BLOCK.min(rows - start);
            let visible = start + block;
            let at = start * wide + column;
            let (p, ds) = (&mut p[..block * visible], &mut ds[..block * visible]);
            let q = Mat::strided(&forward.q[at..], block, channels, wide);
            let k = Mat::strided(&forward.k[kv_column..], visible, channels, narrow);
            let v = Mat::strided(&forward.v[kv_column..], visible, channels, narrow);
            let dout = Mat::strided(&grad[at..], block, channels, wide);
            matmul(MatMut::strided(p, visible), q, k.t(), false, Threads::One);
            matmul(
                MatMut::strided(ds, visible),
                dout,
                v.t(),
                false,
                Threads::One,
            );
            let lines = p
                .chunks_exact_mut(visible)
                .zip(ds.chunks_exact_mut(visible));
            for (row, (p, ds)) in lines.enumerate() {
                let lse = forward.lse[head * rows + start + row];
                let here = at + row * wide..at + row * wide + channels;
                let along = dot(&grad[here.clone()], &forward.out[here]);
                let seen = start + row + 1;
                for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                    *p = exp(*p * scale - lse);
                    *ds = *p * (*ds - along) * scale;
                }
                p[seen..].fill(0.0);
                ds[seen..].fill(0.0);
            }
            let (p, ds) = (Mat::new(p, block, visible), Mat::new(ds, block, visible));
            let dv = MatMut::strided(&mut dv[kv_column..], narrow);
            let dk = MatMut::strided(&mut dk[kv_column..], narrow);
            let dq = MatMut::strided(&mut dq[at..], wide);
            matmul(dv, p.t(), dout, true, Threads::One);
            matmul(dk, ds.t(), q, true, Threads::One);
            matmul(dq, ds, k, false, Threads::One);
        }
    }
}

/// The rows of one segment.
fn part<'a>(values: &'a [f32], segment: &Range<usize>, width: usize) -> &'a [f32] {
    &values[segment.start * width..segment.end * width]
}

/// `values` cut into the rows of each segment.
fn split<'a>(
    mut values: &'a mut [f32],
    segments: &[Range<usize>],
    width: usize,
) -> Vec<&'a mut [f32]> {
    segments
        .iter()
        .map(|segment| {
            let (rows, rest) = std::mem::take(&mut values).split_at_mut(segment.len() * width);
            values = rest;
            rows
        })
        .collect()
}
