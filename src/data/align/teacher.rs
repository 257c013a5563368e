//! Finds the teacher's tokens of an answer, and decodes raw vocabulary entries.

use std::borrow::Cow;
use std::ops::Range;

use super::run::{self, TeacherSpan};
use crate::cache::logprobs_view::LogprobsView;
use crate::prompt::control_tokens::is_control_name;
use crate::tokenizer::token_bytes;

/// Returns true if the teacher's tokens spell the answer, possibly with more text around it.
pub fn spells(teacher: &LogprobsView, answer: &[u8]) -> bool {
    let is_stop =
        |bytes: &[u8]| bytes.is_empty() || std::str::from_utf8(bytes).is_ok_and(is_control_name);
    teacher_spans(teacher, answer, &(0..answer.len()), is_stop).is_some()
}

/// Finds the run of teacher tokens that spells the answer. Raw vocabulary entries (`Ġfoo`, `▁foo`) are
/// decoded. Returns the run, and the logprobs with decoded tokens.
pub(super) fn teacher_spans<'t>(
    teacher: &'t LogprobsView<'t>,
    answer: &[u8],
    kept_bytes: &Range<usize>,
    is_stop: impl Fn(&[u8]) -> bool,
) -> Option<(Vec<TeacherSpan>, Cow<'t, LogprobsView<'t>>)> {
    let find = |tokens: &[Cow<'_, [u8]>]| run::find(tokens, answer, kept_bytes.clone(), &is_stop);
    let find_decoded = |decode: Decode| {
        let decoded = teacher.map_tokens(|bytes| {
            let text = std::str::from_utf8(bytes).ok()?;
            (!is_control_name(text)).then(|| decode(text))?
        });
        Some((find(&decoded.token)?, Cow::Owned(decoded)))
    };
    // The emitted tokens may match the answer both as raw entries and as text, while candidates differ. So the tokens
    // are decoded first if any of them looks raw.
    let find_plain = || Some((find(&teacher.token)?, Cow::Borrowed(teacher)));
    // A short raw answer may contain no `Ġ`, `Ċ` or `▁`.
    raw_spelling(teacher)
        .and_then(find_decoded)
        .or_else(find_plain)
        .or_else(|| find_decoded(token_bytes::byte_level))
}

/// Decodes a raw vocabulary entry to its bytes.
type Decode = fn(&str) -> Option<Vec<u8>>;

/// Returns a decoder if the tokens may be raw vocabulary entries: these contain `Ġ`, `Ċ` or `▁`, and no space. The
/// names of control tokens are ignored, because some contain `▁`.
fn raw_spelling(teacher: &LogprobsView) -> Option<Decode> {
    /// Number of positions whose candidates are inspected. Few are enough, because nearly every position has a
    /// candidate that begins with a space.
    const POSITIONS: usize = 16;
    let positions = 0..teacher.top.lists().min(POSITIONS);
    let candidates = positions.flat_map(|at| teacher.top.get(at));
    let mut spelling: Option<Decode> = None;
    for bytes in teacher.token.iter().chain(candidates) {
        // Raw vocabularies may contain added tokens that are runs of spaces.
        if bytes.contains(&b' ') && !bytes.trim_ascii().is_empty() {
            return None;
        }
        if spelling.is_some() || std::str::from_utf8(bytes).is_ok_and(is_control_name) {
            continue;
        }
        let has = |mark: &str| memchr::memmem::find(bytes, mark.as_bytes()).is_some();
        if has("Ġ") || has("Ċ") {
            spelling = Some(token_bytes::byte_level);
        } else if has("▁") {
            spelling = Some(token_bytes::sentence_piece);
        }
    }
    spelling
}
