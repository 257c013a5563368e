//! Answers that the student writes itself, for the teacher to judge.
//!
//! What a student learns from given answers holds for texts that begin as the teacher's do; its own soon
//! begin otherwise. Here it writes answers to the prompts of the data with its weights of the moment, and
//! learns on each of their positions what the teacher would have said there: generalised knowledge
//! distillation (GKD, Agarwal et al., arXiv 2306.13649), with reverse KL as in MiniLLM (Gu et al., arXiv
//! 2306.08543). The texts count as given: no gradient goes through the sampling.

use std::ops::Range;

use anyhow::Result;

use super::loss::divergence::Divergence;
use crate::config::{Config, Loss};
use crate::data::batch::Batch;
use crate::data::prepared::ExampleView;
use crate::data::tokenizer::Tokenizer;
use crate::model::Model;
use crate::model::generate::{self, GenerateOptions, Sampling};

/// How the student writes.
pub struct OnPolicy<'a> {
    settings: &'a crate::config::OnPolicy,
    tokenizer: &'a Tokenizer,
    /// Answers in a batch.
    batch_size: usize,
    seed: u64,
}

impl<'a> OnPolicy<'a> {
    /// None where it is not asked for.
    pub fn of(config: &'a Config, tokenizer: &'a Tokenizer) -> Option<Self> {
        config.train.on_policy.then_some(Self {
            settings: &config.on_policy,
            tokenizer,
            batch_size: config.train.micro_batch_size,
            seed: config.train.seed,
        })
    }

    /// The divergence that the written answers are judged by.
    pub fn divergence(&self, settings: &Loss) -> Option<[Divergence; 2]> {
        Divergence::of(&Loss {
            kd: self.settings.kd,
            ..settings.clone()
        })
    }

    /// The examples of a step, cut into those that are learnt as they are and those whose prompts the
    /// student answers.
    pub fn cut<'e, 'v>(
        &self,
        examples: &'e [ExampleView<'v>],
    ) -> (&'e [ExampleView<'v>], &'e [ExampleView<'v>]) {
        let written = (self.settings.share * examples.len() as f64).round() as usize;
        examples.split_at(examples.len() - written.min(examples.len()))
    }

    /// Answers the prompts of `examples` in step `step`. The same step and weights give the same answers.
    ///
    /// # Errors
    /// Where a prompt does not fit the model.
    pub fn write(
        &self,
        student: &Model,
        step: u64,
        examples: &[ExampleView],
    ) -> Result<Vec<Batch>> {
        let prompts: Vec<Vec<u32>> = examples.iter().map(|example| prompt(*example)).collect();
        let options = GenerateOptions {
            max_tokens: self.settings.max_tokens as usize,
            sampling: Sampling {
                temperature: self.settings.temperature,
                top_p: 1.0,
                // Far apart from one step to the next, as answers are within a step.
                seed: self.seed ^ step.wrapping_mul(0xd134_2543_de82_ef95),
            },
            ..GenerateOptions::default()
        };
        let answers =
            generate::batch(student, self.tokenizer, &prompts, &options, self.batch_size)?;
        let mut written = Vec::new();
        for (start, chunk) in prompts.chunks(self.batch_size).enumerate() {
            let start = start * self.batch_size;
            let mut batch = Batch {
                soft_offsets: vec![0],
                ..Batch::default()
            };
            for (at, prompt) in chunk.iter().enumerate() {
                let answer = &answers[start + at].ids;
                push(&mut batch, prompt, answer, examples[start + at].key());
            }
            if !batch.labels.is_empty() {
                written.push(batch);
            }
        }
        Ok(written)
    }
}

/// What stands before the last answer of an example.
fn prompt(example: ExampleView) -> Vec<u32> {
    let mut start = 0;
    let mut before = None;
    for position in example.positions() {
        if before.is_none_or(|before: u32| before + 1 != position) {
            start = position as usize;
        }
        before = Some(position);
    }
    example.input_ids().take(start + 1).collect()
}

/// Appends a prompt with its answer, every token of which is supervised.
fn push(batch: &mut Batch, prompt: &[u32], answer: &[u32], key: &str) {
    if answer.is_empty() {
        return;
    }
    let first = batch.input_ids.len();
    batch.input_ids.extend(prompt);
    batch.input_ids.extend(answer);
    let end = batch.input_ids.len();
    batch.segments.push(Range { start: first, end });
    batch.keys.push(key.to_owned());
    for (at, token) in answer.iter().enumerate() {
        batch.positions.push((first + prompt.len() + at - 1) as u32);
        batch.labels.push(*token);
        batch.soft_offsets.push(batch.soft_ids.len());
    }
}
