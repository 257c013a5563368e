//! The backward pass: operations in reverse, each sending its gradient to what it was made of.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use super::{Memory, Op, Setting, Tape, Value, linear_of, lora_of};
use crate::model::gradients::Gradients;
use crate::model::projection::Projection;
use crate::ops::arena::Buffer;
use crate::ops::attention::Forward;
use crate::ops::rope::Turn;
use crate::ops::{Gradient, Values, embedding, gelu, layer_norm, rms_norm, sum_rows, swiglu};

impl Tape<'_, '_> {
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
        let arena = self.setting.arena;
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
            Op::LayerNorm {
                x, weight, bias, ..
            } => {
                let values = self.ensure(*x)?;
                let statistics = self.saved(id)?;
                let weights = Values::of(weight)?;
                let dweight = gradients.of(weight)?;
                self.add_gradient(*x, values.len(), |to| {
                    layer_norm::backward(&values, &weights, &statistics, &dy, to, dweight);
                })?;
                if let Some(to) = gradients.of(bias)? {
                    sum_rows(&dy, width, to);
                }
            }
            Op::Linear { x, layer, residual } => {
                self.backward_linear(id, *x, layer, &dy, gradients)?;
                if let Some(residual) = residual {
                    self.give_gradient(*residual, dy);
                }
            }
            Op::Gelu { x } => {
                let values = self.ensure(*x)?;
                // Nothing else needs the input any more: it becomes its own gradient.
                self.nodes[*x].value = None;
                let mut dx = self.own(values)?;
                gelu::backward(&mut dx, &dy);
                self.give_gradient(*x, dx);
            }
            Op::SwiGlu { gate, up } => {
                let (values, others) = (self.ensure(*gate)?, self.ensure(*up)?);
                // Nothing else needs the inputs any more: they become their own gradients.
                (self.nodes[*gate].value, self.nodes[*up].value) = (None, None);
                let [mut dgate, mut dup] = [self.own(values)?, self.own(others)?];
                swiglu::backward(&mut dgate, &mut dup, &dy);
                self.give_gradient(*gate, dgate);
                self.give_gradient(*up, dup);
            }
            Op::Positions { x, table, .. } => {
                if let Some(to) = gradients.of(table)? {
                    embedding::backward(&dy, &self.positions(), width, to);
                }
                self.give_gradient(*x, dy);
            }
            Op::Rope { x, .. } => {
                let mut dy = dy;
                self.turn(&mut dy, width, Turn::Backward)?;
                self.give_gradient(*x, dy);
            }
            Op::Attention { qkv, window, .. } => {
                let [q, k, v] = *qkv;
                let out = self.ensure(id)?;
                let lse = self.saved(id)?;
                let [q_values, k_values, v_values] =
                    [self.ensure(q)?, self.ensure(k)?, self.ensure(v)?];
                let attention = self.attention_layer(*window);
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
                for (id, gradient) in [(q, dq), (k, dk), (v, dv)] {
                    self.give_gradient(id, gradient);
                }
            }
        }
        Ok(())
    }

    /// Gradients of a linear layer's weights, of its adapter, and of its input `x`.
    fn backward_linear(
        &mut self,
        id: usize,
        x: usize,
        layer: &Projection,
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Setting {
            arena, precision, ..
        } = self.setting;
        let linear = linear_of(&layer.weight, precision)?;
        if let Some(to) = gradients.of(&layer.weight)? {
            linear.backward_weight(dy, &self.ensure(x)?, to);
        }
        if let Some(bias) = &layer.bias
            && let Some(to) = gradients.of(bias)?
        {
            sum_rows(dy, linear.outputs, to);
        }
        let rows = dy.len() / linear.outputs;
        let mut low = None;
        if let Some(adapter) = &layer.adapter {
            let lora = lora_of(adapter, precision)?;
            if let Some(to) = gradients.of(&adapter.b)? {
                lora.backward_b(dy, &self.saved(id)?, to);
            }
            let a = Values::of(&adapter.a)?;
            let mut dlow = arena.take(rows * lora.rank)?;
            lora.backward_low(dy, &Values::of(&adapter.b)?, &mut dlow);
            if let Some(to) = gradients.of(&adapter.a)? {
                lora.backward_a(&dlow, &self.ensure(x)?, to);
            }
            low = Some((lora, a, dlow));
        }
        if self.nodes[x].trains {
            let weight = Values::of(&layer.weight)?;
            let len = rows * linear.inputs;
            self.add_gradient(x, len, |to| linear.backward_input(dy, &weight, to))?;
            if let Some((lora, a, dlow)) = &low {
                self.add_gradient(x, len, |to| lora.backward_input(dlow, a, to))?;
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
