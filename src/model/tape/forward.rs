//! The forward pass of each operation.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use rayon::prelude::*;

use super::{Activations, KeyValueSource, Op, Tape, TapeSettings, linear_layer, lora_layer};
use crate::model::graph::NO_ROPE;
use crate::model::kv_cache::KvCache;
use crate::ops::arena::Buffer;
use crate::ops::attention::{Attention, CachedAttention};
use crate::ops::rope::Rotation;
use crate::ops::{CpuValues, embedding, gelu, layer_norm, rms_norm, split_segments, swiglu};

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
                let mut y = arena.take(ids.len() * width)?;
                embedding::forward(&CpuValues::new(table)?, ids, width, &mut y);
                y
            }
            Op::SelectRows { x, positions } => {
                let mut y = arena.take(positions.len() * width)?;
                embedding::forward(&self.node_value(*x)?, positions, width, &mut y);
                y
            }
            Op::RmsNorm { x, weight, epsilon } => {
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
                let x = self.node_value(*x)?;
                let mut y = arena.take(x.len())?;
                let mut statistics = arena.take(2 * x.len() / width)?;
                let (weight, bias) = (CpuValues::new(weight)?, CpuValues::new(bias)?);
                layer_norm::forward(&x, &weight, &bias, *epsilon, &mut y, &mut statistics);
                saved = Some(statistics);
                y
            }
            Op::Linear { x, layer, residual } => {
                let x = self.node_value(*x)?;
                let linear = linear_layer(&layer.weight, precision)?;
                let mut y = arena.take(x.len() / linear.inputs * linear.outputs)?;
                if let Some(residual) = residual {
                    y.copy_from_slice(&self.node_value(*residual)?);
                }
                let weight = CpuValues::new(&layer.weight)?;
                let bias = layer.bias.as_ref().map(CpuValues::new).transpose()?;
                linear.forward(&x, &weight, bias.as_deref(), &mut y, residual.is_some());
                if let Some(adapter) = &layer.adapter {
                    let lora = lora_layer(adapter, precision)?;
                    let mut xa = arena.take(x.len() / lora.inputs * lora.rank)?;
                    let (a, b) = (CpuValues::new(&adapter.a)?, CpuValues::new(&adapter.b)?);
                    lora.forward(&x, &a, &b, &mut xa, &mut y);
                    saved = Some(xa);
                }
                y
            }
            Op::Gelu { x } => {
                let x = self.node_value(*x)?;
                let mut y = arena.take(x.len())?;
                gelu::forward(&x, &mut y);
                y
            }
            Op::SwiGlu { gate, up } => {
                let (gate, up) = (self.node_value(*gate)?, self.node_value(*up)?);
                let mut y = arena.take(gate.len())?;
                swiglu::forward(&gate, &up, &mut y);
                y
            }
            Op::AddPositions { x, table, in_place } => {
                let mut y = self.take_input(*x, *in_place)?;
                embedding::add(&CpuValues::new(table)?, &self.positions(), width, &mut y);
                y
            }
            Op::Rope { x, in_place } => {
                let mut y = self.take_input(*x, *in_place)?;
                self.rotate(&mut y, width, Rotation::Forward)?;
                y
            }
            Op::Attention { layer, qkv, window } => {
                let [q, k, v] = [
                    self.node_value(qkv[0])?,
                    self.node_value(qkv[1])?,
                    self.node_value(qkv[2])?,
                ];
                let mut out = arena.take(q.len())?;
                let attention = self.attention_layer(*window);
                if let KeyValueSource::Caches(caches) = &mut self.key_value_source {
                    attend_caches(attention, *layer, [&q, &k, &v], caches, &mut out);
                } else {
                    let mut lse = arena.take(q.len() / self.settings.heads.head_dim)?;
                    attention.forward(&q, &k, &v, &mut out, &mut lse);
                    saved = Some(lse);
                }
                out
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

    /// Applies the rotary embedding to rows of `width` channels, in place.
    pub(super) fn rotate(&self, rows: &mut [f32], width: usize, rotation: Rotation) -> Result<()> {
        let rope = self.settings.rope.context(NO_ROPE)?;
        match &self.key_value_source {
            KeyValueSource::Batch => rope.rotate_segments(rows, width, self.segments, rotation),
            KeyValueSource::Caches(caches) => {
                for (segment, cache) in self.segments.iter().zip(caches.iter()) {
                    let rows = &mut rows[segment.start * width..segment.end * width];
                    rope.rotate_rows(rows, width, cache.len(), rotation);
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
    [q, k, v]: [&[f32]; 3],
    caches: &mut [&mut KvCache],
    out: &mut [f32],
) {
    let Attention {
        heads,
        segments,
        window,
        precision,
    } = attention;
    let q_width = heads.query_width();
    let kv_width = heads.key_value_width();
    let outs = split_segments(out, segments, q_width);
    segments
        .par_iter()
        .zip(caches.par_iter_mut())
        .zip(outs)
        .for_each(|((segment, cache), out)| {
            let (keys, values) = cache.layer(layer);
            keys.extend_from_slice(&k[segment.start * kv_width..segment.end * kv_width]);
            values.extend_from_slice(&v[segment.start * kv_width..segment.end * kv_width]);
            let attention = CachedAttention {
                heads,
                window,
                precision,
                k_SGC: keys,
                v_SGC: values,
            };
            attention.attend(
                &q[segment.start * q_width..segment.end * q_width],
                out,
                None,
            );
        });
}
