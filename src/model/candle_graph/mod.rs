//! The graph in candle's own operations, with candle's autograd. It runs on every device, and is the
//! reference for the tests of the fused operations. Weights are stored in f32 and cast to the graph's
//! data type where they are used. Activations have the graph's data type; norms compute in f32.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | the operations of [`Graph`] in candle |
//! | `head.rs` | the LM head and the loss, chunked over positions |
//!
//! Invariant: only operations with a backward pass are used. candle's fused `rms_norm`,
//! `softmax_last_dim`, `rope` and `sdpa` have no backward pass: the weights before them would silently
//! receive no gradient.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

pub(crate) mod head;

use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::{sigmoid, softmax};

use crate::model::graph::{AttentionKind, AttentionLayer, Graph, NO_ROPE, Segments};
use crate::model::position_bias::PositionBias;
use crate::model::projection::{LoraAdapter, Projection};
use crate::ops::activation::Activation;
use crate::ops::attention::Heads;
use crate::ops::rope::RopeTable;

/// A graph over candle tensors.
pub struct CandleGraph<'a> {
    heads: Heads,
    segments: Segments<'a>,
    dtype: DType,
    /// The position of each row of the decoder in its sequence.
    positions_T: Tensor,
    /// cos and sin of each row's angles, in models with a rotary embedding.
    cos_sin_T1c: Option<[Tensor; 2]>,
}

impl<'a> CandleGraph<'a> {
    /// Creates a graph for `segments` on `device`.
    ///
    /// # Errors
    /// Where a tensor cannot be created on `device`.
    pub fn new(
        heads: Heads,
        rope: Option<&RopeTable>,
        segments: Segments<'a>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let positions = || segments.decoder.iter().flat_map(|segment| 0..segment.len());
        let cos_sin = |rope: &RopeTable| -> Result<[Tensor; 2]> {
            let (cos, sin): (Vec<&[f32]>, Vec<&[f32]>) =
                positions().map(|position| rope.cos_sin(position)).unzip();
            let tensor = |rows: Vec<&[f32]>| -> Result<Tensor> {
                let shape = (rows.len(), 1, heads.head_dim / 2);
                Ok(Tensor::from_vec(rows.concat(), shape, device)?.to_dtype(dtype)?)
            };
            Ok([tensor(cos)?, tensor(sin)?])
        };
        Ok(Self {
            heads,
            segments,
            dtype,
            positions_T: Tensor::from_iter(positions().map(|position| position as u32), device)?,
            cos_sin_T1c: rope.map(cos_sin).transpose()?,
        })
    }

    /// Returns the mask of causal attention (1 x t x t): 0 where row i sees key j, minus infinity elsewhere. It has the
    /// device and data type of `scores_Htt`.
    fn causal_mask(rows: usize, window: Option<usize>, scores_Htt: &Tensor) -> Result<Tensor> {
        let is_visible = |i: usize, j: usize| j <= i && window.is_none_or(|w| i - j < w);
        let values: Vec<f32> = (0..rows * rows)
            .map(|index| {
                if is_visible(index / rows, index % rows) {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
            .collect();
        let mask_1tt = Tensor::from_vec(values, (1, rows, rows), scores_Htt.device())?;
        Ok(mask_1tt.to_dtype(scores_Htt.dtype())?)
    }

    /// Returns the bias of t queries over as many keys (H x t x t).
    fn bias_Htt(&self, bias: &PositionBias, rows: usize) -> Result<Tensor> {
        let buckets = (0..rows * rows).map(|index| {
            let relative = (index % rows) as isize - (index / rows) as isize;
            bias.buckets.bucket(relative) as u32
        });
        let buckets = Tensor::from_iter(buckets, bias.table_EH.device())?;
        let bias_ttH = bias.table_EH.index_select(&buckets, 0)?;
        let bias_ttH = bias_ttH.to_dtype(self.dtype)?.reshape((rows, rows, ()))?;
        Ok(bias_ttH.permute((2, 0, 1))?.contiguous()?)
    }
}

impl Graph for CandleGraph<'_> {
    type Value = Tensor;

    fn embed(&mut self, table: &Tensor, ids: &[u32]) -> Result<Tensor> {
        let rows_TD = table.index_select(&Tensor::new(ids, table.device())?, 0)?;
        Ok(rows_TD.to_dtype(self.dtype)?)
    }

    fn select_rows(&mut self, x: Tensor, positions: &[u32]) -> Result<Tensor> {
        Ok(x.index_select(&Tensor::new(positions, x.device())?, 0)?)
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
        let shape = x.shape();
        let x = x.reshape(((), weight.elem_count()))?.to_dtype(DType::F32)?;
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = x.broadcast_div(&(mean + epsilon)?.sqrt()?)?;
        let y = normed.broadcast_mul(weight)?;
        Ok(y.to_dtype(self.dtype)?.reshape(shape)?)
    }

    fn layer_norm(
        &mut self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
    ) -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
        let y = normed.broadcast_mul(weight)?.broadcast_add(bias)?;
        Ok(y.to_dtype(self.dtype)?)
    }

    fn linear(&mut self, x: &Tensor, layer: &Projection) -> Result<Tensor> {
        let project = |x: &Tensor, weight: &Tensor| -> Result<Tensor> {
            Ok(x.matmul(&weight.to_dtype(self.dtype)?.t()?)?)
        };
        let mut y = project(x, &layer.weight)?;
        if let Some(bias) = &layer.bias {
            y = y.broadcast_add(&bias.to_dtype(self.dtype)?)?;
        }
        if let Some(LoraAdapter { a, b, scale }) = &layer.adapter {
            let xa = (project(x, a)? * *scale)?;
            y = (y + project(&xa, b)?)?;
        }
        Ok(y)
    }

    fn add_linear(&mut self, residual: Tensor, x: &Tensor, layer: &Projection) -> Result<Tensor> {
        Ok((residual + self.linear(x, layer)?)?)
    }

    fn activate(&mut self, activation: Activation, x: Tensor) -> Result<Tensor> {
        Ok(match activation {
            Activation::Relu => x.relu()?,
            Activation::Silu => (&x * sigmoid(&x)?)?,
            Activation::Gelu => x.gelu()?,
        })
    }

    fn activate_gated(
        &mut self,
        activation: Activation,
        gate: Tensor,
        up: Tensor,
    ) -> Result<Tensor> {
        Ok((self.activate(activation, gate)? * up)?)
    }

    fn scale(&mut self, x: Tensor, factor: f32) -> Result<Tensor> {
        Ok((x * f64::from(factor))?)
    }

    fn add_positions(&mut self, x: Tensor, table: &Tensor) -> Result<Tensor> {
        let rows_TD = table.index_select(&self.positions_T, 0)?;
        Ok((x + rows_TD.to_dtype(self.dtype)?)?)
    }

    fn rope(&mut self, x: Tensor) -> Result<Tensor> {
        let [cos_T1c, sin_T1c] = self.cos_sin_T1c.as_ref().context(NO_ROPE)?;
        let (rows, width) = x.dims2()?;
        let half = self.heads.head_dim / 2;
        let x_THC = x.reshape((rows, width / self.heads.head_dim, 2 * half))?;
        let a_THc = x_THC.narrow(2, 0, half)?;
        let b_THc = x_THC.narrow(2, half, half)?;
        let rotated_a_THc = (a_THc.broadcast_mul(cos_T1c)? - b_THc.broadcast_mul(sin_T1c)?)?;
        let rotated_b_THc = (b_THc.broadcast_mul(cos_T1c)? + a_THc.broadcast_mul(sin_T1c)?)?;
        let rotated_THC = Tensor::cat(&[rotated_a_THc, rotated_b_THc], 2)?;
        Ok(rotated_THC.reshape((rows, width))?)
    }

    fn attention(
        &mut self,
        layer: &AttentionLayer,
        q_THC: Tensor,
        kv: Option<[Tensor; 2]>,
    ) -> Result<Tensor> {
        let Heads {
            query,
            key_value,
            head_dim,
            scale,
        } = self.heads;
        let [k_TGC, v_TGC] = kv.context("internal error: this graph has no cache")?;
        let [query_segments, key_segments] = self.segments.of_attention(layer.kind);
        let mut outputs = Vec::with_capacity(query_segments.len());
        for (queries, keys) in query_segments.iter().zip(key_segments) {
            // (count x t x C), where `count` is the number of heads in `x`.
            let heads_first =
                |x: &Tensor, segment: &Range<usize>, count: usize| -> Result<Tensor> {
                    let x = x.narrow(0, segment.start, segment.len())?;
                    Ok(x.reshape((segment.len(), count, head_dim))?
                        .transpose(0, 1)?
                        .contiguous()?)
                };
            // (H x s x C): each key/value head is repeated for the query heads that share it.
            let repeat_heads = |x: &Tensor| -> Result<Tensor> {
                let x = heads_first(x, keys, key_value)?.unsqueeze(1)?;
                let x = x.broadcast_as((key_value, self.heads.group(), keys.len(), head_dim))?;
                Ok(x.contiguous()?.reshape((query, keys.len(), head_dim))?)
            };
            let q_HtC = heads_first(&q_THC, queries, query)?;
            let k_HsC = repeat_heads(&k_TGC)?;
            let v_HsC = repeat_heads(&v_TGC)?;
            let mut scores_Hts = (q_HtC.matmul(&k_HsC.t()?)? * f64::from(scale))?;
            if let Some(bias) = &layer.bias {
                scores_Hts = (scores_Hts + self.bias_Htt(bias, queries.len())?)?;
            }
            if let AttentionKind::Causal { window } = layer.kind {
                let mask_1tt = Self::causal_mask(queries.len(), window, &scores_Hts)?;
                scores_Hts = scores_Hts.broadcast_add(&mask_1tt)?;
            }
            let out_HtC = softmax(&scores_Hts, D::Minus1)?.matmul(&v_HsC)?;
            let out_tHC = out_HtC.transpose(0, 1)?;
            outputs.push(out_tHC.reshape((queries.len(), query * head_dim))?);
        }
        Tensor::cat(&outputs, 0).context("attention needs at least one segment")
    }
}
