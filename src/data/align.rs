//! Soft labels from any teacher tokenizer to any student tokenizer, on the bytes of the answer.
//!
//! Both tokenisations are cut where both have a boundary, which gives groups of teacher and student
//! tokens that spell the same bytes. A group of one and one says the same about the next bytes, so
//! the teacher's alternatives become student tokens there. In every other group the position trains
//! on cross-entropy. With one tokenizer on both sides all groups are one and one, and the map is
//! the identity.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use foldhash::fast::FixedState;

use super::tokenizer::Tokenizer;
use crate::cache::view::LogprobsView;

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
///
/// Those of a position are the teacher's top-k, mapped to student tokens: natural logarithms, best
/// first; missing ones (sentinels) have been dropped and several tokens that map to one id merged.
/// The mass that is not listed is the tail.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Aligned {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    /// Where the labels of each position end (N).
    ends: Vec<usize>,
    /// The teacher's mass on student tokens, summed over the positions that have soft labels.
    pub mapped_mass: f64,
}

impl Aligned {
    /// N
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Token ids and logprobs at position `at`. Empty where the teacher gave nothing usable, and
    /// past the end; the position then trains on cross-entropy.
    pub fn soft(&self, at: usize) -> (&[u32], &[f32]) {
        let Some(&end) = self.ends.get(at) else {
            return (&[], &[]);
        };
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        (&self.ids[start..end], &self.logprobs[start..end])
    }
}

/// Maps the teacher's tokens to the student's. What was looked up once is remembered, so keep one
/// for many answers.
pub struct Mapper<'a> {
    tokenizer: &'a Tokenizer,
    /// Nearly all tokens are short; a key without a pointer is found in one step.
    short: HashMap<u128, Option<u32>, FixedState>,
    long: HashMap<Box<[u8]>, Option<u32>, FixedState>,
    /// The tokens of one position, kept for its memory.
    found: Vec<Option<u32>>,
}

impl<'a> Mapper<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            short: HashMap::default(),
            long: HashMap::default(),
            found: Vec::new(),
        }
    }

    /// The student token for a teacher token that is spelled `bytes`: that with the same bytes, or
    /// else the first of their encoding, an event that they imply. None for control tokens and what
    /// the student cannot spell.
    fn id_of(&mut self, bytes: &[u8]) -> Option<u32> {
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

    /// Soft labels for `student`, the N tokens that spell the part `kept` of the answer's bytes,
    /// possibly with white space of the template before it.
    ///
    /// # Errors
    /// If one side's bytes do not add up, or the logprobs are none.
    pub fn align(
        &mut self,
        teacher: &LogprobsView,
        answer: &[u8],
        kept: Range<usize>,
        student: &[u32],
    ) -> Result<Aligned, Mismatch> {
        let teacher_ends = self.teacher_ends(teacher, answer)?;
        let student_ends = self.student_ends(student, answer, kept.clone())?;
        // What the template cut off, and the white space that it put in its place, has no partner.
        let skipped = teacher_ends.partition_point(|&end| end <= kept.start);
        let lead = student_ends.partition_point(|&end| end <= kept.start);

        let most = teacher.top.total() + student.len();
        let mut aligned = Aligned {
            ids: Vec::with_capacity(most),
            logprobs: Vec::with_capacity(most),
            ends: Vec::with_capacity(student.len()),
            mapped_mass: 0.0,
        };
        let mut listed = Vec::new();
        for (from, to) in groups(&teacher_ends[skipped..], &student_ends[lead..]) {
            let (position, at) = (skipped + from.start, lead + to.start);
            let (bytes, label) = (&*teacher.token[position], student[at]);
            let one_to_one = from.len() == 1 && to.len() == 1;
            if !one_to_one || self.tokenizer.token_bytes(label) != Some(bytes) {
                continue;
            }
            aligned.ends.resize(at, aligned.ids.len());
            let total = alternatives(teacher, position, &mut listed)?;
            self.map(&listed, total, bytes, label, &mut aligned);
            aligned.ends.push(aligned.ids.len());
        }
        aligned.ends.resize(student.len(), aligned.ids.len());
        Ok(aligned)
    }

    /// Gate 1: the teacher's bytes are the answer's, up to stop tokens at the end. Returns where
    /// each of the others ends in the answer.
    fn teacher_ends(&self, teacher: &LogprobsView, answer: &[u8]) -> Result<Vec<usize>, Mismatch> {
        let mut ends = Vec::with_capacity(teacher.token.len());
        let mut at = 0;
        for (position, bytes) in teacher.token.iter().enumerate() {
            if at == answer.len() && is_stop(self.tokenizer, bytes) {
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

    /// Appends the alternatives at a position, whose probabilities sum to `total`, as student tokens,
    /// best first. `emitted` is what the teacher said there, which the student spells with `label`.
    fn map(
        &mut self,
        alternatives: &[(&[u8], f32)],
        total: f64,
        emitted: &[u8],
        label: u32,
        to: &mut Aligned,
    ) {
        let start = to.ids.len();
        let mut mapped = total;
        // All at once, for the processor to wait for several of them at a time: the table is larger
        // than its nearest memory.
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        found.extend(
            alternatives
                .iter()
                .map(|&(bytes, _)| match bytes == emitted {
                    true => Some(label),
                    false => self.id_of(bytes),
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
        if !ids.is_empty() {
            to.mapped_mass += mapped;
        }
        if !logprobs.is_sorted_by(|a, b| a >= b) {
            let mut sorted: Vec<(u32, f32)> = ids.iter().copied().zip(logprobs.to_vec()).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
            for (at, (id, logprob)) in sorted.into_iter().enumerate() {
                (ids[at], logprobs[at]) = (id, logprob);
            }
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
    let same = tokenizer.id_of_bytes(bytes);
    same.or_else(|| match is_stop(tokenizer, bytes) {
        true => None,
        false => tokenizer.first_id_of(bytes),
    })
}

/// Fills `listed` with the teacher's alternatives at a position that have usable logprobs, and the
/// emitted token where it is not among them; probabilities that sum to slightly more than 1 are
/// brought to 1. Returns what they sum to then.
///
/// # Errors
/// [`Mismatch::Mass`] if they sum to more than that.
pub fn alternatives<'t>(
    teacher: &'t LogprobsView,
    position: usize,
    listed: &mut Vec<(&'t [u8], f32)>,
) -> Result<f64, Mismatch> {
    let emitted = teacher.token.get(position).map_or(&[][..], Cow::as_ref);
    let logprobs = teacher.top_logprob.get(position);
    let mut among = false;
    listed.clear();
    for (bytes, &logprob) in teacher.top.get(position).iter().zip(logprobs) {
        among |= **bytes == *emitted;
        if let Some(logprob) = logprob.filter(is_usable) {
            listed.push((bytes, logprob));
        }
    }
    let own = teacher.logprob.get(position).copied().flatten();
    if let (false, Some(logprob)) = (among, own.filter(is_usable)) {
        listed.push((emitted, logprob));
    }
    let total = mass(listed.iter().map(|&(_, logprob)| logprob));
    if total > 1.0 + EXCESS {
        return Err(Mismatch::Mass);
    }
    if total > 1.0 {
        let excess = total.ln() as f32;
        for (_, logprob) in listed {
            *logprob -= excess;
        }
    }
    Ok(total.min(1.0))
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
