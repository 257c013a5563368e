//! The backward pass: from the last recorded operation to the first, each computes the gradients of its
//! inputs and weights from the gradient of its output.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use super::{Activations, NodeHandle, Op, Tape, TapeSettings, linear_layer, lora_layer};
use crate::model::gradients::Gradients;
use crate::model::position_bias::PositionBias;
use crate::model::projection::Projection;
use crate::ops::arena::Buffer;
use crate::ops::attention::AttentionForward;
use crate::ops::rope::Rotation;
use crate::ops::{
    CpuValues, GradientMut, VALUES_PER_TASK, activation, embedding, layer_norm, rms_norm, scale,
    sum_rows,
};

impl Tape<'_, '_> {
    /// Computes the gradients of all variables from `droot_NW`, the gradient of the value of `root`, and adds them to
    /// `gradients`.
    ///
    /// # Errors
    /// Where memory runs out, or the activations were discarded.
    pub fn backward(
        mut self,
        root: NodeHandle,
        droot_NW: Buffer,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.activations == Activations::Discard {
            bail!("a backward pass needs the activations of the forward pass");
        }
        self.nodes[*root.0].gradient = Some(droot_NW);
        for id in (0..self.nodes.len()).rev() {
            let dy_TW = self.nodes[id].gradient.take();
            if let Some(dy_TW) = dy_TW.filter(|_| self.nodes[id].requires_grad) {
                self.backward_node(id, dy_TW, gradients)?;
            }
            let node = &mut self.nodes[id];
            node.value = None;
            node.saved = None;
        }
        Ok(())
    }

    /// Runs the backward pass of one operation, where `dy_TW` is the gradient of its value.
    fn backward_node(&mut self, id: usize, dy_TW: Buffer, gradients: &mut Gradients) -> Result<()> {
        let arena = self.settings.arena;
        let op = Rc::clone(&self.nodes[id].op);
        let width = self.nodes[id].width;
        match &*op {
            Op::Embed { table, ids } => {
                if let Some(dtable_VD) = gradients.accumulator(table)? {
                    embedding::backward(&dy_TW, ids, width, dtable_VD);
                }
            }
            Op::SelectRows { x, rows, positions } => {
                // Rows that were not selected have a zero gradient.
                self.accumulate_gradient_with(*x, rows * width, |dx_TD| {
                    embedding::backward(&dy_TW, positions, width, dx_TD);
                })?;
            }
            Op::RmsNorm { x, weight, .. } => {
                // The norm is over rows (T x D) or heads (T H x C), as in the forward pass.
                let x_values = self.value_or_recompute(*x)?;
                let scale = self.saved_values(id)?;
                let weight_values = CpuValues::new(weight)?;
                let dweight = gradients.accumulator(weight)?;
                self.accumulate_gradient_with(*x, x_values.len(), |dx| {
                    rms_norm::backward(&x_values, &weight_values, &scale, &dy_TW, dx, dweight);
                })?;
            }
            Op::LayerNorm {
                x, weight, bias, ..
            } => {
                let x_TD = self.value_or_recompute(*x)?;
                let statistics_T2 = self.saved_values(id)?;
                let weight_D = CpuValues::new(weight)?;
                let dweight_D = gradients.accumulator(weight)?;
                self.accumulate_gradient_with(*x, x_TD.len(), |dx_TD| {
                    layer_norm::backward(
                        &x_TD,
                        &weight_D,
                        &statistics_T2,
                        &dy_TW,
                        dx_TD,
                        dweight_D,
                    );
                })?;
                if let Some(dbias_D) = gradients.accumulator(bias)? {
                    sum_rows(&dy_TW, width, dbias_D);
                }
            }
            Op::Linear { x, layer, residual } => {
                self.backward_linear(id, *x, layer, &dy_TW, gradients)?;
                if let Some(residual) = residual {
                    self.accumulate_gradient(*residual, dy_TW);
                }
            }
            Op::Activate { activation, x } => {
                let x_TF = self.value_or_recompute(*x)?;
                // No other operation needs the input: its buffer is overwritten with the gradient.
                self.nodes[*x].value = None;
                let mut dx_TF = self.make_writable(x_TF)?;
                activation::backward(*activation, &mut dx_TF, &dy_TW);
                self.accumulate_gradient(*x, dx_TF);
            }
            Op::ActivateGated {
                activation,
                gate,
                up,
            } => {
                let gate_TF = self.value_or_recompute(*gate)?;
                let up_TF = self.value_or_recompute(*up)?;
                // No other operation needs the inputs: their buffers are overwritten with the gradients.
                self.nodes[*gate].value = None;
                self.nodes[*up].value = None;
                let mut dgate_TF = self.make_writable(gate_TF)?;
                let mut dup_TF = self.make_writable(up_TF)?;
                activation::gated_backward(*activation, &mut dgate_TF, &mut dup_TF, &dy_TW);
                self.accumulate_gradient(*gate, dgate_TF);
                self.accumulate_gradient(*up, dup_TF);
            }
            Op::Scale { x, factor, .. } => {
                let mut dx_TW = dy_TW;
                scale(&mut dx_TW, *factor);
                self.accumulate_gradient(*x, dx_TW);
            }
            Op::AddPositions { x, table, .. } => {
                if let Some(dtable_SD) = gradients.accumulator(table)? {
                    embedding::backward(&dy_TW, &self.positions(), width, dtable_SD);
                }
                self.accumulate_gradient(*x, dy_TW);
            }
            Op::Rope { x, .. } => {
                let mut dx_TW = dy_TW;
                self.rotate(&mut dx_TW, width, Rotation::Backward)?;
                self.accumulate_gradient(*x, dx_TW);
            }
            Op::Attention { layer, q, kv } => {
                let q = *q;
                let [k, v] = kv.context("internal error: cross-attention without a source")?;
                let out_THC = self.value_or_recompute(id)?;
                let lse_TH = self.saved_values(id)?;
                let q_THC = self.value_or_recompute(q)?;
                let k_TGC = self.value_or_recompute(k)?;
                let v_TGC = self.value_or_recompute(v)?;
                let bias = self.bias_values(layer)?;
                let attention = self.attention_op(layer.kind, bias.as_ref());
                let mut scratch = arena.take(attention.scratch_len())?;
                let mut dq_THC = arena.take(q_THC.len())?;
                let mut dk_TGC = arena.take(k_TGC.len())?;
                let mut dv_TGC = arena.take(v_TGC.len())?;
                let forward = AttentionForward {
                    q_THC: &q_THC,
                    k_TGC: &k_TGC,
                    v_TGC: &v_TGC,
                    out_THC: &out_THC,
                    lse_TH: &lse_TH,
                };
                let dqkv = [&mut dq_THC, &mut dk_TGC, &mut dv_TGC]
                    .map(|values| GradientMut { values, add: false });
                let dbias_HJ = attention.backward(forward, &dy_TW, &mut scratch, dqkv);
                if let (Some(values), Some(PositionBias { table_EH, buckets })) =
                    (&bias, &layer.bias)
                    && let Some(dtable_EH) = gradients.accumulator(table_EH)?
                {
                    values.backward(&dbias_HJ, *buckets, dtable_EH);
                }
                for (input, gradient) in [(q, dq_THC), (k, dk_TGC), (v, dv_TGC)] {
                    self.accumulate_gradient(input, gradient);
                }
            }
        }
        Ok(())
    }

    /// Computes the gradients of the weight and bias of a linear layer, of its adapter, and of its input
    /// `x`.
    fn backward_linear(
        &mut self,
        id: usize,
        x: usize,
        layer: &Projection,
        dy_TO: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let TapeSettings {
            arena, precision, ..
        } = self.settings;
        let linear = linear_layer(&layer.weight, precision)?;
        if let Some(dweight_OI) = gradients.accumulator(&layer.weight)? {
            linear.backward_weight(dy_TO, &self.value_or_recompute(x)?, dweight_OI);
        }
        if let Some(bias) = &layer.bias
            && let Some(dbias_O) = gradients.accumulator(bias)?
        {
            sum_rows(dy_TO, linear.outputs, dbias_O);
        }
        let rows = dy_TO.len() / linear.outputs;
        let mut adapter_input = None;
        if let Some(adapter) = &layer.adapter {
            let lora = lora_layer(adapter, precision)?;
            if let Some(db_OR) = gradients.accumulator(&adapter.b)? {
                lora.backward_b(dy_TO, &self.saved_values(id)?, db_OR);
            }
            let a_RI = CpuValues::new(&adapter.a)?;
            let mut dxa_TR = arena.take(rows * lora.rank)?;
            lora.backward_xa(dy_TO, &CpuValues::new(&adapter.b)?, &mut dxa_TR);
            if let Some(da_RI) = gradients.accumulator(&adapter.a)? {
                lora.backward_a(&dxa_TR, &self.value_or_recompute(x)?, da_RI);
            }
            adapter_input = Some((lora, a_RI, dxa_TR));
        }
        if self.nodes[x].requires_grad {
            let weight_OI = CpuValues::new(&layer.weight)?;
            let len = rows * linear.inputs;
            self.accumulate_gradient_with(x, len, |dx_TI| {
                linear.backward_input(dy_TO, &weight_OI, dx_TI);
            })?;
            if let Some((lora, a_RI, dxa_TR)) = &adapter_input {
                self.accumulate_gradient_with(x, len, |dx_TI| {
                    lora.backward_input(dxa_TR, a_RI, dx_TI);
                })?;
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
        self.node_value(id)
    }

    fn saved_values(&self, id: usize) -> Result<Arc<Buffer>> {
        self.nodes[id]
            .saved
            .clone()
            .context("internal error: the saved values of an operation are missing")
    }

    /// Calls `backward` with the gradient of a node of `len` values. `backward` adds its result to the gradient, or
    /// overwrites the buffer if the node has no gradient yet.
    fn accumulate_gradient_with(
        &mut self,
        id: usize,
        len: usize,
        backward: impl FnOnce(GradientMut),
    ) -> Result<()> {
        let node = &mut self.nodes[id];
        let add = node.gradient.is_some();
        if !add {
            node.gradient = Some(self.settings.arena.take(len)?);
        }
        if let Some(values) = &mut node.gradient {
            backward(GradientMut { values, add });
        }
        Ok(())
    }

    /// Adds `gradient` to the gradient of a node. The first gradient is moved, not copied.
    fn accumulate_gradient(&mut self, id: usize, gradient: Buffer) {
        match &mut self.nodes[id].gradient {
            Some(sums) => sums
                .par_iter_mut()
                .with_min_len(VALUES_PER_TASK)
                .zip(&*gradient)
                .for_each(|(sum, value)| *sum += value),
            none => *none = Some(gradient),
        }
    }
}
