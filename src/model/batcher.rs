//! Continuous batching: many answers grow together, one token each per forward pass.
//!
//! A finished answer leaves its slot at once, and the next prompt takes it in the following pass.
//! One `Batcher` serves a list of prompts ([`super::generate::batch`]) and the server alike; it
//! knows nothing of channels or HTTP.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Serialize;

use super::Model;
use super::sampling::{Sampler, SamplingParams, TokenLogprobs};
use super::text_stream::TextStream;
use crate::model::kv_cache::KvCache;
use crate::tokenizer::Tokenizer;

/// Prompt tokens read in one pass, so that a long prompt does not stall the answers under way.
const PROMPT_TOKENS_PER_STEP: usize = 512;

/// What to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// At least 1. The answer ends at the model's context length in any case.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Strings that end the answer and are no part of it.
    pub stop: Vec<String>,
    /// Report logprobs, with so many of the likeliest tokens at each position.
    pub top_logprobs: Option<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: usize::MAX,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            top_logprobs: None,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or wrote a stop string.
    Stop,
    /// The answer reached `max_tokens` or the model's context length.
    Length,
}

/// One more token of one answer.
#[derive(Debug)]
pub struct TokenUpdate {
    /// As given by [`Batcher::submit`].
    pub id: u64,
    /// The sampled token: part of the text, or the end of the turn.
    pub token: u32,
    /// Text that became certain; often empty while a character or a stop string is incomplete.
    pub text: String,
    /// The choices behind the text released so far that were not reported before, where asked for.
    /// The end of the turn is not among them: it is no part of the text.
    pub choices: Vec<TokenLogprobs>,
    /// Set in the last update of an answer.
    pub finish_reason: Option<FinishReason>,
}

/// One answer under way.
struct Sequence {
    id: u64,
    cache: KvCache,
    /// Tokens that the cache does not hold yet: the rest of the prompt, or the last sampled token.
    unread: Vec<u32>,
    /// Tokens that may still be sampled.
    remaining: usize,
    sampler: Sampler,
    top_logprobs: Option<usize>,
    text: TextStream,
    /// Choices not reported yet, with the offsets in the answer's bytes where they begin and end.
    unreported: VecDeque<(usize, usize, TokenLogprobs)>,
}

/// Runs up to `size` answers at once.
pub struct Batcher<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    size: usize,
    /// Tokens that can be emitted: ids from here on are padding of the model's embedding.
    vocabulary: usize,
    sequences: Vec<Sequence>,
    next_id: u64,
}

impl<'a> Batcher<'a> {
    pub fn new(model: &'a Model, tokenizer: &'a Tokenizer, size: usize) -> Self {
        Self {
            model,
            tokenizer,
            size: size.max(1),
            vocabulary: model.config().vocab_size.min(tokenizer.vocab_size()),
            sequences: Vec::new(),
            next_id: 0,
        }
    }

    /// May another answer start?
    pub fn has_free_slot(&self) -> bool {
        self.sequences.len() < self.size
    }

    /// Is no answer under way?
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Starts an answer to `prompt` in the next step, and returns the id of its updates.
    ///
    /// # Errors
    ///
    /// The prompt must hold at least one token, and fewer than the model's context.
    pub fn submit(&mut self, prompt: Vec<u32>, options: &GenerateOptions) -> Result<u64> {
        let context = self.model.config().max_position_embeddings;
        ensure!(!prompt.is_empty(), "the prompt has no tokens");
        ensure!(
            prompt.len() < context,
            "the prompt has {} tokens, and the model's context is {context}",
            prompt.len()
        );
        let id = self.next_id;
        self.next_id += 1;
        self.sequences.push(Sequence {
            id,
            cache: self.model.new_cache(),
            remaining: options.max_tokens.clamp(1, context - prompt.len()),
            unread: prompt,
            sampler: Sampler::new(&options.sampling),
            top_logprobs: options.top_logprobs,
            text: TextStream::new(&options.stop),
            unreported: VecDeque::new(),
        });
        Ok(id)
    }

    /// Gives up an answer that nobody waits for.
    pub fn cancel(&mut self, id: u64) {
        self.sequences.retain(|sequence| sequence.id != id);
    }

    /// Gives up every answer.
    pub fn clear(&mut self) {
        self.sequences.clear();
    }

    /// One forward pass: every answer whose prompt is read grows by one token.
    ///
    /// # Errors
    ///
    /// The pass failed, or its logits are no numbers; the answers under way cannot go on, and the
    /// caller must [`clear`](Self::clear) them.
    pub fn step(&mut self) -> Result<Vec<TokenUpdate>> {
        let mut budget = PROMPT_TOKENS_PER_STEP;
        let mut stepping: Vec<(&mut Sequence, Vec<u32>)> = Vec::new();
        for sequence in &mut self.sequences {
            let tokens = sequence.next_tokens(&mut budget);
            if !tokens.is_empty() {
                stepping.push((sequence, tokens));
            }
        }
        if stepping.is_empty() {
            return Ok(Vec::new());
        }
        let (tokens, mut caches): (Vec<&[u32]>, Vec<&mut KvCache>) = stepping
            .iter_mut()
            .map(|(sequence, tokens)| (tokens.as_slice(), &mut sequence.cache))
            .unzip();
        let logits = self.model.step(&tokens, &mut caches)?;
        let updates: Vec<TokenUpdate> = stepping
            .into_par_iter()
            .zip(logits.par_chunks_exact(self.model.config().vocab_size))
            .filter(|((sequence, _), _)| sequence.unread.is_empty())
            .map(|((sequence, _), row)| sequence.grow(&row[..self.vocabulary], self.tokenizer))
            .collect::<Result<_>>()?;
        for update in &updates {
            if update.finish_reason.is_some() {
                self.cancel(update.id);
            }
        }
        Ok(updates)
    }
}

impl Sequence {
    /// Takes the tokens to read in this step, and what they use of the budget for prompts.
    fn next_tokens(&mut self, budget: &mut usize) -> Vec<u32> {
        if self.unread.len() == 1 {
            return std::mem::take(&mut self.unread);
        }
        let count = self.unread.len().min(*budget);
        *budget -= count;
        self.unread.drain(..count).collect()
    }

    /// Samples the next token from the logits (V) after the last one.
    fn grow(&mut self, logits: &[f32], tokenizer: &Tokenizer) -> Result<TokenUpdate> {
        ensure!(
            logits.iter().all(|logit| logit.is_finite()),
            "the model's logits are no numbers; its weights are damaged, or its training diverged"
        );
        let token = self.sampler.sample(logits);
        self.remaining -= 1;
        let begin = self.text.received();
        let finish_reason = if tokenizer.stop_ids().contains(&token) {
            Some(FinishReason::Stop)
        } else {
            let stopped = self.text.push(tokenizer.token_bytes(token).unwrap_or(&[]));
            self.unread.push(token);
            match (stopped, self.remaining) {
                (true, _) => Some(FinishReason::Stop),
                (false, 0) => Some(FinishReason::Length),
                (false, _) => None,
            }
        };
        // The end of the turn, too, as vLLM reports it: it is one of the model's choices.
        if let Some(k) = self.top_logprobs {
            let choice = TokenLogprobs::from_logits(logits, token, k);
            let end = self.text.received();
            self.unreported.push_back((begin, end, choice));
        }
        let text = match finish_reason {
            Some(_) => self.text.finish(),
            None => self.text.release(),
        };
        Ok(TokenUpdate {
            id: self.id,
            token,
            text,
            choices: self.report(finish_reason.is_some()),
            finish_reason,
        })
    }

    /// The choices whose text is released. At the end of the answer all of them but those of the
    /// stop string; a token that a stop string cuts in two is kept, since it was chosen.
    fn report(&mut self, end: bool) -> Vec<TokenLogprobs> {
        let released = self.text.released();
        let due = self
            .unreported
            .iter()
            .take_while(|(begin, until, _)| match self.text.cut() {
                Some(cut) => *begin < cut,
                None => end || *until <= released,
            });
        let count = due.count();
        self.unreported
            .drain(..count)
            .map(|(_, _, choice)| choice)
            .collect()
    }
}
