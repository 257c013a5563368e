//! The student tokens that spell an answer.

use std::borrow::Cow;
use std::ops::Range;

use super::{Mapper, Mismatch};

/// The tokens of an answer (N), and how they divide its text.
#[derive(Debug, Clone, Copy)]
pub struct StudentAnswer<'a> {
    pub ids: &'a [u32],
    /// End of each token of the text in bytes of the answer; a token after these ends the answer. Set where normalisation
    /// or unknown tokens hide the bytes of the tokens. None if the bytes of the tokens spell the answer.
    pub ends: Option<&'a [usize]>,
}

impl<'a> From<&'a [u32]> for StudentAnswer<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Self { ids, ends: None }
    }
}

impl Mapper<'_> {
    /// Returns the number of student tokens before the answer, which begins at byte `start`, that have no counterpart on
    /// the teacher's side: text that the template adds. If `keeps_space`, a space before the text is a part of the
    /// answer's first word, or has a counterpart.
    pub(super) fn template_tokens(
        &self,
        student: &[u32],
        ends: &[usize],
        keeps_space: bool,
        start: usize,
    ) -> usize {
        let before = ends.partition_point(|&end| end <= start);
        let is_space = |id: u32| self.tokenizer.token_bytes(id) == Some(b" ");
        match before.checked_sub(1) {
            Some(last) if is_space(student[last]) && keeps_space => last,
            _ => before,
        }
    }

    /// Splits off the token that ends the answer. Returns this token, if there is one, and the ends of the other
    /// tokens, as [`Self::student_token_ends`] computes them.
    pub(super) fn split_end(
        &self,
        student: &[u32],
        answer: &[u8],
        kept_bytes: Range<usize>,
    ) -> Result<(Option<u32>, Vec<usize>), Mismatch> {
        let Some((&last, text)) = student.split_last() else {
            return Ok((None, self.student_token_ends(student, answer, kept_bytes)?));
        };
        if self.tokenizer.is_special(last) && self.tokenizer.stop_ids().contains(&last) {
            return Ok((
                Some(last),
                self.student_token_ends(text, answer, kept_bytes)?,
            ));
        }
        let ends = self.student_token_ends(student, answer, kept_bytes.clone());
        // The last token may be text that the template writes before the end of the turn.
        if ends.is_err() && Some(last) == self.tokenizer.end_of_answer() {
            return Ok((
                Some(last),
                self.student_token_ends(text, answer, kept_bytes)?,
            ));
        }
        Ok((None, ends?))
    }

    /// Returns the end of each token of `student`, in bytes of the answer (N). The tokens spell the kept bytes of the
    /// answer; template text may come before.
    ///
    /// # Errors
    /// If the bytes of the tokens do not end with the kept bytes.
    fn student_token_ends(
        &self,
        student: &[u32],
        answer: &[u8],
        kept_bytes: Range<usize>,
    ) -> Result<Vec<usize>, Mismatch> {
        let spellings: Option<Vec<Cow<'_, [u8]>>> = student
            .iter()
            .map(|&id| self.tokenizer.spelling(id))
            .collect();
        let spellings = spellings.ok_or(Mismatch::Student)?;
        let student_bytes = spellings.concat();
        let template_bytes = student_bytes
            .strip_suffix(&answer[kept_bytes.clone()])
            .ok_or(Mismatch::Student)?
            .len();
        let mut end = 0;
        let ends = spellings.iter().map(|bytes| {
            end += bytes.len();
            // Template text ends at the start of the answer.
            kept_bytes.start + end.saturating_sub(template_bytes)
        });
        Ok(ends.collect())
    }
}
