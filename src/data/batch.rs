//! Batches: examples laid end to end for one forward pass, and the order of the examples.

#![allow(
    non_snake_case,
    reason = "arrays carry their shape as a suffix: see the legend in `data`"
)]

use std::ops::Range;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::config;
use crate::data::prepared::shard::ExampleView;

/// B examples of T tokens in total, one after the other without padding, with N supervised positions. Each example is
/// a segment: attention stays inside it, and its position ids start at 0. So the result of an example does not depend
/// on its neighbours.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids; of an encoder-decoder, the input of the decoder.
    pub input_ids_T: Vec<u32>,
    /// Range of each example in `input_ids_T`.
    pub segments_B: Vec<Range<usize>>,
    /// Token ids of the sources of an encoder-decoder (U in total), end to end; else empty.
    pub source_ids_U: Vec<u32>,
    /// Range of each example's source in `source_ids_U`; empty without sources.
    pub source_segments_B: Vec<Range<usize>>,
    /// Index in `input_ids_T` of each supervised position.
    pub positions_N: Vec<u32>,
    /// Token that each position must predict.
    pub labels_N: Vec<u32>,
    /// Offsets of each position's soft labels: those of position n are `soft_offsets_N1[n]..soft_offsets_N1[n + 1]` in
    /// `soft_ids_NK`. An empty range means that the position has none.
    pub soft_offsets_N1: Vec<usize>,
    pub soft_ids_NK: Vec<u32>,
    pub soft_logprobs_NK: Vec<f32>,
    /// Logprob of a label that the teacher emitted from outside its top-k; -inf if unknown, None for other labels.
    /// May be empty if all are None.
    pub sampled_logprobs_N: Vec<Option<f32>>,
    /// True if the label was sampled from the distribution of the logprobs. May be empty if all are false.
    pub is_exact_sample_N: Vec<bool>,
    /// Whether the teacher's logprobs include the end of this position's answer; None if unknown. May be empty if
    /// all are None.
    pub lists_end_N: Vec<Option<bool>>,
    /// Chunks, in order: the range of positions whose text the teacher's tokenizer splits differently, and the negative
    /// log-likelihood of the text under the teacher in nats.
    pub chunks_C: Vec<(Range<usize>, f32)>,
    /// Keys of the examples, for error messages.
    pub keys_B: Vec<String>,
}

impl Batch {
    /// Lays `examples` end to end.
    pub fn new<'a>(examples: impl IntoIterator<Item = ExampleView<'a>>) -> Self {
        let mut batch = Batch {
            soft_offsets_N1: vec![0],
            ..Batch::default()
        };
        for example in examples {
            let start = batch.input_ids_T.len();
            let soft_start = batch.soft_ids_NK.len();
            let first = batch.labels_N.len();
            let chunks = example.chunks();
            let chunks = chunks.map(|(span, nll)| (first + span.start..first + span.end, nll));
            batch.chunks_C.extend(chunks);
            batch.input_ids_T.extend(example.input_ids());
            batch.segments_B.push(start..batch.input_ids_T.len());
            batch.keys_B.push(example.key().to_owned());
            batch.push_source(example.source_ids());
            for position in example.positions() {
                let index = start + position as usize;
                batch.positions_N.push(index as u32);
                batch.labels_N.push(batch.input_ids_T[index + 1]);
            }
            batch.soft_ids_NK.extend(example.soft_ids());
            batch.soft_logprobs_NK.extend(example.soft_logprobs());
            batch.sampled_logprobs_N.extend(example.sampled_logprobs());
            let positions = batch.labels_N.len();
            batch
                .is_exact_sample_N
                .resize(positions, example.is_exact_sample());
            batch.lists_end_N.resize(positions, example.lists_end());
            let ends = example.soft_ends();
            batch
                .soft_offsets_N1
                .extend(ends.map(|end| soft_start + end));
        }
        batch
    }

    /// Appends the source of the next example, if it has one.
    pub(crate) fn push_source(&mut self, ids: impl ExactSizeIterator<Item = u32>) {
        if ids.len() > 0 {
            let start = self.source_ids_U.len();
            self.source_ids_U.extend(ids);
            self.source_segments_B.push(start..self.source_ids_U.len());
        }
    }

    /// Returns the number of tokens, those of the sources included.
    pub(crate) fn tokens(&self) -> usize {
        self.input_ids_T.len() + self.source_ids_U.len()
    }
}

/// Splits the examples of a step into micro-batches. If `train.micro_batch_tokens` is 0, each but the last has
/// `train.micro_batch_size` examples, in order. Else the examples are packed: each micro-batch has at most
/// `train.micro_batch_tokens` tokens, those of the sources included, and a longer example is alone in its micro-batch.
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
    // Micro-batches, each after its number of tokens.
    let mut packed: Vec<(usize, Vec<ExampleView>)> = Vec::new();
    for example in sorted {
        let tokens = example.tokens();
        let first_fit = packed
            .iter_mut()
            .find(|(packed_tokens, _)| packed_tokens + tokens <= max_tokens);
        match first_fit {
            Some((packed_tokens, examples)) => {
                *packed_tokens += tokens;
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
/// A step takes `batch_size` examples, if necessary from several epochs. All steps have the same size, and each example
/// is taken once per epoch.
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
    /// 2^64 divided by the golden ratio.
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    // The product spreads the seed over all bits, so that seed 0, epoch 1 differs from seed 1, epoch 0.
    let spread_seed = seed.wrapping_mul(GOLDEN);
    fastrand::Rng::with_seed(spread_seed.wrapping_add(epoch)).shuffle(&mut order);
    order
}
