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

/// Finds the run of teacher tokens that spells the answer. If the tokens are raw vocabulary entries (`Ġfoo`,
/// `▁foo`), they are decoded first, and the decoded logprobs are returned.
pub(super) fn teacher_units<'t>(
    teacher: &'t LogprobsView<'t>,
    answer: &[u8],
    kept: &Range<usize>,
    is_stop: impl Fn(&[u8]) -> bool,
) -> Option<(Vec<Unit>, Cow<'t, LogprobsView<'t>>)> {
    let find = |tokens: &[Cow<'_, [u8]>]| run::find(tokens, answer, kept.clone(), &is_stop);
    if let Some(decode) = raw_spelling(teacher) {
        let decoded = teacher.map_tokens(|bytes| decode(std::str::from_utf8(bytes).ok()?));
        if let Some(units) = find(&decoded.token) {
            return Some((units, Cow::Owned(decoded)));
        }
    }
    Some((find(&teacher.token)?, Cow::Borrowed(teacher)))
}

/// Bytes of a raw vocabulary entry.
type Decode = fn(&str) -> Option<Vec<u8>>;

/// Decoder of the tokens if they are raw vocabulary entries: these contain `Ġ` or `▁`, but no space.
fn raw_spelling(teacher: &LogprobsView) -> Option<Decode> {
    // Nearly every position has an alternative that begins with a space.
    const POSITIONS: usize = 16;
    let positions = 0..teacher.top.lists().min(POSITIONS);
    let alternatives = positions.flat_map(|at| teacher.top.get(at));
    let mut spelling: Option<Decode> = None;
    for bytes in teacher.token.iter().chain(alternatives) {
        // Raw vocabularies may contain added tokens that are runs of spaces.
        if bytes.contains(&b' ') && !bytes.trim_ascii().is_empty() {
            return None;
        }
        if spelling.is_none() {
            let has = |mark: &str| memchr::memmem::find(bytes, mark.as_bytes()).is_some();
            if has("Ġ") || has("Ċ") {
                spelling = Some(token_bytes::byte_level);
            } else if has("▁") {
                spelling = Some(token_bytes::sentence_piece);
            }
        }
    }
    spelling
}
