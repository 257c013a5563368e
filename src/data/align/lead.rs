//! The text before an answer in the first tokens of both sides.

use std::borrow::Cow;

use crate::tokenizer::Tokenizer;

/// Text before the answer in the first tokens of both sides. SentencePiece writes a space before each text.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lead<'a> {
    /// Bytes of the student's first token before its text.
    student: &'a [u8],
    /// True if the teacher's first token has a space before its text.
    has_teacher_space: bool,
}

impl<'a> Lead<'a> {
    /// Returns the bytes before the answer in the tokens of both sides: `label`, the student's first token, which spells
    /// `text`, and `emitted`, the teacher's first token. `answer` begins at that token's text.
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        (label, text): (u32, &[u8]),
        emitted: &[u8],
        answer: &[u8],
    ) -> Self {
        let bytes = tokenizer.token_bytes(label).unwrap_or_default();
        let adds_space = |bytes: &[u8]| bytes.starts_with(b" ") && !answer.starts_with(b" ");
        let student = match bytes.strip_suffix(text) {
            Some(lead) if !text.is_empty() => lead,
            // Normalisation may have changed the text.
            _ if adds_space(bytes) => &bytes[..1],
            _ => &[],
        };
        Self {
            student,
            has_teacher_space: adds_space(emitted),
        }
    }

    /// Returns true if no token has text before the answer.
    pub(super) fn is_empty(self) -> bool {
        self.student.is_empty() && !self.has_teacher_space
    }

    /// Returns the number of bytes of the teacher's token before its text.
    pub(super) fn teacher_bytes(self) -> usize {
        usize::from(self.has_teacher_space)
    }

    /// Returns a token that the teacher lists in place of its first token, as the student would write it there.
    pub(super) fn of_student<'t>(self, bytes: &'t [u8]) -> Cow<'t, [u8]> {
        let text = match bytes.strip_prefix(b" ") {
            Some(text) if self.has_teacher_space => text,
            // The teacher distinguishes tokens with and without the space.
            None if self.has_teacher_space => return bytes.into(),
            // Another token at this position has the same bytes before its text.
            _ if bytes.starts_with(self.student) => return bytes.into(),
            _ => bytes,
        };
        match self.student {
            [] => text.into(),
            lead => [lead, text].concat().into(),
        }
    }
}
