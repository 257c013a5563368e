//! Examples laid end to end for one forward pass, and the order in which they come.

use std::ops::Range;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::config;
use crate::data::prepared::shard::ExampleView;

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
    /// The logprob of a label that the teacher emitted from outside its top-k, -inf where it is not
    /// known (N; or empty, where there are none).
    pub drawn: Vec<Option<f32>>,
    /// Was the label drawn from the very distribution that the logprobs tell? (N; or empty, where
    /// none was.)
    pub exact: Vec<bool>,
    /// Does the teacher say how likely the end of this answer was? (N; or empty, where nobody knows.)
    pub lists_end: Vec<Option<bool>>,
    /// Positions that spell what the teacher cuts into other tokens, in order, with the negative
    /// log-likelihood of that text under the teacher.
    pub chunks: Vec<(Range<usize>, f32)>,
    /// Keys of the examples, for error messages (B).
    pub keys: Vec<String>,
}

impl Batch {
    /// Lays `examples` end to end.
    pub fn new<'a>(examples: impl IntoIterator<Item = ExampleView<'a>>) -> Self {
        let mut batch = Batch {
            soft_offsets: vec![0],
            ..Batch::default()
        };
        for example in examples {
            let (start, soft_start) = (batch.input_ids.len(), batch.soft_ids.len());
            let first = batch.labels.len();
            let chunks = example.chunks();
            let chunks = chunks.map(|(span, nll)| (first + span.start..first + span.end, nll));
            batch.chunks.extend(chunks);
            batch.input_ids.extend(example.input_ids());
            batch.segments.push(start..batch.input_ids.len());
            batch.keys.push(example.key().to_owned());
            for position in example.positions() {
                let at = start + position as usize;
                batch.positions.push(at as u32);
                batch.labels.push(batch.input_ids[at + 1]);
            }
            batch.soft_ids.extend(example.soft_ids());
            batch.soft_logprobs.extend(example.soft_logprobs());
            batch.drawn.extend(example.drawn());
            batch.exact.resize(batch.labels.len(), example.is_exact());
            let lists_end = example.lists_end();
            batch.lists_end.resize(batch.labels.len(), lists_end);
            let ends = example.soft_ends();
            batch.soft_offsets.extend(ends.map(|end| soft_start + end));
        }
        batch
    }
}

/// Cuts the examples of a step into micro-batches: as they come, `train.micro_batch_size` at a time,
/// or, with `train.micro_batch_tokens`, packed so that none has more tokens than that, save one that
/// is a longer example alone.
///
/// Packing is first-fit decreasing: the longest examples come first, so that long ones share a
/// micro-batch with their like and short ones fill the gaps. The order within a step changes
/// nothing but rounding: gradients are sums over all of it.
pub fn micro_batches<'a>(
    examples: &[ExampleView<'a>],
    settings: &config::TrainConfig,
) -> Vec<Vec<ExampleView<'a>>> {
    let room = settings.micro_batch_tokens;
    if room == 0 {
        let cut = examples.chunks(settings.micro_batch_size.max(1));
        return cut.map(<[_]>::to_vec).collect();
    }
    let mut sorted = examples.to_vec();
    sorted.sort_by_key(|example| std::cmp::Reverse(example.tokens()));
    // With the tokens in each.
    let mut cut: Vec<(usize, Vec<ExampleView>)> = Vec::new();
    for example in sorted {
        let tokens = example.tokens();
        match cut.iter_mut().find(|(used, _)| used + tokens <= room) {
            Some((used, examples)) => {
                *used += tokens;
                examples.push(example);
            }
            None => cut.push((tokens, vec![example])),
        }
    }
    cut.into_iter().map(|(_, examples)| examples).collect()
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
