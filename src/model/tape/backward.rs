//! The backward pass of each operation, in reverse order of recording.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use super::{Activations, NodeHandle, Op, Tape, TapeSettings, linear_layer, lora_layer};
use crate::model::gradients::Gradients;
use crate::model::projection::Projection;
use crate::ops::arena::Buffer;
use crate::ops::attention::AttentionForward;
use crate::ops::rope::Rotation;
use crate::ops::{CpuValues, Gradient, embedding, gelu, layer_norm, rms_norm, sum_rows, swiglu};

impl Tape<'_, '_> {
    /// Computes the gradients of all variables from `gradient`, the gradient of `root`.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn backward(
        mut self,
        root: NodeHandle,
        gradient: Buffer,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.activations == Activations::Discard {
            bail!("a backward pass needs the activations of the forward pass");
        }
        self.nodes[*root.0].gradient = Some(gradient);
        for id in (0..self.nodes.len()).rev() {
            let gradient = self.nodes[id].gradient.take();
            if let Some(gradient) = gradient.filter(|_| self.nodes[id].requires_grad) {
                self.backward_node(id, gradient, gradients)?;
            }
            let node = &mut self.nodes[id];
            node.value = None;
            node.saved = None;
        }
        Ok(())
    }

    fn backward_node(&mut self, id: usize, dy: Buffer, gradients: &mut Gradients) -> Result<()> {
        let arena = self.settings.arena;
        let op = Rc::clone(&self.nodes[id].op);
        let width = self.nodes[id].width;
        match &*op {
            Op::Embed { table, ids } => {
                if let Some(to) = gradients.accumulator(table)? {
                    embedding::backward(&dy, ids, width, to);
                }
            }
            Op::SelectRows { x, positions } => {
                // Rows that were not selected have a zero gradient.
                let rows = self.segments.last().map_or(0, |last| last.end);
                self.add_to_gradient(*x, rows * width, |to| {
                    embedding::backward(&dy, positions, width, to);
                })?;
            }
            Op::RmsNorm { x, weight, .. } => {
                let values = self.value_or_recompute(*x)?;
                let scale = self.saved_values(id)?;
                let weights = CpuValues::new(weight)?;
                let dweight = gradients.accumulator(weight)?;
                self.add_to_gradient(*x, values.len(), |to| {
                    rms_norm::backward(&values, &weights, &scale, &dy, to, dweight);
                })?;
            }
            Op::LayerNorm {
                x, weight, bias, ..
            } => {
                let values = self.value_or_recompute(*x)?;
                let statistics = self.saved_values(id)?;
                let weights = CpuValues::new(weight)?;
                let dweight = gradients.accumulator(weight)?;
                self.add_to_gradient(*x, values.len(), |to| {
                    layer_norm::backward(&values, &weights, &statistics, &dy, to, dweight);
                })?;
                if let Some(to) = gradients.accumulator(bias)? {
                    sum_rows(&dy, width, to);
                }
            }
            Op::Linear { x, layer, residual } => {
                self.backward_linear(id, *x, layer, &dy, gradients)?;
                if let Some(residual) = residual {
                    self.accumulate_gradient(*residual, dy);
                }
            }
            Op::Gelu { x } => {
                let values = self.value_or_recompute(*x)?;
                // No other operation needs the input: its buffer is overwritten with the gradient.
                self.nodes[*x].value = None;
                let mut dx = self.writable(values)?;
                gelu::backward(&mut dx, &dy);
                self.accumulate_gradient(*x, dx);
            }
            Op::SwiGlu { gate, up } => {
                let gate_values = self.value_or_recompute(*gate)?;
                let up_values = self.value_or_recompute(*up)?;
                // No other operation needs the inputs: their buffers are overwritten with the gradients.
                self.nodes[*gate].value = None;
                self.nodes[*up].value = None;
                let mut dgate = self.writable(gate_values)?;
                let mut dup = self.writable(up_values)?;
                swiglu::backward(&mut dgate, &mut dup, &dy);
                self.accumulate_gradient(*gate, dgate);
                self.accumulate_gradient(*up, dup);
            }
            Op::Positions { x, table, .. } => {
                if let Some(to) = gradients.accumulator(table)? {
                    embedding::backward(&dy, &self.positions(), width, to);
                }
                self.accumulate_gradient(*x, dy);
            }
            Op::Rope { x, .. } => {
                let mut dy = dy;
                self.rotate(&mut dy, width, Rotation::Backward)?;
                self.accumulate_gradient(*x, dy);
            }
            Op::Attention { qkv, window, .. } => {
                let [q, k, v] = *qkv;
                let out = self.value_or_recompute(id)?;
                let lse = self.saved_values(id)?;
                let [q_values, k_values, v_values] = [
                    self.value_or_recompute(q)?,
                    self.value_or_recompute(k)?,
                    self.value_or_recompute(v)?,
                ];
                let attention = self.attention_layer(*window);
                let mut scratch = arena.take(attention.scratch())?;
                let mut dq = arena.take(q_values.len())?;
                let mut dk = arena.take(k_values.len())?;
                let mut dv = arena.take(v_values.len())?;
                let forward = AttentionForward {
                    q_THC: &q_values,
                    k_TGC: &k_values,
                    v_TGC: &v_values,
                    out_THC: &out,
                    lse_TH: &lse,
                };
                let to = [&mut dq, &mut dk, &mut dv].map(|values| Gradient { values, add: false });
                attention.backward(forward, &dy, &mut scratch, to);
                for (id, gradient) in [(q, dq), (k, dk), (v, dv)] {
                    self.accumulate_gradient(id, gradient);
                }
            }
        }
        Ok(())
    }

    /// Computes the gradients of the weights of a linear layer, of its adapter, and of its input `x`.
    fn backward_linear(
        &mut self,
        id: usize,
        x: usize,
        layer: &Projection,
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let TapeSettings {
            arena, precision, ..
        } = self.settings;
        let linear = linear_layer(&layer.weight, precision)?;
        if let Some(to) = gradients.accumulator(&layer.weight)? {
            linear.backward_weight(dy, &self.value_or_recompute(x)?, to);
        }
        if let Some(bias) = &layer.bias
            && let Some(to) = gradients.accumulator(bias)?
        {
            sum_rows(dy, linear.outputs, to);
        }
        let rows = dy.len() / linear.outputs;
        let mut low = None;
        if let Some(adapter) = &layer.adapter {
            let lora = lora_layer(adapter, precision)?;
            if let Some(to) = gradients.accumulator(&adapter.b)? {
                lora.backward_b(dy, &self.saved_values(id)?, to);
            }
            let a = CpuValues::new(&adapter.a)?;
            let mut dlow = arena.take(rows * lora.rank)?;
            lora.backward_low(dy, &CpuValues::new(&adapter.b)?, &mut dlow);
            if let Some(to) = gradients.accumulator(&adapter.a)? {
                lora.backward_a(&dlow, &self.value_or_recompute(x)?, to);
            }
            low = Some((lora, a, dlow));
        }
        if self.nodes[x].requires_grad {
            let weight = CpuValues::new(&layer.weight)?;
            let len = rows * linear.inputs;
            self.add_to_gradient(x, len, |to| linear.backward_input(dy, &weight, to))?;
            if let Some((lora, a, dlow)) = &low {
                self.add_to_gradient(x, len, |to| lora.backward_input(dlow, a, to))?;
            }
        }
        Ok(())
    }

    /// Returns the value of a node, recomputed if it was dropped.
    fn value_or_recompute(&mut self, id: usize) -> Result<Arc<Buffer>> {
        if self.nodes[id].value.is_none() {
            let op = Rc::clone(&self.nodes[id].op);
            for input in op.inputs() {
                self.value_or_recompute(input)?;
            }
            self.compute(id)?;
        }
        self.get(id)
    }

    fn saved_values(&self, id: usize) -> Result<Arc<Buffer>> {
        self.nodes[id]
            .saved
            .clone()
            .context("internal error: the saved values of an operation are missing")
    }

    /// Lets `add` add to the gradient of a node of `len` values. The first call overwrites it.
    fn add_to_gradient(&mut self, id: usize, len: usize, add: impl FnOnce(Gradient)) -> Result<()> {
        let node = &mut self.nodes[id];
        let exists = node.gradient.is_some();
        if !exists {
            node.gradient = Some(self.settings.arena.take(len)?);
        }
        if let Some(values) = &mut node.gradient {
            add(Gradient {
                values,
                add: exists,
            });
        }
        Ok(())
    }

    /// Adds a whole gradient to that of a node. The first gradient is moved, not copied.
    fn accumulate_gradient(&mut self, id: usize, part: Buffer) {
        match &mut self.nodes[id].gradient {
            Some(values) => values
                .par_iter_mut()
                .with_min_len(1 << 14)
                .zip(&*part)
                .for_each(|(sum, part)| *sum += part),
            none => *none = Some(part),
        }
    }
}
