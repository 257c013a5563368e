//! The graph on the CPU: fused operations, recorded as they run, and their backward passes in
//! reverse.
//!
//! What a step holds is decided here. Outputs of norms and of activation functions are dropped when
//! the forward pass is done with them and computed again when the backward pass asks: they are
//! cheap, and as large as what they are made of. With `checkpoint` the same happens to everything
//! but the inputs of layers. A gradient is made when the first part of it arrives, and an
//! activation is dropped when the last gradient that needs it is done, so the peak of a step is
//! the larger of the two, not their sum.

pub(crate) mod backward;
pub(crate) mod forward;

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::graph::Graph;
use super::projection::{Adapter, Projection};
use crate::model::kv_cache::KvCache;
use crate::ops::arena::{Arena, Buffer};
use crate::ops::attention::Heads;
use crate::ops::linear::Linear;
use crate::ops::lora::Lora;
use crate::ops::matmul::Precision;
use crate::ops::rope::RopeTable;

/// What the tape needs to know of a model.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    pub arena: &'a Arena,
    pub heads: Heads,
    pub rope: Option<&'a RopeTable>,
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
    LayerNorm {
        x: usize,
        weight: Tensor,
        bias: Tensor,
        epsilon: f32,
    },
    Linear {
        x: usize,
        layer: Projection,
        residual: Option<usize>,
    },
    Gelu {
        x: usize,
    },
    SwiGlu {
        gate: usize,
        up: usize,
    },
    Positions {
        x: usize,
        table: Tensor,
        /// Does nobody else need x as it was?
        in_place: bool,
    },
    Rope {
        x: usize,
        /// As above.
        in_place: bool,
    },
    Attention {
        layer: usize,
        qkv: [usize; 3],
        window: Option<usize>,
    },
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

    /// Will nobody read `x` again, once this handle of it is gone?
    fn is_last_handle(&self, x: &Value) -> bool {
        let ours = self.passing.iter().any(|id| **id == *x.0) as usize + 1;
        Rc::strong_count(&x.0) == ours
    }

    /// The values of a node as a buffer to write to; a copy if somebody else reads them.
    fn own(&self, values: Arc<Buffer>) -> Result<Buffer> {
        Ok(match Arc::try_unwrap(values) {
            Ok(own) => own,
            Err(shared) => {
                let mut copy = self.setting.arena.take(shared.len())?;
                copy.copy_from_slice(&shared);
                copy
            }
        })
    }

    /// The position of each row in its sequence.
    fn positions(&self) -> Vec<u32> {
        let starts: Vec<usize> = match &self.keys {
            Keys::Batch => vec![0; self.segments.len()],
            Keys::Caches(caches) => caches.iter().map(|cache| cache.len()).collect(),
        };
        let of_segment = |(segment, start): (&Range<usize>, usize)| {
            (start..start + segment.len()).map(|at| at as u32)
        };
        self.segments
            .iter()
            .zip(starts)
            .flat_map(of_segment)
            .collect()
    }

    /// Runs an operation and keeps its result.
    fn push(&mut self, op: Op, width: usize, cheap: bool) -> Result<Value> {
        let trains =
            op.has_variables() || op.inputs().iter().any(|input| self.nodes[*input].trains);
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
}

impl Op {
    /// The nodes that it reads.
    fn inputs(&self) -> Vec<usize> {
        match *self {
            Op::Embed { .. } => vec![],
            Op::Rows { x, .. }
            | Op::RmsNorm { x, .. }
            | Op::LayerNorm { x, .. }
            | Op::Gelu { x }
            | Op::Positions { x, .. }
            | Op::Rope { x, .. } => vec![x],
            Op::Linear { x, residual, .. } => [Some(x), residual].into_iter().flatten().collect(),
            Op::SwiGlu { gate, up } => vec![gate, up],
            Op::Attention { qkv, .. } => qkv.to_vec(),
        }
    }

    /// Has it weights that get gradients?
    fn has_variables(&self) -> bool {
        match self {
            Op::Embed { table, .. } | Op::Positions { table, .. } => table.is_variable(),
            Op::RmsNorm { weight, .. } => weight.is_variable(),
            Op::LayerNorm { weight, bias, .. } => weight.is_variable() || bias.is_variable(),
            Op::Linear { layer, .. } => layer.trains(),
            Op::Rows { .. }
            | Op::Gelu { .. }
            | Op::SwiGlu { .. }
            | Op::Rope { .. }
            | Op::Attention { .. } => false,
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

    fn layer_norm(
        &mut self,
        x: &Value,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
    ) -> Result<Value> {
        let op = Op::LayerNorm {
            x: *x.0,
            weight: weight.clone(),
            bias: bias.clone(),
            epsilon: epsilon as f32,
        };
        self.push(op, self.width(x), true)
    }

    fn linear(&mut self, x: &Value, layer: &Projection) -> Result<Value> {
        let op = Op::Linear {
            x: *x.0,
            layer: layer.clone(),
            residual: None,
        };
        self.push(op, layer.weight.dim(0)?, false)
    }

    fn add_linear(&mut self, residual: Value, x: &Value, layer: &Projection) -> Result<Value> {
        let op = Op::Linear {
            x: *x.0,
            layer: layer.clone(),
            residual: Some(*residual.0),
        };
        self.push(op, layer.weight.dim(0)?, false)
    }

    fn gelu(&mut self, x: Value) -> Result<Value> {
        self.push(Op::Gelu { x: *x.0 }, self.width(&x), true)
    }

    fn swiglu(&mut self, gate: Value, up: Value) -> Result<Value> {
        let op = Op::SwiGlu {
            gate: *gate.0,
            up: *up.0,
        };
        self.push(op, self.width(&gate), true)
    }

    fn add_positions(&mut self, x: Value, table: &Tensor) -> Result<Value> {
        let op = Op::Positions {
            x: *x.0,
            table: table.clone(),
            in_place: self.is_last_handle(&x),
        };
        self.push(op, self.width(&x), false)
    }

    fn rope(&mut self, x: Value) -> Result<Value> {
        let op = Op::Rope {
            x: *x.0,
            in_place: self.is_last_handle(&x),
        };
        self.push(op, self.width(&x), false)
    }

    fn attention(
        &mut self,
        layer: usize,
        [q, k, v]: [Value; 3],
        window: Option<usize>,
    ) -> Result<Value> {
        let op = Op::Attention {
            layer,
            qkv: [*q.0, *k.0, *v.0],
            window,
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

/// An adapter as an operation.
fn lora_of(adapter: &Adapter, precision: Precision) -> Result<Lora> {
    let ((rank, inputs), outputs) = (adapter.a.dims2()?, adapter.b.dim(0)?);
    Ok(Lora {
        inputs,
        rank,
        outputs,
        scale: adapter.scale as f32,
        precision,
    })
}
