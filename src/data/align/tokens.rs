//! Looks up the student's token for the bytes of a teacher's token.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::prompt::control_tokens::{is_control_name, is_end_of_turn_name};
use crate::tokenizer::Tokenizer;

/// U+FFFD in UTF-8.
const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

/// Cache of student tokens by the bytes of teacher tokens.
pub(super) struct TokenLookup<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens of at most 15 bytes: nearly all tokens. A key without a pointer saves a memory access.
    short: HashMap<u128, Option<u32>, FixedState>,
    long: HashMap<Box<[u8]>, Option<u32>, FixedState>,
}

impl<'a> TokenLookup<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            short: HashMap::default(),
            long: HashMap::default(),
        }
    }

    /// Returns the student token for a teacher token that is spelled `bytes`:
    ///
    /// 1. the token with the same bytes, or else the first token of the encoding of these bytes;
    /// 2. for the name of a control token, the control token of the same name;
    /// 3. for a control token that ends a turn, the token with which the student ends its answer.
    ///
    /// None for other control tokens, for bytes that contain U+FFFD, and for bytes that the student cannot spell.
    pub(super) fn student_id(&mut self, bytes: &[u8]) -> Option<u32> {
        let tokenizer = self.tokenizer;
        match short_key(bytes) {
            Some(key) => *self
                .short
                .entry(key)
                .or_insert_with(|| find_student_id(tokenizer, bytes)),
            None => match self.long.get(bytes) {
                Some(&id) => id,
                None => {
                    let id = find_student_id(tokenizer, bytes);
                    self.long.insert(bytes.into(), id);
                    id
                }
            },
        }
    }
}

/// Packs up to 15 bytes and their number into a key, in registers. Filling a buffer byte by byte and reading it as one
/// number would stall on store forwarding, which doubles the time of a look-up.
fn short_key(bytes: &[u8]) -> Option<u128> {
    let length = bytes.len();
    let u32_word = |part: &[u8; 4]| u128::from(u32::from_le_bytes(*part));
    let u64_word = |part: &[u8; 8]| u128::from(u64::from_le_bytes(*part));
    let key = match length {
        0 => 0,
        // With 1 or 2 bytes, some of the three indices are equal, which sets the same bits twice.
        1..=3 => [0, length / 2, length - 1]
            .into_iter()
            .fold(0, |key, at| key | u128::from(bytes[at]) << (8 * at)),
        4..=7 => {
            // The two words overlap; the bits in the overlap are equal.
            u32_word(bytes.first_chunk()?) | u32_word(bytes.last_chunk()?) << (8 * (length - 4))
        }
        8..=15 => {
            u64_word(bytes.first_chunk()?) | u64_word(bytes.last_chunk()?) << (8 * (length - 8))
        }
        _ => return None,
    };
    // The length takes the highest of the 16 bytes.
    Some(key | (length as u128) << 120)
}

fn find_student_id(tokenizer: &Tokenizer, bytes: &[u8]) -> Option<u32> {
    // Some servers write U+FFFD for a part of a character, so the bytes of the token are unknown.
    if memchr::memmem::find(bytes, REPLACEMENT).is_some() {
        return None;
    }
    if let Some(id) = tokenizer.id_of_bytes(bytes) {
        return Some(id);
    }
    if !is_stop(tokenizer, bytes) {
        return tokenizer.first_id_of(bytes);
    }
    let name = std::str::from_utf8(bytes).ok()?;
    let student_id = tokenizer.id_of_control(name);
    if student_id == tokenizer.end_of_turn() || student_id.is_none() && is_end_of_turn_name(name) {
        tokenizer.end_of_answer()
    } else {
        student_id
    }
}

/// Returns true for the name of a token that ends a turn, in the student's tokenizer or another one.
pub(super) fn ends_turn(tokenizer: &Tokenizer, bytes: &[u8]) -> bool {
    let Ok(name) = std::str::from_utf8(bytes) else {
        return false;
    };
    let student_id = tokenizer.id_of_control(name);
    student_id.map_or_else(
        || is_end_of_turn_name(name),
        |id| tokenizer.stop_ids().contains(&id),
    )
}

/// Returns true for a token that may follow an answer without being part of its text: a token without bytes, or the
/// name of a control token.
pub fn is_stop(tokenizer: &Tokenizer, bytes: &[u8]) -> bool {
    bytes.is_empty() || is_control(tokenizer, bytes)
}

/// Returns true for the name of a control token, of the student or of other models.
fn is_control(tokenizer: &Tokenizer, bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    tokenizer.names_special(text) || is_control_name(text)
}
