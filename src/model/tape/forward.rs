//! The forward pass of each operation.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use super::{Activations, KeyValueSource, Op, Tape, TapeSettings, linear_layer, lora_layer};
use crate::model::graph::{AttentionKind, AttentionLayer, NO_ROPE};
use crate::model::kv_cache::{KvCache, LayerCache};
use crate::ops::arena::Buffer;
use crate::ops::attention::{Attention, CachedAttention, Mask, RelativeBias};
use crate::ops::rope::Rotation;
use crate::ops::{
    CpuValues, activation, embedding, layer_norm, rms_norm, scale, segment_rows, split_segments,
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
            Op::SelectRows { x, positions, .. } => {
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
            Op::Activate { activation, x } => {
                let x_TF = self.node_value(*x)?;
                let mut y_TF = arena.take(x_TF.len())?;
                activation::forward(*activation, &x_TF, &mut y_TF);
                y_TF
            }
            Op::ActivateGated {
                activation,
                gate,
                up,
            } => {
                let gate_TF = self.node_value(*gate)?;
                let up_TF = self.node_value(*up)?;
                let mut y_TF = arena.take(gate_TF.len())?;
                activation::gated_forward(*activation, &gate_TF, &up_TF, &mut y_TF);
                y_TF
            }
            Op::Scale {
                x,
                factor,
                in_place,
            } => {
                let mut y_TW = self.take_input(*x, *in_place)?;
                scale(&mut y_TW, *factor);
                y_TW
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
            Op::Attention { layer, q, kv } => {
                let q_THC = self.node_value(*q)?;
                let kv_values = kv.map(|[k, v]| {
                    Ok::<_, anyhow::Error>([self.node_value(k)?, self.node_value(v)?])
                });
                let kv_values = kv_values.transpose()?;
                let kv = kv_values
                    .as_ref()
                    .map(|kv| kv.each_ref().map(|values| &***values));
                let mut out_THC = arena.take(q_THC.len())?;
                let bias = self.bias_values(layer)?;
                let attention = self.attention_op(layer.kind, bias.as_ref());
                match (&mut self.key_value_source, kv) {
                    (KeyValueSource::Caches(caches), kv) => {
                        attend_caches(attention, layer.index, &q_THC, kv, caches, &mut out_THC);
                    }
                    (KeyValueSource::Batch, Some([k_TGC, v_TGC])) => {
                        let mut lse_TH = arena.take(q_THC.len() / self.settings.heads.head_dim)?;
                        attention.forward(&q_THC, k_TGC, v_TGC, &mut out_THC, &mut lse_TH);
                        saved = Some(lse_TH);
                    }
                    (KeyValueSource::Batch, None) => {
                        bail!("internal error: cross-attention without a source")
                    }
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

    /// Returns the attention operation of a layer of this kind, with its bias.
    pub(super) fn attention_op<'b>(
        &self,
        kind: AttentionKind,
        bias: Option<&'b RelativeBias>,
    ) -> Attention<'b>
    where
        'a: 'b,
    {
        let [query_segments, key_segments] = self.segments.of_attention(kind);
        Attention {
            heads: self.settings.heads,
            query_segments,
            key_segments,
            mask: mask(kind),
            bias,
            precision: self.settings.precision,
        }
    }

    /// Computes the bias of a layer for the longest sequence of the batch; None if it has none.
    pub(super) fn bias_values(&self, layer: &AttentionLayer) -> Result<Option<RelativeBias>> {
        let Some(bias) = &layer.bias else {
            return Ok(None);
        };
        let [query_segments, _] = self.segments.of_attention(layer.kind);
        let positions = match &self.key_value_source {
            KeyValueSource::Caches(caches) => {
                let segments = query_segments.iter().zip(caches.iter());
                segments
                    .map(|(segment, cache)| cache.len() + segment.len())
                    .max()
            }
            KeyValueSource::Batch => query_segments.iter().map(Range::len).max(),
        };
        let values = bias.values(mask(layer.kind), positions.unwrap_or_default())?;
        Ok(Some(values))
    }

    /// Applies the rotary embedding to `x_TW`, rows of `width` channels, in place.
    pub(super) fn rotate(&self, x_TW: &mut [f32], width: usize, rotation: Rotation) -> Result<()> {
        let rope = self.settings.rope.context(NO_ROPE)?;
        match &self.key_value_source {
            KeyValueSource::Batch => {
                rope.rotate_segments(x_TW, width, self.segments.decoder, rotation)
            }
            KeyValueSource::Caches(caches) => {
                for (segment, cache) in self.segments.decoder.iter().zip(caches.iter()) {
                    let x_tW = &mut x_TW[segment.start * width..segment.end * width];
                    rope.rotate_rows(x_tW, width, cache.len(), rotation);
                }
            }
        }
        Ok(())
    }
}

/// Returns the mask of an attention layer of this kind.
fn mask(kind: AttentionKind) -> Mask {
    match kind {
        AttentionKind::Causal { window } => Mask::Causal { window },
        AttentionKind::Encoder | AttentionKind::Cross => Mask::Full,
    }
}

/// Computes the attention of each segment's rows over its cache. With k and v, appends them to the cache first; without,
/// the keys and values are those of the source.
fn attend_caches(
    attention: Attention,
    layer: usize,
    q_THC: &[f32],
    kv_TGC: Option<[&[f32]; 2]>,
    caches: &mut [&mut KvCache],
    out_THC: &mut [f32],
) {
    let Attention {
        heads,
        query_segments: segments,
        mask,
        bias,
        precision,
        ..
    } = attention;
    let q_width = heads.query_width();
    let kv_width = heads.key_value_width();
    let segment_outputs = split_segments(out_THC, segments, q_width);
    segments
        .par_iter()
        .zip(caches.par_iter_mut())
        .zip(segment_outputs)
        .for_each(|((segment, cache), out_tHC)| {
            let LayerCache { k_SGC, v_SGC } = match kv_TGC {
                Some([k_TGC, v_TGC]) => {
                    let cached = &mut cache.layers[layer];
                    cached
                        .k_SGC
                        .extend_from_slice(segment_rows(k_TGC, segment, kv_width));
                    cached
                        .v_SGC
                        .extend_from_slice(segment_rows(v_TGC, segment, kv_width));
                    cached
                }
                None => &mut cache.source_layers[layer],
            };
            let attention = CachedAttention {
                heads,
                mask,
                bias,
                precision,
                k_SGC,
                v_SGC,
            };
            attention.attend(segment_rows(q_THC, segment, q_width), out_tHC, None);
        });
}
