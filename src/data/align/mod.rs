//! Maps soft labels from any teacher tokenizer to any student tokenizer, by the bytes of the answer.
//!
//! Both tokenisations are cut at their common boundaries. This gives groups of teacher tokens and student tokens
//! that spell the same bytes:
//!
//! | group | soft labels |
//! |---|---|
//! | one teacher token, one student token | both predict the next bytes, so the teacher's candidates become student tokens |
//! | one teacher token, several student tokens | the first position gets the first student token of each candidate; a later position gets the candidates that extend the bytes of the earlier student tokens |
//! | several teacher tokens | none: the positions train on cross-entropy, or as a [`Chunk`] |
//!
//! With the same tokenizer on both sides, all groups have one token on each side, and every token maps to itself.
//!
//! SentencePiece writes a space before each text. At the first token of an answer, each side may have this space, and the
//! candidates become student tokens with the student's space. A later position after the space alone has no soft labels:
//! every candidate that begins a word extends a space.
//!
//! | file | content |
//! |---|---|
//! | `aligned` | the result: soft labels of an answer |
//! | `candidates` | the tokens that a teacher lists at a position |
//! | `lead` | the text before an answer in the first tokens of both sides |
//! | `run`, `teacher` | the teacher tokens that spell the answer |
//! | `student` | the student tokens that spell the answer |
//! | `token_ids` | tokens that are named by id |
//! | `tokens` | the student's token for the bytes of a teacher's token |

#![allow(
    non_snake_case,
    reason = "arrays carry their shape as a suffix: see the legend in `data`"
)]

pub mod aligned;
pub(crate) mod candidates;
pub(crate) mod lead;
pub(crate) mod run;
pub(crate) mod student;
pub(crate) mod teacher;
pub(crate) mod token_ids;
pub(crate) mod tokens;

use std::borrow::Cow;
use std::ops::Range;

use crate::cache::logprobs_view::LogprobsView;
use crate::ops::math::logaddexp;
use crate::tokenizer::Tokenizer;
pub use aligned::{Aligned, Chunk};
pub use candidates::{Candidates, EXCESS, SampledToken, is_usable, list_candidates};
use candidates::{agreement, mass};
use lead::Lead;
use run::SpanKind;
pub use student::StudentAnswer;
pub use teacher::spells;
use teacher::teacher_spans;
pub use tokens::is_stop;
use tokens::{TokenLookup, ends_turn};

/// Maximum number of student tokens in a chunk. The positions of longer texts train on cross-entropy.
const MAX_CHUNK: usize = 64;
/// A position of a split teacher token has soft labels only if at least this probability is known to map to student
/// tokens.
const MIN_SHARE: f64 = 0.5;

/// Reason for an answer without any soft labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Mismatch {
    #[error("the teacher's tokens do not spell the answer")]
    Teacher,
    #[error("the student's tokens do not spell the answer")]
    Student,
    #[error("the teacher's tokens are ids (`token_id:N`): set `data.teacher_tokenizer`")]
    TokenIds,
}

/// Maps the teacher's tokens to the student's. Caches look-ups, so reuse one mapper for many answers.
pub struct Mapper<'a> {
    tokenizer: &'a Tokenizer,
    /// The teacher's tokenizer, for tokens that are named by id.
    teacher: Option<&'a Tokenizer>,
    tokens: TokenLookup<'a>,
    /// Maximum number of candidates at a position.
    max_candidates: usize,
    /// Student tokens of the candidates at one position; a field only to reuse the allocation.
    candidate_ids: Vec<Option<u32>>,
}

impl<'a> Mapper<'a> {
    /// Creates a mapper to the tokens of `tokenizer`, with at most `max_candidates` candidates at a position.
    pub fn new(tokenizer: &'a Tokenizer, max_candidates: Option<usize>) -> Self {
        Self {
            tokenizer,
            teacher: None,
            tokens: TokenLookup::new(tokenizer),
            max_candidates: max_candidates.unwrap_or(usize::MAX),
            candidate_ids: Vec::new(),
        }
    }

    /// Sets the teacher's tokenizer, which resolves tokens that are named by id.
    pub fn with_teacher(self, teacher: Option<&'a Tokenizer>) -> Self {
        Self { teacher, ..self }
    }

    /// Returns the soft labels of `student`, the N tokens of an answer. `kept_bytes` is the range of the answer's bytes
    /// that the student's template keeps. The tokens spell these bytes; tokens of template text may come before, and
    /// the token that ends the answer may follow. `top_logprobs` is the number of alternatives in the request.
    ///
    /// # Errors
    /// If the tokens of one side do not spell the answer, or the teacher's tokens are ids and its tokenizer is not set.
    pub fn align(
        &mut self,
        teacher: &LogprobsView,
        answer: &[u8],
        kept_bytes: Range<usize>,
        answer_tokens: StudentAnswer,
        top_logprobs: Option<usize>,
    ) -> Result<Aligned, Mismatch> {
        let StudentAnswer { ids: student, ends } = answer_tokens;
        let decoded;
        let teacher = if token_ids::are_ids(&teacher.token) {
            decoded = token_ids::decode_ids(teacher, self.teacher.ok_or(Mismatch::TokenIds)?);
            &decoded
        } else {
            teacher
        };
        let is_stop = |bytes: &[u8]| is_stop(self.tokenizer, bytes);
        let (spans, teacher) =
            teacher_spans(teacher, answer, &kept_bytes, is_stop).ok_or(Mismatch::Teacher)?;
        let teacher = teacher.as_ref();
        let (end, student_ends) = match ends {
            Some(ends) => (student.get(ends.len()).copied(), ends.to_vec()),
            None => self.split_end(student, answer, kept_bytes.clone())?,
        };
        let text = &student[..student_ends.len()];
        // Teacher tokens of text that the template removes and student tokens of text that it adds have no counterpart.
        let skipped = match kept_bytes.start {
            // A token without text at the start is the space before the answer's first word.
            0 => 0,
            start => spans.partition_point(|span| span.end <= start),
        };
        let teacher_ends: Vec<usize> = spans.iter().map(|span| span.end).collect();
        let has_first_space = teacher_ends.get(skipped) == Some(&0);
        let template_tokens = self.template_tokens(
            text,
            &student_ends,
            has_first_space || !answer[kept_bytes.start..].starts_with(b" "),
            kept_bytes.start,
        );

        let capacity = teacher.top.total() + student.len();
        let mut aligned = Aligned::with_capacity(capacity, student.len());
        let ends_turn = |bytes: &[u8]| ends_turn(self.tokenizer, bytes);
        // If the last token extends past the answer, the logprobs after it belong to a longer text.
        let last_span = spans.last().filter(|span| span.kind != SpanKind::Partial);
        let after_text = last_span.map_or(usize::MAX, |span| span.tokens.end);
        let bytes_after_text = teacher.token.get(after_text).map_or(&[][..], Cow::as_ref);
        // Servers such as vLLM report the end of the turn after the tokens of the text.
        let listed_end = Some(after_text).filter(|_| ends_turn(bytes_after_text));
        aligned.agreement = agreement(teacher, &spans, listed_end, ends_turn);
        let mut listed = Vec::new();
        for (teacher_group, student_group) in
            common_groups(&teacher_ends[skipped..], &student_ends[template_tokens..])
        {
            let spelled_by = &spans[skipped + teacher_group.start..skipped + teacher_group.end];
            let start = template_tokens + student_group.start;
            let labels = &student[start..start + student_group.len()];
            if spelled_by.iter().any(|span| span.kind == SpanKind::Partial) {
                continue;
            }
            let (Some(first), Some(last)) = (spelled_by.first(), spelled_by.last()) else {
                continue;
            };
            let position = first.tokens.start;
            let bytes = &*teacher.token[position];
            let text_start = start.checked_sub(1).map_or(kept_bytes.start, |before| {
                student_ends[before].max(kept_bytes.start)
            });
            // Only the first token of the answer can have bytes before it.
            let lead = if student_group.start == 0 {
                let text = &answer[text_start..student_ends[start].max(text_start)];
                Lead::new(
                    self.tokenizer,
                    (labels[0], text),
                    bytes,
                    &answer[text_start..],
                )
            } else {
                Lead::default()
            };
            if spelled_by.len() > 1 || first.kind == SpanKind::Unknown {
                // Normalisation hides the bytes of the student's tokens.
                let has_known_bytes =
                    ends.is_none() && spelled_by.iter().all(|span| span.kind == SpanKind::Token);
                let tokens = position..last.tokens.end;
                let chunk = self.chunk(teacher, tokens, (start, labels), lead, has_known_bytes);
                aligned.chunks_C.extend(chunk);
                continue;
            }
            let spells = || self.spells(labels, &lead.of_student(bytes));
            let is_unknown = |id: &u32| self.tokenizer.is_unknown(*id);
            if labels.iter().any(is_unknown) || ends.is_none() && !spells() {
                continue;
            }
            aligned.fill(start);
            let candidates =
                self.candidates_at(teacher, position, top_logprobs, &mut listed, &mut aligned);
            let Some(candidates) = candidates else {
                continue;
            };
            let is_split = labels.len() > 1;
            self.push_first(
                &listed,
                candidates,
                bytes,
                (labels[0], lead),
                is_split,
                &mut aligned,
            );
            for (index, &label) in labels.iter().enumerate().skip(1) {
                let unlisted = 1.0 - candidates.mass;
                let spelled_bytes = student_ends[start + index - 1].saturating_sub(text_start)
                    + lead.teacher_bytes();
                // Nearly every candidate extends a space, and most of them are student tokens of their own. Tokens that
                // normalisation makes of one character have no bytes of the teacher's token between them.
                let shares_character =
                    student_ends[start + index - 1] == student_ends[start + index];
                if shares_character || matches!(&bytes[..spelled_bytes], b"" | b" ") {
                    aligned.fill(start + index + 1);
                    continue;
                }
                self.push_later(&listed, unlisted, bytes, spelled_bytes, label, &mut aligned);
            }
        }
        aligned.fill(text.len());
        if let Some(end) = end {
            if let Some(position) = listed_end
                && let Some(candidates) =
                    self.candidates_at(teacher, position, top_logprobs, &mut listed, &mut aligned)
            {
                let label = (end, Lead::default());
                self.push_first(
                    &listed,
                    candidates,
                    bytes_after_text,
                    label,
                    false,
                    &mut aligned,
                );
            }
            aligned.lists_end = Some(aligned.is_soft(text.len()));
            aligned.fill(student.len());
        }
        Ok(aligned)
    }

    /// Fills `listed` with the candidates at a position, and adds the position to the counts of `aligned`. Returns None
    /// if the probabilities sum to more than 1 + [`EXCESS`]; the other positions of the answer stay usable.
    fn candidates_at<'t>(
        &self,
        teacher: &'t LogprobsView,
        position: usize,
        top_logprobs: Option<usize>,
        listed: &mut Vec<(&'t [u8], f32)>,
        aligned: &mut Aligned,
    ) -> Option<Candidates> {
        let candidates =
            list_candidates(teacher, position, self.max_candidates, top_logprobs, listed);
        let Some(candidates) = candidates else {
            aligned.positions_over_one += 1;
            return None;
        };
        if !teacher.top.get(position).is_empty() {
            let is_in_top_k = candidates.sampled == SampledToken::InTopK;
            aligned
                .in_top_k
                .count(position, candidates.top_mass, is_in_top_k);
        }
        Some(candidates)
    }

    /// Returns the chunk of the teacher's `tokens` and the student tokens `labels`, which begin at `start` with `lead`.
    /// `has_known_bytes` is true if the bytes of all tokens are known.
    ///
    /// Returns None if the logprob of a teacher token is missing, there are more than `MAX_CHUNK` student tokens, one of
    /// them is the unknown token, or they do not spell the known bytes.
    fn chunk(
        &self,
        teacher: &LogprobsView,
        tokens: Range<usize>,
        (start, labels): (usize, &[u32]),
        lead: Lead,
        has_known_bytes: bool,
    ) -> Option<Chunk> {
        let logprobs = teacher.logprob.get(tokens.clone())?;
        let nll = logprobs
            .iter()
            .map(|logprob| logprob.filter(is_usable).map(|logprob| -logprob))
            .sum::<Option<f32>>()?;
        let spells = || self.spells(labels, &lead.of_student(&teacher.token[tokens].concat()));
        let is_unknown = labels.iter().any(|&id| self.tokenizer.is_unknown(id));
        let fits = labels.len() <= MAX_CHUNK && !is_unknown && (!has_known_bytes || spells());
        fits.then_some(Chunk {
            start,
            len: labels.len(),
            nll,
        })
    }

    /// Returns true if the student tokens spell exactly `bytes`.
    fn spells(&self, student: &[u32], bytes: &[u8]) -> bool {
        let mut remaining = bytes;
        student.iter().all(|&id| {
            let token = self.tokenizer.token_bytes(id).unwrap_or_default();
            match remaining.strip_prefix(token) {
                Some(after_token) => {
                    remaining = after_token;
                    !token.is_empty()
                }
                None => false,
            }
        }) && remaining.is_empty()
    }

    /// Appends the soft labels of `label`, the first student token of an emitted teacher token. `is_split` is true if the
    /// student spells the teacher token with several tokens.
    fn push_first(
        &mut self,
        listed: &[(&[u8], f32)],
        candidates: Candidates,
        emitted: &[u8],
        label: (u32, Lead),
        is_split: bool,
        aligned: &mut Aligned,
    ) {
        // An emitted token from outside the top-k is a sample of the tail, so it is not one of the soft labels.
        let (top, sampled_logprob) = match (candidates.sampled, listed.split_last()) {
            (SampledToken::ListedLast, Some((&(_, logprob), top))) => (top, logprob),
            (SampledToken::NotListed, _) => (listed, f32::NEG_INFINITY),
            _ => (listed, f32::NAN),
        };
        let start = aligned.ids_NK.len();
        let mapped = self.push_mapped(top, candidates.mass, emitted, label, aligned);
        let is_unreliable = is_split && mapped < MIN_SHARE;
        aligned.finish_position(start, sampled_logprob, mapped, is_unreliable);
    }

    /// Appends the soft labels of `label`, a later student token of the teacher token `emitted`. The earlier student
    /// tokens spell the first `spelled_bytes` bytes of `emitted`. The soft labels are the candidates that extend these
    /// bytes, renormalised over all candidates that start with them. `unlisted` is the probability of the tokens that
    /// are not listed; any of them may start with these bytes.
    fn push_later(
        &mut self,
        listed: &[(&[u8], f32)],
        unlisted: f64,
        emitted: &[u8],
        spelled_bytes: usize,
        label: u32,
        aligned: &mut Aligned,
    ) {
        let with_prefix: Vec<(&[u8], f32)> = listed
            .iter()
            .filter_map(|&(bytes, logprob)| {
                Some((bytes.strip_prefix(&emitted[..spelled_bytes])?, logprob))
            })
            .collect();
        let shared_mass = mass(with_prefix.iter().map(|&(_, logprob)| logprob));
        let log_shared_mass = shared_mass.ln() as f32;
        let listed_share = shared_mass / (shared_mass + unlisted);
        // A candidate that ends here does not predict the next bytes.
        let extending: Vec<(&[u8], f32)> = with_prefix
            .into_iter()
            .filter(|(next_bytes, _)| !next_bytes.is_empty())
            .map(|(next_bytes, logprob)| (next_bytes, logprob - log_shared_mass))
            .collect();
        let mass = mass(extending.iter().map(|&(_, logprob)| logprob)).min(1.0);
        let start = aligned.ids_NK.len();
        let label = (label, Lead::default());
        let mapped = self.push_mapped(&extending, mass, &emitted[spelled_bytes..], label, aligned);
        let is_unreliable = mapped * listed_share < MIN_SHARE;
        aligned.finish_position(start, f32::NAN, mapped, is_unreliable);
    }

    /// Appends the candidates at a position as student tokens, best first. `emitted` is the teacher's token at this
    /// position, and `label` its student token. `mass` is the probability of the candidates and of an emitted token from
    /// outside the top-k. Returns `mass` minus the probabilities of the candidates that have no student token.
    fn push_mapped(
        &mut self,
        candidates: &[(&[u8], f32)],
        mass: f64,
        emitted: &[u8],
        (label, lead): (u32, Lead),
        aligned: &mut Aligned,
    ) -> f64 {
        let start = aligned.ids_NK.len();
        let mut mapped = mass;
        // All look-ups in one loop, so that their cache misses overlap: the table exceeds the processor's cache.
        let mut candidate_ids = std::mem::take(&mut self.candidate_ids);
        candidate_ids.clear();
        candidate_ids.extend(candidates.iter().map(|&(bytes, _)| {
            if bytes == emitted {
                Some(label)
            } else if lead.is_empty() || is_stop(self.tokenizer, bytes) {
                self.tokens.student_id(bytes)
            } else {
                self.tokens.student_id(&lead.of_student(bytes))
            }
        }));
        for (&(_, logprob), id) in candidates.iter().zip(&candidate_ids) {
            let Some(id) = *id else {
                mapped -= f64::from(logprob).exp();
                continue;
            };
            match aligned.ids_NK[start..]
                .iter()
                .position(|&other| other == id)
            {
                Some(index) => {
                    let merged = &mut aligned.logprobs_NK[start + index];
                    *merged = logaddexp(*merged, logprob);
                }
                None => {
                    aligned.ids_NK.push(id);
                    aligned.logprobs_NK.push(logprob);
                }
            }
        }
        self.candidate_ids = candidate_ids;
        let ids = &mut aligned.ids_NK[start..];
        let logprobs = &mut aligned.logprobs_NK[start..];
        if !logprobs.is_sorted_by(|a, b| a >= b) {
            let mut sorted: Vec<(u32, f32)> = ids.iter().copied().zip(logprobs.to_vec()).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
            for (index, (id, logprob)) in sorted.into_iter().enumerate() {
                ids[index] = id;
                logprobs[index] = logprob;
            }
        }
        mapped
    }
}

/// Cuts two tokenisations of the same text at their common boundaries. `a` and `b` are the ends of their tokens in
/// the text. Returns minimal ranges of tokens on both sides that spell the same bytes. Several tokens of `b` with the same
/// end, which normalisation makes of one character, stay together.
///
/// Tokens after the last common boundary are left out: one side may end early, because its text was trimmed.
pub fn common_groups(a: &[usize], b: &[usize]) -> Vec<(Range<usize>, Range<usize>)> {
    let mut groups = Vec::with_capacity(a.len().min(b.len()));
    let mut start_a = 0;
    let mut start_b = 0;
    let mut at_a = 0;
    let mut at_b = 0;
    while at_a < a.len() && at_b < b.len() {
        match a[at_a].cmp(&b[at_b]) {
            std::cmp::Ordering::Less => at_a += 1,
            std::cmp::Ordering::Greater => at_b += 1,
            std::cmp::Ordering::Equal => {
                at_a += 1;
                let end = b[at_b];
                at_b += b[at_b..].iter().take_while(|&&other| other == end).count();
                groups.push((start_a..at_a, start_b..at_b));
                start_a = at_a;
                start_b = at_b;
            }
        }
    }
    groups
}
