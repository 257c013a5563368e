//! On-policy distillation: the student generates answers, and the teacher scores them.
//!
//! A student trained on the teacher's answers only sees prefixes that the teacher wrote, but at inference it continues
//! its own. Here the student answers the prompts of the data with its current weights, and learns the teacher's
//! distribution at each position of these answers: generalised knowledge distillation (GKD, Agarwal et al., arXiv
//! 2306.13649), with reverse KL as in MiniLLM (Gu et al., arXiv 2306.08543). The texts are constants: no gradient
//! flows through the sampling.
//!
//! A local teacher (`train/local_teacher.rs`) gives whole distributions. A teacher behind an API
//! ([`TextScorer`]) gives its top-k, which is aligned with the student's tokens like the top-k of a harvested answer.
//! With a teacher behind an API, positions without soft labels are not trained, nor are the end of the turn and other
//! control tokens.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result};
use serde::Serialize;

use super::loss::divergence::Divergence;
use crate::config::{LossConfig, OnPolicyConfig, TrainConfig};
use crate::data::align::aligned::Aligned;
use crate::data::align::{Mapper, Mismatch};
use crate::data::batch::Batch;
use crate::data::prepared::shard::ExampleView;
use crate::data::text_scorer::TextScorer;
use crate::exit::Exit;
use crate::model::Model;
use crate::model::batcher::GenerateOptions;
use crate::model::generate;
use crate::model::sampling::SamplingParams;
use crate::prompt::Prompt;
use crate::prompt::message::Message;
use crate::signal::StopFlag;
use crate::tokenizer::Tokenizer;

/// Multiplier of the step number in the seeds of its answers. It differs from the multiplier of the answer's index
/// ([`SamplingParams::for_answer`]), so that answers of different steps practically never share a seed.
const SEED_SPREAD: u64 = 0xd134_2543_de82_ef95;

/// Number of scored answers after which training stops if none of them has soft labels.
const MAX_UNALIGNED: u64 = 32;

/// Generator of the student's own answers.
pub(crate) struct OnPolicy<'a> {
    settings: &'a OnPolicyConfig,
    tokenizer: &'a Tokenizer,
    /// Number of answers in a batch.
    batch_size: usize,
    seed: u64,
    /// The teacher behind an API; None with a local teacher.
    remote: Option<RemoteTeacher<'a>>,
    counts: OnPolicyCounts,
}

/// Numbers of generated answers in this session.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct OnPolicyCounts {
    /// Answers that the student generated, empty ones excluded.
    #[serde(rename = "written")]
    pub generated: u64,
    /// Answers for which the teacher gave soft labels. A local teacher gives them for all answers.
    #[serde(rename = "judged")]
    pub scored: u64,
}

/// A teacher behind an API.
pub(crate) struct RemoteTeacher<'a> {
    scorer: &'a mut dyn TextScorer,
    mapper: Mapper<'a>,
    /// Prompts by the keys of the examples.
    prompts: HashMap<String, Vec<Message>>,
    /// Number of answers that the teacher scored in this session, but for which it gave no soft labels.
    unaligned: u64,
    /// Reason why the last answer in `unaligned` is not trained.
    last_reason: String,
}

/// An answer that the student generated.
struct GeneratedAnswer<'a> {
    /// Key of the example with the same prompt.
    key: &'a str,
    prompt: &'a PromptTokens,
    /// Token ids, including the end of the turn if it was reached.
    ids: &'a [u32],
}

/// The tokens before an answer.
struct PromptTokens {
    /// Source of an encoder-decoder; else empty.
    source: Vec<u32>,
    /// Tokens before the answer in the input of the decoder.
    decoder: Vec<u32>,
}

impl<'a> OnPolicy<'a> {
    /// Creates a generator. `remote` scores the answers; None with a local teacher.
    pub(crate) fn new(
        settings: &'a OnPolicyConfig,
        train: &TrainConfig,
        tokenizer: &'a Tokenizer,
        remote: Option<RemoteTeacher<'a>>,
    ) -> Self {
        Self {
            settings,
            tokenizer,
            batch_size: train.micro_batch_size,
            seed: train.seed,
            remote,
            counts: OnPolicyCounts::default(),
        }
    }

    pub(crate) fn counts(&self) -> OnPolicyCounts {
        self.counts
    }

    /// Returns the divergences for generated answers.
    pub(crate) fn divergence(&self, settings: &LossConfig) -> Option<[Divergence; 2]> {
        Divergence::from_config(&LossConfig {
            kd: self.settings.kd,
            ..settings.clone()
        })
    }

    /// Splits the examples of a step in two: the first are used unchanged, and the student answers the prompts of the
    /// others.
    pub(crate) fn split<'e, 'v>(
        &self,
        examples: &'e [ExampleView<'v>],
    ) -> (&'e [ExampleView<'v>], &'e [ExampleView<'v>]) {
        let generated_count = (self.settings.share * examples.len() as f64).round() as usize;
        examples.split_at(examples.len() - generated_count.min(examples.len()))
    }

    /// Generates answers to the prompts of `examples` in step `step`, and lets a teacher behind an API score them.
    /// The same seed, step and weights give the same answers.
    ///
    /// # Errors
    /// If a prompt does not fit the model, [`TextScorer::score`] fails, or the logprobs of the first [`MAX_UNALIGNED`]
    /// scored answers give no soft labels.
    pub(crate) fn generate(
        &mut self,
        student: &Model,
        step: u64,
        examples: &[ExampleView],
        stop: &StopFlag,
    ) -> Result<Vec<Batch>> {
        let prompts: Vec<PromptTokens> = examples.iter().map(|example| prompt(*example)).collect();
        let generation_prompts: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| match prompt.source.as_slice() {
                [] => prompt.decoder.clone(),
                source => source.to_vec(),
            })
            .collect();
        let options = GenerateOptions {
            max_tokens: self.settings.max_tokens as usize,
            sampling: SamplingParams {
                temperature: self.settings.temperature,
                top_p: 1.0,
                seed: self.seed ^ step.wrapping_mul(SEED_SPREAD),
            },
            ..GenerateOptions::default()
        };
        let answers = generate::batch(
            student,
            self.tokenizer,
            &generation_prompts,
            &options,
            self.batch_size,
        )?;
        let answers = answers.iter().zip(&prompts).zip(examples);
        let generated: Vec<GeneratedAnswer> = answers
            .filter(|((answer, _), _)| !answer.ids.is_empty())
            .map(|((answer, prompt), example)| GeneratedAnswer {
                key: example.key(),
                prompt,
                ids: &answer.ids,
            })
            .collect();
        let soft_labels = match &mut self.remote {
            Some(remote) => Some(remote.soft_labels(self.tokenizer, &generated, stop)?),
            None => None,
        };
        let is_scored = |index: &usize| {
            soft_labels
                .as_ref()
                .is_none_or(|labels| labels[*index].is_some())
        };
        self.counts.generated += generated.len() as u64;
        self.counts.scored += (0..generated.len()).filter(is_scored).count() as u64;
        if let Some(remote) = &self.remote
            && self.counts.scored == 0
            && remote.unaligned >= MAX_UNALIGNED
        {
            return Err(no_soft_labels(remote.unaligned, &remote.last_reason));
        }
        let mut batches = Vec::new();
        for start in (0..generated.len()).step_by(self.batch_size) {
            let mut batch = Batch {
                soft_offsets_N1: vec![0],
                ..Batch::default()
            };
            let end = generated.len().min(start + self.batch_size);
            for index in (start..end).filter(is_scored) {
                let labels = soft_labels
                    .as_ref()
                    .and_then(|labels| labels[index].as_ref());
                push_answer(&mut batch, &generated[index], labels);
            }
            if !batch.labels_N.is_empty() {
                batches.push(batch);
            }
        }
        Ok(batches)
    }
}

impl<'a> RemoteTeacher<'a> {
    /// Creates the teacher. `prompts` holds the prompts by the keys of the examples.
    pub(crate) fn new(
        scorer: &'a mut dyn TextScorer,
        mapper: Mapper<'a>,
        prompts: HashMap<String, Vec<Message>>,
    ) -> Self {
        Self {
            scorer,
            mapper,
            prompts,
            unaligned: 0,
            last_reason: String::new(),
        }
    }

    /// Returns the soft labels of each answer; None for an answer without soft labels.
    ///
    /// # Errors
    /// If the prompt of an answer is missing, or [`TextScorer::score`] fails.
    fn soft_labels(
        &mut self,
        tokenizer: &Tokenizer,
        generated: &[GeneratedAnswer],
        stop: &StopFlag,
    ) -> Result<Vec<Option<Aligned>>> {
        let mut soft_labels: Vec<Option<Aligned>> = generated.iter().map(|_| None).collect();
        let mut requests = Vec::new();
        let mut texts = Vec::new();
        for (index, answer) in generated.iter().enumerate() {
            let (text, ids) = text_prefix(tokenizer, answer.ids);
            if text.is_empty() {
                continue;
            }
            let prompt = self.prompts.get(answer.key);
            let mut messages = prompt
                .with_context(|| {
                    format!(
                        "the data has changed: the prompt of {} is missing",
                        answer.key
                    )
                })?
                .clone();
            messages.push(Message {
                role: "assistant".into(),
                content: text.clone(),
            });
            texts.push(Prompt::plain(answer.key.to_owned(), messages));
            requests.push((index, text, ids));
        }
        let scored = self.scorer.score(texts, stop)?;
        for ((index, text, ids), logprobs) in requests.into_iter().zip(scored) {
            let Some(logprobs) = logprobs else { continue };
            let aligned =
                self.mapper
                    .align(&logprobs, text.as_bytes(), 0..text.len(), ids.into(), None);
            let has_soft_labels = |labels: &Aligned| (0..labels.len()).any(|at| labels.is_soft(at));
            match aligned {
                Ok(labels) if has_soft_labels(&labels) => soft_labels[index] = Some(labels),
                Ok(_) => self.count_unaligned("its logprobs give no soft labels"),
                Err(Mismatch::TokenIds) => self.count_unaligned("the teacher's tokens are ids"),
                Err(mismatch) => self.count_unaligned(&mismatch.to_string()),
            }
        }
        Ok(soft_labels)
    }

    /// Counts an answer that was scored and cannot be trained, and warns about the first one.
    fn count_unaligned(&mut self, reason: &str) {
        if self.unaligned == 0 {
            tracing::warn!("an answer of the student was scored but is not trained: {reason}");
        }
        self.unaligned += 1;
        reason.clone_into(&mut self.last_reason);
    }
}

/// Returns the error for a teacher whose logprobs cannot be used.
fn no_soft_labels(count: u64, reason: &str) -> anyhow::Error {
    Exit::Usage(format!(
        "the teacher scored {count} answers of the student, but none of them can be trained ({reason}): if the \
         teacher's tokens do not match the text, set `on_policy.tokenizer` to the folder of the teacher's tokenizer"
    ))
    .into()
}

/// Returns the longest prefix of an answer that is text, and its tokens. The prefix ends before the end of the turn,
/// another control token, or an incomplete character.
fn text_prefix<'a>(tokenizer: &Tokenizer, ids: &'a [u32]) -> (String, &'a [u32]) {
    let mut bytes = Vec::new();
    let mut text = String::new();
    let mut count = 0;
    for (at, &id) in ids.iter().enumerate() {
        match tokenizer.answer_bytes(id, at == 0) {
            // The first token may be only the space that the tokenizer writes before a text.
            Some(token) if !token.is_empty() || at == 0 => bytes.extend(token),
            _ => break,
        }
        if let Ok(characters) = std::str::from_utf8(&bytes) {
            text.push_str(characters);
            bytes.clear();
            count = at + 1;
        }
    }
    (text, &ids[..count])
}

/// Returns the tokens before the last answer of an example.
fn prompt(example: ExampleView) -> PromptTokens {
    let mut start = 0;
    let mut previous = None;
    for position in example.positions() {
        if previous.is_none_or(|previous: u32| previous + 1 != position) {
            start = position as usize;
        }
        previous = Some(position);
    }
    PromptTokens {
        source: example.source_ids().collect(),
        decoder: example.input_ids().take(start + 1).collect(),
    }
}

/// Appends a prompt and its answer to the batch. The supervised positions are those with soft labels, or all tokens of
/// the answer if `soft_labels` is None (local teacher).
fn push_answer(batch: &mut Batch, answer: &GeneratedAnswer, soft_labels: Option<&Aligned>) {
    let first = batch.input_ids_T.len();
    batch.input_ids_T.extend(&answer.prompt.decoder);
    batch.input_ids_T.extend(answer.ids);
    let end = batch.input_ids_T.len();
    batch.segments_B.push(Range { start: first, end });
    batch.keys_B.push(answer.key.to_owned());
    batch.push_source(answer.prompt.source.iter().copied());
    for (at, token) in answer.ids.iter().enumerate() {
        if let Some(labels) = soft_labels {
            if !labels.is_soft(at) {
                continue;
            }
            let (ids, logprobs) = labels.soft(at);
            batch.soft_ids_NK.extend(ids);
            batch.soft_logprobs_NK.extend(logprobs);
            batch.sampled_logprobs_N.push(labels.sampled_logprob(at));
        }
        let position = first + answer.prompt.decoder.len() + at - 1;
        batch.positions_N.push(position as u32);
        batch.labels_N.push(*token);
        batch.soft_offsets_N1.push(batch.soft_ids_NK.len());
    }
}
