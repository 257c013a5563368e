//! Examples laid end to end for one forward pass, and the order in which they come.

use std::ops::Range;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::example::Example;

/// B examples of T tokens in all, one after the other without padding. Attention stays inside a
/// segment and positions start at 0 in each, so an example's result does not depend on its
/// neighbours. N is the number of supervised positions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// (T)
    pub input_ids: Vec<u32>,
    /// Where each example lies in `input_ids` (B).
    pub segments: Vec<Range<usize>>,
    /// Index in `input_ids` of each supervised position (N).
    pub positions: Vec<u32>,
    /// The token that each must predict (N).
    pub labels: Vec<u32>,
    /// Soft labels of position n are `soft_ids[soft_offsets[n]..soft_offsets[n + 1]]`; an empty
    /// range means none (N + 1).
    pub soft_offsets: Vec<usize>,
    pub soft_ids: Vec<u32>,
    pub soft_logprobs: Vec<f32>,
    /// Keys of the examples, for error messages (B).
    pub keys: Vec<String>,
}

impl Batch {
    /// Lays `examples` end to end.
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Batch {
            soft_offsets: vec![0],
            ..Batch::default()
        };
        for example in examples {
            let start = batch.input_ids.len();
            batch.input_ids.extend_from_slice(&example.input_ids);
            batch.segments.push(start..batch.input_ids.len());
            batch.keys.push(example.key.clone());
            for target in &example.targets {
                batch.positions.push((start + target.position) as u32);
                batch.labels.push(target.label);
                if let Some(soft) = &target.soft {
                    batch.soft_ids.extend_from_slice(&soft.ids);
                    batch.soft_logprobs.extend_from_slice(&soft.logprobs);
                }
                batch.soft_offsets.push(batch.soft_ids.len());
            }
        }
        batch
    }
}

/// Where the order of the examples stands: the next one to take is number `index` of `epoch`. Part
/// of a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: u64,
    pub index: usize,
}

/// The order in which examples are trained on: every epoch in an order of its own, which the seed
/// and the epoch's number decide.
///
/// A step takes `batch_size` examples, across the border of two epochs where it must: all steps are
/// the same size, and each example is taken once per epoch.
#[derive(Debug, Clone)]
pub struct Batches {
    batch_size: usize,
    seed: u64,
    cursor: Cursor,
    /// The order of the epoch that the cursor is in.
    order: Vec<usize>,
}

impl Batches {
    /// Over `examples` examples, from `cursor` on; a new run starts at the default.
    ///
    /// # Errors
    /// If a size is 0, or the cursor lies outside, which means that the data has changed since.
    pub fn new(examples: usize, batch_size: usize, seed: u64, cursor: Cursor) -> Result<Self> {
        ensure!(examples > 0, "there are no examples to train on");
        ensure!(batch_size > 0, "`train.batch_size` must be at least 1");
        ensure!(
            cursor.index <= examples,
            "the checkpoint stands at example {} of {examples}: the data has changed since; train \
             with `--fresh`",
            cursor.index
        );
        Ok(Self {
            batch_size,
            seed,
            cursor,
            order: order(examples, seed, cursor.epoch),
        })
    }

    /// Where the next step begins.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Which examples the next step takes.
    pub fn next_step(&mut self) -> Vec<usize> {
        let mut indices = Vec::with_capacity(self.batch_size);
        while indices.len() < self.batch_size {
            if self.cursor.index == self.order.len() {
                self.cursor.epoch += 1;
                self.cursor.index = 0;
                self.order = order(self.order.len(), self.seed, self.cursor.epoch);
            }
            indices.push(self.order[self.cursor.index]);
            self.cursor.index += 1;
        }
        indices
    }
}

/// The order of an epoch.
fn order(examples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..examples).collect();
    // The seed is spread over all bits first: seed 0 epoch 1 and seed 1 epoch 0 must differ.
    let spread = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    fastrand::Rng::with_seed(spread.wrapping_add(epoch)).shuffle(&mut order);
    order
}
