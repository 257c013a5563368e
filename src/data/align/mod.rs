//! Soft labels from any teacher tokenizer to any student tokenizer, on the bytes of the answer.
//!
//! Both tokenisations are cut where both have a boundary, which gives groups of teacher and student
//! tokens that spell the same bytes. A group of one and one says the same about the next bytes, so
//! the teacher's alternatives become student tokens there. Where a teacher token is several student
//! tokens, the alternatives that go on from what is already written say what comes next. In every
//! other group the position trains on cross-entropy. With one tokenizer on both sides all groups are
//! one and one, and the map is the identity.

pub mod aligned;
pub(crate) mod alternatives;
pub(crate) mod run;
pub(crate) mod teacher;
pub(crate) mod token_ids;
pub(crate) mod tokens;

use std::borrow::Cow;
use std::ops::Range;

use crate::cache::logprobs_view::LogprobsView;
use crate::ops::math::logaddexp;
use crate::tokenizer::Tokenizer;
pub use aligned::{Aligned, Chunk};
pub use alternatives::{Drawn, EXCESS, Known, alternatives, is_usable};
use alternatives::{agreement, mass};
use run::UnitKind;
pub use teacher::spells;
use teacher::teacher_units;
pub use tokens::is_stop;
use tokens::{Tokens, ends_turn};

/// Chunks of more student tokens than this are left to cross-entropy.
const MAX_CHUNK: usize = 64;
/// Where a teacher token is split, the student's parts of it get soft labels if at least this share of
/// the mass is on tokens that are known.
const MIN_SHARE: f64 = 0.5;

/// Why an answer has no soft labels at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Mismatch {
    #[error("the teacher's tokens do not spell the answer")]
    Teacher,
    #[error("the student's tokens do not spell the answer")]
    Student,
    #[error("the teacher's tokens are ids (`token_id:N`): set `data.teacher_tokenizer`")]
    TokenIds,
}

/// Maps the teacher's tokens to the student's. What was looked up once is remembered, so keep one
/// for many answers.
pub struct Mapper<'a> {
    tokenizer: &'a Tokenizer,
    /// The teacher's, for tokens that are named by id.
    teacher: Option<&'a Tokenizer>,
    tokens: Tokens<'a>,
    /// The most alternatives at a position.
    most: usize,
    /// The tokens of one position, kept for its memory.
    found: Vec<Option<u32>>,
}

impl<'a> Mapper<'a> {
    /// To this tokenizer, of at most `most` alternatives at a position.
    pub fn new(tokenizer: &'a Tokenizer, most: Option<usize>) -> Self {
        Self {
            tokenizer,
            teacher: None,
            tokens: Tokens::new(tokenizer),
            most: most.unwrap_or(usize::MAX),
            found: Vec::new(),
        }
    }

    /// With the teacher's tokenizer, which knows tokens that are named by id.
    pub fn with_teacher(self, teacher: Option<&'a Tokenizer>) -> Self {
        Self { teacher, ..self }
    }

    /// Soft labels for `student`, the N tokens that spell the part `kept` of the answer's bytes,
    /// possibly after text of the template, and possibly with the token that ends the answer. `asked` is the
    /// `top_logprobs` of the request.
    ///
    /// # Errors
    /// If one side's bytes do not add up, or the logprobs are none.
    pub fn align(
        &mut self,
        teacher: &LogprobsView,
        answer: &[u8],
        kept: Range<usize>,
        student: &[u32],
        asked: Option<usize>,
    ) -> Result<Aligned, Mismatch> {
        let decoded;
        let teacher = if token_ids::are_ids(&teacher.token) {
            decoded = token_ids::decoded(teacher, self.teacher.ok_or(Mismatch::TokenIds)?);
            &decoded
        } else {
            teacher
        };
        // Gate 1
        let is_stop = |bytes: &[u8]| is_stop(self.tokenizer, bytes);
        let (units, teacher) =
            teacher_units(teacher, answer, &kept, is_stop).ok_or(Mismatch::Teacher)?;
        let teacher = teacher.as_ref();
        let (end, student_ends) = self.ends(student, answer, kept.clone())?;
        let text = &student[..student_ends.len()];
        // What the template cut off, and the white space that it put in its place, has no partner.
        let skipped = units.partition_point(|unit| unit.end <= kept.start);
        let teacher_ends: Vec<usize> = units.iter().map(|unit| unit.end).collect();
        let lead = student_ends.partition_point(|&end| end <= kept.start);

        let most = teacher.top.total() + student.len();
        let mut aligned = Aligned {
            ids: Vec::with_capacity(most),
            logprobs: Vec::with_capacity(most),
            ends: Vec::with_capacity(student.len()),
            drawn: Vec::with_capacity(student.len()),
            agreement: agreement(teacher, &units),
            ..Aligned::default()
        };
        let mut listed = Vec::new();
        for (from, to) in groups(&teacher_ends[skipped..], &student_ends[lead..]) {
            let said = &units[skipped + from.start..skipped + from.end];
            let at = lead + to.start;
            let labels = &student[at..at + to.len()];
            if said.iter().any(|unit| unit.kind == UnitKind::Partial) {
                continue;
            }
            let (Some(first), Some(last)) = (said.first(), said.last()) else {
                continue;
            };
            let position = first.tokens.start;
            if said.len() > 1 || first.kind == UnitKind::Unknown {
                let is_known = said.iter().all(|unit| unit.kind == UnitKind::Token);
                let said = position..last.tokens.end;
                let chunk = self.chunk(teacher, said, at, labels, is_known);
                aligned.chunks.extend(chunk);
                continue;
            }
            let bytes = &*teacher.token[position];
            if !self.spells(labels, bytes) {
                continue;
            }
            aligned.fill(at);
            let Some(known) = self.known(teacher, position, asked, &mut listed, &mut aligned)
            else {
                continue;
            };
            let split = labels.len() > 1;
            self.first(&listed, known, bytes, labels[0], split, &mut aligned);
            let mut written = self.tokenizer.token_bytes(labels[0]).map_or(0, <[u8]>::len);
            for &label in &labels[1..] {
                let missing = 1.0 - known.mass;
                self.later(&listed, missing, bytes, written, label, &mut aligned);
                written += self.tokenizer.token_bytes(label).map_or(0, <[u8]>::len);
            }
        }
        aligned.fill(text.len());
        if let Some(end) = end {
            // Of a token that ends after the text, nothing follows that was chosen after the text.
            let last = units.last().filter(|unit| unit.kind != UnitKind::Partial);
            let position = last.map_or(usize::MAX, |unit| unit.tokens.end);
            let bytes = teacher.token.get(position).map_or(&[][..], Cow::as_ref);
            // Servers like vLLM report it after the tokens of the text.
            if ends_turn(self.tokenizer, bytes)
                && let Some(known) = self.known(teacher, position, asked, &mut listed, &mut aligned)
            {
                self.first(&listed, known, bytes, end, false, &mut aligned);
            }
            aligned.lists_end = Some(aligned.is_soft(text.len()));
            aligned.fill(student.len());
        }
        Ok(aligned)
    }

    /// Fills `listed` with the alternatives at a position, and counts it. Returns None if they are not usable, which
    /// leaves other positions usable.
    fn known<'t>(
        &self,
        teacher: &'t LogprobsView,
        position: usize,
        asked: Option<usize>,
        listed: &mut Vec<(&'t [u8], f32)>,
        to: &mut Aligned,
    ) -> Option<Known> {
        let known = alternatives(teacher, position, self.most, asked, listed);
        let Some(known) = known else {
            to.positions_over_one += 1;
            return None;
        };
        if !teacher.top.get(position).is_empty() {
            let is_in = known.drawn == Drawn::No;
            to.in_top_k.count(position, known.top_mass, is_in);
        }
        Some(known)
    }

    /// The teacher's tokens `said` as a chunk of the student tokens `labels`, the first of which is at
    /// `start`; None where the teacher does not say how likely one is.
    fn chunk(
        &self,
        teacher: &LogprobsView,
        said: Range<usize>,
        start: usize,
        labels: &[u32],
        is_known: bool,
    ) -> Option<Chunk> {
        let logprobs = teacher.logprob.get(said.clone())?;
        let nll = logprobs
            .iter()
            .map(|logprob| logprob.filter(is_usable).map(|logprob| -logprob))
            .sum::<Option<f32>>()?;
        let spells = || self.spells(labels, &teacher.token[said].concat());
        let fits = labels.len() <= MAX_CHUNK && (!is_known || spells());
        fits.then_some(Chunk {
            start,
            len: labels.len(),
            nll,
        })
    }

    /// Do the student tokens spell exactly `bytes`?
    fn spells(&self, student: &[u32], bytes: &[u8]) -> bool {
        let mut rest = bytes;
        student.iter().all(|&id| {
            let token = self.tokenizer.token_bytes(id).unwrap_or_default();
            match rest.strip_prefix(token) {
                Some(left) => {
                    rest = left;
                    !token.is_empty()
                }
                None => false,
            }
        }) && rest.is_empty()
    }

    /// What the teacher's alternatives say of the first student token of what it emitted, or of the
    /// only one; `split` where there are more.
    fn first(
        &mut self,
        listed: &[(&[u8], f32)],
        known: Known,
        emitted: &[u8],
        label: u32,
        split: bool,
        to: &mut Aligned,
    ) {
        // The probability of a token from outside the top-k is known, but it is a sample of what
        // is not.
        let (top, drawn) = match (known.drawn, listed.split_last()) {
            (Drawn::Last, Some((&(_, logprob), top))) => (top, logprob),
            (Drawn::Unknown, _) => (listed, f32::NEG_INFINITY),
            _ => (listed, f32::NAN),
        };
        let start = to.ids.len();
        let mapped = self.map(top, known.mass, emitted, label, to);
        to.drawn.push(drawn);
        self.end(start, label, mapped, split && mapped < MIN_SHARE, to);
    }

    /// What they say of a later one, `label`, when the first `written` bytes have been written: those
    /// that go on from there, given that one of those that come through here is meant. `missing` is the
    /// mass of what is not listed, all of which may come through here, too.
    fn later(
        &mut self,
        listed: &[(&[u8], f32)],
        missing: f64,
        emitted: &[u8],
        written: usize,
        label: u32,
        to: &mut Aligned,
    ) {
        let here: Vec<(&[u8], f32)> = listed
            .iter()
            .filter_map(|&(bytes, logprob)| {
                Some((bytes.strip_prefix(&emitted[..written])?, logprob))
            })
            .collect();
        let all = mass(here.iter().map(|&(_, logprob)| logprob));
        let (log_all, share) = (all.ln() as f32, all / (all + missing));
        // One that ends here says nothing of what comes next.
        let on: Vec<(&[u8], f32)> = here
            .into_iter()
            .filter(|(rest, _)| !rest.is_empty())
            .map(|(rest, logprob)| (rest, logprob - log_all))
            .collect();
        let mass = mass(on.iter().map(|&(_, logprob)| logprob)).min(1.0);
        let start = to.ids.len();
        let mapped = self.map(&on, mass, &emitted[written..], label, to);
        to.drawn.push(f32::NAN);
        self.end(start, label, mapped, mapped * share < MIN_SHARE, to);
    }

    /// Ends a position whose soft labels begin at `start`; without them, where they are `vague`.
    fn end(&self, start: usize, label: u32, mapped: f64, vague: bool, to: &mut Aligned) {
        if vague {
            to.ids.truncate(start);
            to.logprobs.truncate(start);
            if let Some(drawn) = to.drawn.last_mut() {
                *drawn = f32::NAN;
            }
        }
        let at = to.ends.len();
        to.ends.push(to.ids.len());
        if to.is_soft(at) {
            to.mapped_mass += mapped;
        }
        if let Some(best) = to.soft(at).0.first() {
            let bytes = self.tokenizer.token_bytes(label).unwrap_or_default();
            to.classes.count(bytes, *best == label);
        }
    }

    /// The token that ends the answer, if one does, and what [`Self::student_ends`] says of the others.
    fn ends(
        &self,
        student: &[u32],
        answer: &[u8],
        kept: Range<usize>,
    ) -> Result<(Option<u32>, Vec<usize>), Mismatch> {
        let Some((&last, text)) = student.split_last() else {
            return Ok((None, self.student_ends(student, answer, kept)?));
        };
        if self.tokenizer.is_special(last) && self.tokenizer.stop_ids().contains(&last) {
            return Ok((Some(last), self.student_ends(text, answer, kept)?));
        }
        let all = self.student_ends(student, answer, kept.clone());
        // Text of the template before the end of the turn.
        if all.is_err() && Some(last) == self.tokenizer.end_of_answer() {
            return Ok((Some(last), self.student_ends(text, answer, kept)?));
        }
        Ok((None, all?))
    }

    /// Gate 2: checks that the student's bytes end with the answer's; template text may precede them. Returns
    /// the end of each token in the answer (N).
    fn student_ends(
        &self,
        student: &[u32],
        answer: &[u8],
        kept: Range<usize>,
    ) -> Result<Vec<usize>, Mismatch> {
        let spelled: Option<Vec<Cow<'_, [u8]>>> = student
            .iter()
            .map(|&id| self.tokenizer.spelling(id))
            .collect();
        let spelled = spelled.ok_or(Mismatch::Student)?;
        let all = spelled.concat();
        let lead = all
            .strip_suffix(&answer[kept.clone()])
            .ok_or(Mismatch::Student)?
            .len();
        let mut at = 0;
        let ends = spelled.iter().map(|bytes| {
            at += bytes.len();
            // Template text ends at the start of the answer.
            kept.start + at.saturating_sub(lead)
        });
        Ok(ends.collect())
    }

    /// Appends the alternatives at a position as student tokens, best first. `emitted` is what the
    /// teacher said there, which the student spells with `label`. Returns how much of `mass` is left,
    /// without the alternatives that the student cannot spell.
    fn map(
        &mut self,
        alternatives: &[(&[u8], f32)],
        mass: f64,
        emitted: &[u8],
        label: u32,
        to: &mut Aligned,
    ) -> f64 {
        let start = to.ids.len();
        let mut mapped = mass;
        // All at once, for the processor to wait for several of them at a time: the table is larger
        // than its nearest memory.
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        found.extend(
            alternatives
                .iter()
                .map(|&(bytes, _)| match bytes == emitted {
                    true => Some(label),
                    false => self.tokens.id_of(bytes),
                }),
        );
        for (&(_, logprob), id) in alternatives.iter().zip(&found) {
            let Some(id) = *id else {
                mapped -= f64::from(logprob).exp();
                continue;
            };
            match to.ids[start..].iter().position(|&known| known == id) {
                Some(at) => {
                    let merged = &mut to.logprobs[start + at];
                    *merged = logaddexp(*merged, logprob);
                }
                None => {
                    to.ids.push(id);
                    to.logprobs.push(logprob);
                }
            }
        }
        self.found = found;
        let (ids, logprobs) = (&mut to.ids[start..], &mut to.logprobs[start..]);
        if !logprobs.is_sorted_by(|a, b| a >= b) {
            let mut sorted: Vec<(u32, f32)> = ids.iter().copied().zip(logprobs.to_vec()).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
            for (at, (id, logprob)) in sorted.into_iter().enumerate() {
                (ids[at], logprobs[at]) = (id, logprob);
            }
        }
        mapped
    }
}

/// Cuts two tokenisations, given by where each token ends in the same text, at their common
/// boundaries: minimal ranges of tokens on both sides that spell the same bytes.
///
/// Where one side ends early (its text was trimmed) the rest of the other is left out.
pub fn groups(a: &[usize], b: &[usize]) -> Vec<(Range<usize>, Range<usize>)> {
    let mut groups = Vec::with_capacity(a.len().min(b.len()));
    let (mut start_a, mut start_b) = (0, 0);
    let (mut at_a, mut at_b) = (0, 0);
    while at_a < a.len() && at_b < b.len() {
        match a[at_a].cmp(&b[at_b]) {
            std::cmp::Ordering::Less => at_a += 1,
            std::cmp::Ordering::Greater => at_b += 1,
            std::cmp::Ordering::Equal => {
                at_a += 1;
                at_b += 1;
                groups.push((start_a..at_a, start_b..at_b));
                (start_a, start_b) = (at_a, at_b);
            }
        }
    }
    groups
}
