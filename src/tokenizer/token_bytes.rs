//! The exact bytes of each token.
//!
//! Alignment compares bytes. Decoding token by token does not return them: a part of a character decodes to a
//! replacement character, and a SentencePiece decoder drops a leading space.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::Value;
use tokenizers::AddedToken;

/// The spelling of bytes in a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// GPT-2: each byte is written as one character; printable bytes as themselves.
    ByteLevel,
    /// SentencePiece: a space is written as `▁`, a single byte as `<0x0A>`, and all other text as itself.
    SentencePiece,
}

/// Ranks of tokens: of several tokens with the same bytes, the token with the lowest rank is found.
const ORDINARY_RANK: u8 = 0;
const FALLBACK_RANK: u8 = 1;
const ADDED_RANK: u8 = 2;

/// Maps between tokens and their bytes. Control tokens have no bytes.
#[derive(Debug, Default)]
pub(crate) struct TokenByteMap {
    by_id: Vec<Option<Box<[u8]>>>,
    by_bytes: HashMap<Box<[u8]>, u32>,
}

impl TokenByteMap {
    /// Builds the maps from a parsed `tokenizer.json`. `vocabulary` contains the model's tokens, and `added` the added
    /// tokens outside the vocabulary, control tokens excluded. The maps are empty if the spelling is unknown, as for
    /// WordPiece, whose vocabulary does not show the spaces between words.
    pub(crate) fn new(
        tokenizer: &Value,
        vocabulary: &HashMap<String, u32>,
        added: &[(u32, AddedToken)],
        is_control: impl Fn(u32) -> bool,
    ) -> Self {
        let Some(alphabet) = alphabet(tokenizer) else {
            return Self::default();
        };
        let byte_fallback = tokenizer["model"]["byte_fallback"] == true;
        // Each token with its bytes and its rank among tokens with the same bytes.
        let mut tokens: Vec<(u32, Box<[u8]>, u8)> = Vec::with_capacity(vocabulary.len());
        for (token, &id) in vocabulary {
            let fallback = fallback_byte(token).filter(|_| byte_fallback);
            let bytes: Vec<u8> = match (alphabet, fallback) {
                (_, Some(byte)) => vec![byte],
                // The decoder, too, treats a token with a character outside the alphabet as plain text.
                (Alphabet::ByteLevel, _) => {
                    byte_level(token).unwrap_or_else(|| token.clone().into_bytes())
                }
                (Alphabet::SentencePiece, _) => token.replace('▁', " ").into_bytes(),
            };
            if !is_control(id) {
                let rank = if fallback.is_some() {
                    FALLBACK_RANK
                } else {
                    ORDINARY_RANK
                };
                tokens.push((id, bytes.into(), rank));
            }
        }
        for (id, token) in added {
            let text = match alphabet {
                // The library matches normalised tokens in text whose spaces were replaced by `▁`.
                Alphabet::SentencePiece if token.normalized => token.content.replace('▁', " "),
                _ => token.content.clone(),
            };
            tokens.push((*id, text.into_bytes().into(), ADDED_RANK));
        }
        // Of several tokens with the same bytes, `by_bytes` holds an ordinary one, which the tokenizer would produce.
        tokens.sort_by_key(|&(id, _, rank)| (rank, id));
        let mut maps = Self::default();
        for (id, bytes, _) in tokens {
            let index = id as usize;
            if index >= maps.by_id.len() {
                maps.by_id.resize(index + 1, None);
            }
            if !bytes.is_empty() {
                maps.by_bytes.entry(bytes.clone()).or_insert(id);
            }
            maps.by_id[index] = Some(bytes);
        }
        maps
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub(crate) fn get(&self, id: u32) -> Option<&[u8]> {
        self.by_id.get(id as usize)?.as_deref()
    }

    pub(crate) fn find_id(&self, bytes: &[u8]) -> Option<u32> {
        self.by_bytes.get(bytes).copied()
    }
}

/// Detects the alphabet from the parts of the tokenizer that encode or decode it.
fn alphabet(tokenizer: &Value) -> Option<Alphabet> {
    let uses = |kind: &str| {
        ["decoder", "pre_tokenizer", "normalizer"]
            .iter()
            .any(|part| has_part(&tokenizer[part], kind))
    };
    if uses("ByteLevel") {
        Some(Alphabet::ByteLevel)
    } else if uses("Metaspace") || has_part(&tokenizer["decoder"], "ByteFallback") {
        Some(Alphabet::SentencePiece)
    } else {
        None
    }
}

/// Returns true if `part`, or one of its steps if it is a sequence, has this type.
pub(crate) fn has_part(part: &Value, kind: &str) -> bool {
    let steps = ["decoders", "pretokenizers", "normalizers"];
    part["type"] == kind
        || steps
            .iter()
            .filter_map(|name| part[name].as_array())
            .flatten()
            .any(|step| has_part(step, kind))
}

/// Bytes of a token in a byte-level vocabulary. None if a character is outside the alphabet.
pub(crate) fn byte_level(token: &str) -> Option<Vec<u8>> {
    static CHARACTERS: LazyLock<HashMap<char, u8>> = LazyLock::new(byte_of_character);
    token.chars().map(|c| CHARACTERS.get(&c).copied()).collect()
}

/// Bytes of a token in a SentencePiece vocabulary.
pub(crate) fn sentence_piece(token: &str) -> Option<Vec<u8>> {
    let byte = fallback_byte(token).map(|byte| vec![byte]);
    Some(byte.unwrap_or_else(|| token.replace('▁', " ").into_bytes()))
}

/// Byte of a token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 2)
}

/// Returns the byte of each character in GPT-2's alphabet: printable bytes are written as themselves, all others as the
/// characters from U+0100 on, in order (`bytes_to_unicode` in GPT-2's `encoder.py`).
fn byte_of_character() -> HashMap<char, u8> {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next_code = 0x100;
    (0..=255u8)
        .filter_map(|byte| {
            let code = if is_printable(byte) {
                u32::from(byte)
            } else {
                next_code += 1;
                next_code - 1
            };
            Some((char::from_u32(code)?, byte))
        })
        .collect()
}
