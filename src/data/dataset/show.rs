//! Examples token by token, for `distill data show`.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::example_builder::{ExampleBuilder, TokenizedRow};
use super::rows::{SkippedRow, TrainingRow};
use super::source::DataSource;
use crate::config::{self, DataConfig};
use crate::data::groups::{Group, Selection};
use crate::data::sample_trie::SampleTrie;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::answer_tokens::PromptDifference;

/// Minimum number of hex digits of a key's prefix that selects a record.
const MIN_KEY_DIGITS: usize = 6;

/// A row, and its example token by token.
#[derive(Debug, Serialize)]
pub struct ShownExample {
    /// Key of the record, or line of the file; `:N` is the answer in message N.
    pub key: String,
    pub prompt_id: String,
    /// None in a file.
    pub group: Option<String>,
    /// Reason if the row makes no example.
    pub left_out: Option<String>,
    /// Reason if the example trains on cross-entropy alone.
    pub ce_only: Option<String>,
    /// Set if the generation prompt differs from the prefix of the answer in the rendered conversation.
    pub difference: Option<PromptDifference>,
    /// Source of an encoder-decoder; else empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source: Vec<ShownToken>,
    /// Tokens of the example; of an encoder-decoder, the input of the decoder.
    pub tokens: Vec<ShownToken>,
}

/// A token of an example.
#[derive(Debug, Serialize)]
pub struct ShownToken {
    pub id: u32,
    pub text: String,
    pub is_special: bool,
    pub is_supervised: bool,
    /// Most likely first; empty if the position has none.
    pub soft_labels: Vec<ShownLabel>,
    /// Probability outside the soft labels.
    pub tail: Option<f64>,
    /// Probability of the emitted token if it is outside the teacher's top-k; None if it is in the top-k, or if the
    /// probability is unknown.
    pub emitted: Option<f64>,
    /// Set on the first token of a text that the teacher's tokenizer splits differently: the likelihood of the text
    /// under the teacher, and its number of student tokens.
    pub chunk: Option<(f64, usize)>,
}

/// A soft label of a token.
#[derive(Debug, Serialize)]
pub struct ShownLabel {
    pub id: u32,
    pub text: String,
    pub probability: f64,
}

/// Returns at most `limit` rows. With `id`, these are the rows whose key, line number or prompt id is `id`, or whose
/// key starts with `id` (at least `MIN_KEY_DIGITS` digits). Without `id`, these are the first rows that make an
/// example. Also returns, by reason, the number of rows that make no example and are not returned. Rows that `id`
/// rules out, and rows after the last returned one, are not counted.
///
/// # Errors
/// If the source or the teacher's tokenizer cannot be read.
pub fn show(
    settings: &DataConfig,
    run_dir: &Path,
    selection: &Selection,
    tokenizer: &Tokenizer,
    id: Option<&str>,
    limit: usize,
) -> Result<(Vec<ShownExample>, BTreeMap<String, u64>)> {
    let source = DataSource::new(settings, run_dir);
    let teacher = settings.teacher_tokenizer.as_deref();
    let teacher = teacher.map(Tokenizer::load).transpose()?;
    let tokenizers = (tokenizer, teacher.as_ref());
    let selected = (settings, selection);
    let samples = if settings.sample_trie {
        collect_samples(&source, selected, tokenizers)?
    } else {
        SampleTrie::default()
    };
    let mut builder = ExampleBuilder::new(&source, settings, tokenizers, &samples);
    let is_named = |key: &str, prompt_id: &str| {
        id.is_none_or(|id| {
            let is_key_prefix = id.len() >= MIN_KEY_DIGITS && key.starts_with(id);
            key == id || prompt_id == id || is_key_prefix
        })
    };
    let mut shown = Vec::new();
    let mut skipped = BTreeMap::new();
    source.for_each_row(selected, |row| {
        let mut rows = VecDeque::from([row]);
        while let Some(row) = rows.pop_front() {
            let (key, prompt_id) = match &row {
                Ok(row) => (&row.key, &row.prompt_id),
                Err(skipped) => (&skipped.key, &skipped.prompt_id),
            };
            // The key without the number of the message.
            let row_key = key.split(':').next().unwrap_or(key);
            let is_selected = is_named(key, prompt_id) || is_named(row_key, prompt_id);
            // `id` may name another answer of the same row: that answer becomes a row only after this one is tokenised.
            let may_contain_selected = id.is_some_and(|id| id.split(':').next() == Some(row_key));
            if !(is_selected || may_contain_selected) || shown.len() >= limit {
                continue;
            }
            match row.and_then(|row| builder.tokenize(row)) {
                Ok((row, tokenized)) => {
                    rows.extend(
                        tokenized
                            .separate_answers
                            .iter()
                            .map(|message| Ok(row.up_to(*message))),
                    );
                    if is_selected {
                        shown.push(shown_example(row, tokenized, tokenizer));
                    }
                }
                Err(row) if id.is_some() && is_selected => shown.push(left_out(*row)),
                Err(row) => *skipped.entry(row.reason).or_default() += 1,
            }
        }
        shown.len() < limit
    })?;
    Ok((shown, skipped))
}

/// Collects the answers of the source by prompt.
fn collect_samples(
    source: &DataSource,
    selected: (&config::DataConfig, &Selection),
    tokenizers: (&Tokenizer, Option<&Tokenizer>),
) -> Result<SampleTrie> {
    let mut samples = SampleTrie::default();
    let no_samples = SampleTrie::default();
    let mut builder = ExampleBuilder::new(source, selected.0, tokenizers, &no_samples);
    source.for_each_row(selected, |row| {
        builder.collect_sample(row, &mut samples);
        true
    })?;
    Ok(samples)
}

fn group_text(group: &Group) -> String {
    format!("{} ({group})", group.id())
}

fn left_out(skipped: SkippedRow) -> ShownExample {
    ShownExample {
        left_out: Some(skipped.reason),
        key: skipped.key,
        prompt_id: skipped.prompt_id,
        group: skipped.group.as_ref().map(group_text),
        ce_only: None,
        difference: None,
        source: Vec::new(),
        tokens: Vec::new(),
    }
}

fn shown_example(row: TrainingRow, tokenized: TokenizedRow, tokenizer: &Tokenizer) -> ShownExample {
    let shown_tokens = |ids: &[u32]| -> Vec<ShownToken> {
        ids.iter()
            .map(|&id| ShownToken {
                id,
                text: text_of(tokenizer, id),
                is_special: tokenizer.is_special(id),
                is_supervised: false,
                soft_labels: Vec::new(),
                tail: None,
                emitted: None,
                chunk: None,
            })
            .collect()
    };
    let mut tokens = shown_tokens(&tokenized.input_ids);
    for index in tokenized.labels.iter().cloned().flatten() {
        tokens[index].is_supervised = true;
    }
    let soft = &tokenized.soft;
    for position in 0..soft.len() {
        let Some(token) = tokens
            .get_mut(tokenized.answer + position)
            .filter(|token| token.is_supervised)
        else {
            continue;
        };
        let (ids, logprobs) = soft.soft(position);
        let labels = ids.iter().zip(logprobs).map(|(&id, &logprob)| ShownLabel {
            id,
            text: text_of(tokenizer, id),
            probability: f64::from(logprob).exp(),
        });
        token.soft_labels = labels.collect();
        if soft.is_soft(position) {
            let listed = token.soft_labels.iter().map(|label| label.probability);
            token.tail = Some((1.0 - listed.sum::<f64>()).max(0.0));
        }
        let emitted = soft
            .sampled_logprob(position)
            .filter(|logprob| logprob.is_finite());
        token.emitted = emitted.map(|logprob| f64::from(logprob).exp());
    }
    for chunk in soft.chunks() {
        if let Some(token) = tokens.get_mut(tokenized.answer + chunk.start) {
            token.chunk = Some((f64::from(-chunk.nll).exp(), chunk.len));
        }
    }
    ShownExample {
        key: row.key,
        prompt_id: row.prompt_id,
        group: row.group.as_ref().map(group_text),
        left_out: None,
        ce_only: tokenized.ce_only,
        difference: tokenized.difference,
        source: shown_tokens(&tokenized.source_ids),
        tokens,
    }
}

/// Returns the text of a token, or its name if it has no text.
pub fn text_of(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.spelling(id) {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => tokenizer.token_name(id),
    }
}
