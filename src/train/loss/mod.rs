//! What one supervised position contributes: its loss and the gradient at its logits.
//!
//! With q = softmax(z) the student and y the emitted token, CE = -log q_y. What the soft labels add
//! is a [`divergence`].

pub mod dense;
pub mod divergence;

use std::fmt;

use crate::ops::math;
use divergence::{Divergence, Position, Term};

/// The teacher's probabilities of all tokens but the end of the turn never count as less than this.
const MIN_REST: f32 = 1e-6;

/// Negative log-likelihoods never count as smaller than this, which bounds their ratio.
const MIN_NLL: f32 = 1e-6;

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

/// The token by which a model ends its answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct End {
    pub token: u32,
    /// Does a teacher give its distribution where a turn ends? Of answers that do not show it themselves.
    pub is_listed: bool,
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
    fn known(&self, divergence: Divergence) -> (Vec<u32>, Vec<f32>) {
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

/// Computes the loss of one position and turns its logits into their gradient.
///
/// Where the teacher does not list [`Weights::end`], positions with soft labels are those at which no end came: with
/// them alone, the student would learn the end from the tail, and from cross-entropy at the ends once
/// more. So the two sides are compared without it, and KD gets -log(1 - q_end) beside the -log q_end of
/// the ends, which is the likelihood of ending or not; both terms together have their fixed point where the
/// student is the teacher. What the teacher gives to the end, if it is not among its top-k, is taken to be
/// what the student does, but at most the tail.
///
/// `logits` has V entries; every id must be below V.
#[inline(always)]
pub fn row(logits: &mut [f32], row: Row, weights: Weights) -> RowLoss {
    if let Some(teacher) = row.dense {
        return dense::row(logits, teacher, row.label, weights);
    }
    let scale = weights.scale;
    let SoftTerm {
        divergence,
        weight: kd,
    } = weights.soft[usize::from(row.exact)];
    let label = row.label as usize;
    let label_logit = logits[label];
    let smoothing = weights.label_smoothing;
    let mean_logit = match smoothing > 0.0 {
        true => math::sum(logits) / logits.len() as f32,
        false => 0.0,
    };
    let (top1, max) = top1(logits);
    let (mut ids, mut logprobs) = row.known(divergence);
    let has_soft = !ids.is_empty();
    let teachers = best(&ids, &logprobs);
    let unlisted = weights
        .end
        .filter(|end| !row.lists_end.unwrap_or(end.is_listed));
    let end = unlisted
        .map(|end| end.token)
        .filter(|&end| has_soft && end != row.label);
    let known_end = end.and_then(|end| {
        let at = ids.iter().position(|&id| id == end)?;
        ids.swap_remove(at);
        Some(logprobs.swap_remove(at).exp())
    });
    // With K set aside the sum over the rest is the tail itself: no cancellation in 1 - Q.
    let inside: Vec<f32> = ids.iter().map(|&id| logits[id as usize]).collect();
    let end_logit = end.map_or(f32::NEG_INFINITY, |end| logits[end as usize]);
    for &id in ids.iter().chain(&end) {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    let outside_sum = math::exp_sum(logits, 1.0, max);
    let inside_exp: Vec<f32> = inside.iter().map(|z| (z - max).exp()).collect();
    // Without the end, and with it.
    let rest = outside_sum + inside_exp.iter().sum::<f32>();
    let end_exp = (end_logit - max).exp();
    let sum = rest + end_exp;
    let lse = max + sum.ln();
    let ce = lse - label_logit;
    let smoothed = ce + smoothing * (label_logit - mean_logit);
    let mut loss = RowLoss {
        loss: smoothed,
        ce,
        kd: None,
        kl: None,
        alm: None,
        top1_is_label: top1 == label,
        top1_is_teachers: None,
        confidence: 1.0 / sum,
    };
    if !has_soft {
        let factor = scale * (1.0 + row.chunk) / sum;
        logits.iter_mut().for_each(|e| *e *= factor);
        pull_to_label(logits, label, smoothing, scale);
        logits[label] -= scale * row.chunk;
        return loss;
    }

    let end_share = end_exp / sum;
    let mut drawn = row.drawn;
    if end.is_some() {
        let (_, tail) = divergence::masses(&logprobs);
        let teachers_end = known_end.unwrap_or(end_share.min(tail));
        let shift = (1.0 - teachers_end).max(MIN_REST).ln();
        logprobs.iter_mut().for_each(|logprob| *logprob -= shift);
        drawn = drawn.map(|logprob| logprob - shift);
    }
    let shares: Vec<f32> = inside_exp.iter().map(|e| e / rest).collect();
    let position = Position {
        teacher: &logprobs,
        logits: &inside,
        shares: &shares,
        lse: max + rest.ln(),
        tail: outside_sum / rest,
        masses: divergence::masses(&logprobs),
        drawn: drawn.map(|known| (label_logit, Some(known).filter(|known| known.is_finite()))),
    };
    let term = position.term(divergence);
    let kl = match divergence {
        Divergence::Tail => term.value,
        _ => position.term(Divergence::Tail).value,
    };
    // That no end came here: -log(1 - q_end).
    let value = term.value + (sum / rest).ln();
    loss.kd = Some(value);
    loss.kl = Some(kl);
    loss.loss = (1.0 - kd) * smoothed + kd * value;
    loss.top1_is_teachers = teachers.map(|id| id as usize == top1);

    let Term {
        inside, outside, ..
    } = term;
    let factor = scale * ((1.0 - kd) / sum + kd * (outside - end_share) / rest);
    logits.iter_mut().for_each(|e| *e *= factor);
    for (((&id, e), q), slope) in ids.iter().zip(&inside_exp).zip(&shares).zip(inside) {
        logits[id as usize] = scale * ((1.0 - kd) * e / sum + kd * (slope - end_share * q));
    }
    if let Some(end) = end {
        logits[end as usize] = scale * end_share;
    }
    pull_to_label(logits, label, smoothing, scale * (1.0 - kd));
    logits[label] -= scale * kd * term.at_label;
    loss
}

/// The losses of the positions of a chunk: text that is n tokens of the student's and m of the
/// teacher's, whose negative log-likelihood under the teacher is `nll`. There is no distribution to
/// compare with, but the likelihoods of the text: with a the teacher's and b the student's negative
/// logarithm, f = b - a + a log(a / b) is added to the cross-entropies, which is 0 where they are
/// equal (the limit of ALM, arXiv 2503.20083, for likelihoods that are small).
///
/// `logits` has n x V entries, which become their gradient; `rows` have no soft labels.
#[inline(always)]
pub fn chunk(logits: &mut [f32], rows: &[Row], nll: f32, weights: Weights) -> Vec<RowLoss> {
    let vocabulary = logits.len() / rows.len().max(1);
    let mut b = 0.0;
    for (logits, row) in logits.chunks_exact(vocabulary).zip(rows) {
        let (_, max) = top1(logits);
        let sum: f32 = math::sum_of(logits, |z| math::exp(z - max));
        b += max + sum.ln() - logits[row.label as usize];
    }
    let (a, b) = (nll.max(MIN_NLL), b.max(MIN_NLL));
    let slope = weights.alm * (1.0 - a / b);
    let value = b - a + a * (a / b).ln();
    let logits = logits.chunks_exact_mut(vocabulary);
    let mut losses = Vec::with_capacity(rows.len());
    // No closure: one that is not inlined is compiled without vector instructions.
    for (logits, &of) in logits.zip(rows) {
        losses.push(row(logits, Row { chunk: slope, ..of }, weights));
    }
    if let Some(first) = losses.first_mut() {
        first.loss += weights.alm * value;
        first.alm = Some(value);
    }
    losses
}

/// The part of the gradient of CE that is not the student's own distribution.
#[inline(always)]
fn pull_to_label(logits: &mut [f32], label: usize, smoothing: f32, weight: f32) {
    if smoothing > 0.0 {
        let everywhere = weight * smoothing / logits.len() as f32;
        logits.iter_mut().for_each(|g| *g -= everywhere);
    }
    logits[label] -= weight * (1.0 - smoothing);
}

/// The teacher's most likely token.
fn best(ids: &[u32], logprobs: &[f32]) -> Option<u32> {
    ids.iter()
        .zip(logprobs)
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map(|(&id, _)| id)
}

/// Index and value of the largest logit; the first of equals.
#[inline(always)]
fn top1(logits: &[f32]) -> (usize, f32) {
    let max = math::max(logits);
    let index = logits.iter().position(|&z| z == max).unwrap_or(0);
    (index, max)
}

#[cfg(test)]
mod tests;
