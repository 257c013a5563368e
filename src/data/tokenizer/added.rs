//! Added tokens of a model folder, and their occurrences in a text.
//!
//! A tokenizer finds added tokens first, and encodes the text between them separately.

use std::collections::HashMap;
use std::ops::Range;

use aho_corasick::{AhoCorasick, Anchored, Input};
use anyhow::Result;
use serde_json::{Value, json};
use tokenizers::{AddedVocabulary, NormalizerWrapper, OffsetReferential, OffsetType};

use super::files::Files;

/// Adds tokens that only the other files of the folder list to `tokenizer`, a parsed `tokenizer.json`, as
/// `transformers` does on loading.
pub fn complete(tokenizer: &mut Value, files: &Files) {
    let mut next = next_id(tokenizer);
    let mut new_id = || {
        next += 1;
        next - 1
    };
    let Some(Value::Array(mut added)) = tokenizer.get_mut("added_tokens").map(Value::take) else {
        return;
    };
    let vocabulary = &tokenizer["model"]["vocab"];
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
                let id = id_in_vocabulary(vocabulary, &name);
                token["id"] = id.unwrap_or_else(&mut new_id).into();
                known.insert(name, added.len());
                added.push(token);
            }
        }
    }
    // A special token outside the vocabulary gets an id if the chat template can produce it.
    let template = files.chat_template.as_deref().unwrap_or_default();
    for name in files.special_tokens() {
        let is_known = known.contains_key(name) || id_in_vocabulary(vocabulary, name).is_some();
        if is_known || name.is_empty() || !template.contains(name) {
            continue;
        }
        known.insert(name.to_owned(), added.len());
        added.push(special(name, new_id()));
    }
    tokenizer["added_tokens"] = Value::Array(added);
}

/// An entry of `added_tokens` for a special token.
pub fn special(content: &str, id: u64) -> Value {
    json!({
        "id": id, "content": content, "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false,
    })
}

/// Id of the next new token.
fn next_id(tokenizer: &Value) -> u64 {
    let vocabulary = &tokenizer["model"]["vocab"];
    let size = vocabulary.as_object().map_or_else(
        || vocabulary.as_array().map_or(0, Vec::len),
        |map| map.len(),
    );
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let largest = added.filter_map(|token| token["id"].as_u64()).max();
    largest.map_or(0, |id| id + 1).max(size as u64)
}

/// Id of a token in a vocabulary: an object of ids, or a list of tokens with scores.
pub fn id_in_vocabulary(vocabulary: &Value, token: &str) -> Option<u64> {
    match vocabulary {
        Value::Object(ids) => ids.get(token)?.as_u64(),
        Value::Array(tokens) => {
            let at = tokens.iter().position(|entry| entry[0] == token)?;
            Some(at as u64)
        }
        _ => None,
    }
}

/// Fast search for added tokens that are not control tokens.
#[derive(Debug)]
pub struct PlainAdded {
    names: AhoCorasick,
    /// Normalisation may produce such a token from a text without its name.
    by_normalising: bool,
}

impl PlainAdded {
    /// Returns None if there are none.
    ///
    /// # Errors
    /// If the names exceed the limits of the search.
    pub fn new(vocabulary: &AddedVocabulary, normalises: bool) -> Result<Option<PlainAdded>> {
        let plain = vocabulary.get_added_tokens_decoder().values();
        let plain: Vec<_> = plain.filter(|token| !token.special).collect();
        if plain.is_empty() {
            return Ok(None);
        }
        let by_normalising = normalises
            && plain
                .iter()
                .any(|token| token.normalized && !token.content.is_ascii());
        let names = AhoCorasick::new(plain.iter().map(|token| &token.content))?;
        Ok(Some(PlainAdded {
            names,
            by_normalising,
        }))
    }

    /// Returns false only if no such token is in `text`.
    pub fn may_be_in(&self, text: &str) -> bool {
        let input = Input::new(text).anchored(Anchored::No).earliest(true);
        self.names.find(input).is_some() || (self.by_normalising && !text.is_ascii())
    }
}

/// Finds the added tokens of `vocabulary` in a text, in order: byte ranges and ids.
pub fn find(
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
