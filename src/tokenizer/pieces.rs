//! Texts in pieces that are encoded one by one, and remembered.
//!
//! Where a pre-tokenizer is known to end a word before a space and a letter, and before a punctuation
//! mark, a text may be cut there: the ids of the pieces are those of the whole. Nearly all pieces have been met before, and to look
//! one up takes a tenth of the time that encoding it takes.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use anyhow::Result;
use foldhash::fast::FixedState;
use serde_json::Value;

/// Pieces that are remembered. The words of a language, with and without a comma, are not many more.
const REMEMBERED: usize = 1 << 17;
/// Longer ones hardly come again.
const LONGEST: usize = 32;

/// The patterns of Llama 3 and of Qwen 2. As GPT-2's, neither takes what is no space together with a
/// space behind it, or a letter together with a mark behind it; neither looks back.
const SPLITS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// The ids of pieces met before.
#[derive(Debug, Default)]
pub(crate) struct PieceCache(RwLock<HashMap<Box<str>, Box<[u32]>, FixedState>>);

impl PieceCache {
    /// None where `tokenizer`, a parsed `tokenizer.json`, may make one token of what stands on both
    /// sides of a cut.
    pub(crate) fn new(tokenizer: &Value) -> Option<Self> {
        let normalizer = &tokenizer["normalizer"];
        let keeps_words = normalizer.is_null() || normalizer["type"] == "NFC";
        // Such a token takes part of the text around it, before the words are told apart.
        let added = tokenizer["added_tokens"].as_array();
        let is_clean = added.into_iter().flatten().all(|token| {
            let strips = ["lstrip", "rstrip"].iter().any(|side| token[side] == true);
            let content = token["content"].as_str().unwrap_or_default();
            !strips && !content.contains(' ') && token["single_word"] != true
        });
        let cuts = cuts(&tokenizer["pre_tokenizer"]);
        let is_bpe = tokenizer["model"]["type"] == "BPE";
        (keeps_words && is_clean && is_bpe && cuts == Some(true)).then(Self::default)
    }

    /// The ids of `text`, whose pieces `encode` encodes.
    ///
    /// # Errors
    /// That of `encode`.
    pub(crate) fn encode(
        &self,
        text: &str,
        encode: impl Fn(&str) -> Result<Vec<u32>>,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut new: Vec<(&str, Vec<u32>)> = Vec::new();
        let read = || self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut known = read();
        for piece in pieces(text) {
            if let Some(known) = known.get(piece) {
                ids.extend_from_slice(known);
                continue;
            }
            let has_room = known.len() < REMEMBERED;
            // It may come back here for parts of the piece, and write what it has met.
            drop(known);
            let encoded = encode(piece)?;
            known = read();
            ids.extend_from_slice(&encoded);
            if has_room && piece.len() <= LONGEST {
                new.push((piece, encoded));
            }
        }
        drop(known);
        if !new.is_empty() {
            let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
            known.extend(
                new.into_iter()
                    .map(|(piece, ids)| (piece.into(), ids.into())),
            );
        }
        Ok(ids)
    }
}

/// Does this pre-tokenizer end a word at each cut? None if it is not known.
fn cuts(part: &Value) -> Option<bool> {
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
            let cuts: Option<Vec<bool>> = parts.iter().map(cuts).collect();
            Some(cuts?.contains(&true))
        }
        _ => None,
    }
}

/// Cuts a text before each space that stands alone between what is no space and a letter, and between
/// a letter and a punctuation mark.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let bytes = text.as_bytes();
    let mut start = 0;
    let is_cut = move |at: &usize| {
        let (before, byte) = (bytes[at - 1], bytes[*at]);
        match byte {
            b' ' => {
                before.is_ascii_graphic() && bytes.get(at + 1).is_some_and(u8::is_ascii_alphabetic)
            }
            _ => before.is_ascii_alphabetic() && byte.is_ascii_punctuation(),
        }
    };
    let cuts = (1..bytes.len()).filter(is_cut);
    cuts.chain([bytes.len()]).filter_map(move |end| {
        let piece = &text[start..end];
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
}
