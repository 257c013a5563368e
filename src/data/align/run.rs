//! Finds the run of a teacher's tokens that spells an answer.
//!
//! A server may report logprobs of more tokens than its text contains: thinking before the text, stripped white space,
//! a stop string after the text. It may also report tokens without their bytes, or U+FFFD for a part of a character.

use std::borrow::Cow;
use std::ops::Range;

/// U+FFFD in UTF-8.
const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();
/// Maximum number of bytes after an answer: a stop string and the end of the turn.
const MAX_TRAILING_BYTES: usize = 256;
/// Assumed maximum number of bytes of a token whose bytes are not reported.
const MAX_UNKNOWN_BYTES: usize = 16;

/// Teacher tokens that end at a known byte of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TeacherSpan {
    /// Indices of the tokens.
    pub tokens: Range<usize>,
    /// End of the tokens, in bytes of the answer.
    pub end: usize,
    pub kind: SpanKind,
}

impl TeacherSpan {
    fn token(index: usize, end: usize) -> TeacherSpan {
        TeacherSpan {
            tokens: index..index + 1,
            end,
            kind: SpanKind::Token,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpanKind {
    /// One token whose bytes are known.
    Token,
    /// Tokens whose bytes are unknown; only the end of the last one is known.
    Unknown,
    /// A token that starts before the answer or ends after it.
    Partial,
}

/// Finds the teacher tokens that spell the answer, or only the bytes `kept_bytes`, which the student's template keeps.
/// Returns None if there is no such run. `is_stop` identifies tokens that may follow an answer.
///
/// The first token with text may have a space that the answer lacks: SentencePiece writes one before each text, and some
/// servers remove it from the text only.
pub(crate) fn find(
    tokens: &[Cow<'_, [u8]>],
    answer: &[u8],
    kept_bytes: Range<usize>,
    is_stop: impl Fn(&[u8]) -> bool,
) -> Option<Vec<TeacherSpan>> {
    match_whole_answer(tokens, answer, &is_stop)
        .or_else(|| {
            let first = tokens.iter().position(|bytes| !is_stop(bytes))?;
            let mut shortened: Vec<Cow<[u8]>> =
                tokens.iter().map(|bytes| Cow::Borrowed(&**bytes)).collect();
            shortened[first] = Cow::Borrowed(tokens[first].strip_prefix(b" ")?);
            match_whole_answer(&shortened, answer, &is_stop)
        })
        .or_else(|| find_text(tokens, &answer[kept_bytes.clone()], kept_bytes.start))
        .or_else(|| match_around_unknown(tokens, answer, &is_stop))
}

/// Matches the whole answer, from the first token on. Only stop tokens may follow. Control tokens inside the answer, such
/// as a sampled `<unk>`, have no text and no span.
fn match_whole_answer(
    tokens: &[Cow<'_, [u8]>],
    answer: &[u8],
    is_stop: impl Fn(&[u8]) -> bool,
) -> Option<Vec<TeacherSpan>> {
    let mut spans = Vec::with_capacity(tokens.len());
    let mut offset = 0;
    let mut without_text = 0;
    for (index, bytes) in tokens.iter().enumerate() {
        if offset == answer.len() && is_stop(bytes) {
            continue;
        }
        let is_text = answer[offset..].starts_with(bytes);
        if !is_text && is_stop(bytes) {
            without_text += 1;
            continue;
        }
        if spans.len() + without_text != index || !is_text {
            return None;
        }
        offset += bytes.len();
        spans.push(TeacherSpan::token(index, offset));
    }
    (offset == answer.len()).then_some(spans)
}

/// Finds `text` near the end of the bytes of all tokens. `start` is the index of the text's first byte in the answer.
///
/// If the text occurs several times, an occurrence is selected by the first of these rules that applies: it starts at
/// the first token and ends at a token boundary; it starts and ends at token boundaries; it starts at a token boundary;
/// it is the last one.
fn find_text(tokens: &[Cow<'_, [u8]>], text: &[u8], start: usize) -> Option<Vec<TeacherSpan>> {
    if text.is_empty() {
        return None;
    }
    let all = tokens.concat();
    let mut boundaries = vec![false; all.len() + 1];
    let mut offset = 0;
    for bytes in tokens {
        boundaries[offset] = true;
        offset += bytes.len();
    }
    boundaries[all.len()] = true;
    let is_near_the_end = |from: &usize| all.len() - from - text.len() <= MAX_TRAILING_BYTES;
    let occurrences = memchr::memmem::find_iter(&all, text).filter(is_near_the_end);
    let text_start = occurrences.max_by_key(|from| {
        let starts_token = boundaries[*from];
        let ends_token = boundaries[from + text.len()];
        (
            *from == 0 && ends_token,
            starts_token && ends_token,
            starts_token,
            *from,
        )
    })?;
    let text_end = text_start + text.len();
    let mut spans = Vec::new();
    let mut offset = 0;
    for (index, bytes) in tokens.iter().enumerate() {
        let range = offset..offset + bytes.len();
        offset = range.end;
        if range.end <= text_start || range.is_empty() {
            continue;
        }
        if range.start >= text_end {
            break;
        }
        let is_inside = range.start >= text_start && range.end <= text_end;
        spans.push(TeacherSpan {
            tokens: index..index + 1,
            end: start + range.end.min(text_end) - text_start,
            kind: if is_inside {
                SpanKind::Token
            } else {
                SpanKind::Partial
            },
        });
    }
    let has_complete_token = spans.iter().any(|span| span.kind == SpanKind::Token);
    has_complete_token.then_some(spans)
}

/// Returns true if the server did not report the bytes of a token.
fn is_unknown(bytes: &[u8]) -> bool {
    bytes.is_empty() || memchr::memmem::find(bytes, REPLACEMENT).is_some()
}

/// Matches the tokens with known bytes in order. Bytes of the answer between two matches belong to the tokens of
/// unknown bytes between them.
fn match_around_unknown(
    tokens: &[Cow<'_, [u8]>],
    answer: &[u8],
    is_stop: impl Fn(&[u8]) -> bool,
) -> Option<Vec<TeacherSpan>> {
    let mut spans = Vec::new();
    let mut offset = 0;
    // Index of the first token of unknown bytes since the last match.
    let mut unknown: Option<usize> = None;
    // The end of the turn may follow tokens of unknown bytes.
    let is_end = |bytes: &Cow<'_, [u8]>| !is_unknown(bytes) && is_stop(bytes);
    let ends = tokens.iter().rev().take_while(|bytes| is_end(bytes));
    let (tokens, _) = tokens.split_at(tokens.len() - ends.count());
    for (index, bytes) in tokens.iter().enumerate() {
        if offset == answer.len() && is_stop(bytes) {
            continue;
        }
        if is_unknown(bytes) {
            unknown.get_or_insert(index);
            continue;
        }
        if let Some(first) = unknown.take() {
            let max_bytes = (index - first) * MAX_UNKNOWN_BYTES + bytes.len();
            let window = &answer[offset..answer.len().min(offset + max_bytes)];
            let skipped = memchr::memmem::find(window, bytes)?;
            offset += skipped;
            if skipped > 0 {
                spans.push(TeacherSpan {
                    tokens: first..index,
                    end: offset,
                    kind: SpanKind::Unknown,
                });
            }
        }
        if !answer[offset..].starts_with(bytes) {
            return None;
        }
        offset += bytes.len();
        spans.push(TeacherSpan::token(index, offset));
    }
    let remaining_bytes = answer.len() - offset;
    match unknown {
        Some(first)
            if remaining_bytes > 0
                && remaining_bytes <= (tokens.len() - first) * MAX_UNKNOWN_BYTES =>
        {
            spans.push(TeacherSpan {
                tokens: first..tokens.len(),
                end: answer.len(),
                kind: SpanKind::Unknown,
            });
        }
        _ if remaining_bytes > 0 => return None,
        _ => {}
    }
    let has_known_token = spans.iter().any(|span| span.kind == SpanKind::Token);
    has_known_token.then_some(spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(tokens: &[&str], answer: &str) -> Option<Vec<(Range<usize>, usize, SpanKind)>> {
        let tokens: Vec<_> = tokens.iter().map(|t| Cow::Borrowed(t.as_bytes())).collect();
        let is_stop = |bytes: &[u8]| bytes.is_empty() || bytes == b"</s>";
        let spans = find(&tokens, answer.as_bytes(), 0..answer.len(), is_stop)?;
        Some(
            spans
                .into_iter()
                .map(|span| (span.tokens, span.end, span.kind))
                .collect(),
        )
    }

    #[test]
    fn run_is_found_inside_longer_logprobs() {
        use SpanKind::{Partial, Token};
        let two_tokens = |first: usize| {
            vec![
                (first..first + 1, 1, Token),
                (first + 1..first + 2, 3, Token),
            ]
        };
        assert_eq!(cut(&["a", " b"], "a b"), Some(two_tokens(0)));
        assert_eq!(cut(&["a", " b", "</s>", ""], "a b"), Some(two_tokens(0)));
        assert_eq!(
            cut(&["<think>", "a b", "</think>", "\n\n", "a", " b"], "a b"),
            Some(two_tokens(4))
        );
        assert_eq!(cut(&["\n", "a", " b", "\n"], "a b"), Some(two_tokens(1)));
        assert_eq!(cut(&["a", " b", "STOP"], "a b"), Some(two_tokens(0)));
        let partial = vec![(0..1, 1, Partial), (1..2, 3, Token), (2..3, 4, Partial)];
        assert_eq!(cut(&[" a", " b", "c<"], "a bc"), Some(partial));
        // The space that SentencePiece writes before a text is not part of the answer.
        assert_eq!(cut(&[" a", " b", "</s>"], "a b"), Some(two_tokens(0)));
        let after_control = vec![(1..2, 1, Token), (2..3, 3, Token)];
        assert_eq!(cut(&["</s>", " a", " b"], "a b"), Some(after_control));
        let space_alone = vec![(0..1, 0, Token), (1..2, 1, Token), (2..3, 3, Token)];
        assert_eq!(cut(&[" ", "a", " b"], "a b"), Some(space_alone));
        // An occurrence on token boundaries is preferred, and the first token to later ones.
        let one = |index: usize| Some(vec![(index..index + 1, 1, Token)]);
        assert_eq!(cut(&["A", "\n", "Answer", ":"], "A"), one(0));
        assert_eq!(cut(&["4", "\n\n", "Step", " ", "4", ":"], "4"), one(0));
        assert_eq!(cut(&["<think>", "4", "</think>", "4", "</s>"], "4"), one(3));
        assert_eq!(cut(&["a", " c"], "a b"), None);
        // A control token inside the answer has no text.
        let around_control = vec![(0..1, 1, Token), (2..3, 3, Token)];
        assert_eq!(
            cut(&["a", "</s>", " b", "</s>"], "a b"),
            Some(around_control)
        );
        assert_eq!(
            cut(&["xa bx"], "a b"),
            None,
            "no whole token spells part of it"
        );
        assert_eq!(cut(&["a", "b"], ""), None);
    }

    #[test]
    fn unknown_tokens_get_the_bytes_between_their_neighbours() {
        use SpanKind::{Token, Unknown};
        let expected = vec![(0..1, 2, Token), (1..3, 6, Unknown), (3..4, 8, Token)];
        assert_eq!(
            cut(&["hi", "\u{fffd}", "\u{fffd}", " b"], "hi👋 b"),
            Some(expected.clone())
        );
        assert_eq!(cut(&["hi", "", "", " b"], "hi👋 b"), Some(expected));
        let at_the_end = vec![(0..1, 2, Token), (1..3, 6, Unknown)];
        assert_eq!(
            cut(&["hi", "\u{fffd}", "\u{fffd}"], "hi👋"),
            Some(at_the_end)
        );
        let before_end = vec![(0..1, 2, Token), (1..3, 6, Unknown)];
        assert_eq!(
            cut(&["hi", "\u{fffd}", "\u{fffd}", "</s>"], "hi👋"),
            Some(before_end)
        );
        assert_eq!(cut(&["hi", "\u{fffd}", "x"], "hi👋 b"), None);
        assert_eq!(cut(&["\u{fffd}"], "👋"), None);
    }
}
