//! Soft labels from any teacher tokenizer to any student tokenizer, on the bytes of the answer.
//!
//! Both tokenisations are cut where both have a boundary, which gives groups of teacher and student
//! tokens that spell the same bytes. A group of one and one says the same about the next bytes, so
//! the teacher's alternatives become student tokens there. In every other group the position trains
//! on cross-entropy. With one tokenizer on both sides all groups are one and one, and the map is
//! the identity.

use std::collections::HashMap;
use std::ops::Range;

use super::example::SoftLabels;
use super::tokenizer::Tokenizer;
use crate::cache::record::Logprobs;

/// Logprobs at or below are no logprobs: endpoints send -100, -9999 for "too small to tell".
const SENTINEL: f32 = -100.0;
/// By how much probabilities may sum to more than 1: they are rounded.
const EXCESS: f64 = 1e-3;

/// Why an answer has no soft labels at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Mismatch {
    #[error("the teacher's tokens do not spell the answer")]
    Teacher,
    #[error("the student's tokens do not spell the answer")]
    Student,
    #[error("the teacher's probabilities sum to more than 1")]
    Mass,
}

/// The soft labels of an answer of N student tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Aligned {
    /// (N)
    pub soft: Vec<Option<SoftLabels>>,
    /// The teacher's mass on student tokens, summed over the positions that have soft labels.
    pub mapped_mass: f64,
}

/// Maps the teacher's tokens to the student's. Encodings of bytes that are no student token are
/// remembered, so keep one for many answers.
pub struct Mapper<'a> {
    tokenizer: &'a Tokenizer,
    first_ids: HashMap<Box<[u8]>, Option<u32>>,
}

impl<'a> Mapper<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            first_ids: HashMap::new(),
        }
    }

    /// The student token for a teacher token that is spelled `bytes`: that with the same bytes, or
    /// else the first of their encoding, an event that they imply. None for control tokens and what
    /// the student cannot spell.
    fn id_of(&mut self, bytes: &[u8]) -> Option<u32> {
        if let Some(id) = self.tokenizer.id_of_bytes(bytes) {
            return Some(id);
        }
        if let Some(&known) = self.first_ids.get(bytes) {
            return known;
        }
        let id = if self.is_stop(bytes) {
            None
        } else {
            self.tokenizer.first_id_of(bytes)
        };
        self.first_ids.insert(bytes.into(), id);
        id
    }

    /// Soft labels for `student`, the N tokens that spell the part `kept` of the answer's bytes,
    /// possibly with white space of the template before it.
    ///
    /// # Errors
    /// If one side's bytes do not add up, or the logprobs are none.
    pub fn align(
        &mut self,
        teacher: &Logprobs,
        answer: &[u8],
        kept: Range<usize>,
        student: &[u32],
    ) -> Result<Aligned, Mismatch> {
        let teacher = Tokens::new(teacher);
        let teacher_ends = self.teacher_ends(&teacher, answer)?;
        let student_ends = self.student_ends(student, answer, kept.clone())?;
        // What the template cut off, and the white space that it put in its place, has no partner.
        let skipped = teacher_ends.partition_point(|&end| end <= kept.start);
        let lead = student_ends.partition_point(|&end| end <= kept.start);

        let mut soft = vec![None; student.len()];
        let mut mapped_mass = 0.0;
        for (from, to) in groups(&teacher_ends[skipped..], &student_ends[lead..]) {
            let (position, at) = (skipped + from.start, lead + to.start);
            let (bytes, label) = (teacher.emitted(position), student[at]);
            let one_to_one = from.len() == 1 && to.len() == 1;
            if !one_to_one || self.tokenizer.token_bytes(label) != Some(bytes) {
                continue;
            }
            let labels = self.map(&teacher.alternatives(position)?, bytes, label);
            if !labels.ids.is_empty() {
                mapped_mass += mass(labels.logprobs.iter().copied());
                soft[at] = Some(labels);
            }
        }
        Ok(Aligned { soft, mapped_mass })
    }

    /// Gate 1: the teacher's bytes are the answer's, up to stop tokens at the end. Returns where
    /// each of the others ends in the answer.
    fn teacher_ends(&self, teacher: &Tokens, answer: &[u8]) -> Result<Vec<usize>, Mismatch> {
        let mut ends = Vec::with_capacity(teacher.len());
        let mut at = 0;
        for position in 0..teacher.len() {
            let bytes = teacher.emitted(position);
            if at == answer.len() && self.is_stop(bytes) {
                continue;
            }
            if ends.len() != position || !answer[at..].starts_with(bytes) {
                return Err(Mismatch::Teacher);
            }
            at += bytes.len();
            ends.push(at);
        }
        if at != answer.len() {
            return Err(Mismatch::Teacher);
        }
        Ok(ends)
    }

    fn is_stop(&self, bytes: &[u8]) -> bool {
        is_stop(self.tokenizer, bytes)
    }

    /// Gate 2: the student's bytes are the answer's, up to white space before it. Returns where
    /// each token ends in the answer (N).
    fn student_ends(
        &self,
        student: &[u32],
        answer: &[u8],
        kept: Range<usize>,
    ) -> Result<Vec<usize>, Mismatch> {
        let spelled: Option<Vec<&[u8]>> = student
            .iter()
            .map(|&id| self.tokenizer.token_bytes(id))
            .collect();
        let spelled = spelled.ok_or(Mismatch::Student)?;
        let all = spelled.concat();
        let lead = all
            .strip_suffix(&answer[kept.clone()])
            .filter(|lead| lead.iter().all(u8::is_ascii_whitespace))
            .ok_or(Mismatch::Student)?
            .len();
        let mut at = 0;
        let ends = spelled.iter().map(|bytes| {
            at += bytes.len();
            // white space of the template ends where the answer starts
            kept.start + at.saturating_sub(lead)
        });
        Ok(ends.collect())
    }

    /// The alternatives at a position as student tokens, best first. `emitted` is what the teacher
    /// said there, which the student spells with `label`.
    fn map(&mut self, alternatives: &[(&[u8], f32)], emitted: &[u8], label: u32) -> SoftLabels {
        let mut labels = SoftLabels::default();
        for &(bytes, logprob) in alternatives {
            let id = if bytes == emitted {
                label
            } else if let Some(id) = self.id_of(bytes) {
                id
            } else {
                continue;
            };
            match labels.ids.iter().position(|&known| known == id) {
                Some(at) => labels.logprobs[at] = logaddexp(labels.logprobs[at], logprob),
                None => {
                    labels.ids.push(id);
                    labels.logprobs.push(logprob);
                }
            }
        }
        if !labels.logprobs.is_sorted_by(|a, b| a >= b) {
            let mut order: Vec<usize> = (0..labels.ids.len()).collect();
            order.sort_by(|&a, &b| labels.logprobs[b].total_cmp(&labels.logprobs[a]));
            labels = SoftLabels {
                ids: order.iter().map(|&at| labels.ids[at]).collect(),
                logprobs: order.iter().map(|&at| labels.logprobs[at]).collect(),
            };
        }
        labels
    }
}

/// The teacher's tokens of an answer of T tokens, by their bytes.
pub struct Tokens<'a> {
    logprobs: &'a Logprobs,
    /// Bytes of the tokens that are no UTF-8, by position and rank.
    raw: HashMap<(u32, i32), Vec<u8>>,
}

impl<'a> Tokens<'a> {
    pub fn new(logprobs: &'a Logprobs) -> Self {
        let raw = logprobs.raw.iter().filter_map(|token| {
            let bytes = bytes_of_hex(&token.hex)?;
            Some(((token.position, token.rank), bytes))
        });
        Self {
            logprobs,
            raw: raw.collect(),
        }
    }

    /// T
    pub fn len(&self) -> usize {
        self.logprobs.token.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the teacher said at `position`, which is less than T. Empty where its bytes are not
    /// known.
    pub fn emitted(&self, position: usize) -> &[u8] {
        self.bytes(&self.logprobs.token[position], position, -1)
    }

    fn bytes<'b>(&'b self, text: &'b str, position: usize, rank: i32) -> &'b [u8] {
        if text.is_empty() && !self.raw.is_empty() {
            return self
                .raw
                .get(&(position as u32, rank))
                .map_or(&[], Vec::as_slice);
        }
        text.as_bytes()
    }

    /// The alternatives with usable logprobs, and the emitted token where it is not among them;
    /// probabilities that sum to slightly more than 1 are brought to 1.
    ///
    /// # Errors
    /// [`Mismatch::Mass`] if they sum to more than that.
    pub fn alternatives(&self, position: usize) -> Result<Vec<(&[u8], f32)>, Mismatch> {
        let top = self
            .logprobs
            .top
            .get(position)
            .map_or(&[][..], Vec::as_slice);
        let logprobs = self.logprobs.top_logprob.get(position);
        let logprobs = logprobs.map_or(&[][..], Vec::as_slice);
        let emitted = self.emitted(position);
        let mut among = false;
        let mut alternatives = Vec::with_capacity(top.len() + 1);
        for (rank, (text, &logprob)) in top.iter().zip(logprobs).enumerate() {
            let bytes = self.bytes(text, position, rank as i32);
            among |= bytes == emitted;
            if let Some(logprob) = logprob.filter(is_usable) {
                alternatives.push((bytes, logprob));
            }
        }
        let own = self.logprobs.logprob.get(position).copied().flatten();
        if let (false, Some(logprob)) = (among, own.filter(is_usable)) {
            alternatives.push((emitted, logprob));
        }
        let total = mass(alternatives.iter().map(|&(_, logprob)| logprob));
        if total > 1.0 + EXCESS {
            return Err(Mismatch::Mass);
        }
        if total > 1.0 {
            let excess = total.ln() as f32;
            for (_, logprob) in &mut alternatives {
                *logprob -= excess;
            }
        }
        Ok(alternatives)
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

fn is_usable(logprob: &f32) -> bool {
    logprob.is_finite() && *logprob > SENTINEL
}

/// The sum of probabilities given by their logarithms.
fn mass(logprobs: impl Iterator<Item = f32>) -> f64 {
    logprobs.map(|logprob| f64::from(logprob).exp()).sum()
}

/// ln(e^a + e^b)
fn logaddexp(a: f32, b: f32) -> f32 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    high + (low - high).exp().ln_1p()
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
    let usual = [
        "</s>",
        "<s>",
        "<eos>",
        "<bos>",
        "<end_of_turn>",
        "<pad>",
        "<unk>",
    ];
    tokenizer.names_special(text)
        || usual.contains(&text)
        || (text.starts_with("<|") && text.ends_with("|>") && text.len() > 4)
        || (text.starts_with("<｜") && text.ends_with("｜>"))
}

fn bytes_of_hex(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}
