//! Examples token by token, for people.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use super::prepare::{Preparing, Ready};
use super::rows::{Row, Skipped};
use super::source::Source;
use crate::config::{self, Config};
use crate::data::groups::{Group, Selection};
use crate::data::sample_trie::Samples;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::Difference;

/// Hex digits from which the beginning of a key names a record.
const LEAST_DIGITS: usize = 6;

/// A row and the example it makes.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// Key of the record, or line of the file; `:N` is the answer in message N.
    pub key: String,
    pub prompt_id: String,
    /// None in a file.
    pub group: Option<String>,
    /// Why it makes no example.
    pub left_out: Option<String>,
    /// Why it trains on cross-entropy alone.
    pub ce_only: Option<String>,
    /// Where its prompt differs from the rendered conversation.
    pub difference: Option<Difference>,
    pub tokens: Vec<Token>,
}

#[derive(Debug, Serialize)]
pub struct Token {
    pub id: u32,
    pub text: String,
    pub is_special: bool,
    pub is_supervised: bool,
    /// Likeliest first; empty if the position trains on cross-entropy alone.
    pub soft_labels: Vec<SoftLabel>,
    /// Probability outside the soft labels.
    pub tail: Option<f64>,
    /// Probability of the emitted token, if it was outside the teacher's top-k and is known.
    pub emitted: Option<f64>,
    /// Likelihood under the teacher of the text that begins here, which its tokenizer splits in another way, and the
    /// number of student tokens of that text.
    pub chunk: Option<(f64, usize)>,
}

#[derive(Debug, Serialize)]
pub struct SoftLabel {
    pub id: u32,
    pub text: String,
    pub probability: f64,
}

/// Shows at most `limit` rows: those of this key, beginning of a key, line or prompt id; or else the first rows that
/// make an example. Also returns the reasons for which others make none.
///
/// # Errors
/// If the source or the teacher's tokenizer cannot be read.
pub fn show(
    config: &Config,
    selection: &Selection,
    tokenizer: &Tokenizer,
    id: Option<&str>,
    limit: usize,
) -> Result<(Vec<Shown>, BTreeMap<String, u64>)> {
    let source = Source::of(config);
    let teacher = config.data.teacher_tokenizer.as_deref();
    let teacher = teacher.map(Tokenizer::load).transpose()?;
    let tokenizers = (tokenizer, teacher.as_ref());
    let selected = (&config.data, selection);
    let samples = if config.data.sample_trie {
        samples_of(&source, selected, tokenizers)?
    } else {
        Samples::default()
    };
    let mut preparing = Preparing::new(&source, &config.data, tokenizers, &samples);
    let is_named = |key: &str, prompt_id: &str| {
        id.is_none_or(|id| {
            let is_beginning = id.len() >= LEAST_DIGITS && key.starts_with(id);
            key == id || prompt_id == id || is_beginning
        })
    };
    let (mut shown, mut skipped) = (Vec::new(), BTreeMap::new());
    source.for_each_row(selected, |row| {
        let mut rows = vec![row];
        while let Some(row) = rows.pop() {
            let (name, prompt_id) = match &row {
                Ok(row) => (&row.key, &row.prompt_id),
                Err(skipped) => (&skipped.key, &skipped.prompt_id),
            };
            let base = name.split(':').next().unwrap_or(name);
            let is_asked = is_named(name, prompt_id) || is_named(base, prompt_id);
            // Its other answers may be asked for.
            let is_of_asked = id.is_some_and(|id| id.split(':').next() == Some(base));
            if !(is_asked || is_of_asked) || shown.len() >= limit {
                continue;
            }
            match row.and_then(|row| preparing.ready(row)) {
                Ok((row, ready)) => {
                    rows.extend(ready.separate.iter().map(|at| Ok(row.up_to(*at))));
                    if is_asked {
                        shown.push(shown_of(row, ready, tokenizer));
                    }
                }
                Err(row) if id.is_some() && is_asked => shown.push(left_out(*row)),
                Err(row) => *skipped.entry(row.reason).or_default() += 1,
            }
        }
        shown.len() < limit
    })?;
    Ok((shown, skipped))
}

/// Answers to the same prompts, merged.
fn samples_of(
    source: &Source,
    selected: (&config::DataConfig, &Selection),
    tokenizers: (&Tokenizer, Option<&Tokenizer>),
) -> Result<Samples> {
    let (mut samples, none) = (Samples::default(), Samples::default());
    let mut preparing = Preparing::new(source, selected.0, tokenizers, &none);
    source.for_each_row(selected, |row| {
        preparing.collect(row, &mut samples);
        true
    })?;
    Ok(samples)
}

fn group_text(group: &Group) -> String {
    format!("{} ({group})", group.id())
}

fn left_out(skipped: Skipped) -> Shown {
    Shown {
        left_out: Some(skipped.reason),
        key: skipped.key,
        prompt_id: skipped.prompt_id,
        group: skipped.group.as_ref().map(group_text),
        ce_only: None,
        difference: None,
        tokens: Vec::new(),
    }
}

fn shown_of(row: Row, ready: Ready, tokenizer: &Tokenizer) -> Shown {
    let mut tokens: Vec<Token> = ready
        .input_ids
        .iter()
        .map(|&id| Token {
            id,
            text: text_of(tokenizer, id),
            is_special: tokenizer.is_special(id),
            is_supervised: false,
            soft_labels: Vec::new(),
            tail: None,
            emitted: None,
            chunk: None,
        })
        .collect();
    for at in ready.labels.iter().cloned().flatten() {
        tokens[at].is_supervised = true;
    }
    let soft = &ready.soft;
    for at in 0..soft.len() {
        let Some(token) = tokens
            .get_mut(ready.answer + at)
            .filter(|it| it.is_supervised)
        else {
            continue;
        };
        let (ids, logprobs) = soft.soft(at);
        let labels = ids.iter().zip(logprobs).map(|(&id, &logprob)| SoftLabel {
            id,
            text: text_of(tokenizer, id),
            probability: f64::from(logprob).exp(),
        });
        token.soft_labels = labels.collect();
        if soft.is_soft(at) {
            let known = token.soft_labels.iter().map(|label| label.probability);
            token.tail = Some((1.0 - known.sum::<f64>()).max(0.0));
        }
        let emitted = soft.drawn(at).filter(|logprob| logprob.is_finite());
        token.emitted = emitted.map(|logprob| f64::from(logprob).exp());
    }
    for chunk in soft.chunks() {
        if let Some(token) = tokens.get_mut(ready.answer + chunk.start) {
            token.chunk = Some((f64::from(-chunk.nll).exp(), chunk.len));
        }
    }
    Shown {
        key: row.key,
        prompt_id: row.prompt_id,
        group: row.group.as_ref().map(group_text),
        left_out: None,
        ce_only: ready.ce_only,
        difference: ready.difference,
        tokens,
    }
}

/// Text of a token, or its name if it has none of its own.
pub fn text_of(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.spelling(id) {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => tokenizer.token_name(id),
    }
}
