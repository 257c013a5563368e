//! The graph on the CPU: fused operations, recorded as they run, and their backward passes in
//! reverse.
//!
//! What a step holds is decided here. Outputs of norms and of activation functions are dropped when
//! the forward pass is done with them and computed again when the backward pass asks: they are
//! cheap, and as large as what they are made of. With `checkpoint` the same happens to everything
//! but the inputs of layers. A gradient is made when the first part of it arrives, and an
//! activation is dropped when the last gradient that needs it is done, so the peak of a step is
//! the larger of the two, not their sum.

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, TensorId};
use rayon::prelude::*;

use super::KvCache;
use super::graph::Graph;
use crate::ops::arena::{Arena, Buffer};
use crate::ops::attention::{Attention, Cached, Forward, Heads};
use crate::ops::linear::Linear;
use crate::ops::matmul::Precision;
use crate::ops::rope::{RopeTable, Turn};
use crate::ops::{Gradient, Values, embedding, rms_norm, swiglu};

/// What the tape needs to know of a model.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    pub arena: &'a Arena,
    pub heads: Heads,
    pub rope: &'a RopeTable,
    pub window: Option<usize>,
    pub precision: Precision,
}

/// Where keys and values come from.
pub enum Keys<'a, 'c> {
    /// From the batch itself.
    Batch,
    /// From what was said before, to which the batch's are added; one cache a segment.
    Caches(&'a mut [&'c mut KvCache]),
}

/// What becomes of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Dropped as soon as they are used: there will be no backward pass.
    Forget,
    /// Kept for the backward pass.
    Record,
    /// Kept only where layers begin; the rest is computed twice.
    Checkpoint,
}

/// A graph that runs at once. Segments cover the rows in order.
pub struct Tape<'a, 'c> {
    setting: Setting<'a>,
    segments: &'a [Range<usize>],
    keys: Keys<'a, 'c>,
    memory: Memory,
    nodes: Vec<Node>,
    /// Nodes whose values go when nobody holds their handle any more.
    passing: Vec<Rc<usize>>,
}

/// The handle of a node.
#[derive(Clone)]
pub struct Value(Rc<usize>);

struct Node {
    op: Rc<Op>,
    width: usize,
    value: Option<Arc<Buffer>>,
    /// What the backward pass needs besides: a row's scale, or the log-sum-exp of its scores.
    saved: Option<Arc<Buffer>>,
    gradient: Option<Buffer>,
    trains: bool,
}

enum Op {
    Embed {
        table: Tensor,
        ids: Vec<u32>,
    },
    Rows {
        x: usize,
        positions: Vec<u32>,
    },
    RmsNorm {
        x: usize,
        weight: Tensor,
        epsilon: f32,
    },
    Linear {
        x: usize,
        weight: Tensor,
        bias: Option<Tensor>,
        residual: Option<usize>,
    },
    SwiGlu {
        gate: usize,
        up: usize,
    },
    Rope {
        x: usize,
        /// Does nobody else need x as it was?
        in_place: bool,
    },
    Attention {
        layer: usize,
        q: usize,
        k: usize,
        v: usize,
    },
}

/// Gradients of the variables, summed over micro-batches.
pub struct Gradients {
    arena: Arena,
    of: HashMap<TensorId, Buffer>,
}

impl Gradients {
    pub fn new(arena: Arena) -> Self {
        Self {
            arena,
            of: HashMap::new(),
        }
    }

    /// The gradient of a variable, if it has received one.
    pub fn get(&self, variable: &Tensor) -> Option<&[f32]> {
        self.of.get(&variable.id()).map(|buffer| &**buffer)
    }

    /// Where to put a part of the gradient of `tensor`; None if it is no variable.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn of(&mut self, tensor: &Tensor) -> Result<Option<Gradient<'_>>> {
        if !tensor.is_variable() {
            return Ok(None);
        }
        let add = self.of.contains_key(&tensor.id());
        let values = match self.of.entry(tensor.id()) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.arena.take(tensor.elem_count())?)
            }
        };
        Ok(Some(Gradient { values, add }))
    }

    /// Drops all gradients.
    pub fn clear(&mut self) {
        self.of.clear();
    }
}

impl<'a, 'c> Tape<'a, 'c> {
    pub fn new(
        setting: Setting<'a>,
        segments: &'a [Range<usize>],
        keys: Keys<'a, 'c>,
        memory: Memory,
    ) -> Self {
        Self {
            setting,
            segments,
            keys,
            memory,
            nodes: Vec::new(),
            passing: Vec::new(),
        }
    }

    /// The values of a node.
    ///
    /// # Errors
    /// Where they have been dropped.
    pub fn value(&self, value: &Value) -> Result<Arc<Buffer>> {
        self.get(*value.0)
    }

    fn get(&self, node: usize) -> Result<Arc<Buffer>> {
        self.nodes[node]
            .value
            .clone()
            .context("a value was used after it was dropped")
    }

    fn width(&self, value: &Value) -> usize {
        self.nodes[*value.0].width
    }

    /// Runs an operation and keeps its result.
    fn push(&mut self, op: Op, width: usize, cheap: bool) -> Result<Value> {
        let variable = Tensor::is_variable;
        let trains = match &op {
            Op::Embed { table, .. } => table.is_variable(),
            Op::RmsNorm { x, weight, .. } => self.nodes[*x].trains || weight.is_variable(),
            Op::Linear {
                x,
                weight,
                bias,
                residual,
            } => {
                weight.is_variable()
                    || bias.as_ref().is_some_and(variable)
                    || self.nodes[*x].trains
                    || residual.is_some_and(|residual| self.nodes[residual].trains)
            }
            Op::Rows { x, .. } | Op::Rope { x, .. } => self.nodes[*x].trains,
            Op::SwiGlu { gate, up } => self.nodes[*gate].trains || self.nodes[*up].trains,
            Op::Attention { q, k, v, .. } => [q, k, v].iter().any(|id| self.nodes[**id].trains),
        };
        let id = self.nodes.len();
        self.nodes.push(Node {
            op: Rc::new(op),
            width,
            value: None,
            saved: None,
            gradient: None,
            trains,
        });
        self.compute(id)?;
        let value = Value(Rc::new(id));
        if self.memory != Memory::Record || cheap {
            self.passing.push(Rc::clone(&value.0));
        }
        let nodes = &mut self.nodes;
        self.passing.retain(|id| {
            let held = Rc::strong_count(id) > 1;
            if !held {
                nodes[**id].value = None;
            }
            held
        });
        Ok(value)
    }

    /// Computes the value of a node from its inputs' values.
    fn compute(&mut self, id: usize) -> Result<()> {
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
                embedding::forward(&*self.get(*x)?, positions, width, &mut y);
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

    fn attention_layer(&self) -> Attention<'a> {
        Attention {
            heads: self.setting.heads,
            segments: self.segments,
            window: self.setting.window,
            precision: self.setting.precision,
        }
    }

    fn turn(&self, rows: &mut [f32], width: usize, turn: Turn) {
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

    /// Sends `gradient`, that of `root` (as many values), back to all variables.
    ///
    /// # Errors
    /// Where there is no memory.
    pub fn backward(
        mut self,
        root: Value,
        gradient: Buffer,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.memory == Memory::Forget {
            bail!("a backward pass needs a recorded forward pass");
        }
        self.nodes[*root.0].gradient = Some(gradient);
        for id in (0..self.nodes.len()).rev() {
            let gradient = self.nodes[id].gradient.take();
            if let Some(gradient) = gradient.filter(|_| self.nodes[id].trains) {
                self.backward_of(id, gradient, gradients)?;
            }
            let node = &mut self.nodes[id];
            (node.value, node.saved) = (None, None);
        }
        Ok(())
    }

    fn backward_of(&mut self, id: usize, dy: Buffer, gradients: &mut Gradients) -> Result<()> {
        let Setting {
            arena, precision, ..
        } = self.setting;
        let op = Rc::clone(&self.nodes[id].op);
        let width = self.nodes[id].width;
        match &*op {
            Op::Embed { table, ids } => {
                if let Some(to) = gradients.of(table)? {
                    embedding::backward(&dy, ids, width, to);
                }
            }
            Op::Rows { x, positions } => {
                // Rows that were not taken have a gradient of zero; their number is that of x.
                let rows = self.segments.last().map_or(0, |last| last.end);
                self.add_gradient(*x, rows * width, |to| {
                    embedding::backward(&dy, positions, width, to);
                })?;
            }
            Op::RmsNorm { x, weight, .. } => {
                let values = self.ensure(*x)?;
                let scale = self.saved(id)?;
                let weights = Values::of(weight)?;
                let dweight = gradients.of(weight)?;
                self.add_gradient(*x, values.len(), |to| {
                    rms_norm::backward(&values, &weights, &scale, &dy, to, dweight);
                })?;
            }
            Op::Linear {
                x,
                weight,
                bias,
                residual,
            } => {
                let linear = linear_of(weight, precision)?;
                if let Some(to) = gradients.of(weight)? {
                    linear.backward_weight(&dy, &self.ensure(*x)?, to);
                }
                if let Some(bias) = bias
                    && let Some(to) = gradients.of(bias)?
                {
                    linear.backward_bias(&dy, to);
                }
                if self.nodes[*x].trains {
                    let weight = Values::of(weight)?;
                    let len = dy.len() / linear.outputs * linear.inputs;
                    self.add_gradient(*x, len, |to| linear.backward_input(&dy, &weight, to))?;
                }
                if let Some(residual) = residual {
                    self.give_gradient(*residual, dy);
                }
            }
            Op::SwiGlu { gate, up } => {
                let (values, others) = (self.ensure(*gate)?, self.ensure(*up)?);
                // Nothing else needs the inputs any more: they become their own gradients.
                (self.nodes[*gate].value, self.nodes[*up].value) = (None, None);
                let [mut dgate, mut dup] = [own(arena, values)?, own(arena, others)?];
                swiglu::backward(&mut dgate, &mut dup, &dy);
                self.give_gradient(*gate, dgate);
                self.give_gradient(*up, dup);
            }
            Op::Rope { x, .. } => {
                let mut dy = dy;
                self.turn(&mut dy, width, Turn::Backward);
                self.give_gradient(*x, dy);
            }
            Op::Attention { q, k, v, .. } => {
                let out = self.ensure(id)?;
                let lse = self.saved(id)?;
                let [q_values, k_values, v_values] =
                    [self.ensure(*q)?, self.ensure(*k)?, self.ensure(*v)?];
                let attention = self.attention_layer();
                let mut scratch = arena.take(attention.scratch())?;
                let mut dq = arena.take(q_values.len())?;
                let mut dk = arena.take(k_values.len())?;
                let mut dv = arena.take(v_values.len())?;
                let forward = Forward {
                    q: &q_values,
                    k: &k_values,
                    v: &v_values,
                    out: &out,
                    lse: &lse,
                };
                let to = [&mut dq, &mut dk, &mut dv].map(|values| Gradient { values, add: false });
                attention.backward(forward, &dy, &mut scratch, to);
                for (id, gradient) in [(*q, dq), (*k, dk), (*v, dv)] {
                    self.give_gradient(id, gradient);
                }
            }
        }
        Ok(())
    }

    /// The value of a node, computed again where it was dropped.
    fn ensure(&mut self, id: usize) -> Result<Arc<Buffer>> {
        if self.nodes[id].value.is_none() {
            let op = Rc::clone(&self.nodes[id].op);
            for input in op.inputs() {
                self.ensure(input)?;
            }
            self.compute(id)?;
        }
        self.get(id)
    }

    fn saved(&self, id: usize) -> Result<Arc<Buffer>> {
        self.nodes[id].saved.clone().context("nothing was saved")
    }

    /// Adds to the gradient of a node of `len` values, where it trains.
    fn add_gradient(&mut self, id: usize, len: usize, add: impl FnOnce(Gradient)) -> Result<()> {
        let node = &mut self.nodes[id];
        let exists = node.gradient.is_some();
        if !exists {
            node.gradient = Some(self.setting.arena.take(len)?);
        }
        if let Some(values) = &mut node.gradient {
            add(Gradient {
                values,
                add: exists,
            });
        }
        Ok(())
    }

    /// Adds a whole gradient, which becomes the node's where it has none.
    fn give_gradient(&mut self, id: usize, given: Buffer) {
        match &mut self.nodes[id].gradient {
            Some(values) => values
                .par_iter_mut()
                .with_min_len(1 << 14)
                .zip(&*given)
                .for_each(|(sum, part)| *sum += part),
            none => *none = Some(given),
        }
    }
}

impl Op {
    /// The nodes that it reads.
    fn inputs(&self) -> Vec<usize> {
        match *self {
            Op::Embed { .. } => vec![],
            Op::Rows { x, .. } | Op::RmsNorm { x, .. } | Op::Rope { x, .. } => vec![x],
            Op::Linear { x, residual, .. } => [Some(x), residual].into_iter().flatten().collect(),
            Op::SwiGlu { gate, up } => vec![gate, up],
            Op::Attention { q, k, v, .. } => vec![q, k, v],
        }
    }
}

impl Graph for Tape<'_, '_> {
    type Value = Value;

    fn embed(&mut self, table: &Tensor, ids: &[u32]) -> Result<Value> {
        let (vocabulary, width) = table.dims2()?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            bail!("token {id} is past the vocabulary of {vocabulary}");
        }
        let op = Op::Embed {
            table: table.clone(),
            ids: ids.to_vec(),
        };
        self.push(op, width, false)
    }

    fn rows(&mut self, x: Value, positions: &[u32]) -> Result<Value> {
        let width = self.width(&x);
        let op = Op::Rows {
            x: *x.0,
            positions: positions.to_vec(),
        };
        self.push(op, width, false)
    }

    fn rms_norm(&mut self, x: &Value, weight: &Tensor, epsilon: f64) -> Result<Value> {
        let op = Op::RmsNorm {
            x: *x.0,
            weight: weight.clone(),
            epsilon: epsilon as f32,
        };
        self.push(op, self.width(x), true)
    }

    fn linear(&mut self, x: &Value, weight: &Tensor, bias: Option<&Tensor>) -> Result<Value> {
        let op = Op::Linear {
            x: *x.0,
            weight: weight.clone(),
            bias: bias.cloned(),
            residual: None,
        };
        self.push(op, weight.dim(0)?, false)
    }

    fn add_linear(
        &mut self,
        residual: Value,
        x: &Value,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Value> {
        let op = Op::Linear {
            x: *x.0,
            weight: weight.clone(),
            bias: bias.cloned(),
            residual: Some(*residual.0),
        };
        self.push(op, weight.dim(0)?, false)
    }

    fn swiglu(&mut self, gate: Value, up: Value) -> Result<Value> {
        let op = Op::SwiGlu {
            gate: *gate.0,
            up: *up.0,
        };
        self.push(op, self.width(&gate), true)
    }

    fn rope(&mut self, x: Value) -> Result<Value> {
        let holders = self.passing.iter().any(|id| **id == *x.0) as usize + 1;
        let op = Op::Rope {
            x: *x.0,
            in_place: Rc::strong_count(&x.0) == holders,
        };
        self.push(op, self.width(&x), false)
    }

    fn attention(&mut self, layer: usize, q: Value, k: Value, v: Value) -> Result<Value> {
        let op = Op::Attention {
            layer,
            q: *q.0,
            k: *k.0,
            v: *v.0,
        };
        self.push(op, self.width(&q), false)
    }

    fn keep(&mut self, x: &Value) {
        if self.memory == Memory::Checkpoint {
            self.passing.retain(|id| **id != *x.0);
        }
    }
}

/// The linear layer of a weight (O x I).
fn linear_of(weight: &Tensor, precision: Precision) -> Result<Linear> {
    let (outputs, inputs) = weight.dims2()?;
    Ok(Linear {
        inputs,
        outputs,
        precision,
    })
}

/// The values as a buffer to write to; a copy if somebody else reads them.
fn own(arena: &Arena, values: Arc<Buffer>) -> Result<Buffer> {
    Ok(match Arc::try_unwrap(values) {
        Ok(own) => own,
        Err(shared) => {
            let mut copy = arena.take(shared.len())?;
            copy.copy_from_slice(&shared);
            copy
        }
    })
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
