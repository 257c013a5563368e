//! Added tokens of a model folder, and their occurrences in a text.
//!
//! A tokenizer finds added tokens first, and encodes the text between them separately.

use std::collections::HashMap;
use std::ops::Range;

use aho_corasick::AhoCorasick;
use anyhow::Result;
use serde_json::{Value, json};
use tokenizers::{AddedVocabulary, Model, NormalizerWrapper, OffsetReferential, OffsetType};

use crate::tokenizer::chat_template::TOKEN_VARIABLES;
use crate::tokenizer::files::TokenizerFiles;
use crate::tokenizer::source::TokenizerJson;

/// Adds the tokens that only the other files of the folder list to `tokenizer`, as `transformers` does when it loads a
/// folder.
pub(crate) fn add_missing(tokenizer: &mut TokenizerJson, files: &TokenizerFiles) {
    let mut new_ids = next_id(tokenizer)..;
    let mut new_id = || new_ids.next().unwrap_or(u64::MAX);
    let mut added = match tokenizer.json["added_tokens"].take() {
        Value::Array(added) => added,
        _ => Vec::new(),
    };
    let content = |token: &Value| token["content"].as_str().unwrap_or_default().to_owned();
    let mut known: HashMap<String, usize> = added.iter().map(content).zip(0..).collect();
    for mut token in files.added_tokens() {
        let name = content(&token);
        match known.get(&name) {
            Some(&at) => {
                token["id"] = added[at]["id"].take();
                added[at] = token;
            }
            None => {
                let id = tokenizer.id(&name).map(u64::from);
                token["id"] = id.unwrap_or_else(&mut new_id).into();
                known.insert(name, added.len());
                added.push(token);
            }
        }
    }
    // A special token outside the vocabulary gets an id if the chat template can produce it.
    let template = files.chat_template.as_deref().unwrap_or_default();
    let by_variable = |name: &str| {
        let mut variables = TOKEN_VARIABLES.iter();
        variables.any(|variable| files.token(variable) == Some(name) && template.contains(variable))
    };
    for name in files.special_tokens() {
        let is_known = known.contains_key(name) || tokenizer.id(name).is_some();
        let is_used = template.contains(name) || by_variable(name);
        if is_known || name.is_empty() || !is_used {
            continue;
        }
        known.insert(name.to_owned(), added.len());
        added.push(special(name, new_id()));
    }
    tokenizer.json["added_tokens"] = Value::Array(added);
}

/// An entry of `added_tokens` for a special token.
pub(crate) fn special(content: &str, id: u64) -> Value {
    json!({
        "id": id, "content": content, "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false,
    })
}

/// Id for the next new token.
fn next_id(tokenizer: &TokenizerJson) -> u64 {
    let size = tokenizer.model.get_vocab_size() as u64;
    let added = tokenizer.json["added_tokens"].as_array();
    let ids = added.into_iter().flatten();
    let largest = ids.filter_map(|token| token["id"].as_u64()).max();
    largest.map_or(0, |id| id + 1).max(size)
}

/// Fast search for added tokens that are not control tokens.
#[derive(Debug)]
pub(crate) struct PlainAdded {
    names: AhoCorasick,
    normalised_match: NormalisedMatch,
}

/// Texts from which normalisation may produce an added token whose name the text does not contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NormalisedMatch {
    Never,
    NonAscii,
    Always,
}

impl PlainAdded {
    /// Builds the search. Returns None if the vocabulary has no such tokens.
    ///
    /// # Errors
    /// If the names exceed the limits of the search.
    pub(crate) fn new(
        vocabulary: &AddedVocabulary,
        normalizer: &Value,
    ) -> Result<Option<PlainAdded>> {
        let plain = vocabulary.get_added_tokens_decoder().values();
        let plain: Vec<_> = plain.filter(|token| !token.special).collect();
        if plain.is_empty() {
            return Ok(None);
        }
        let mut normalized = plain.iter().filter(|token| token.normalized);
        let normalised_match = if normalizer.is_null() {
            NormalisedMatch::Never
        } else if normalizer["type"] != "NFC" {
            normalized
                .next()
                .map_or(NormalisedMatch::Never, |_| NormalisedMatch::Always)
        } else if normalized.any(|token| !token.content.is_ascii()) {
            NormalisedMatch::NonAscii
        } else {
            NormalisedMatch::Never
        };
        let names = AhoCorasick::new(plain.iter().map(|token| &token.content))?;
        Ok(Some(PlainAdded {
            names,
            normalised_match,
        }))
    }

    /// Returns false only if `text` contains no such token.
    pub(crate) fn may_be_in(&self, text: &str) -> bool {
        let may_be_normalised = match self.normalised_match {
            NormalisedMatch::Never => false,
            NormalisedMatch::NonAscii => !text.is_ascii(),
            NormalisedMatch::Always => true,
        };
        may_be_normalised || self.names.is_match(text)
    }
}

/// Finds the added tokens of `vocabulary` in a text, in order: byte ranges and ids.
pub(crate) fn find(
    vocabulary: &AddedVocabulary,
    normalizer: Option<&NormalizerWrapper>,
    text: &str,
) -> Vec<(Range<usize>, u32)> {
    let extracted = vocabulary.extract_and_normalize(normalizer, text);
    let splits = extracted.get_splits(OffsetReferential::Original, OffsetType::Byte);
    let found = splits.into_iter().filter_map(|(_, (start, end), tokens)| {
        let token = tokens.as_ref()?.first()?;
        Some((start..end, token.id))
    });
    found.collect()
}
