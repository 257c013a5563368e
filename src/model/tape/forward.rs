//! The forward pass of each operation.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use rayon::prelude::*;

use super::{Activations, KeyValueSource, Op, Tape, TapeSettings, linear_layer, lora_layer};
use crate::model::graph::NO_ROPE;
use crate::model::kv_cache::{KvCache, LayerCache};
use crate::ops::arena::Buffer;
use crate::ops::attention::{Attention, CachedAttention};
use crate::ops::rope::Rotation;
use crate::ops::{
    CpuValues, embedding, gelu, layer_norm, rms_norm, segment_rows, split_segments, swiglu,
};

impl<'a> Tape<'a, '_> {
    /// Computes the value of a node from the values of its inputs.
    pub(super) fn compute(&mut self, id: usize) -> Result<()> {
        let TapeSettings {
            arena, precision, ..
        } = self.settings;
        let op = Rc::clone(&self.nodes[id].op);
        let width = self.nodes[id].width;
        let mut saved = None;
        let value = match &*op {
            Op::Embed { table, ids } => {
                let mut y_TD = arena.take(ids.len() * width)?;
                embedding::forward(&CpuValues::new(table)?, ids, width, &mut y_TD);
                y_TD
            }
            Op::SelectRows { x, positions } => {
                let mut y_ND = arena.take(positions.len() * width)?;
                embedding::forward(&self.node_value(*x)?, positions, width, &mut y_ND);
                y_ND
            }
            Op::RmsNorm { x, weight, epsilon } => {
                // Each group of `weight.elem_count()` values is normalised: a row (D) or a head (C). `scale` has one
                // value per group.
                let x = self.node_value(*x)?;
                let mut y = arena.take(x.len())?;
                let mut scale = arena.take(x.len() / weight.elem_count())?;
                rms_norm::forward(&x, &CpuValues::new(weight)?, *epsilon, &mut y, &mut scale);
                saved = Some(scale);
                y
            }
            Op::LayerNorm {
                x,
                weight,
                bias,
                epsilon,
            } => {
                let x_TD = self.node_value(*x)?;
                let mut y_TD = arena.take(x_TD.len())?;
                let rows = x_TD.len() / width;
                let mut statistics_T2 = arena.take(layer_norm::STATISTICS * rows)?;
                layer_norm::forward(
                    &x_TD,
                    &CpuValues::new(weight)?,
                    &CpuValues::new(bias)?,
                    *epsilon,
                    &mut y_TD,
                    &mut statistics_T2,
                );
                saved = Some(statistics_T2);
                y_TD
            }
            Op::Linear { x, layer, residual } => {
                let x_TI = self.node_value(*x)?;
                let linear = linear_layer(&layer.weight, precision)?;
                let mut y_TO = arena.take(x_TI.len() / linear.inputs * linear.outputs)?;
                if let Some(residual) = residual {
                    y_TO.copy_from_slice(&self.node_value(*residual)?);
                }
                let weight_OI = CpuValues::new(&layer.weight)?;
                let bias_O = layer.bias.as_ref().map(CpuValues::new).transpose()?;
                linear.forward(
                    &x_TI,
                    &weight_OI,
                    bias_O.as_deref(),
                    &mut y_TO,
                    residual.is_some(),
                );
                if let Some(adapter) = &layer.adapter {
                    let lora = lora_layer(adapter, precision)?;
                    let mut xa_TR = arena.take(x_TI.len() / lora.inputs * lora.rank)?;
                    let a_RI = CpuValues::new(&adapter.a)?;
                    let b_OR = CpuValues::new(&adapter.b)?;
                    lora.forward(&x_TI, &a_RI, &b_OR, &mut xa_TR, &mut y_TO);
                    saved = Some(xa_TR);
                }
                y_TO
            }
            Op::Gelu { x } => {
                let x_TF = self.node_value(*x)?;
                let mut y_TF = arena.take(x_TF.len())?;
                gelu::forward(&x_TF, &mut y_TF);
                y_TF
            }
            Op::SwiGlu { gate, up } => {
                let gate_TF = self.node_value(*gate)?;
                let up_TF = self.node_value(*up)?;
                let mut y_TF = arena.take(gate_TF.len())?;
                swiglu::forward(&gate_TF, &up_TF, &mut y_TF);
                y_TF
            }
            Op::AddPositions { x, table, in_place } => {
                let mut y_TD = self.take_input(*x, *in_place)?;
                let table = CpuValues::new(table)?;
                embedding::add(&table, &self.positions(), width, &mut y_TD);
                y_TD
            }
            Op::Rope { x, in_place } => {
                let mut y_TW = self.take_input(*x, *in_place)?;
                self.rotate(&mut y_TW, width, Rotation::Forward)?;
                y_TW
            }
            Op::Attention { layer, qkv, window } => {
                let [q, k, v] = *qkv;
                let q_THC = self.node_value(q)?;
                let k_TGC = self.node_value(k)?;
                let v_TGC = self.node_value(v)?;
                let mut out_THC = arena.take(q_THC.len())?;
                let attention = self.attention_layer(*window);
                if let KeyValueSource::Caches(caches) = &mut self.key_value_source {
                    let qkv = [&**q_THC, &**k_TGC, &**v_TGC];
                    attend_caches(attention, *layer, qkv, caches, &mut out_THC);
                } else {
                    let mut lse_TH = arena.take(q_THC.len() / self.settings.heads.head_dim)?;
                    attention.forward(&q_THC, &k_TGC, &v_TGC, &mut out_THC, &mut lse_TH);
                    saved = Some(lse_TH);
                }
                out_THC
            }
        };
        let node = &mut self.nodes[id];
        node.value = Some(Arc::new(value));
        if self.activations != Activations::Discard {
            node.saved = saved.map(Arc::new);
        }
        Ok(())
    }

    /// Returns the values of node `x` as a writable buffer: the values themselves with `in_place`, else a
    /// copy.
    fn take_input(&mut self, x: usize, in_place: bool) -> Result<Buffer> {
        let values = self.node_value(x)?;
        if in_place {
            self.nodes[x].value = None;
        }
        self.make_writable(values)
    }

    /// Returns the attention operation over the segments.
    pub(super) fn attention_layer(&self, window: Option<usize>) -> Attention<'a> {
        Attention {
            heads: self.settings.heads,
            segments: self.segments,
            window,
            precision: self.settings.precision,
        }
    }

    /// Applies the rotary embedding to `x_TW`, rows of `width` channels, in place.
    pub(super) fn rotate(&self, x_TW: &mut [f32], width: usize, rotation: Rotation) -> Result<()> {
        let rope = self.settings.rope.context(NO_ROPE)?;
        match &self.key_value_source {
            KeyValueSource::Batch => rope.rotate_segments(x_TW, width, self.segments, rotation),
            KeyValueSource::Caches(caches) => {
                for (segment, cache) in self.segments.iter().zip(caches.iter()) {
                    let x_tW = &mut x_TW[segment.start * width..segment.end * width];
                    rope.rotate_rows(x_tW, width, cache.len(), rotation);
                }
            }
        }
        Ok(())
    }
}

/// Appends the keys and values of each segment to its cache, and computes the attention of the segment's
/// rows over that cache.
fn attend_caches(
    attention: Attention,
    layer: usize,
    [q_THC, k_TGC, v_TGC]: [&[f32]; 3],
    caches: &mut [&mut KvCache],
    out_THC: &mut [f32],
) {
    let Attention {
        heads,
        segments,
        window,
        precision,
    } = attention;
    let q_width = heads.query_width();
    let kv_width = heads.key_value_width();
    let segment_outputs = split_segments(out_THC, segments, q_width);
    segments
        .par_iter()
        .zip(caches.par_iter_mut())
        .zip(segment_outputs)
        .for_each(|((segment, cache), out_tHC)| {
            let LayerCache { k_SGC, v_SGC } = &mut cache.layers[layer];
            k_SGC.extend_from_slice(segment_rows(k_TGC, segment, kv_width));
            v_SGC.extend_from_slice(segment_rows(v_TGC, segment, kv_width));
            let attention = CachedAttention {
                heads,
                window,
                precision,
                k_SGC,
                v_SGC,
            };
            attention.attend(segment_rows(q_THC, segment, q_width), out_tHC, None);
        });
}
