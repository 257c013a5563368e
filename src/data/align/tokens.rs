//! The student's token for the bytes of a teacher's token.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::prompt::control_tokens::{is_control_name, is_end_of_turn_name};
use crate::tokenizer::Tokenizer;

/// U+FFFD in UTF-8.
const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

/// Looks tokens up by their bytes, and remembers what it found.
pub(super) struct Tokens<'a> {
    tokenizer: &'a Tokenizer,
    /// Nearly all tokens are short; a key without a pointer is found in one step.
    short: HashMap<u128, Option<u32>, FixedState>,
    long: HashMap<Box<[u8]>, Option<u32>, FixedState>,
}

impl<'a> Tokens<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            short: HashMap::default(),
            long: HashMap::default(),
        }
    }

    /// The student token for a teacher token that is spelled `bytes`: that with the same bytes, or
    /// else the first of their encoding, an event that they imply. A control token is that of the same name, and
    /// one that ends a turn is that by which the student ends its answer. None for other control tokens, for what holds the
    /// replacement character, and for what the student cannot spell.
    pub(super) fn id_of(&mut self, bytes: &[u8]) -> Option<u32> {
        let tokenizer = self.tokenizer;
        match short_key(bytes) {
            Some(key) => *self
                .short
                .entry(key)
                .or_insert_with(|| find(tokenizer, bytes)),
            None => match self.long.get(bytes) {
                Some(&known) => known,
                None => {
                    let id = find(tokenizer, bytes);
                    self.long.insert(bytes.into(), id);
                    id
                }
            },
        }
    }
}

/// Up to 15 bytes with their number. Put together in registers: a buffer that is filled byte by byte
/// and read as one number makes the processor wait for the filling, which doubles the time of a
/// look-up.
fn short_key(bytes: &[u8]) -> Option<u128> {
    let length = bytes.len();
    let low = |part: &[u8; 8]| u128::from(u64::from_le_bytes(*part));
    let key = match length {
        0 => 0,
        // For 1, 2 and 3 bytes: some of these are the same byte, twice at the same place.
        1..=3 => [0, length / 2, length - 1]
            .into_iter()
            .fold(0, |key, at| key | u128::from(bytes[at]) << (8 * at)),
        4..=7 => {
            let word = |part: &[u8; 4]| u128::from(u32::from_le_bytes(*part));
            // The second word overlaps the first one, where both have the same bits.
            word(bytes.first_chunk()?) | word(bytes.last_chunk()?) << (8 * (length - 4))
        }
        8..=15 => low(bytes.first_chunk()?) | low(bytes.last_chunk()?) << (8 * (length - 8)),
        _ => return None,
    };
    Some(key | (length as u128) << 120)
}

fn find(tokenizer: &Tokenizer, bytes: &[u8]) -> Option<u32> {
    // Some servers tell a part of a character so, and which part that is nobody knows.
    if memchr::memmem::find(bytes, REPLACEMENT).is_some() {
        return None;
    }
    if let Some(same) = tokenizer.id_of_bytes(bytes) {
        return Some(same);
    }
    if !is_stop(tokenizer, bytes) {
        return tokenizer.first_id_of(bytes);
    }
    let name = std::str::from_utf8(bytes).ok()?;
    let own = tokenizer.id_of_control(name);
    if own == tokenizer.end_of_turn() || own.is_none() && is_end_of_turn_name(name) {
        tokenizer.end_of_answer()
    } else {
        own
    }
}

/// Is this the name of a token that ends a turn, of the student's tokenizer or of another one?
pub(super) fn ends_turn(tokenizer: &Tokenizer, bytes: &[u8]) -> bool {
    let Ok(name) = std::str::from_utf8(bytes) else {
        return false;
    };
    let own = tokenizer.id_of_control(name);
    own.map_or_else(
        || is_end_of_turn_name(name),
        |id| tokenizer.stop_ids().contains(&id),
    )
}

/// Is this a token that may end an answer without being part of its text: one without bytes, or
/// the name of a control token?
pub fn is_stop(tokenizer: &Tokenizer, bytes: &[u8]) -> bool {
    bytes.is_empty() || is_control(tokenizer, bytes)
}

/// Is this the name of a control token, the student's own or one that other models use?
fn is_control(tokenizer: &Tokenizer, bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    tokenizer.names_special(text) || is_control_name(text)
}
