//! The soft labels of an answer.

#![allow(
    non_snake_case,
    reason = "arrays carry their shape as a suffix: see the legend in `data`"
)]

use crate::data::logprob_check::Agreement;

/// The soft labels of an answer of N student tokens.
///
/// The labels of a position are the teacher's top-k, mapped to student tokens: natural logarithms, best
/// first. Missing logprobs (sentinels) are dropped. Teacher tokens that map to one student token are merged.
/// The probability outside the labels is the tail.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Aligned {
    pub(super) ids_NK: Vec<u32>,
    pub(super) logprobs_NK: Vec<f32>,
    /// End of each position's labels in `ids_NK`.
    pub(super) ends_N: Vec<usize>,
    /// See [`Aligned::sampled_logprob`]; NaN stands for None.
    pub(super) sampled_logprob_N: Vec<f32>,
    pub(super) chunks_C: Vec<Chunk>,
    /// The teacher's mass on student tokens, summed over the positions that have soft labels.
    pub mapped_mass: f64,
    /// Positions whose emitted token is in the top-k; the expected rate is the probability mass of the top-k.
    pub in_top_k: Agreement,
    /// Number of positions whose probabilities sum to more than 1 + [`super::EXCESS`].
    pub positions_over_one: u64,
    /// Positions where the teacher emitted its most likely token, counted before the mapping to student tokens.
    pub agreement: Agreement,
    /// Whether the teacher's logprobs include the end of the turn; None if the answer does not end the turn.
    pub lists_end: Option<bool>,
}

/// Text that several teacher tokens spell and that the student splits differently.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chunk {
    /// Index of the first student token.
    pub start: usize,
    /// Number of student tokens.
    pub len: usize,
    /// Negative log-likelihood of the text under the teacher, in nats.
    pub nll: f32,
}

impl Aligned {
    /// An empty result with capacity for `soft_labels` labels at `positions` positions.
    pub(super) fn with_capacity(soft_labels: usize, positions: usize) -> Self {
        Self {
            ids_NK: Vec::with_capacity(soft_labels),
            logprobs_NK: Vec::with_capacity(soft_labels),
            ends_N: Vec::with_capacity(positions),
            sampled_logprob_N: Vec::with_capacity(positions),
            ..Self::default()
        }
    }

    /// N, the number of positions.
    pub fn len(&self) -> usize {
        self.ends_N.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends_N.is_empty()
    }

    /// Token ids and logprobs of the soft labels at `position`. Empty if the position has none, or if `position` is
    /// past the end.
    pub fn soft(&self, position: usize) -> (&[u32], &[f32]) {
        let Some(&end) = self.ends_N.get(position) else {
            return (&[], &[]);
        };
        let start = position
            .checked_sub(1)
            .map_or(0, |previous| self.ends_N[previous]);
        (&self.ids_NK[start..end], &self.logprobs_NK[start..end])
    }

    /// Logprob of the emitted token if it is outside the top-k; -inf if that logprob is unknown. None if the token
    /// is one of the top-k, or the position has no soft labels, or is a later token of a split teacher token.
    pub fn sampled_logprob(&self, position: usize) -> Option<f32> {
        self.sampled_logprob_N
            .get(position)
            .copied()
            .filter(|logprob| !logprob.is_nan())
    }

    /// The chunks, in order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks_C
    }

    /// Returns true if the position has soft labels.
    pub fn is_soft(&self, position: usize) -> bool {
        !self.soft(position).0.is_empty()
            || self.sampled_logprob(position).is_some_and(f32::is_finite)
    }

    /// Appends a position whose soft labels (token ids and logprobs, best first) have a total probability of 1.
    pub fn push(&mut self, labels: &[(u32, f32)]) {
        self.ids_NK.extend(labels.iter().map(|label| label.0));
        self.logprobs_NK.extend(labels.iter().map(|label| label.1));
        self.ends_N.push(self.ids_NK.len());
        self.sampled_logprob_N.push(f32::NAN);
        self.mapped_mass += 1.0;
    }

    /// Appends positions without soft labels until there are `positions` positions.
    pub(super) fn fill(&mut self, positions: usize) {
        self.ends_N.resize(positions, self.ids_NK.len());
        self.sampled_logprob_N.resize(positions, f32::NAN);
    }

    /// Completes the position whose labels start at index `start` of `ids_NK`. If `is_unreliable`, the labels are
    /// removed and the position has no soft labels.
    pub(super) fn finish_position(
        &mut self,
        start: usize,
        sampled_logprob: f32,
        mapped_mass: f64,
        is_unreliable: bool,
    ) {
        if is_unreliable {
            self.ids_NK.truncate(start);
            self.logprobs_NK.truncate(start);
        }
        let position = self.ends_N.len();
        self.ends_N.push(self.ids_NK.len());
        self.sampled_logprob_N.push(if is_unreliable {
            f32::NAN
        } else {
            sampled_logprob
        });
        if self.is_soft(position) {
            self.mapped_mass += mapped_mass;
        }
    }
}
