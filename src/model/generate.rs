//! Answers to a list of prompts.

use anyhow::{Context, Result};

use super::Model;
pub use super::batcher::{Batcher, FinishReason, GenerateOptions, TokenUpdate};
pub use super::sampling::{SamplingParams, TokenLogprobs};
use crate::tokenizer::Tokenizer;

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Every sampled token, the end of the turn included; their number is what OpenAI and vLLM
    /// call `completion_tokens`.
    pub ids: Vec<u32>,
    /// The tokens' bytes as text, without the end of the turn and without the stop string.
    pub text: String,
    pub finish_reason: FinishReason,
    /// The choices behind `text`, where [`GenerateOptions::top_logprobs`] asks for them.
    pub choices: Vec<TokenLogprobs>,
}

impl Generated {
    fn append(&mut self, update: TokenUpdate) {
        self.ids.push(update.token);
        self.text.push_str(&update.text);
        self.choices.extend(update.choices);
        self.finish_reason = update.finish_reason.unwrap_or(FinishReason::Length);
    }
}

/// Answers `prompts` (token ids, ready to be continued), up to `batch_size` at once, in order.
///
/// Each answer has a seed of its own, derived from that of the options and its place in the list.
/// A prompt that fills the model's context gets an empty answer with [`FinishReason::Length`].
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
        choices: Vec::new(),
    };
    let mut answers = vec![empty; prompts.len()];
    let context = model.config().max_position_embeddings;
    let mut waiting = prompts
        .iter()
        .enumerate()
        .filter(|(_, prompt)| prompt.len() < context);
    let mut batcher = Batcher::new(model, tokenizer, batch_size);
    // The batcher counts its answers from 0: its ids index the prompts in the order of submission.
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
