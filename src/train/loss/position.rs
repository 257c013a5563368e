//! Inputs and outputs of the loss at one supervised position.

use std::fmt;

use crate::ops::math;
use crate::train::loss::divergence::Divergence;

/// Lower bound of the negative log-likelihoods of a chunk, in nats; it bounds their ratio.
pub(crate) const MIN_NLL: f32 = 1e-6;

/// Lower bound of the teacher's total probability of all tokens except the end token.
pub(crate) const MIN_NON_END_MASS: f32 = 1e-6;

/// The loss term of the soft labels: a divergence (KD in the formula of [`LossWeights`]) and its weight (kd).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftTerm {
    pub divergence: Divergence,
    pub weight: f32,
}

impl fmt::Display for SoftTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, weight {}", self.divergence, self.weight)
    }
}

/// Weights of the terms of a position. The loss is `scale * ((1 - kd) CE + kd KD)`, or `scale * CE` without soft
/// labels.
#[derive(Debug, Clone, Copy)]
pub struct LossWeights {
    /// Indexed by [`PositionTarget::is_exact_sample`].
    pub soft: [SoftTerm; 2],
    /// epsilon: CE is taken against (1 - epsilon) of the label and epsilon of the uniform
    /// distribution (Szegedy et al., arXiv 1512.00567).
    pub label_smoothing: f32,
    /// Weight of the terms of chunks (see [`super::chunk`]).
    pub alm: f32,
    /// The end token; None if it is treated like any other token.
    pub end: Option<EndToken>,
    /// 1 / N, with N the supervised positions of the step.
    pub scale: f32,
}

impl Default for LossWeights {
    /// Cross-entropy, summed over the positions.
    fn default() -> Self {
        Self {
            soft: [SoftTerm {
                divergence: Divergence::Tail,
                weight: 0.0,
            }; 2],
            label_smoothing: 0.0,
            alm: 0.0,
            end: None,
            scale: 1.0,
        }
    }
}

/// The token that ends an answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EndToken {
    pub token: u32,
    /// Whether the teacher's logprobs include the position of the end token, for answers whose
    /// [`PositionTarget::lists_end`] is None.
    pub is_listed: bool,
}

/// Training target of one position: the label and the teacher's distribution.
#[derive(Debug, Clone, Copy, Default)]
pub struct PositionTarget<'a> {
    /// y, the emitted token.
    pub label: u32,
    /// Top-k token ids, without repetition; empty if the position has none.
    pub soft_ids_K: &'a [u32],
    /// Natural logarithms of the probabilities of `soft_ids_K`.
    pub soft_logprobs_K: &'a [f32],
    /// The teacher's logprob of a label outside its top-k; -inf if it is unknown, None if the label is in the top-k.
    pub sampled_logprob: Option<f32>,
    /// Whether the label was sampled from exactly the distribution that the logprobs describe.
    pub is_exact_sample: bool,
    /// Whether the teacher's logprobs include the position where this answer ends; None if unknown.
    pub lists_end: Option<bool>,
    /// Logits of a local teacher, which replace the top-k (V, or the size of the teacher's vocabulary).
    pub teacher_logits_V: Option<&'a [f32]>,
    /// Extra weight of the cross-entropy, from the chunk of this position. Not used with soft labels.
    pub chunk_weight: f32,
}

impl PositionTarget<'_> {
    /// Returns the set K and the teacher's logprobs on it. K includes a label that the teacher sampled from outside its
    /// top-k, except for `damped`, which treats this label as a sample of the tail.
    pub(crate) fn candidates(&self, divergence: Divergence) -> (Vec<u32>, Vec<f32>) {
        let mut ids_K = self.soft_ids_K.to_vec();
        let mut logprobs_K = self.soft_logprobs_K.to_vec();
        let is_damped = matches!(divergence, Divergence::Damped(_));
        if let Some(sampled) = self
            .sampled_logprob
            .filter(|logprob| logprob.is_finite() && !is_damped)
        {
            match ids_K.iter().position(|&id| id == self.label) {
                // Two different tokens of the teacher may begin with the same token of the student.
                Some(index) => {
                    logprobs_K[index] = math::logaddexp(logprobs_K[index], sampled);
                }
                None => {
                    ids_K.push(self.label);
                    logprobs_K.push(sampled);
                }
            }
        }
        (ids_K, logprobs_K)
    }
}

/// Loss terms and statistics of one position.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PositionLoss {
    /// The minimised value before `scale`. The first position of a chunk includes the chunk's term.
    pub loss: f32,
    /// Cross-entropy with the label, without smoothing.
    pub ce: f32,
    /// The term of the soft labels; None without soft labels.
    pub kd: Option<f32>,
    /// KL divergence from the teacher to the student, independent of the minimised term: on K and the tail, or over
    /// the whole vocabulary with a local teacher.
    pub kl: Option<f32>,
    /// The term of the chunk that begins here; None if no chunk begins here.
    pub alm: Option<f32>,
    /// Whether the student's most likely token is the label.
    pub top1_is_label: bool,
    /// Whether the student's most likely token is the teacher's; None without soft labels.
    pub top1_is_teachers: Option<bool>,
    /// The student's probability of its most likely token.
    pub confidence: f32,
}

/// Subtracts the smoothed label distribution, times `weight`, from the gradient. The gradient of CE is the
/// student's distribution minus the smoothed label distribution.
#[inline(always)]
pub(crate) fn subtract_label(gradient_V: &mut [f32], label: usize, smoothing: f32, weight: f32) {
    if smoothing > 0.0 {
        let uniform = weight * smoothing / gradient_V.len() as f32;
        gradient_V.iter_mut().for_each(|g| *g -= uniform);
    }
    gradient_V[label] -= weight * (1.0 - smoothing);
}

/// Returns the teacher's most likely token.
pub(crate) fn most_likely(ids_K: &[u32], logprobs_K: &[f32]) -> Option<u32> {
    ids_K
        .iter()
        .zip(logprobs_K)
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map(|(&id, _)| id)
}

/// Returns index and value of the largest logit; the first one if several are equal.
#[inline(always)]
pub(crate) fn argmax(logits_V: &[f32]) -> (usize, f32) {
    let max = math::max(logits_V);
    let index = logits_V.iter().position(|&z| z == max).unwrap_or(0);
    (index, max)
}

/// Returns the mean of the logits, which only label smoothing needs; 0 without smoothing.
#[inline(always)]
pub(crate) fn mean_logit(logits_V: &[f32], smoothing: f32) -> f32 {
    if smoothing > 0.0 {
        math::sum(logits_V) / logits_V.len() as f32
    } else {
        0.0
    }
}
