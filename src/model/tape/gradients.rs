//! Gradients of the variables, each made when its first part arrives.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use anyhow::Result;
use candle_core::{Tensor, TensorId};

use crate::ops::Gradient;
use crate::ops::arena::{Arena, Buffer};

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
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.arena.take(tensor.elem_count())?),
        };
        Ok(Some(Gradient { values, add }))
    }

    /// Drops all gradients.
    pub fn clear(&mut self) {
        self.of.clear();
    }
}
