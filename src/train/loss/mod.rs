//! Loss of one supervised position, and its gradient with respect to the position's logits.
//!
//! With q = softmax(z) the student's distribution and y the emitted token, CE = -log q_y. The term KD of the soft
//! labels is a [`divergence`]. All functions are pure, except that they replace the logits with their gradient. They
//! pass over the logits a few times.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | CE and KD at a position with a top-k teacher; chunks |
//! | `position.rs` | weights, target and result of a position |
//! | `divergence.rs` | the KD terms over K and the tail: values, derivatives, sources |
//! | `dense.rs` | CE and KD with a local teacher, whose K is its whole vocabulary |
//!
//! Shape suffixes in names: N supervised positions, V vocabulary, K the tokens of the teacher's top-k.
//!
//! # How to add a loss
//!
//! 1. Add a variant, with its parameters, to [`divergence::Divergence`], and its name to the `Display` there.
//! 2. Add its value and derivative to `DistributionPair::term` in `divergence.rs`, and a row with its paper to the
//!    table at the top of that file. If it depends on t and s alone, it is a closure for `sum_over_events`.
//! 3. Add a variant to the enum `config::KdMode` with its `name`, and map it in
//!    `divergence::Divergence::from_config`. Parameters go to `config::LossConfig`, `config/validate.rs` and
//!    `config.example.toml`. The JSON of `config::LossConfig` is hashed into checkpoints: keep the order of its fields,
//!    and do not serialise a new field at its default value.
//! 4. Choose its default weight in `soft_labels::default_weight`; measure it with `tests/bench/softlabels.sh`.
//! 5. Tests: golden values and gradients in `tests.rs` of this folder, and `SMOOTH` there if it is flat at a match;
//!    its formula in `tests/it/gradients/formulas.rs`; its name in `tests/it/train/soft_labels.rs`.

#![allow(
    non_snake_case,
    reason = "arrays carry their shape as a suffix: see the legend above"
)]

pub(crate) mod dense;
pub mod divergence;
pub mod position;

use crate::ops::math;
use crate::train::loss::position::{
    LossWeights, MIN_NLL, MIN_NON_END_MASS, PositionLoss, PositionTarget, SoftTerm, argmax,
    mean_logit, most_likely, subtract_label,
};
use divergence::{DistributionPair, Divergence, DivergenceTerm, TailSample};

/// Computes the loss of one position and replaces its logits with their gradient.
///
/// # Unlisted end tokens
/// If the teacher's logprobs leave out the end token ([`LossWeights::end`]), only positions where the answer did not
/// end have soft labels. KD on these positions would teach the end token as part of the tail, and cross-entropy at the
/// ends of answers would teach it a second time. Therefore KD compares both distributions without the end token, and
/// adds the term -log(1 - q_end). Together with the cross-entropy -log q_end at the ends of answers, this is the
/// negative log-likelihood of the decision to end. The expected gradient of the sum is zero where the student equals
/// the teacher. The teacher's probability of an end token outside the top-k is unknown: the student's probability is
/// used instead, limited by the teacher's tail.
///
/// `logits_V` has V entries; every id must be below V.
#[inline(always)]
pub fn position(
    logits_V: &mut [f32],
    target: PositionTarget,
    weights: LossWeights,
) -> PositionLoss {
    if let Some(teacher_logits_V) = target.teacher_logits_V {
        return dense::position(logits_V, teacher_logits_V, target.label, weights);
    }
    let scale = weights.scale;
    let SoftTerm {
        divergence,
        weight: kd,
    } = weights.soft[usize::from(target.is_exact_sample)];
    let label = target.label as usize;
    let label_logit = logits_V[label];
    let smoothing = weights.label_smoothing;
    let mean_logit = mean_logit(logits_V, smoothing);
    let (top1, max) = argmax(logits_V);
    let (mut ids_K, mut logprobs_K) = target.candidates(divergence);
    let has_soft_labels = !ids_K.is_empty();
    let teacher_top1 = most_likely(&ids_K, &logprobs_K);
    let unlisted = weights
        .end
        .filter(|end| !target.lists_end.unwrap_or(end.is_listed));
    let end = unlisted
        .map(|end| end.token)
        .filter(|&end| has_soft_labels && end != target.label);
    let teacher_end_in_K = end.and_then(|end| {
        let index = ids_K.iter().position(|&id| id == end)?;
        ids_K.swap_remove(index);
        Some(logprobs_K.swap_remove(index).exp())
    });
    // With K and the end token masked, the sum over the vocabulary is the tail itself: no cancellation in 1 - Q.
    let logits_K: Vec<f32> = ids_K.iter().map(|&id| logits_V[id as usize]).collect();
    let end_logit = end.map_or(f32::NEG_INFINITY, |end| logits_V[end as usize]);
    for &id in ids_K.iter().chain(&end) {
        logits_V[id as usize] = f32::NEG_INFINITY;
    }
    let tail_sum = math::exp_sum(logits_V, 1.0, max);
    let exp_K: Vec<f32> = logits_K.iter().map(|z| (z - max).exp()).collect();
    let sum_without_end = tail_sum + exp_K.iter().sum::<f32>();
    let end_exp = (end_logit - max).exp();
    let sum = sum_without_end + end_exp;
    let lse = max + sum.ln();
    let ce = lse - label_logit;
    let smoothed = ce + smoothing * (label_logit - mean_logit);
    let mut loss = PositionLoss {
        loss: smoothed,
        ce,
        kd: None,
        kl: None,
        alm: None,
        top1_is_label: top1 == label,
        top1_is_teachers: None,
        confidence: 1.0 / sum,
    };
    if !has_soft_labels {
        let factor = scale * (1.0 + target.chunk_weight) / sum;
        logits_V.iter_mut().for_each(|e| *e *= factor);
        subtract_label(logits_V, label, smoothing, scale);
        logits_V[label] -= scale * target.chunk_weight;
        return loss;
    }

    let end_prob = end_exp / sum;
    let mut sampled_logprob = target.sampled_logprob;
    if end.is_some() {
        let (_, tail) = divergence::masses(&logprobs_K);
        let teacher_end = teacher_end_in_K.unwrap_or(end_prob.min(tail));
        let shift = (1.0 - teacher_end).max(MIN_NON_END_MASS).ln();
        logprobs_K.iter_mut().for_each(|logprob| *logprob -= shift);
        sampled_logprob = sampled_logprob.map(|logprob| logprob - shift);
    }
    let probs_K: Vec<f32> = exp_K.iter().map(|e| e / sum_without_end).collect();
    let pair = DistributionPair {
        teacher_logprobs_K: &logprobs_K,
        logits_K: &logits_K,
        probs_K: &probs_K,
        lse: max + sum_without_end.ln(),
        tail: tail_sum / sum_without_end,
        masses: divergence::masses(&logprobs_K),
        tail_sample: sampled_logprob.map(|logprob| TailSample {
            logit: label_logit,
            teacher_logprob: Some(logprob).filter(|logprob| logprob.is_finite()),
        }),
    };
    let term = pair.term(divergence);
    let kl = match divergence {
        Divergence::Tail => term.value,
        _ => pair.term(Divergence::Tail).value,
    };
    // -log(1 - q_end): the answer did not end here.
    let value = term.value + (sum / sum_without_end).ln();
    loss.kd = Some(value);
    loss.kl = Some(kl);
    loss.loss = (1.0 - kd) * smoothed + kd * value;
    loss.top1_is_teachers = teacher_top1.map(|id| id as usize == top1);

    let DivergenceTerm {
        slopes_K,
        tail_slope,
        ..
    } = term;
    let factor = scale * ((1.0 - kd) / sum + kd * (tail_slope - end_prob) / sum_without_end);
    logits_V.iter_mut().for_each(|e| *e *= factor);
    for (((&id, e), q), slope) in ids_K.iter().zip(&exp_K).zip(&probs_K).zip(slopes_K) {
        logits_V[id as usize] = scale * ((1.0 - kd) * e / sum + kd * (slope - end_prob * q));
    }
    if let Some(end) = end {
        logits_V[end as usize] = scale * end_prob;
    }
    subtract_label(logits_V, label, smoothing, scale * (1.0 - kd));
    logits_V[label] -= scale * kd * term.label_slope;
    loss
}

/// Computes the losses of the positions of a chunk and replaces their logits with the gradients.
///
/// A chunk is a text of n student tokens and m teacher tokens, whose negative log-likelihood under the teacher is
/// `nll`. The tokens differ, so only the two likelihoods of the text can be compared: with a the teacher's and b the
/// student's negative log-likelihood, f = b - a + a log(a / b) times `weights.alm` is added to the cross-entropies. f
/// is 0 if a = b (the limit of ALM, arXiv 2503.20083, for small likelihoods).
///
/// `logits_NV` has n x V entries; `targets_N` have no soft labels.
#[inline(always)]
pub fn chunk(
    logits_NV: &mut [f32],
    targets_N: &[PositionTarget],
    nll: f32,
    weights: LossWeights,
) -> Vec<PositionLoss> {
    let vocabulary = logits_NV.len() / targets_N.len().max(1);
    let mut b = 0.0;
    for (logits_V, target) in logits_NV.chunks_exact(vocabulary).zip(targets_N) {
        let (_, max) = argmax(logits_V);
        let sum: f32 = math::sum_of(logits_V, |z| math::exp(z - max));
        b += max + sum.ln() - logits_V[target.label as usize];
    }
    let a = nll.max(MIN_NLL);
    let b = b.max(MIN_NLL);
    let chunk_weight = weights.alm * (1.0 - a / b);
    let value = b - a + a * (a / b).ln();
    let mut losses = Vec::with_capacity(targets_N.len());
    // No closure: one that is not inlined is compiled without vector instructions.
    for (logits_V, &target) in logits_NV.chunks_exact_mut(vocabulary).zip(targets_N) {
        let target = PositionTarget {
            chunk_weight,
            ..target
        };
        losses.push(position(logits_V, target, weights));
    }
    if let Some(first) = losses.first_mut() {
        first.loss += weights.alm * value;
        first.alm = Some(value);
    }
    losses
}

#[cfg(test)]
mod tests;
