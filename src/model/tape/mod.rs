//! The graph on the CPU: fused operations, recorded as they run, and their backward passes in
//! reverse.
//!
//! What a step holds is decided here. Outputs of norms and of activation functions are dropped when
//! the forward pass is done with them and computed again when the backward pass asks: they are
//! is_cheap, and as large as what they are made of. With `checkpoint` the same happens to everything
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
use crate::ops::lora::LoraLayer;
use crate::ops::matmul::Precision;
use crate::ops::rope::RopeTable;

/// What the tape needs to know of a model.
#[derive(Clone, Copy)]
pub struct TapeSettings<'a> {
    pub arena: &'a Arena,
    pub heads: Heads,
    pub rope: Option<&'a RopeTable>,
    pub precision: Precision,
}

/// Where keys and values come from.
pub enum KeyValueSource<'a, 'c> {
    /// From the batch itself.
    Batch,
    /// From what was said before, to which the batch's are added; one cache a segment.
    Caches(&'a mut [&'c mut KvCache]),
}

/// What becomes of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// Dropped as soon as they are used: there will be no backward pass.
    Discard,
    /// Kept for the backward pass.
    Keep,
    /// Kept only where layers begin; the rest is computed twice.
    Recompute,
}

/// A graph that runs at once. Segments cover the rows in order.
pub struct Tape<'a, 'c> {
    settings: TapeSettings<'a>,
    segments: &'a [Range<usize>],
    keys: KeyValueSource<'a, 'c>,
    activations: Activations,
    nodes: Vec<Node>,
    /// Nodes whose values go when nobody holds their handle any more.
    droppable: Vec<Rc<usize>>,
}

/// The handle of a node.
#[derive(Clone)]
pub struct NodeHandle(Rc<usize>);

struct Node {
    op: Rc<Op>,
    width: usize,
    value: Option<Arc<Buffer>>,
    /// What the backward pass needs besides: a row's scale, or the log-sum-exp of its scores.
    saved: Option<Arc<Buffer>>,
    gradient: Option<Buffer>,
    requires_grad: bool,
}

enum Op {
    Embed {
        table: Tensor,
        ids: Vec<u32>,
    },
    SelectRows {
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
        settings: TapeSettings<'a>,
        segments: &'a [Range<usize>],
        keys: KeyValueSource<'a, 'c>,
        activations: Activations,
    ) -> Self {
        Self {
            settings,
            segments,
            keys,
            activations,
            nodes: Vec::new(),
            droppable: Vec::new(),
        }
    }

    /// The values of a node.
    ///
    /// # Errors
    /// Where they have been dropped.
    pub fn value(&self, value: &NodeHandle) -> Result<Arc<Buffer>> {
        self.get(*value.0)
    }

    fn get(&self, node: usize) -> Result<Arc<Buffer>> {
        self.nodes[node]
            .value
            .clone()
            .context("a value was used after it was dropped")
    }

    fn width(&self, value: &NodeHandle) -> usize {
        self.nodes[*value.0].width
    }

    /// Will nobody read `x` again, once this handle of it is gone?
    fn is_last_handle(&self, x: &NodeHandle) -> bool {
        let ours = self.droppable.iter().any(|id| **id == *x.0) as usize + 1;
        Rc::strong_count(&x.0) == ours
    }

    /// The values of a node as a buffer to write to; a copy if somebody else reads them.
    fn into_owned(&self, values: Arc<Buffer>) -> Result<Buffer> {
        Ok(match Arc::try_unwrap(values) {
            Ok(own) => own,
            Err(shared) => {
                let mut copy = self.settings.arena.take(shared.len())?;
                copy.copy_from_slice(&shared);
                copy
            }
        })
    }

    /// The position of each row in its sequence.
    fn positions(&self) -> Vec<u32> {
        let starts: Vec<usize> = match &self.keys {
            KeyValueSource::Batch => vec![0; self.segments.len()],
            KeyValueSource::Caches(caches) => caches.iter().map(|cache| cache.len()).collect(),
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
    fn push(&mut self, op: Op, width: usize, is_cheap: bool) -> Result<NodeHandle> {
        let requires_grad = op.has_trainable_weights()
            || op
                .inputs()
                .iter()
                .any(|input| self.nodes[*input].requires_grad);
        let id = self.nodes.len();
        self.nodes.push(Node {
            op: Rc::new(op),
            width,
            value: None,
            saved: None,
            gradient: None,
            requires_grad,
        });
        self.compute(id)?;
        let value = NodeHandle(Rc::new(id));
        if self.activations != Activations::Keep || is_cheap {
            self.droppable.push(Rc::clone(&value.0));
        }
        let nodes = &mut self.nodes;
        self.droppable.retain(|id| {
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
            Op::SelectRows { x, .. }
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
    fn has_trainable_weights(&self) -> bool {
        match self {
            Op::Embed { table, .. } | Op::Positions { table, .. } => table.is_variable(),
            Op::RmsNorm { weight, .. } => weight.is_variable(),
            Op::LayerNorm { weight, bias, .. } => weight.is_variable() || bias.is_variable(),
            Op::Linear { layer, .. } => layer.requires_grad(),
            Op::SelectRows { .. }
            | Op::Gelu { .. }
            | Op::SwiGlu { .. }
            | Op::Rope { .. }
            | Op::Attention { .. } => false,
        }
    }
}

impl Graph for Tape<'_, '_> {
    type Value = NodeHandle;

    fn embed(&mut self, table: &Tensor, ids: &[u32]) -> Result<NodeHandle> {
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

    fn select_rows(&mut self, x: NodeHandle, positions: &[u32]) -> Result<NodeHandle> {
        let width = self.width(&x);
        let op = Op::SelectRows {
            x: *x.0,
            positions: positions.to_vec(),
        };
        self.push(op, width, false)
    }

    fn rms_norm(&mut self, x: &NodeHandle, weight: &Tensor, epsilon: f64) -> Result<NodeHandle> {
        let op = Op::RmsNorm {
            x: *x.0,
            weight: weight.clone(),
            epsilon: epsilon as f32,
        };
        self.push(op, self.width(x), true)
    }

    fn layer_norm(
        &mut self,
        x: &NodeHandle,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
    ) -> Result<NodeHandle> {
        let op = Op::LayerNorm {
            x: *x.0,
            weight: weight.clone(),
            bias: bias.clone(),
            epsilon: epsilon as f32,
        };
        self.push(op, self.width(x), true)
    }

    fn linear(&mut self, x: &NodeHandle, layer: &Projection) -> Result<NodeHandle> {
        let op = Op::Linear {
            x: *x.0,
            layer: layer.clone(),
            residual: None,
        };
        self.push(op, layer.weight.dim(0)?, false)
    }

    fn add_linear(
        &mut self,
        residual: NodeHandle,
        x: &NodeHandle,
        layer: &Projection,
    ) -> Result<NodeHandle> {
        let op = Op::Linear {
            x: *x.0,
            layer: layer.clone(),
            residual: Some(*residual.0),
        };
        self.push(op, layer.weight.dim(0)?, false)
    }

    fn gelu(&mut self, x: NodeHandle) -> Result<NodeHandle> {
        self.push(Op::Gelu { x: *x.0 }, self.width(&x), true)
    }

    fn swiglu(&mut self, gate: NodeHandle, up: NodeHandle) -> Result<NodeHandle> {
        let op = Op::SwiGlu {
            gate: *gate.0,
            up: *up.0,
        };
        self.push(op, self.width(&gate), true)
    }

    fn add_positions(&mut self, x: NodeHandle, table: &Tensor) -> Result<NodeHandle> {
        let op = Op::Positions {
            x: *x.0,
            table: table.clone(),
            in_place: self.is_last_handle(&x),
        };
        self.push(op, self.width(&x), false)
    }

    fn rope(&mut self, x: NodeHandle) -> Result<NodeHandle> {
        let op = Op::Rope {
            x: *x.0,
            in_place: self.is_last_handle(&x),
        };
        self.push(op, self.width(&x), false)
    }

    fn attention(
        &mut self,
        layer: usize,
        [q, k, v]: [NodeHandle; 3],
        window: Option<usize>,
    ) -> Result<NodeHandle> {
        let op = Op::Attention {
            layer,
            qkv: [*q.0, *k.0, *v.0],
            window,
        };
        self.push(op, self.width(&q), false)
    }

    fn mark_checkpoint(&mut self, x: &NodeHandle) {
        if self.activations == Activations::Recompute {
            self.droppable.retain(|id| **id != *x.0);
        }
    }
}

/// The linear layer of a weight (O x I).
fn linear_layer(weight: &Tensor, precision: Precision) -> Result<Linear> {
    let (outputs, inputs) = weight.dims2()?;
    Ok(Linear {
        inputs,
        outputs,
        precision,
    })
}

/// An adapter as an operation.
fn lora_layer(adapter: &Adapter, precision: Precision) -> Result<LoraLayer> {
    let ((rank, inputs), outputs) = (adapter.a.dims2()?, adapter.b.dim(0)?);
    Ok(LoraLayer {
        inputs,
        rank,
        outputs,
        scale: adapter.scale as f32,
        precision,
    })
}
