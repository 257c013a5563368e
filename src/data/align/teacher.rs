//! The teacher's tokens of an answer.

use std::borrow::Cow;
use std::ops::Range;

use super::run::{self, Unit};
use crate::cache::view::LogprobsView;
use crate::data::tokenizer::token_bytes;

/// Returns true if the teacher's tokens spell the answer, with more around it or not.
pub fn spells(teacher: &LogprobsView, answer: &[u8]) -> bool {
    teacher_units(teacher, answer, &(0..answer.len()), <[u8]>::is_empty).is_some()
}

/// Finds the run of teacher tokens that spells the answer. Raw vocabulary entries (`Ġfoo`, `▁foo`) are decoded, and
/// the decoded logprobs are returned.
pub(super) fn teacher_units<'t>(
    teacher: &'t LogprobsView<'t>,
    answer: &[u8],
    kept: &Range<usize>,
    is_stop: impl Fn(&[u8]) -> bool,
) -> Option<(Vec<Unit>, Cow<'t, LogprobsView<'t>>)> {
    let find = |tokens: &[Cow<'_, [u8]>]| run::find(tokens, answer, kept.clone(), &is_stop);
    let decoded = |decode: Decode| {
        let decoded = teacher.map_tokens(|bytes| decode(std::str::from_utf8(bytes).ok()?));
        Some((find(&decoded.token)?, Cow::Owned(decoded)))
    };
    // Plain tokens may be spelled like raw ones, and only their alternatives differ: so raw ones first, if any
    // token looks like it.
    let decoders: &[Decode] = match mark(teacher) {
        Some(Mark::ByteLevel) => &[token_bytes::byte_level],
        // Control tokens of byte-level vocabularies may contain `▁`.
        Some(Mark::Metaspace) => &[token_bytes::sentence_piece, token_bytes::byte_level],
        None => &[],
    };
    let plain = || Some((find(&teacher.token)?, Cow::Borrowed(teacher)));
    decoders
        .iter()
        .find_map(|decode| decoded(*decode))
        .or_else(plain)
}

/// Bytes of a raw vocabulary entry.
type Decode = fn(&str) -> Option<Vec<u8>>;

/// Sign of raw vocabulary entries.
enum Mark {
    /// `Ġ` or `Ċ`
    ByteLevel,
    /// `▁`
    Metaspace,
}

/// The mark in the tokens, if they may be raw vocabulary entries: these contain no space.
fn mark(teacher: &LogprobsView) -> Option<Mark> {
    // Nearly every position has an alternative that begins with a space.
    const POSITIONS: usize = 16;
    let positions = 0..teacher.top.lists().min(POSITIONS);
    let alternatives = positions.flat_map(|at| teacher.top.get(at));
    let mut found = None;
    for bytes in teacher.token.iter().chain(alternatives) {
        // Raw vocabularies may contain added tokens that are runs of spaces.
        if bytes.contains(&b' ') && !bytes.trim_ascii().is_empty() {
            return None;
        }
        let has = |mark: &str| memchr::memmem::find(bytes, mark.as_bytes()).is_some();
        match found {
            Some(Mark::ByteLevel) => {}
            _ if has("Ġ") || has("Ċ") => found = Some(Mark::ByteLevel),
            None if has("▁") => found = Some(Mark::Metaspace),
            _ => {}
        }
    }
    found
}
