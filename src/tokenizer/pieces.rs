//! A cache of encoded pieces of text.
//!
//! Some pre-tokenizers always end a word before a space that stands between a non-space and a letter, and between a
//! letter and a punctuation mark after it. A text can be cut at these places: the joined ids of the pieces equal the
//! ids of the text. Nearly all pieces occur repeatedly, and a look-up takes a tenth of the time of encoding.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use anyhow::Result;
use foldhash::fast::FixedState;
use serde_json::Value;

/// Low estimate of the number of bytes per token, for the capacity of buffers.
pub(crate) const BYTES_PER_TOKEN: usize = 3;

/// Maximum number of cached pieces: enough for the common words of a language.
const MAX_PIECES: usize = 1 << 17;
/// Maximum number of bytes of a cached piece. Longer pieces rarely repeat.
const MAX_PIECE_BYTES: usize = 32;

/// Split patterns of Llama 3 and Qwen 2. Like GPT-2's pattern, they never match a non-space together with a following
/// space, nor a letter together with a following punctuation mark, and they do not look back.
const SPLITS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Ids of encoded pieces.
#[derive(Debug, Default)]
pub(crate) struct PieceCache(RwLock<HashMap<Box<str>, Box<[u32]>, FixedState>>);

impl PieceCache {
    /// Creates a cache. Returns None if a token of `tokenizer`, a parsed `tokenizer.json`, may extend over a cut.
    pub(crate) fn new(tokenizer: &Value) -> Option<Self> {
        let normalizer = &tokenizer["normalizer"];
        let keeps_words = normalizer.is_null() || normalizer["type"] == "NFC";
        // An added token that strips or contains spaces, or needs a word boundary, depends on the text around it.
        let added = tokenizer["added_tokens"].as_array();
        let is_independent = added.into_iter().flatten().all(|token| {
            let strips = ["lstrip", "rstrip"].iter().any(|side| token[side] == true);
            let content = token["content"].as_str().unwrap_or_default();
            !strips && !content.contains(' ') && token["single_word"] != true
        });
        let ends_words = ends_words_at_cuts(&tokenizer["pre_tokenizer"]) == Some(true);
        let is_bpe = tokenizer["model"]["type"] == "BPE";
        (keeps_words && is_independent && is_bpe && ends_words).then(Self::default)
    }

    /// Encodes `text`; `encode` encodes pieces that are not cached.
    ///
    /// # Errors
    /// If `encode` fails.
    pub(crate) fn encode(
        &self,
        text: &str,
        encode: impl Fn(&str) -> Result<Vec<u32>>,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / BYTES_PER_TOKEN);
        let mut new_pieces: Vec<(&str, Vec<u32>)> = Vec::new();
        let read = || self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut cache = read();
        for piece in pieces(text) {
            if let Some(cached) = cache.get(piece) {
                ids.extend_from_slice(cached);
                continue;
            }
            let has_room = cache.len() < MAX_PIECES;
            // `encode` may call this function for parts of the piece, and that call takes the lock for writing.
            drop(cache);
            let encoded = encode(piece)?;
            cache = read();
            ids.extend_from_slice(&encoded);
            if has_room && piece.len() <= MAX_PIECE_BYTES {
                new_pieces.push((piece, encoded));
            }
        }
        drop(cache);
        if !new_pieces.is_empty() {
            let mut cache = self.0.write().unwrap_or_else(PoisonError::into_inner);
            cache.extend(
                new_pieces
                    .into_iter()
                    .map(|(piece, ids)| (piece.into(), ids.into())),
            );
        }
        Ok(ids)
    }
}

/// Returns true if this pre-tokenizer ends a word at each cut of [`pieces`]. None for unknown pre-tokenizers.
fn ends_words_at_cuts(part: &Value) -> Option<bool> {
    match part["type"].as_str()? {
        "ByteLevel" => (part["add_prefix_space"] == false).then(|| part["use_regex"] != false),
        "Digits" => Some(false),
        "Split" => {
            let pattern = part["pattern"]["Regex"].as_str()?;
            let is_known = SPLITS.contains(&pattern)
                && part["behavior"] == "Isolated"
                && part["invert"] != true;
            is_known.then_some(true)
        }
        "Sequence" => {
            let parts = part["pretokenizers"].as_array()?;
            let results: Option<Vec<bool>> = parts.iter().map(ends_words_at_cuts).collect();
            Some(results?.contains(&true))
        }
        _ => None,
    }
}

/// Cuts a text before each single space between a non-space and a letter, and between each letter and a punctuation
/// mark after it. Only ASCII characters count.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let bytes = text.as_bytes();
    let mut start = 0;
    let is_cut = move |index: &usize| {
        let previous = bytes[index - 1];
        let byte = bytes[*index];
        match byte {
            b' ' => {
                previous.is_ascii_graphic()
                    && bytes.get(index + 1).is_some_and(u8::is_ascii_alphabetic)
            }
            _ => previous.is_ascii_alphabetic() && byte.is_ascii_punctuation(),
        }
    };
    let cuts = (1..bytes.len()).filter(is_cut);
    cuts.chain([bytes.len()]).filter_map(move |end| {
        let piece = &text[start..end];
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}
