//! The backward pass of attention.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `ops`"
)]

use std::ops::Range;

use rayon::prelude::*;

use super::{Attention, BLOCK, add_bias};
use crate::ops::math::{dot, exp};
use crate::ops::matmul::matmul;
use crate::ops::matmul::matrix::{Mat, MatMut, Threads};
use crate::ops::{GradientMut, ROWS_PER_TASK, simd, split_segments};

/// Inputs and results of a forward pass that the backward pass needs.
#[derive(Clone, Copy)]
pub(crate) struct AttentionForward<'a> {
    pub q_THC: &'a [f32],
    pub k_TGC: &'a [f32],
    pub v_TGC: &'a [f32],
    pub out_THC: &'a [f32],
    /// Log-sum-exp of the scores of each row and head.
    pub lse_TH: &'a [f32],
}

/// The gradients of one query head over one pair of segments, before they are summed.
struct HeadGradients<'a> {
    /// Segment of the queries.
    queries: &'a Range<usize>,
    /// Segment of the keys.
    keys: &'a Range<usize>,
    head: usize,
    /// dQ, dK and dV of the head (S x C each), in this order.
    scratch: &'a mut [f32],
}

/// The gradients of one query head, in their order in the scratch space of [`Attention::backward`].
#[derive(Clone, Copy)]
enum ScratchPart {
    Query,
    Key,
    Value,
}

impl Attention<'_> {
    /// Computes the gradients of q, k and v. With P the probabilities and dP = dO V^T:
    /// dV = P^T dO, dS = P (dP - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q. Returns the gradient of the bias of
    /// each head and relative position: the sum of dS over all pairs of a query and a key at this relative position.
    /// It is empty without a bias.
    ///
    /// `scratch` has [`Attention::scratch_len`] values.
    pub(crate) fn backward(
        &self,
        forward: AttentionForward,
        dout_THC: &[f32],
        scratch: &mut [f32],
        [dq_THC, dk_TGC, dv_TGC]: [GradientMut; 3],
    ) -> Vec<f32> {
        let heads = self.heads.query;
        // One task per segment and query head. Each writes its own dQ, dK and dV, because the query heads of a group
        // would otherwise write to the same key/value head.
        let mut unassigned = &mut *scratch;
        let mut tasks = Vec::with_capacity(self.query_segments.len() * heads);
        for (queries, keys) in self.query_segments.iter().zip(self.key_segments) {
            for head in 0..heads {
                let len = self.head_scratch_len(queries, keys);
                let (part, rest) = std::mem::take(&mut unassigned).split_at_mut(len);
                unassigned = rest;
                tasks.push(HeadGradients {
                    queries,
                    keys,
                    head,
                    scratch: part,
                });
            }
        }
        let dbias_of_tasks: Vec<Vec<f32>> = tasks
            .into_par_iter()
            .with_max_len(1)
            .map(|task| self.backward_head(&forward, dout_THC, task))
            .collect();
        let group = self.heads.group();
        self.gather(scratch, ScratchPart::Query, 1, dq_THC);
        self.gather(scratch, ScratchPart::Key, group, dk_TGC);
        self.gather(scratch, ScratchPart::Value, group, dv_TGC);
        let width = self.bias.map_or(0, |bias| bias.width());
        let mut dbias_HJ = vec![0.0; heads * width];
        for (index, dbias_J) in dbias_of_tasks.iter().enumerate() {
            let sums_J = &mut dbias_HJ[index % heads * width..][..width];
            sums_J
                .iter_mut()
                .zip(dbias_J)
                .for_each(|(sum, d)| *sum += d);
        }
        dbias_HJ
    }

    /// Returns the number of scratch values that a backward pass needs: (T + 2 keys) H C.
    pub(crate) fn scratch_len(&self) -> usize {
        let segments = self.query_segments.iter().zip(self.key_segments);
        segments
            .map(|(queries, keys)| self.heads.query * self.head_scratch_len(queries, keys))
            .sum()
    }

    fn head_scratch_len(&self, queries: &Range<usize>, keys: &Range<usize>) -> usize {
        (queries.len() + 2 * keys.len()) * self.heads.head_dim
    }

    /// Computes dQ, dK and dV of one query head over one pair of segments, and writes them to the scratch space of
    /// `task`. Returns the gradient of the bias of this head (J).
    fn backward_head(
        &self,
        forward: &AttentionForward,
        dout_THC: &[f32],
        task: HeadGradients,
    ) -> Vec<f32> {
        let HeadGradients {
            queries,
            keys: segment_keys,
            head,
            scratch,
        } = task;
        let heads = self.heads;
        let q_width = heads.query_width();
        let kv_width = heads.key_value_width();
        let head_dim = heads.head_dim;
        let (column, kv_column) = heads.columns(head);
        let rows = queries.len();
        let all_keys = segment_keys.len();
        let mut dbias_J = vec![0.0; self.bias.map_or(0, |bias| bias.width())];
        scratch.fill(0.0);
        let (dq_SC, dkv_SC) = scratch.split_at_mut(rows * head_dim);
        let (dk_SC, dv_SC) = dkv_SC.split_at_mut(all_keys * head_dim);
        let first_position = self.mask.first_position(rows, all_keys);
        let keys_of_block = |start: usize| {
            let block = BLOCK.min(rows - start);
            let first = first_position + start;
            self.mask.keys_of_block(first..first + block, all_keys)
        };
        let starts = (0..rows).step_by(BLOCK);
        let max_keys = starts.clone().map(|start| keys_of_block(start).len()).max();
        let mut p_ts = vec![0.0; BLOCK.min(rows) * max_keys.unwrap_or(0)];
        let mut ds_ts = p_ts.clone();
        let product = |out: MatMut, a: Mat, b: Mat, add: bool| {
            matmul(out, a, b, add, Threads::One, self.precision);
        };
        for start in starts {
            let block = BLOCK.min(rows - start);
            let keys = keys_of_block(start);
            let count = keys.len();
            let q_start = (queries.start + start) * q_width + column;
            let kv_start = (segment_keys.start + keys.start) * kv_width + kv_column;
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
                let lse = forward.lse_TH[(queries.start + start + row) * heads.query + head];
                let row_channels = q_start + row * q_width..q_start + row * q_width + head_dim;
                let position = first_position + start + row;
                let visible = self.mask.keys_of_row(position, &keys);
                let bias = self.bias.map(|bias| {
                    let keys = keys.start + visible.start..keys.start + visible.end;
                    (bias, bias.range(position, keys))
                });
                let mut scale = heads.scale;
                if let Some((bias, range)) = &bias {
                    add_bias(
                        &mut p_s[visible.clone()],
                        scale,
                        bias.row(head, range.clone()),
                    );
                    scale = 1.0;
                }
                softmax_backward(
                    &mut p_s[visible.clone()],
                    &mut ds_s[visible.clone()],
                    &dout_THC[row_channels.clone()],
                    &forward.out_THC[row_channels],
                    scale,
                    lse,
                );
                if let Some((_, range)) = bias {
                    for (sum, ds) in dbias_J[range].iter_mut().zip(&mut ds_s[visible.clone()]) {
                        *sum += *ds;
                        *ds *= heads.scale;
                    }
                }
                for values in [p_s, ds_s] {
                    values[..visible.start].fill(0.0);
                    values[visible.end..].fill(0.0);
                }
            }
            let p_ts = Mat::new(p_ts, count);
            let ds_ts = Mat::new(ds_ts, count);
            let key_channels = keys.start * head_dim..keys.end * head_dim;
            let dv_sC = MatMut::new(&mut dv_SC[key_channels.clone()], head_dim);
            product(dv_sC, p_ts.t(), dout_tC, true);
            let dk_sC = MatMut::new(&mut dk_SC[key_channels], head_dim);
            product(dk_sC, ds_ts.t(), q_tC, true);
            let dq_tC = &mut dq_SC[start * head_dim..(start + block) * head_dim];
            product(MatMut::new(dq_tC, head_dim), ds_ts, k_sC, false);
        }
        dbias_J
    }

    /// Writes the gradient `part` of all query heads from `scratch` to the rows of `gradient`. Sums over groups of
    /// `group` query heads. `group` is 1 for dQ, and H / G for dK and dV, because H / G query heads share a key/value
    /// head.
    fn gather(&self, scratch: &[f32], part: ScratchPart, group: usize, gradient: GradientMut) {
        let heads = self.heads;
        let head_dim = heads.head_dim;
        let width = heads.query_width() / group;
        let segments = match part {
            ScratchPart::Query => self.query_segments,
            ScratchPart::Key | ScratchPart::Value => self.key_segments,
        };
        let mut start = 0;
        let pairs = self.query_segments.iter().zip(self.key_segments);
        for (rows, (queries, keys)) in split_segments(gradient.values, segments, width)
            .into_iter()
            .zip(pairs)
        {
            let head_len = self.head_scratch_len(queries, keys);
            let scratch = &scratch[start..start + heads.query * head_len];
            start += heads.query * head_len;
            let part_start = match part {
                ScratchPart::Query => 0,
                ScratchPart::Key => queries.len() * head_dim,
                ScratchPart::Value => (queries.len() + keys.len()) * head_dim,
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
                            let row = head * head_len + part_start + row * head_dim;
                            let part = &scratch[row..row + head_dim];
                            values
                                .iter_mut()
                                .zip(part)
                                .for_each(|(sum, value)| *sum += value);
                        }
                    }
                });
        }
    }
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
