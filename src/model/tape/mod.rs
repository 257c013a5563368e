//! The graph on the CPU. Each fused operation runs immediately and is recorded; the backward pass visits the
//! recorded operations in reverse order.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | the recorded operations, and which values are kept |
//! | `forward.rs` | the forward pass of each operation |
//! | `backward.rs` | the backward pass of each operation |
//!
//! This file decides how much memory a step needs. Outputs of norms and activation functions are
//! dropped after use in the forward pass and recomputed in the backward pass: they are cheap to
//! compute, and as large as their inputs. With [`Activations::Recompute`], all values except the inputs
//! of layers are dropped and recomputed. In the backward pass, a gradient is allocated when it is first
//! written, and an activation is dropped after its last use. Activations and gradients therefore share
//! memory: the peak of a step is far below the sum of both.

pub(crate) mod backward;
pub(crate) mod forward;

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::graph::{AttentionLayer, Graph, Segments};
use super::projection::{LoraAdapter, Projection};
use crate::model::kv_cache::KvCache;
use crate::ops::activation::Activation;
use crate::ops::arena::{Arena, Buffer};
use crate::ops::attention::Heads;
use crate::ops::linear::Linear;
use crate::ops::lora::LoraLayer;
use crate::ops::matmul::Precision;
use crate::ops::rope::RopeTable;

/// The settings of a model that the tape uses.
#[derive(Clone, Copy)]
pub struct TapeSettings<'a> {
    pub arena: &'a Arena,
    pub heads: Heads,
    pub rope: Option<&'a RopeTable>,
    pub precision: Precision,
}

/// The keys and values that queries attend to.
pub enum KeyValueSource<'a, 'c> {
    /// The keys and values of the batch only.
    Batch,
    /// Caches of earlier tokens, one per sequence of the decoder. The keys and values of the batch are appended to
    /// them. Cross-attention reads the keys and values of the source from them.
    Caches(&'a mut [&'c mut KvCache]),
}

/// Which activations are kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// None: each is dropped after use, and a backward pass is an error.
    Discard,
    /// All except the cheap ones, which the backward pass recomputes.
    Keep,
    /// The inputs of layers only; the backward pass recomputes all others (activation checkpointing).
    Recompute,
}

/// A graph that runs each operation immediately and records it.
pub struct Tape<'a, 'c> {
    settings: TapeSettings<'a>,
    segments: Segments<'a>,
    key_value_source: KeyValueSource<'a, 'c>,
    activations: Activations,
    nodes: Vec<Node>,
    /// Nodes whose values are dropped at the first operation after their last [`NodeHandle`] is gone.
    droppable: Vec<Rc<usize>>,
}

/// The index of a node. A later operation can read the node as long as a handle exists.
#[derive(Clone)]
pub struct NodeHandle(Rc<usize>);

/// A recorded operation and its results.
struct Node {
    op: Rc<Op>,
    /// Number of values per row.
    width: usize,
    /// None after the value was dropped.
    value: Option<Arc<Buffer>>,
    /// Other results for the backward pass, such as the scale of each row of a norm.
    saved: Option<Arc<Buffer>>,
    gradient: Option<Buffer>,
    /// Whether the value depends on a variable.
    requires_grad: bool,
}

/// An operation with its weights and the indices of its input nodes.
enum Op {
    Embed {
        table: Tensor,
        ids: Vec<u32>,
    },
    SelectRows {
        x: usize,
        /// Number of rows of x.
        rows: usize,
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
    Activate {
        activation: Activation,
        x: usize,
    },
    ActivateGated {
        activation: Activation,
        gate: usize,
        up: usize,
    },
    Scale {
        x: usize,
        factor: f32,
        /// True if no other operation needs x, so that it can be overwritten.
        in_place: bool,
    },
    AddPositions {
        x: usize,
        table: Tensor,
        /// As in `Scale`.
        in_place: bool,
    },
    Rope {
        x: usize,
        /// As in `Scale`.
        in_place: bool,
    },
    Attention {
        layer: AttentionLayer,
        q: usize,
        /// None for the keys and values of the source in the caches.
        kv: Option<[usize; 2]>,
    },
}

impl<'a, 'c> Tape<'a, 'c> {
    /// Creates an empty tape.
    pub fn new(
        settings: TapeSettings<'a>,
        segments: Segments<'a>,
        key_value_source: KeyValueSource<'a, 'c>,
        activations: Activations,
    ) -> Self {
        Self {
            settings,
            segments,
            key_value_source,
            activations,
            nodes: Vec::new(),
            droppable: Vec::new(),
        }
    }

    /// Returns the value of a node (rows x width).
    ///
    /// # Errors
    /// Where the value was dropped.
    pub fn value(&self, handle: &NodeHandle) -> Result<Arc<Buffer>> {
        self.node_value(*handle.0)
    }

    fn node_value(&self, id: usize) -> Result<Arc<Buffer>> {
        self.nodes[id]
            .value
            .clone()
            .context("internal error: a value of the tape was used after it was dropped")
    }

    fn width(&self, handle: &NodeHandle) -> usize {
        self.nodes[*handle.0].width
    }

    /// Returns true if `x` is the last handle of its node, so that no later operation can read the node.
    fn is_last_handle(&self, x: &NodeHandle) -> bool {
        let own_handles = self.droppable.iter().any(|id| **id == *x.0) as usize + 1;
        Rc::strong_count(&x.0) == own_handles
    }

    /// Returns `values` as a writable buffer; copies them if they are shared.
    fn make_writable(&self, values: Arc<Buffer>) -> Result<Buffer> {
        Ok(match Arc::try_unwrap(values) {
            Ok(owned) => owned,
            Err(shared) => {
                let mut copy = self.settings.arena.take(shared.len())?;
                copy.copy_from_slice(&shared);
                copy
            }
        })
    }

    /// Returns the position of each row of the decoder in its sequence.
    fn positions(&self) -> Vec<u32> {
        let starts: Vec<usize> = match &self.key_value_source {
            KeyValueSource::Batch => vec![0; self.segments.decoder.len()],
            KeyValueSource::Caches(caches) => caches.iter().map(|cache| cache.len()).collect(),
        };
        let segment_positions = |(segment, start): (&Range<usize>, usize)| {
            (start..start + segment.len()).map(|position| position as u32)
        };
        self.segments
            .decoder
            .iter()
            .zip(starts)
            .flat_map(segment_positions)
            .collect()
    }

    /// Runs an operation and records it. With `is_cheap`, the value is dropped after its last use in the
    /// forward pass and recomputed in the backward pass.
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
        let handle = NodeHandle(Rc::new(id));
        if self.activations != Activations::Keep || is_cheap {
            self.droppable.push(Rc::clone(&handle.0));
        }
        let nodes = &mut self.nodes;
        self.droppable.retain(|id| {
            let is_held = Rc::strong_count(id) > 1;
            if !is_held {
                nodes[**id].value = None;
            }
            is_held
        });
        Ok(handle)
    }
}

impl Op {
    /// Returns the nodes that the operation reads.
    fn inputs(&self) -> Vec<usize> {
        match *self {
            Op::Embed { .. } => vec![],
            Op::SelectRows { x, .. }
            | Op::RmsNorm { x, .. }
            | Op::LayerNorm { x, .. }
            | Op::Activate { x, .. }
            | Op::Scale { x, .. }
            | Op::AddPositions { x, .. }
            | Op::Rope { x, .. } => vec![x],
            Op::Linear { x, residual, .. } => [Some(x), residual].into_iter().flatten().collect(),
            Op::ActivateGated { gate, up, .. } => vec![gate, up],
            Op::Attention { q, kv, .. } => {
                [q].into_iter().chain(kv.into_iter().flatten()).collect()
            }
        }
    }

    /// Returns true if a weight of the operation is a variable.
    fn has_trainable_weights(&self) -> bool {
        match self {
            Op::Embed { table, .. } | Op::AddPositions { table, .. } => table.is_variable(),
            Op::RmsNorm { weight, .. } => weight.is_variable(),
            Op::LayerNorm { weight, bias, .. } => weight.is_variable() || bias.is_variable(),
            Op::Linear { layer, .. } => layer.requires_grad(),
            Op::Attention { layer, .. } => {
                let bias = layer.bias.as_ref();
                bias.is_some_and(|bias| bias.table_EH.is_variable())
            }
            Op::SelectRows { .. }
            | Op::Activate { .. }
            | Op::ActivateGated { .. }
            | Op::Scale { .. }
            | Op::Rope { .. } => false,
        }
    }
}

impl Graph for Tape<'_, '_> {
    type Value = NodeHandle;

    fn embed(&mut self, table: &Tensor, ids: &[u32]) -> Result<NodeHandle> {
        let (vocabulary, width) = table.dims2()?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            bail!("token id {id} is outside the vocabulary of {vocabulary}");
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
            rows: self.value(&x)?.len() / width,
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

    fn activate(&mut self, activation: Activation, x: NodeHandle) -> Result<NodeHandle> {
        let op = Op::Activate {
            activation,
            x: *x.0,
        };
        self.push(op, self.width(&x), true)
    }

    fn activate_gated(
        &mut self,
        activation: Activation,
        gate: NodeHandle,
        up: NodeHandle,
    ) -> Result<NodeHandle> {
        let op = Op::ActivateGated {
            activation,
            gate: *gate.0,
            up: *up.0,
        };
        self.push(op, self.width(&gate), true)
    }

    fn scale(&mut self, x: NodeHandle, factor: f32) -> Result<NodeHandle> {
        let op = Op::Scale {
            x: *x.0,
            factor,
            in_place: self.is_last_handle(&x),
        };
        self.push(op, self.width(&x), false)
    }

    fn add_positions(&mut self, x: NodeHandle, table: &Tensor) -> Result<NodeHandle> {
        let op = Op::AddPositions {
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
        layer: &AttentionLayer,
        q: NodeHandle,
        kv: Option<[NodeHandle; 2]>,
    ) -> Result<NodeHandle> {
        let op = Op::Attention {
            layer: layer.clone(),
            q: *q.0,
            kv: kv.map(|kv| kv.map(|handle| *handle.0)),
        };
        self.push(op, self.width(&q), false)
    }

    fn mark_checkpoint(&mut self, x: &NodeHandle) {
        if self.activations == Activations::Recompute {
            self.droppable.retain(|id| **id != *x.0);
        }
    }
}

/// Returns the operation of a linear layer with this weight (O x I).
fn linear_layer(weight: &Tensor, precision: Precision) -> Result<Linear> {
    let (outputs, inputs) = weight.dims2()?;
    Ok(Linear {
        inputs,
        outputs,
        precision,
    })
}

/// Returns the operation of an adapter.
fn lora_layer(adapter: &LoraAdapter, precision: Precision) -> Result<LoraLayer> {
    let (rank, inputs) = adapter.a.dims2()?;
    let outputs = adapter.b.dim(0)?;
    Ok(LoraLayer {
        inputs,
        rank,
        outputs,
        scale: adapter.scale as f32,
        precision,
    })
}
