//! Batches: examples laid end to end for one forward pass, and the order of the examples.

use std::ops::Range;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::config;
use crate::data::prepared::shard::ExampleView;

/// B examples of T tokens in total, one after the other without padding, with N supervised positions. Attention stays
/// inside a segment, and position ids start at 0 there: an example's result does not depend on its neighbours.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids (T).
    pub input_ids: Vec<u32>,
    /// Range of each example in `input_ids` (B).
    pub segments: Vec<Range<usize>>,
    /// Index in `input_ids` of each supervised position (N).
    pub positions: Vec<u32>,
    /// Token that each position must predict (N).
    pub labels: Vec<u32>,
    /// The soft labels of position n are `soft_ids[soft_offsets[n]..soft_offsets[n + 1]]`; an empty range means none
    /// (N + 1).
    pub soft_offsets: Vec<usize>,
    pub soft_ids: Vec<u32>,
    pub soft_logprobs: Vec<f32>,
    /// Logprob of a label that the teacher emitted from outside its top-k; -inf if unknown, None for other labels (N,
    /// or empty if all are None).
    pub sampled_logprob: Vec<Option<f32>>,
    /// True if the label was sampled from the distribution of the logprobs (N, or empty if none was).
    pub is_exact_sample: Vec<bool>,
    /// Whether the teacher's logprobs include the end of this position's answer; None if unknown (N, or empty if all
    /// are None).
    pub lists_end: Vec<Option<bool>>,
    /// Chunks, in order: ranges of positions whose text the teacher's tokenizer splits differently, and the negative
    /// log-likelihood of the text under the teacher in nats.
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
            let start = batch.input_ids.len();
            let soft_start = batch.soft_ids.len();
            let first = batch.labels.len();
            let chunks = example.chunks();
            let chunks = chunks.map(|(span, nll)| (first + span.start..first + span.end, nll));
            batch.chunks.extend(chunks);
            batch.input_ids.extend(example.input_ids());
            batch.segments.push(start..batch.input_ids.len());
            batch.keys.push(example.key().to_owned());
            for position in example.positions() {
                let index = start + position as usize;
                batch.positions.push(index as u32);
                batch.labels.push(batch.input_ids[index + 1]);
            }
            batch.soft_ids.extend(example.soft_ids());
            batch.soft_logprobs.extend(example.soft_logprobs());
            batch.sampled_logprob.extend(example.sampled_logprobs());
            batch
                .is_exact_sample
                .resize(batch.labels.len(), example.is_exact_sample());
            let lists_end = example.lists_end();
            batch.lists_end.resize(batch.labels.len(), lists_end);
            let ends = example.soft_ends();
            batch.soft_offsets.extend(ends.map(|end| soft_start + end));
        }
        batch
    }
}

/// Splits the examples of a step into micro-batches: `train.micro_batch_size` examples each, in order; or packed into
/// at most `train.micro_batch_tokens` tokens each, except for a longer example, which is alone.
///
/// Packing is first-fit decreasing: long examples come first and short ones fill the gaps. The order within a step
/// affects only the rounding, because gradients are sums over the step.
pub fn micro_batches<'a>(
    examples: &[ExampleView<'a>],
    settings: &config::TrainConfig,
) -> Vec<Vec<ExampleView<'a>>> {
    let max_tokens = settings.micro_batch_tokens;
    if max_tokens == 0 {
        let chunks = examples.chunks(settings.micro_batch_size.max(1));
        return chunks.map(<[_]>::to_vec).collect();
    }
    let mut sorted = examples.to_vec();
    sorted.sort_by_key(|example| std::cmp::Reverse(example.tokens()));
    // Micro-batches with their number of tokens.
    let mut packed: Vec<(usize, Vec<ExampleView>)> = Vec::new();
    for example in sorted {
        let tokens = example.tokens();
        match packed
            .iter_mut()
            .find(|(used, _)| used + tokens <= max_tokens)
        {
            Some((used, examples)) => {
                *used += tokens;
                examples.push(example);
            }
            None => packed.push((tokens, vec![example])),
        }
    }
    packed.into_iter().map(|(_, examples)| examples).collect()
}

/// Position in the order of the examples: the next example is number `index` of `epoch`, both from 0. Part of a
/// checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: u64,
    pub index: usize,
}

/// Selects the examples of each step. Each epoch has its own random order, which depends on the seed and the number of
/// the epoch.
///
/// A step takes `batch_size` examples, if necessary from two epochs. All steps have the same size, and each example is
/// taken once per epoch.
#[derive(Debug, Clone)]
pub struct BatchSampler {
    batch_size: usize,
    seed: u64,
    cursor: Cursor,
    /// Order of the current epoch.
    order: Vec<usize>,
}

impl BatchSampler {
    /// Iterates over `examples` examples from `cursor`; a new run starts at the default cursor.
    ///
    /// # Errors
    /// If a size is 0, or the cursor is outside the examples, which means that the data has changed.
    pub fn new(examples: usize, batch_size: usize, seed: u64, cursor: Cursor) -> Result<Self> {
        ensure!(examples > 0, "there are no examples to train on");
        ensure!(batch_size > 0, "`train.batch_size` must be at least 1");
        ensure!(
            cursor.index <= examples,
            "the checkpoint is at example {} of {examples}: the data has changed since; train with \
             `--fresh`",
            cursor.index
        );
        Ok(Self {
            batch_size,
            seed,
            cursor,
            order: order(examples, seed, cursor.epoch),
        })
    }

    /// Position of the first example of the next step.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Indices of the examples of the next step.
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

/// Order of the examples in an epoch.
fn order(examples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..examples).collect();
    // Spreading the seed over all bits makes seed 0, epoch 1 differ from seed 1, epoch 0.
    let spread = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    fastrand::Rng::with_seed(spread.wrapping_add(epoch)).shuffle(&mut order);
    order
}
