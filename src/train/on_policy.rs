//! Answers that the student writes itself, for the teacher to judge.
//!
//! What a student learns from given answers holds for texts that begin as the teacher's do; its own soon
//! begin otherwise. Here it writes answers to the prompts of the data with its weights of the moment, and
//! learns on each of their positions what the teacher would have said there: generalised knowledge
//! distillation (GKD, Agarwal et al., arXiv 2306.13649), with reverse KL as in MiniLLM (Gu et al., arXiv
//! 2306.08543). The texts count as given: no gradient goes through the sampling.
//!
//! A teacher on this machine says it by its whole distributions ([`crate::train::local_teacher`]); one behind an API
//! ([`Judge`]) by its top-k, which is aligned with the student's tokens like that of any answer. Positions
//! that it says nothing of are left out, and so is the end of the turn, and what is no text.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result};
use serde::Serialize;

use super::loss::divergence::Divergence;
use crate::cache::view::RecordView;
use crate::config::{self, Config, Loss};
use crate::data::align::Mapper;
use crate::data::align::aligned::Aligned;
use crate::data::batch::Batch;
use crate::data::dataset;
use crate::data::groups::Selection;
use crate::data::prepared::shard::ExampleView;
use crate::model::Model;
use crate::model::batcher::GenerateOptions;
use crate::model::generate;
use crate::model::sampling::Sampling;
use crate::prompt::Prompt;
use crate::prompt::message::Message;
use crate::signal::StopFlag;
use crate::tokenizer::Tokenizer;

/// A teacher behind an API.
pub trait Judge: Send {
    /// What it would have said in place of each token of the last message of these conversations: lines
    /// of a cache with logprobs, in order. None where it does not say.
    ///
    /// # Errors
    /// Where it cannot be asked any more, or `stop` says so.
    fn judge(&mut self, texts: Vec<Prompt>, stop: &StopFlag) -> Result<Vec<Option<Vec<u8>>>>;
}

/// How the student writes.
pub struct OnPolicy<'a> {
    settings: &'a config::OnPolicy,
    tokenizer: &'a Tokenizer,
    /// Answers in a batch.
    batch_size: usize,
    seed: u64,
    /// Where the teacher is not on this machine.
    asked: Option<Asked<'a>>,
    count: Count,
}

/// How many answers of its own a student has learnt from, in this session.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Count {
    pub written: u64,
    /// Of these, how many the teacher said something of.
    pub judged: u64,
}

/// A teacher that is asked.
struct Asked<'a> {
    judge: &'a mut dyn Judge,
    mapper: Mapper<'a>,
    /// By the keys of the examples.
    prompts: HashMap<String, Vec<Message>>,
}

/// An answer of the student's.
struct Written<'a> {
    /// Of the example whose prompt it answers.
    key: &'a str,
    prompt: &'a [u32],
    /// With the end of the turn, where it came to that.
    ids: &'a [u32],
}

impl<'a> OnPolicy<'a> {
    /// None where it is not asked for. `judge` is the teacher behind an API, if it is there.
    ///
    /// # Errors
    /// Where the prompts cannot be read.
    pub fn of(
        config: &'a Config,
        selection: &Selection,
        tokenizer: &'a Tokenizer,
        judge: Option<&'a mut dyn Judge>,
    ) -> Result<Option<Self>> {
        if !config.train.on_policy {
            return Ok(None);
        }
        let asked = match (config.on_policy.judge, judge) {
            (config::JudgedBy::Local, _) => None,
            (_, judge) => Some(Asked {
                judge: judge
                    .context("there is nobody to ask what the student's answers are worth")?,
                mapper: Mapper::new(tokenizer, config.data.top_logprobs),
                prompts: dataset::prompts(config, selection)?,
            }),
        };
        Ok(Some(Self {
            settings: &config.on_policy,
            tokenizer,
            batch_size: config.train.micro_batch_size,
            seed: config.train.seed,
            asked,
            count: Count::default(),
        }))
    }

    pub fn count(&self) -> Count {
        self.count
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

    /// Answers the prompts of `examples` in step `step`, and has the answers judged where the teacher is
    /// behind an API. The same step and weights give the same answers.
    ///
    /// # Errors
    /// Where a prompt does not fit the model, or as [`Judge::judge`].
    pub fn write(
        &mut self,
        student: &Model,
        step: u64,
        examples: &[ExampleView],
        stop: &StopFlag,
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
        let answers = answers.iter().zip(&prompts).zip(examples);
        let written: Vec<Written> = answers
            .filter(|((answer, _), _)| !answer.ids.is_empty())
            .map(|((answer, prompt), example)| Written {
                key: example.key(),
                prompt,
                ids: &answer.ids,
            })
            .collect();
        let said = match &mut self.asked {
            Some(asked) => Some(asked.soft_labels(self.tokenizer, &written, stop)?),
            None => None,
        };
        let is_judged = |at: &usize| said.as_ref().is_none_or(|said| said[*at].is_some());
        self.count.written += written.len() as u64;
        self.count.judged += (0..written.len()).filter(is_judged).count() as u64;
        let mut batches = Vec::new();
        for start in (0..written.len()).step_by(self.batch_size) {
            let mut batch = Batch {
                soft_offsets: vec![0],
                ..Batch::default()
            };
            let end = written.len().min(start + self.batch_size);
            for at in (start..end).filter(is_judged) {
                let said = said.as_ref().and_then(|said| said[at].as_ref());
                push(&mut batch, &written[at], said);
            }
            if !batch.labels.is_empty() {
                batches.push(batch);
            }
        }
        Ok(batches)
    }
}

impl Asked<'_> {
    /// What the teacher says of each, None where it says nothing.
    fn soft_labels(
        &mut self,
        tokenizer: &Tokenizer,
        written: &[Written],
        stop: &StopFlag,
    ) -> Result<Vec<Option<Aligned>>> {
        let mut said: Vec<Option<Aligned>> = written.iter().map(|_| None).collect();
        let (mut asked, mut texts) = (Vec::new(), Vec::new());
        for (at, answer) in written.iter().enumerate() {
            let (text, ids) = beginning(tokenizer, answer.ids);
            if text.is_empty() {
                continue;
            }
            let prompt = self.prompts.get(answer.key);
            let mut messages = prompt
                .with_context(|| {
                    format!("the prompt of {} is not in the data any more", answer.key)
                })?
                .clone();
            messages.push(Message {
                role: "assistant".into(),
                content: text.clone(),
            });
            texts.push(Prompt::plain(answer.key.to_owned(), messages));
            asked.push((at, text, ids));
        }
        let lines = self.judge.judge(texts, stop)?;
        for ((at, text, ids), line) in asked.into_iter().zip(lines) {
            let Some(line) = line else { continue };
            let record = RecordView::from_line(&line)?;
            let Some(logprobs) = &record.logprobs else {
                continue;
            };
            let aligned = self
                .mapper
                .align(logprobs, text.as_bytes(), 0..text.len(), ids, None);
            said[at] = aligned
                .ok()
                .filter(|said| (0..said.len()).any(|at| said.is_soft(at)));
        }
        Ok(said)
    }
}

/// The text that an answer begins with, and the tokens that spell it: up to the end of the turn, another
/// control token, or a part of a character.
fn beginning<'a>(tokenizer: &Tokenizer, ids: &'a [u32]) -> (String, &'a [u32]) {
    let (mut bytes, mut text, mut count) = (Vec::new(), String::new(), 0);
    for (at, &id) in ids.iter().enumerate() {
        match tokenizer.token_bytes(id) {
            Some(of_token) if !of_token.is_empty() => bytes.extend(of_token),
            _ => break,
        }
        if let Ok(whole) = std::str::from_utf8(&bytes) {
            text.push_str(whole);
            bytes.clear();
            count = at + 1;
        }
    }
    (text, &ids[..count])
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

/// Appends a prompt with its answer, every token of which is supervised; or, where the teacher has `said`
/// something, each that it said something of.
fn push(batch: &mut Batch, written: &Written, said: Option<&Aligned>) {
    let first = batch.input_ids.len();
    batch.input_ids.extend(written.prompt);
    batch.input_ids.extend(written.ids);
    let end = batch.input_ids.len();
    batch.segments.push(Range { start: first, end });
    batch.keys.push(written.key.to_owned());
    for (at, token) in written.ids.iter().enumerate() {
        if let Some(said) = said {
            if !said.is_soft(at) {
                continue;
            }
            let (ids, logprobs) = said.soft(at);
            batch.soft_ids.extend(ids);
            batch.soft_logprobs.extend(logprobs);
            batch.drawn.push(said.drawn(at));
        }
        let position = first + written.prompt.len() + at - 1;
        batch.positions.push(position as u32);
        batch.labels.push(*token);
        batch.soft_offsets.push(batch.soft_ids.len());
    }
}
