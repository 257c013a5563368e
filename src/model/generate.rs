//! Generates answers to a list of prompts.

use anyhow::{Context, Result};

use super::Model;
pub use super::batcher::{Batcher, FinishReason, GenerateOptions, TokenUpdate};
pub use super::sampling::{SamplingParams, TokenLogprobs};
use crate::tokenizer::Tokenizer;

/// A generated answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// All sampled tokens, including the end of the turn. Their number is `completion_tokens` in the APIs of
    /// OpenAI and vLLM.
    pub ids: Vec<u32>,
    /// The decoded text, without the end of the turn and without the stop string.
    pub text: String,
    pub finish_reason: FinishReason,
    /// Logprobs of `ids`, without tokens that begin in the stop string, if [`GenerateOptions::top_logprobs`] is set.
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

/// Generates an answer to each of `prompts` (token ids), up to `batch_size` at a time. Returns the answers in
/// the order of the prompts.
///
/// The seed of each answer is derived from the seed in `options` and the index of its prompt. The answer to a prompt
/// that fills the model's context is empty, with [`FinishReason::Length`].
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
    let config = model.config();
    let mut waiting = prompts
        .iter()
        .enumerate()
        .filter(|(_, prompt)| config.fits_prompt(prompt.len()));
    let mut batcher = Batcher::new(model, tokenizer, batch_size);
    // The batcher numbers its answers from 0 in the order of submission: this maps its ids to prompts.
    let mut prompt_indices = Vec::new();
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
            prompt_indices.push(index);
        }
        if batcher.is_idle() {
            return Ok(answers);
        }
        for update in batcher.step()? {
            answers[prompt_indices[update.id as usize]].append(update);
        }
    }
}
