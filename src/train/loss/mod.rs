//! What one supervised position contributes: its loss and the gradient at its logits.
//!
//! With q = softmax(z) the student and y the emitted token, CE = -log q_y. What the soft labels add
//! is a [`divergence`].

pub mod dense;
pub mod divergence;

use std::fmt;

use crate::ops::math;
use divergence::{Divergence, Position, Term};

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
    let (ids, logprobs) = row.known(divergence);
    // With K set aside the sum over the rest is the tail itself: no cancellation in 1 - Q.
    let inside: Vec<f32> = ids.iter().map(|&id| logits[id as usize]).collect();
    for &id in &ids {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    let outside_sum = math::exp_sum(logits, 1.0, max);
    let inside_exp: Vec<f32> = inside.iter().map(|z| (z - max).exp()).collect();
    let sum = outside_sum + inside_exp.iter().sum::<f32>();
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
    if ids.is_empty() {
        let factor = scale * (1.0 + row.chunk) / sum;
        logits.iter_mut().for_each(|e| *e *= factor);
        pull_to_label(logits, label, smoothing, scale);
        logits[label] -= scale * row.chunk;
        return loss;
    }

    let shares: Vec<f32> = inside_exp.iter().map(|e| e / sum).collect();
    let position = Position {
        teacher: &logprobs,
        logits: &inside,
        shares: &shares,
        lse,
        tail: outside_sum / sum,
        masses: divergence::masses(&logprobs),
        drawn: row
            .drawn
            .map(|known| (label_logit, Some(known).filter(|known| known.is_finite()))),
    };
    let term = position.term(divergence);
    let kl = match divergence {
        Divergence::Tail => term.value,
        _ => position.term(Divergence::Tail).value,
    };
    loss.kd = Some(term.value);
    loss.kl = Some(kl);
    loss.loss = (1.0 - kd) * smoothed + kd * term.value;
    loss.top1_is_teachers = best(&ids, &logprobs).map(|id| id as usize == top1);

    let Term {
        inside, outside, ..
    } = term;
    let factor = scale * (1.0 - kd + kd * outside) / sum;
    logits.iter_mut().for_each(|e| *e *= factor);
    for ((&id, q), slope) in ids.iter().zip(&shares).zip(inside) {
        logits[id as usize] = scale * ((1.0 - kd) * q + kd * slope);
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
mod tests {
    use super::*;

    // The case of the reference: V = 6, K = {0, 1, 2}.
    const TEACHER: [f64; 6] = [3.0, 2.0, 1.0, 0.5, 0.0, -1.0];
    const STUDENT: [f32; 6] = [2.0, 2.5, 0.0, 0.3, -0.2, 0.1];

    fn teacher_logprobs() -> Vec<f32> {
        let lse = TEACHER.iter().map(|z| z.exp()).sum::<f64>().ln();
        TEACHER.iter().map(|z| (z - lse) as f32).collect()
    }

    fn weights(weight: f32, label_smoothing: f32, divergence: Divergence) -> Weights {
        Weights {
            soft: [SoftTerm { divergence, weight }; 2],
            label_smoothing,
            ..Weights::default()
        }
    }

    fn kd(logits: &[f32], k: usize, divergence: Divergence) -> (f32, Vec<f32>) {
        let mut gradient = logits.to_vec();
        let ids: Vec<u32> = (0..k as u32).collect();
        let target = Row {
            label: 5,
            soft_ids: &ids,
            soft_logprobs: &teacher_logprobs()[..k],
            ..Row::default()
        };
        let loss = row(&mut gradient, target, weights(1.0, 0.0, divergence));
        (loss.kd.expect("soft labels were given"), gradient)
    }

    #[test]
    fn divergences_have_their_golden_values_and_gradients() {
        let golden: [(_, f32, [f32; 6]); 4] = [
            (
                Divergence::Tail,
                0.236_738_01,
                [-0.294939, 0.288398, -0.039916, 0.019155, 0.011618, 0.015683],
            ),
            (
                Divergence::Temperature(2.0),
                0.245_135_11,
                [-0.251965, 0.294322, -0.088813, 0.019155, 0.011618, 0.015683],
            ),
            (
                Divergence::Renormalize,
                0.396_888_9,
                [-0.355366, 0.266168, -0.048094, 0.056609, 0.034335, 0.046348],
            ),
            (
                Divergence::RenormalizeBoth,
                0.249_210_39,
                [-0.306053, 0.347473, -0.041420, 0.0, 0.0, 0.0],
            ),
        ];
        for (divergence, value, slopes) in golden {
            let (loss, gradient) = kd(&STUDENT, 3, divergence);
            assert!((loss - value).abs() < 1e-6, "{divergence:?}: {loss}");
            for (got, golden) in gradient.iter().zip(slopes) {
                assert!((got - golden).abs() < 2e-6, "{divergence:?}: {gradient:?}");
            }
        }
        let at_match = |divergence| kd(&TEACHER.map(|z| z as f32), 3, divergence).0;
        assert!((at_match(Divergence::Renormalize) - 0.095_229_28).abs() < 1e-6);
        assert!(at_match(Divergence::RenormalizeBoth).abs() < 1e-6);
    }

    #[test]
    fn damped_has_its_golden_values_and_gradients() {
        // The label, 5, is outside K.
        let golden: [(f32, f32, [f32; 6]); 3] = [
            (
                1.0,
                -0.781_453_28,
                [
                    -0.294939, 0.288398, -0.039916, 0.431482, 0.261707, -0.646733,
                ],
            ),
            (
                0.35,
                -0.119_628_94,
                [
                    -0.294939, 0.288398, -0.039916, 0.163469, 0.099149, -0.216163,
                ],
            ),
            (
                0.0,
                0.236_738_01,
                [-0.294939, 0.288398, -0.039916, 0.019155, 0.011618, 0.015683],
            ),
        ];
        let teacher = teacher_logprobs();
        for (lambda, value, slopes) in golden {
            let mut gradient = STUDENT.to_vec();
            let target = Row {
                label: 5,
                soft_ids: &[0, 1, 2],
                soft_logprobs: &teacher[..3],
                drawn: Some(teacher[5]),
                ..Row::default()
            };
            let weights = weights(1.0, 0.0, Divergence::Damped(lambda));
            let loss = row(&mut gradient, target, weights).kd.unwrap();
            assert!((loss - value).abs() < 1e-6, "{lambda}: {loss}");
            for (got, golden) in gradient.iter().zip(slopes) {
                assert!((got - golden).abs() < 2e-6, "{lambda}: {gradient:?}");
            }
        }
    }

    #[test]
    fn tail_equals_the_full_divergence_at_k_of_v_and_grows_with_k() {
        let losses: Vec<f32> = (1..=6)
            .map(|k| kd(&STUDENT, k, Divergence::Tail).0)
            .collect();
        let grows = losses.windows(2).all(|pair| pair[1] > pair[0] - 1e-6);
        assert!(grows && losses[4] > losses[0] + 0.05, "{losses:?}");
        assert!((losses[5] - 0.247_935_45).abs() < 1e-6, "{losses:?}");
    }

    #[test]
    fn tail_is_zero_and_flat_at_a_match() {
        for k in 1..=6 {
            let (loss, gradient) = kd(&TEACHER.map(|z| z as f32), k, Divergence::Tail);
            assert!(loss.abs() < 1e-6, "k {k}: {loss}");
            assert!(
                gradient.iter().all(|g| g.abs() < 1e-6),
                "k {k}: {gradient:?}"
            );
        }
    }

    #[test]
    fn the_gradient_sums_to_zero_and_cross_entropy_is_exact() {
        let mut gradient = STUDENT.to_vec();
        let target = Row {
            label: 1,
            ..Row::default()
        };
        let loss = row(&mut gradient, target, weights(0.5, 0.0, Divergence::Tail));
        let lse = STUDENT
            .iter()
            .map(|z| f64::from(*z).exp())
            .sum::<f64>()
            .ln();
        assert!((f64::from(loss.ce) - (lse - 2.5)).abs() < 1e-6);
        assert!(loss.kd.is_none() && loss.top1_is_label);
        assert!(gradient.iter().sum::<f32>().abs() < 1e-6);
        let (_, gradient) = kd(&STUDENT, 3, Divergence::Tail);
        assert!(gradient.iter().sum::<f32>().abs() < 1e-6);
    }

    #[test]
    fn label_smoothing_is_cross_entropy_with_the_smoothed_distribution() {
        let lse = STUDENT
            .iter()
            .map(|z| f64::from(*z).exp())
            .sum::<f64>()
            .ln();
        for soft in [0, 3] {
            let teacher = teacher_logprobs();
            let target = Row {
                label: 1,
                soft_ids: &[0, 1, 2][..soft],
                soft_logprobs: &teacher[..soft],
                ..Row::default()
            };
            let [mut plain, mut smooth] = [STUDENT.to_vec(), STUDENT.to_vec()];
            let without = row(&mut plain, target, weights(0.4, 0.0, Divergence::Tail));
            let with = row(&mut smooth, target, weights(0.4, 0.3, Divergence::Tail));
            assert_eq!(without.ce, with.ce);
            let share = if soft > 0 { 0.6 } else { 1.0 };
            let uniform = lse - STUDENT.iter().map(|z| f64::from(*z)).sum::<f64>() / 6.0;
            let more = share * 0.3 * (uniform - f64::from(with.ce));
            assert!((f64::from(with.loss - without.loss) - more).abs() < 1e-6);
            for (j, (plain, smooth)) in plain.iter().zip(&smooth).enumerate() {
                let label = if j == 1 { 1.0 } else { 0.0 };
                let more = share * 0.3 * (label - 1.0 / 6.0);
                assert!((smooth - plain - more as f32).abs() < 1e-6);
            }
        }
    }
}
