//! The added tokens of a model folder: completes their list, and finds them in a text.
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

/// Adds to `tokenizer` the added tokens that only other files of the folder list, as `transformers` does when it loads
/// the folder. Tokens that `tokenizer` already lists keep their ids and take all other fields from these files.
pub(crate) fn add_missing(tokenizer: &mut TokenizerJson, files: &TokenizerFiles) {
    let mut new_ids = next_id(tokenizer)..;
    let mut new_id = || new_ids.next().unwrap_or(u64::MAX);
    let mut added = match tokenizer.json["added_tokens"].take() {
        Value::Array(added) => added,
        _ => Vec::new(),
    };
    let content = |token: &Value| token["content"].as_str().unwrap_or_default().to_owned();
    let mut index_by_name: HashMap<String, usize> = added.iter().map(content).zip(0..).collect();
    for mut token in files.added_tokens() {
        let name = content(&token);
        match index_by_name.get(&name) {
            Some(&index) => {
                token["id"] = added[index]["id"].take();
                added[index] = token;
            }
            None => {
                let id = tokenizer.id(&name).map(u64::from);
                token["id"] = id.unwrap_or_else(&mut new_id).into();
                index_by_name.insert(name, added.len());
                added.push(token);
            }
        }
    }
    // A special token outside the vocabulary gets an id if the chat template can produce it.
    let template = files.chat_template.as_deref().unwrap_or_default();
    let is_used_by_variable = |name: &str| {
        let mut variables = TOKEN_VARIABLES.iter();
        variables.any(|variable| files.token(variable) == Some(name) && template.contains(variable))
    };
    for name in files.special_tokens() {
        let has_id = index_by_name.contains_key(name) || tokenizer.id(name).is_some();
        let is_used = template.contains(name) || is_used_by_variable(name);
        if has_id || name.is_empty() || !is_used {
            continue;
        }
        index_by_name.insert(name.to_owned(), added.len());
        added.push(special_entry(name, new_id()));
    }
    tokenizer.json["added_tokens"] = Value::Array(added);
}

/// Returns an entry of `added_tokens` for a special token.
pub(crate) fn special_entry(content: &str, id: u64) -> Value {
    json!({
        "id": id, "content": content, "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false,
    })
}

/// Returns the id of the next added token, as the library chooses it: above the ids of all added tokens, and at least
/// the number of tokens of the model.
fn next_id(tokenizer: &TokenizerJson) -> u64 {
    let size = tokenizer.model.get_vocab_size() as u64;
    let added = tokenizer.json["added_tokens"].as_array();
    let ids = added.into_iter().flatten();
    let largest = ids.filter_map(|token| token["id"].as_u64()).max();
    largest.map_or(0, |id| id + 1).max(size)
}

/// A fast test of whether a text may contain added tokens that are not control tokens.
#[derive(Debug)]
pub(crate) struct AddedTokenSearch {
    names: AhoCorasick,
    hidden_in: HiddenIn,
}

/// The texts that may contain an added token without containing its name, because normalisation produces the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HiddenIn {
    Nowhere,
    NonAscii,
    Anywhere,
}

impl AddedTokenSearch {
    /// Builds the search. Returns None if the vocabulary has no added tokens except control tokens.
    ///
    /// # Errors
    /// If the names exceed the limits of the search.
    pub(crate) fn new(
        vocabulary: &AddedVocabulary,
        normalizer: &Value,
    ) -> Result<Option<AddedTokenSearch>> {
        let plain = vocabulary.get_added_tokens_decoder().values();
        let plain: Vec<_> = plain.filter(|token| !token.special).collect();
        if plain.is_empty() {
            return Ok(None);
        }
        let mut normalized = plain.iter().filter(|token| token.normalized);
        let hidden_in = if normalizer.is_null() {
            HiddenIn::Nowhere
        } else if normalizer["type"] != "NFC" {
            normalized
                .next()
                .map_or(HiddenIn::Nowhere, |_| HiddenIn::Anywhere)
        } else if normalized.any(|token| !token.content.is_ascii()) {
            HiddenIn::NonAscii
        } else {
            HiddenIn::Nowhere
        };
        let names = AhoCorasick::new(plain.iter().map(|token| &token.content))?;
        Ok(Some(AddedTokenSearch { names, hidden_in }))
    }

    /// Returns false only if `text` contains none of the tokens.
    pub(crate) fn may_be_in(&self, text: &str) -> bool {
        let may_be_hidden = match self.hidden_in {
            HiddenIn::Nowhere => false,
            HiddenIn::NonAscii => !text.is_ascii(),
            HiddenIn::Anywhere => true,
        };
        may_be_hidden || self.names.is_match(text)
    }
}

/// Finds the added tokens of `vocabulary` in a text. Returns their byte ranges and ids, in order.
pub(crate) fn find(
    vocabulary: &AddedVocabulary,
    normalizer: Option<&NormalizerWrapper>,
    text: &str,
) -> Vec<(Range<usize>, u32)> {
    let extracted = vocabulary.extract_and_normalize(normalizer, text);
    let splits = extracted.get_splits(OffsetReferential::Original, OffsetType::Byte);
    let tokens = splits.into_iter().filter_map(|(_, (start, end), tokens)| {
        let token = tokens.as_ref()?.first()?;
        Some((start..end, token.id))
    });
    tokens.collect()
}
