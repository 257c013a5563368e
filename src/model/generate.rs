//! Generates answers to a list of prompts.

use anyhow::{Context, Result};

use super::Model;
pub use super::batcher::{Batcher, FinishReason, GenerateOptions, TokenUpdate};
pub use super::sampling::{SamplingParams, TokenLogprobs};
use crate::tokenizer::Tokenizer;

/// A generated answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// All sampled tokens, the end of the turn included. Their number is `completion_tokens` in the APIs of
    /// OpenAI and vLLM.
    pub ids: Vec<u32>,
    /// The decoded text, without the end of the turn and without the stop string.
    pub text: String,
    pub finish_reason: FinishReason,
    /// Logprobs of `ids`, without those of the stop string, if [`GenerateOptions::top_logprobs`] is set.
    pub token_logprobs: Vec<TokenLogprobs>,
}

impl Generated {
    fn append(&mut self, update: TokenUpdate) {
        self.ids.push(update.token);
        self.text.push_str(&update.text);
        self.token_logprobs.extend(update.token_logprobs);
        self.finish_reason = update.finish_reason.unwrap_or(FinishReason::Length);
    }
}

/// Generates an answer to each of `prompts` (token ids), up to `batch_size` at a time. Answers have the
/// order of the prompts.
///
/// Each answer has its own seed, derived from the seed in `options` and its index in the list. A prompt
/// that fills the model's context gets an empty answer with [`FinishReason::Length`].
///
/// # Errors
/// Where a prompt is empty, or a forward pass fails.
pub fn batch(
    model: &Model,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    batch_size: usize,
) -> Result<Vec<Generated>> {
    let empty = Generated {
        ids: Vec::new(),
        text: String::new(),
        finish_reason: FinishReason::Length,
        token_logprobs: Vec::new(),
    };
    let mut answers = vec![empty; prompts.len()];
    let context = model.config().max_position_embeddings;
    let mut waiting = prompts
        .iter()
        .enumerate()
        .filter(|(_, prompt)| prompt.len() < context);
    let mut batcher = Batcher::new(model, tokenizer, batch_size);
    // The ids of the batcher count from 0, in the order of submission.
    let mut submitted = Vec::new();
    loop {
        while batcher.has_free_slot()
            && let Some((index, prompt)) = waiting.next()
        {
            let options = GenerateOptions {
                sampling: options.sampling.for_answer(index),
                ..options.clone()
            };
            batcher
                .submit(prompt.clone(), &options)
                .with_context(|| format!("prompt {}", index + 1))?;
            submitted.push(index);
        }
        if batcher.is_idle() {
            return Ok(answers);
        }
        for update in batcher.step()? {
            answers[submitted[update.id as usize]].append(update);
        }
    }
}
