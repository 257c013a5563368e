//! The forward pass of each operation.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use rayon::prelude::*;

use super::{Keys, Memory, Op, Setting, Tape, linear_of};
use crate::model::KvCache;
use crate::ops::attention::{Attention, Cached};
use crate::ops::rope::Turn;
use crate::ops::{Values, embedding, rms_norm, swiglu};

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
            Op::Linear {
                x,
                weight,
                bias,
                residual,
            } => {
                let x = self.get(*x)?;
                let (linear, weight) = (linear_of(weight, precision)?, Values::of(weight)?);
                let mut y = arena.take(x.len() / linear.inputs * linear.outputs)?;
                if let Some(residual) = residual {
                    y.copy_from_slice(&self.get(*residual)?);
                }
                let bias = bias.as_ref().map(Values::of).transpose()?;
                linear.forward(&x, &weight, bias.as_deref(), &mut y, residual.is_some());
                y
            }
            Op::SwiGlu { gate, up } => {
                let (gate, up) = (self.get(*gate)?, self.get(*up)?);
                let mut y = arena.take(gate.len())?;
                swiglu::forward(&gate, &up, &mut y);
                y
            }
            Op::Rope { x, in_place } => {
                let given = self.get(*x)?;
                if *in_place {
                    self.nodes[*x].value = None;
                }
                let mut y = match Arc::try_unwrap(given) {
                    Ok(own) => own,
                    Err(shared) => {
                        let mut copy = arena.take(shared.len())?;
                        copy.copy_from_slice(&shared);
                        copy
                    }
                };
                self.turn(&mut y, width, Turn::Forward);
                y
            }
            Op::Attention { layer, q, k, v } => {
                let [q, k, v] = [self.get(*q)?, self.get(*k)?, self.get(*v)?];
                let mut out = arena.take(q.len())?;
                if let Keys::Caches(caches) = &mut self.keys {
                    let setting = &self.setting;
                    attend_caches(
                        setting,
                        *layer,
                        self.segments,
                        [&q, &k, &v],
                        caches,
                        &mut out,
                    );
                } else {
                    let mut lse = arena.take(q.len() / self.setting.heads.channels)?;
                    self.attention_layer()
                        .forward(&q, &k, &v, &mut out, &mut lse);
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

    pub(super) fn attention_layer(&self) -> Attention<'a> {
        Attention {
            heads: self.setting.heads,
            segments: self.segments,
            window: self.setting.window,
            precision: self.setting.precision,
        }
    }

    pub(super) fn turn(&self, rows: &mut [f32], width: usize, turn: Turn) {
        let rope = self.setting.rope;
        match &self.keys {
            Keys::Batch => rope.turn_segments(rows, width, self.segments, turn),
            Keys::Caches(caches) => {
                for (segment, cache) in self.segments.iter().zip(caches.iter()) {
                    let rows = &mut rows[segment.start * width..segment.end * width];
                    rope.turn_rows(rows, width, cache.len(), turn);
                }
            }
        }
    }
}

/// Attention of each segment's rows over its cache, to which its keys and values are added.
fn attend_caches(
    setting: &Setting,
    layer: usize,
    segments: &[Range<usize>],
    [q, k, v]: [&[f32]; 3],
    caches: &mut [&mut KvCache],
    out: &mut [f32],
) {
    let (wide, narrow) = (setting.heads.query_width(), setting.heads.key_value_width());
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
                heads: setting.heads,
                window: setting.window,
                precision: setting.precision,
                k: keys,
                v: values,
            };
            cached.attend(&q[segment.start * wide..segment.end * wide], out, None);
        });
}
