//! The forward pass of each operation.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use rayon::prelude::*;

use super::{Keys, Memory, Op, Setting, Tape, linear_of, lora_of};
use crate::model::graph::NO_ROPE;
use crate::model::kv_cache::KvCache;
use crate::ops::arena::Buffer;
use crate::ops::attention::{Attention, Cached};
use crate::ops::rope::Turn;
use crate::ops::{Values, embedding, gelu, layer_norm, rms_norm, swiglu};

impl<'a> Tape<'a, '_> {
    /// Computes the value of a node from its inputs' values.
    pub(super) fn compute(&mut self, id: usize) -> Result<()> {
        let Setting {
            arena, precision, ..
        } = self.setting;
        let op = Rc::clone(&self.nodes[id].op);
        let width = self.nodes[id].width;
        let mut saved = None;
        let value = match &*op {
            Op::Embed { table, ids } => {
                let mut y = arena.take(ids.len() * width)?;
                embedding::forward(&Values::of(table)?, ids, width, &mut y);
                y
            }
            Op::Rows { x, positions } => {
                let mut y = arena.take(positions.len() * width)?;
                embedding::forward(&self.get(*x)?, positions, width, &mut y);
                y
            }
            Op::RmsNorm { x, weight, epsilon } => {
                let x = self.get(*x)?;
                let mut y = arena.take(x.len())?;
                let mut scale = arena.take(x.len() / weight.elem_count())?;
                rms_norm::forward(&x, &Values::of(weight)?, *epsilon, &mut y, &mut scale);
                saved = Some(scale);
                y
            }
            Op::LayerNorm {
                x,
                weight,
                bias,
                epsilon,
            } => {
                let x = self.get(*x)?;
                let mut y = arena.take(x.len())?;
                let mut statistics = arena.take(2 * x.len() / width)?;
                let (weight, bias) = (Values::of(weight)?, Values::of(bias)?);
                layer_norm::forward(&x, &weight, &bias, *epsilon, &mut y, &mut statistics);
                saved = Some(statistics);
                y
            }
            Op::Linear { x, layer, residual } => {
                let x = self.get(*x)?;
                let linear = linear_of(&layer.weight, precision)?;
                let mut y = arena.take(x.len() / linear.inputs * linear.outputs)?;
                if let Some(residual) = residual {
                    y.copy_from_slice(&self.get(*residual)?);
                }
                let weight = Values::of(&layer.weight)?;
                let bias = layer.bias.as_ref().map(Values::of).transpose()?;
                linear.forward(&x, &weight, bias.as_deref(), &mut y, residual.is_some());
                if let Some(adapter) = &layer.adapter {
                    let lora = lora_of(adapter, precision)?;
                    let mut low = arena.take(x.len() / lora.inputs * lora.rank)?;
                    let (a, b) = (Values::of(&adapter.a)?, Values::of(&adapter.b)?);
                    lora.forward(&x, &a, &b, &mut low, &mut y);
                    saved = Some(low);
                }
                y
            }
            Op::Gelu { x } => {
                let x = self.get(*x)?;
                let mut y = arena.take(x.len())?;
                gelu::forward(&x, &mut y);
                y
            }
            Op::SwiGlu { gate, up } => {
                let (gate, up) = (self.get(*gate)?, self.get(*up)?);
                let mut y = arena.take(gate.len())?;
                swiglu::forward(&gate, &up, &mut y);
                y
            }
            Op::Positions { x, table, in_place } => {
                let mut y = self.take_over(*x, *in_place)?;
                embedding::add(&Values::of(table)?, &self.positions(), width, &mut y);
                y
            }
            Op::Rope { x, in_place } => {
                let mut y = self.take_over(*x, *in_place)?;
                self.turn(&mut y, width, Turn::Forward)?;
                y
            }
            Op::Attention { layer, qkv, window } => {
                let [q, k, v] = [self.get(qkv[0])?, self.get(qkv[1])?, self.get(qkv[2])?];
                let mut out = arena.take(q.len())?;
                let attention = self.attention_layer(*window);
                if let Keys::Caches(caches) = &mut self.keys {
                    attend_caches(attention, *layer, [&q, &k, &v], caches, &mut out);
                } else {
                    let mut lse = arena.take(q.len() / self.setting.heads.channels)?;
                    attention.forward(&q, &k, &v, &mut out, &mut lse);
                    saved = Some(lse);
                }
                out
            }
        };
        let node = &mut self.nodes[id];
        node.value = Some(Arc::new(value));
        if self.memory != Memory::Forget {
            node.saved = saved.map(Arc::new);
        }
        Ok(())
    }

    /// The values of a node to write to; a copy, unless nobody needs them `in_place`.
    fn take_over(&mut self, x: usize, in_place: bool) -> Result<Buffer> {
        let values = self.get(x)?;
        if in_place {
            self.nodes[x].value = None;
        }
        self.own(values)
    }

    pub(super) fn attention_layer(&self, window: Option<usize>) -> Attention<'a> {
        Attention {
            heads: self.setting.heads,
            segments: self.segments,
            window,
            precision: self.setting.precision,
        }
    }

    pub(super) fn turn(&self, rows: &mut [f32], width: usize, turn: Turn) -> Result<()> {
        let rope = self.setting.rope.context(NO_ROPE)?;
        match &self.keys {
            Keys::Batch => rope.turn_segments(rows, width, self.segments, turn),
            Keys::Caches(caches) => {
                for (segment, cache) in self.segments.iter().zip(caches.iter()) {
                    let rows = &mut rows[segment.start * width..segment.end * width];
                    rope.turn_rows(rows, width, cache.len(), turn);
                }
            }
        }
        Ok(())
    }
}

/// Attention of each segment's rows over its cache, to which its keys and values are added.
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
    let (wide, narrow) = (heads.query_width(), heads.key_value_width());
    let mut outs = Vec::with_capacity(segments.len());
    let mut rest = out;
    for segment in segments {
        let (rows, after) = rest.split_at_mut(segment.len() * wide);
        outs.push(rows);
        rest = after;
    }
    segments
        .par_iter()
        .zip(caches.par_iter_mut())
        .zip(outs)
        .for_each(|((segment, cache), out)| {
            let (keys, values) = cache.layer(layer);
            keys.extend_from_slice(&k[segment.start * narrow..segment.end * narrow]);
            values.extend_from_slice(&v[segment.start * narrow..segment.end * narrow]);
            let cached = Cached {
                heads,
                window,
                precision,
                k: keys,
                v: values,
            };
            cached.attend(&q[segment.start * wide..segment.end * wide], out, None);
        });
}
