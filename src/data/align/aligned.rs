//! The soft labels of an answer.

use crate::data::classes::Classes;
use crate::data::logprob_check::Agreement;

/// The soft labels of an answer of N student tokens.
///
/// Those of a position are the teacher's top-k, mapped to student tokens: natural logarithms, best
/// first; missing ones (sentinels) have been dropped and several tokens that map to one id merged.
/// The mass that is not listed is the tail.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Aligned {
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<f32>,
    /// Where the labels of each position end (N).
    pub(super) ends: Vec<usize>,
    /// See [`Aligned::drawn`]; NaN is none (N).
    pub(super) drawn: Vec<f32>,
    pub(super) chunks: Vec<Chunk>,
    /// The teacher's mass on student tokens, summed over the positions that have soft labels.
    pub mapped_mass: f64,
    /// How often the teacher emitted one of its top-k, and the mass of the top-k as the expected rate.
    pub in_top_k: Agreement,
    /// Positions whose probabilities sum to more than 1.
    pub positions_over_one: u64,
    /// How often the teacher emitted its most likely token: of all its tokens, before the map.
    pub agreement: Agreement,
    /// How often the label is the most likely token after the map.
    pub classes: Classes,
    /// Where the tokens end the turn: did the teacher say how likely that was?
    pub lists_end: Option<bool>,
}

/// Text that several tokens of the teacher spell, cut in another way by the student.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chunk {
    /// The first student token, and how many there are.
    pub start: usize,
    pub len: usize,
    /// The negative log-likelihood of the text under the teacher.
    pub nll: f32,
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

    /// Where the teacher emitted a token from outside its top-k: its logprob, or -inf if that is not
    /// known.
    pub fn drawn(&self, at: usize) -> Option<f32> {
        self.drawn
            .get(at)
            .copied()
            .filter(|logprob| !logprob.is_nan())
    }

    /// In order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Does the position at `at` have soft labels?
    pub fn is_soft(&self, at: usize) -> bool {
        !self.soft(at).0.is_empty() || self.drawn(at).is_some_and(f32::is_finite)
    }
}

impl Aligned {
    /// Appends a position with these soft labels, of which nothing is missing: token ids and logprobs,
    /// best first.
    pub fn push(&mut self, labels: &[(u32, f32)]) {
        self.ids.extend(labels.iter().map(|label| label.0));
        self.logprobs.extend(labels.iter().map(|label| label.1));
        self.ends.push(self.ids.len());
        self.drawn.push(f32::NAN);
        self.mapped_mass += 1.0;
    }

    /// Goes on to position `at`; those before it that nothing was said of have no soft labels.
    pub(super) fn fill(&mut self, at: usize) {
        self.ends.resize(at, self.ids.len());
        self.drawn.resize(at, f32::NAN);
    }
}
