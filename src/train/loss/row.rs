//! TODO

use crate::ops::math;
use crate::train::loss::divergence::Divergence;
use std::fmt;

/// KD, the term of soft labels, and its weight kd.
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

/// How the terms of a position make its loss:
/// `scale * ((1 - kd) CE + kd KD)`, or `scale * CE` where the position has no soft labels.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// The second is for positions whose y was drawn from the teacher's distribution.
    pub soft: [SoftTerm; 2],
    /// epsilon: CE is taken against (1 - epsilon) of the label and epsilon of the uniform
    /// distribution (Szegedy et al., arXiv 1512.00567).
    pub label_smoothing: f32,
    /// The weight of the likelihoods of chunks.
    pub alm: f32,
    /// The end of an answer; None where it is a token like others.
    pub end: Option<End>,
    /// 1 / N, with N the supervised positions of the step.
    pub scale: f32,
}

impl Default for Weights {
    /// Cross-entropy, summed.
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

/// The token by which a model ends its answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct End {
    pub token: u32,
    /// Does a teacher give its distribution where a turn ends? Of answers that do not show it themselves.
    pub is_listed: bool,
}

/// What a position teaches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Row<'a> {
    /// The emitted token.
    pub label: u32,
    /// Top-k token ids, each once; empty where there are no soft labels.
    pub soft_ids: &'a [u32],
    /// Their logprobs, natural logarithms.
    pub soft_logprobs: &'a [f32],
    /// Where the label is none of the teacher's top-k: its logprob, or -inf if that is not known.
    pub drawn: Option<f32>,
    /// Was the label drawn from the very distribution that the logprobs tell?
    pub exact: bool,
    /// Does the teacher give its distribution where this turn ends, if that is known?
    pub lists_end: Option<bool>,
    /// The logits of a teacher that is on this machine, in place of its top-k (V, or as many as it has).
    pub dense: Option<&'a [f32]>,
    /// By how much its cross-entropy weighs more, for the chunk that it belongs to; without soft labels.
    pub chunk: f32,
}

impl Row<'_> {
    /// K with the logprobs on it. A label that the teacher emitted from outside its top-k is added, but
    /// not for `damped`, which treats it as a sample of the tail.
    pub(crate) fn known(&self, divergence: Divergence) -> (Vec<u32>, Vec<f32>) {
        let (mut ids, mut logprobs) = (self.soft_ids.to_vec(), self.soft_logprobs.to_vec());
        let apart = matches!(divergence, Divergence::Damped(_));
        if let Some(drawn) = self.drawn.filter(|drawn| drawn.is_finite() && !apart) {
            match ids.iter().position(|&id| id == self.label) {
                // What the teacher calls something else begins with the label, too.
                Some(at) => logprobs[at] = math::logaddexp(logprobs[at], drawn),
                None => {
                    ids.push(self.label);
                    logprobs.push(drawn);
                }
            }
        }
        (ids, logprobs)
    }
}

/// The terms of one position.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowLoss {
    /// What is minimised, before `scale`. That of a chunk is part of its first position's.
    pub loss: f32,
    /// Of the label alone.
    pub ce: f32,
    /// What the soft labels add; None where the position has none.
    pub kd: Option<f32>,
    /// KL divergence from the teacher to the student on K and the tail, or in full where the teacher is
    /// dense, whatever is minimised.
    pub kl: Option<f32>,
    /// What the chunk adds that begins here; None where none does.
    pub alm: Option<f32>,
    /// Is the student's most likely token the label?
    pub top1_is_label: bool,
    /// Is it the teacher's most likely token? None where there are no soft labels.
    pub top1_is_teachers: Option<bool>,
    /// The student's probability of its most likely token.
    pub confidence: f32,
}

/// The part of the gradient of CE that is not the student's own distribution.
#[inline(always)]
pub(crate) fn pull_to_label(logits: &mut [f32], label: usize, smoothing: f32, weight: f32) {
    if smoothing > 0.0 {
        let everywhere = weight * smoothing / logits.len() as f32;
        logits.iter_mut().for_each(|g| *g -= everywhere);
    }
    logits[label] -= weight * (1.0 - smoothing);
}

/// The teacher's most likely token.
pub(crate) fn best(ids: &[u32], logprobs: &[f32]) -> Option<u32> {
    ids.iter()
        .zip(logprobs)
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map(|(&id, _)| id)
}

/// Index and value of the largest logit; the first of equals.
#[inline(always)]
pub(crate) fn top1(logits: &[f32]) -> (usize, f32) {
    let max = math::max(logits);
    let index = logits.iter().position(|&z| z == max).unwrap_or(0);
    (index, max)
}

/// Negative log-likelihoods never count as smaller than this, which bounds their ratio.
pub(crate) const MIN_NLL: f32 = 1e-6;

/// The teacher's probabilities of all tokens but the end of the turn never count as less than this.
pub(crate) const MIN_REST: f32 = 1e-6;
