//! Continuous batching: all running answers grow by one token per forward pass.
//!
//! When an answer ends, the next prompt can take its slot in the following pass.
//! [`super::generate::batch`] and the server both use the [`Batcher`], which does not use channels or HTTP.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Serialize;

use super::Model;
use super::sampling::{Sampler, SamplingParams, TokenLogprobs};
use super::text_stream::TextStream;
use crate::model::kv_cache::KvCache;
use crate::tokenizer::Tokenizer;

/// Maximum number of prompt tokens per forward pass, so that a long prompt does not delay running answers.
const PROMPT_TOKENS_PER_STEP: usize = 512;

/// Options for the generation of one answer.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Maximum number of sampled tokens, at least 1. The model's context length also ends the answer.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Stop strings, which end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Number of most likely tokens (K) to report with each token. None: no logprobs.
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

/// The reason why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or wrote a stop string.
    Stop,
    /// The answer reached `max_tokens` or the model's context length.
    Length,
}

/// One new token of one answer.
#[derive(Debug)]
pub struct TokenUpdate {
    /// The id that `Batcher::submit` returned.
    pub id: u64,
    /// The sampled token, which may be the end of the turn.
    pub token: u32,
    /// New text that later tokens cannot change. Empty while a character or a possible stop string is
    /// incomplete.
    pub text: String,
    /// Logprobs of the tokens whose text this update completes, if logprobs were requested. The last update
    /// includes the logprobs of the end of the turn.
    pub token_logprobs: Vec<TokenLogprobs>,
    /// Set in the last update of an answer only.
    pub finish_reason: Option<FinishReason>,
}

/// A running answer.
struct Sequence {
    id: u64,
    /// The prompt of an encoder-decoder, until the encoder has read it.
    source: Option<Vec<u32>>,
    cache: KvCache,
    /// Tokens that are not in the cache yet: the unprocessed end of the prompt, or the last sampled token.
    pending: Vec<u32>,
    /// True if a token was sampled.
    has_text_tokens: bool,
    /// Number of tokens that may still be sampled.
    remaining: usize,
    sampler: Sampler,
    top_logprobs: Option<usize>,
    text: TextStream,
    /// Tokens whose logprobs have not been reported yet.
    unreported: VecDeque<UnreportedToken>,
}

/// The logprobs of a token whose text is not released yet.
struct UnreportedToken {
    /// Offset of the token's first byte in the answer.
    begin: usize,
    /// Offset after the token's last byte in the answer.
    end: usize,
    logprobs: TokenLogprobs,
}

/// Generates several answers at once.
pub struct Batcher<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    /// Maximum number of running answers.
    slots: usize,
    /// Number of token ids that can be sampled. Ids from this number on are padding of the model's embedding.
    vocabulary: usize,
    sequences: Vec<Sequence>,
    next_id: u64,
}

impl<'a> Batcher<'a> {
    /// Creates an idle batcher for up to `slots` running answers, at least 1.
    pub fn new(model: &'a Model, tokenizer: &'a Tokenizer, slots: usize) -> Self {
        Self {
            model,
            tokenizer,
            slots: slots.max(1),
            vocabulary: model.config().vocab_size.min(tokenizer.vocab_size()),
            sequences: Vec::new(),
            next_id: 0,
        }
    }

    /// Returns true if another answer can start.
    pub(crate) fn has_free_slot(&self) -> bool {
        self.sequences.len() < self.slots
    }

    /// Returns true if no answer is running.
    pub(crate) fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Adds an answer to `prompt`; it starts in the next step. Returns the id of its updates.
    ///
    /// # Errors
    /// If the prompt is empty, or leaves no room for an answer in the model's context.
    pub(crate) fn submit(&mut self, prompt: Vec<u32>, options: &GenerateOptions) -> Result<u64> {
        let config = self.model.config();
        ensure!(!prompt.is_empty(), "the prompt is empty");
        ensure!(
            config.fits_prompt(prompt.len()),
            "the prompt has {} tokens, which leaves no room for an answer in the model's context of {} tokens",
            prompt.len(),
            config.max_position_embeddings
        );
        let room = config.room_for_answer(prompt.len());
        let (source, pending) = match config.decoder_start() {
            Some(start) => (Some(prompt), vec![start]),
            None => (None, prompt),
        };
        let id = self.next_id;
        self.next_id += 1;
        self.sequences.push(Sequence {
            id,
            source,
            cache: self.model.new_cache(),
            has_text_tokens: false,
            remaining: options.max_tokens.clamp(1, room),
            pending,
            sampler: Sampler::new(&options.sampling),
            top_logprobs: options.top_logprobs,
            text: TextStream::new(&options.stop),
            unreported: VecDeque::new(),
        });
        Ok(id)
    }

    /// Cancels a running answer.
    pub fn cancel(&mut self, id: u64) {
        self.sequences.retain(|sequence| sequence.id != id);
    }

    /// Cancels all running answers.
    pub fn clear(&mut self) {
        self.sequences.clear();
    }

    /// Runs one forward pass. Every answer whose prompt is processed completely grows by one token.
    ///
    /// # Errors
    /// If the pass fails or its logits are not finite. The running answers cannot continue after an error:
    /// the caller must [`clear`](Self::clear) them.
    pub fn step(&mut self) -> Result<Vec<TokenUpdate>> {
        let mut budget = PROMPT_TOKENS_PER_STEP;
        self.encode_sources(&mut budget)?;
        // Running answers that take part in this step, each with the tokens to process.
        let mut active: Vec<(&mut Sequence, Vec<u32>)> = Vec::new();
        for sequence in self.sequences.iter_mut().filter(|s| s.source.is_none()) {
            let tokens = sequence.next_tokens(&mut budget);
            if !tokens.is_empty() {
                active.push((sequence, tokens));
            }
        }
        if active.is_empty() {
            return Ok(Vec::new());
        }
        let (tokens, mut caches): (Vec<&[u32]>, Vec<&mut KvCache>) = active
            .iter_mut()
            .map(|(sequence, tokens)| (tokens.as_slice(), &mut sequence.cache))
            .unzip();
        let logits_BV = self.model.step(&tokens, &mut caches)?;
        let updates: Vec<TokenUpdate> = active
            .into_par_iter()
            .zip(logits_BV.par_chunks_exact(self.model.config().vocab_size))
            .filter(|((sequence, _), _)| sequence.pending.is_empty())
            .map(|((sequence, _), logits_V)| {
                sequence.sample_next(&logits_V[..self.vocabulary], self.tokenizer)
            })
            .collect::<Result<_>>()?;
        for update in &updates {
            if update.finish_reason.is_some() {
                self.cancel(update.id);
            }
        }
        Ok(updates)
    }
}

impl Batcher<'_> {
    /// Runs the encoder over the sources of new answers, until `budget` tokens are read: at least one source, because an
    /// encoder cannot read a part of it. Subtracts the tokens from `budget`.
    fn encode_sources(&mut self, budget: &mut usize) -> Result<()> {
        let mut waiting: Vec<(&mut Sequence, Vec<u32>)> = Vec::new();
        for sequence in &mut self.sequences {
            if *budget > 0
                && let Some(source) = sequence.source.take()
            {
                *budget = budget.saturating_sub(source.len());
                waiting.push((sequence, source));
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        let sources: Vec<&[u32]> = waiting
            .iter()
            .map(|(_, source)| source.as_slice())
            .collect();
        let caches = self.model.encode_sources(&sources)?;
        for ((sequence, _), cache) in waiting.into_iter().zip(caches) {
            sequence.cache = cache;
        }
        Ok(())
    }
}

impl Sequence {
    /// Takes the tokens for this step: the last sampled token, or as many prompt tokens as `budget` allows. Subtracts
    /// the prompt tokens from `budget`. A single pending token is always taken and does not count.
    fn next_tokens(&mut self, budget: &mut usize) -> Vec<u32> {
        if self.pending.len() == 1 {
            return std::mem::take(&mut self.pending);
        }
        let count = self.pending.len().min(*budget);
        *budget -= count;
        self.pending.drain(..count).collect()
    }

    /// Samples the next token from the logits after the last token.
    fn sample_next(&mut self, logits_V: &[f32], tokenizer: &Tokenizer) -> Result<TokenUpdate> {
        ensure!(
            logits_V.iter().all(|logit| logit.is_finite()),
            "the model's logits are not finite; its weights are damaged, or its training diverged"
        );
        let token = self.sampler.sample(logits_V);
        self.remaining -= 1;
        let begin = self.text.received();
        let is_first = !self.has_text_tokens;
        let finish_reason = if tokenizer.stop_ids().contains(&token) {
            Some(FinishReason::Stop)
        } else {
            let bytes = tokenizer.answer_bytes(token, is_first);
            self.has_text_tokens |= bytes.is_some();
            let is_stopped = self.text.push(bytes.unwrap_or(&[]));
            self.pending.push(token);
            if is_stopped {
                Some(FinishReason::Stop)
            } else if self.remaining == 0 {
                Some(FinishReason::Length)
            } else {
                None
            }
        };
        // The token that ends the turn also has logprobs, as in vLLM.
        if let Some(k) = self.top_logprobs {
            self.unreported.push_back(UnreportedToken {
                begin,
                end: self.text.received(),
                logprobs: TokenLogprobs {
                    is_first,
                    ..TokenLogprobs::from_logits(logits_V, token, k)
                },
            });
        }
        let text = match finish_reason {
            Some(_) => self.text.finish(),
            None => self.text.release(),
        };
        Ok(TokenUpdate {
            id: self.id,
            token,
            text,
            token_logprobs: self.take_reportable(finish_reason.is_some()),
            finish_reason,
        })
    }

    /// Takes the logprobs of the tokens whose text is released. At the end of the answer, takes all remaining logprobs;
    /// after a stop string, only those of the tokens that begin before it.
    fn take_reportable(&mut self, is_finished: bool) -> Vec<TokenLogprobs> {
        let released = self.text.released();
        let reportable = self
            .unreported
            .iter()
            .take_while(|token| match self.text.stop_offset() {
                Some(stop_offset) => token.begin < stop_offset,
                None => is_finished || token.end <= released,
            });
        let count = reportable.count();
        self.unreported
            .drain(..count)
            .map(|token| token.logprobs)
            .collect()
    }
}
