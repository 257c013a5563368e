//! Gradients of the variables. Each is allocated when its first part arrives.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId};

use crate::ops::Gradient;
use crate::ops::arena::{Arena, Buffer};

/// Gradients of the variables, summed over micro-batches.
pub struct Gradients {
    arena: Arena,
    /// Gradients computed by the tape.
    on_cpu: HashMap<TensorId, Buffer>,
    /// Gradients computed by candle, on the device of their variables.
    on_device: HashMap<TensorId, Tensor>,
}

impl Gradients {
    /// Creates an empty set, which takes its memory from `arena`.
    pub fn new(arena: Arena) -> Self {
        Self {
            arena,
            on_cpu: HashMap::new(),
            on_device: HashMap::new(),
        }
    }

    /// Returns the gradient of a variable that the tape computed.
    pub fn get(&self, variable: &Tensor) -> Option<&[f32]> {
        self.on_cpu.get(&variable.id()).map(|buffer| &**buffer)
    }

    /// Returns the gradient of a variable that candle computed.
    pub fn get_on_device(&self, variable: &Tensor) -> Option<&Tensor> {
        self.on_device.get(&variable.id())
    }

    /// Returns the destination for a part of the gradient of `tensor`; None if `tensor` is not a
    /// variable.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn accumulator(&mut self, tensor: &Tensor) -> Result<Option<Gradient<'_>>> {
        if !tensor.is_variable() {
            return Ok(None);
        }
        let add = self.on_cpu.contains_key(&tensor.id());
        let values = match self.on_cpu.entry(tensor.id()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.arena.take(tensor.elem_count())?),
        };
        Ok(Some(Gradient { values, add }))
    }

    /// Adds a part of the gradient of `variable` that candle computed.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn add(&mut self, variable: TensorId, part: &Tensor) -> Result<()> {
        let sum = match self.on_device.get(&variable) {
            Some(sum) => (sum + part)?,
            None => part.clone(),
        };
        self.on_device.insert(variable, sum.detach());
        Ok(())
    }

    /// Adds all gradients of a backward pass of candle.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn add_all(&mut self, store: &GradStore) -> Result<()> {
        for variable in store.get_ids() {
            if let Some(part) = store.get_id(*variable) {
                self.add(*variable, part)?;
            }
        }
        Ok(())
    }

    /// Drops all gradients.
    pub fn clear(&mut self) {
        self.on_cpu.clear();
        self.on_device.clear();
    }
}
