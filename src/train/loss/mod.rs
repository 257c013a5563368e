//! What one supervised position contributes: its loss and the gradient at its logits.
//!
//! With q = softmax(z) the student and y the emitted token, CE = -log q_y. What the soft labels add
//! is a [`divergence`].

pub(crate) mod dense;
pub mod divergence;
pub mod row;

use crate::train::loss::row::MIN_NLL;
use crate::train::loss::row::MIN_REST;
use crate::train::loss::row::Row;
use crate::train::loss::row::RowLoss;
use crate::train::loss::row::SoftTerm;
use crate::train::loss::row::Weights;
use crate::train::loss::row::best;
use crate::train::loss::row::pull_to_label;
use crate::train::loss::row::top1;

use crate::ops::math;
use divergence::{Divergence, Position, Term};

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

#[cfg(test)]
mod tests;
