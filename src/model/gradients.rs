//! The gradients of the variables, from the tape or from candle. The tape's gradients are buffers in an
//! arena, allocated when they are first written.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId};

use crate::ops::GradientMut;
use crate::ops::arena::{Arena, Buffer};

/// Gradients of the variables, summed over micro-batches.
pub struct Gradients {
    arena: Arena,
    /// Gradients computed by the tape.
    tape: HashMap<TensorId, Buffer>,
    /// Gradients computed by candle, on the device of their variables.
    candle: HashMap<TensorId, Tensor>,
}

impl Gradients {
    /// Creates an empty set. The tape's gradients are allocated in `arena`.
    pub fn new(arena: Arena) -> Self {
        Self {
            arena,
            tape: HashMap::new(),
            candle: HashMap::new(),
        }
    }

    /// Returns the gradient of `variable` that the tape computed.
    pub fn get_tape(&self, variable: &Tensor) -> Option<&[f32]> {
        self.tape.get(&variable.id()).map(|buffer| &**buffer)
    }

    /// Returns the gradient of `variable` that candle computed.
    pub fn get_candle(&self, variable: &Tensor) -> Option<&Tensor> {
        self.candle.get(&variable.id())
    }

    /// Returns the buffer in which the tape sums the gradient of `tensor`, or None if `tensor` is not a
    /// variable.
    ///
    /// # Errors
    /// Where memory runs out.
    pub(crate) fn accumulator(&mut self, tensor: &Tensor) -> Result<Option<GradientMut<'_>>> {
        if !tensor.is_variable() {
            return Ok(None);
        }
        let add = self.tape.contains_key(&tensor.id());
        let values = match self.tape.entry(tensor.id()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.arena.take(tensor.elem_count())?),
        };
        Ok(Some(GradientMut { values, add }))
    }

    /// Adds `gradient`, which candle computed, to the gradient of `variable`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn add(&mut self, variable: TensorId, gradient: &Tensor) -> Result<()> {
        let sum = match self.candle.get(&variable) {
            Some(sum) => (sum + gradient)?,
            None => gradient.clone(),
        };
        self.candle.insert(variable, sum.detach());
        Ok(())
    }

    /// Adds all gradients of a backward pass of candle.
    ///
    /// # Errors
    /// Where the device fails.
    pub(crate) fn add_all(&mut self, store: &GradStore) -> Result<()> {
        for variable in store.get_ids() {
            if let Some(gradient) = store.get_id(*variable) {
                self.add(*variable, gradient)?;
            }
        }
        Ok(())
    }

    /// Drops all gradients.
    pub fn clear(&mut self) {
        self.tape.clear();
        self.candle.clear();
    }
}
