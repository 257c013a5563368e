//! What one supervised position contributes: its loss and the gradient at its logits.
//!
//! With q = softmax(z) the student, y the emitted token, and p_i = exp l_i the teacher's
//! probabilities on its top-k set K, P their sum and p_ = 1 - P the tail:
//!
//! CE = -log q_y, `tail` = sum_K p_i log(p_i / q_i) + p_ log(p_ / q_), with q_ = 1 - sum_K q_i.
//!
//! `tail` is the KL divergence of the two distributions collapsed to K plus one bucket: zero, with
//! zero gradient, exactly where they match, and a lower bound of the full divergence.

use crate::ops::math;

/// Tail masses below this are rounding, not information: the tail term is dropped.
const MIN_TAIL: f32 = 1e-6;

/// The student's tail never counts as smaller than this, which bounds the gradient.
const MIN_STUDENT_TAIL: f32 = 1e-7;

/// How the terms of a position make its loss:
/// `scale * ((1 - kd) CE + kd KD)`, or `scale * CE` where the position has no soft labels.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// lambda, the weight of KD.
    pub kd: f32,
    /// epsilon: CE is taken against (1 - epsilon) of the label and epsilon of the uniform
    /// distribution (Szegedy et al., arXiv 1512.00567).
    pub label_smoothing: f32,
    /// 1 / N, with N the supervised positions of the step.
    pub scale: f32,
}

/// What a position teaches.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The emitted token.
    pub label: u32,
    /// Top-k token ids, each once; empty where there are no soft labels.
    pub soft_ids: &'a [u32],
    /// Their logprobs, natural logarithms.
    pub soft_logprobs: &'a [f32],
}

/// The terms of one position.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowLoss {
    /// What is minimised, before `scale`.
    pub loss: f32,
    /// Of the label alone.
    pub ce: f32,
    /// None where the position has no soft labels.
    pub kd: Option<f32>,
    /// Is the student's most likely token the label?
    pub top1_is_label: bool,
    /// Is it the teacher's most likely token? None where there are no soft labels.
    pub top1_is_teachers: Option<bool>,
}

/// Computes the loss of one position and turns its logits into their gradient.
///
/// `logits` has V entries; every id must be below V.
#[inline(always)]
pub fn row(logits: &mut [f32], row: Row, weights: Weights) -> RowLoss {
    let label = row.label as usize;
    let label_logit = logits[label];
    let smoothing = weights.label_smoothing;
    let mean_logit = match smoothing > 0.0 {
        true => math::sum(logits) / logits.len() as f32,
        false => 0.0,
    };
    let (top1, max) = top1(logits);
    // With K set aside the sum over the rest is the tail itself: no cancellation in 1 - Q.
    let inside: Vec<f32> = row.soft_ids.iter().map(|&id| logits[id as usize]).collect();
    for &id in row.soft_ids {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    let outside_sum = exp_sum(logits, max);
    let inside_exp: Vec<f32> = inside.iter().map(|z| (z - max).exp()).collect();
    let sum = outside_sum + inside_exp.iter().sum::<f32>();
    let lse = max + sum.ln();
    let ce = lse - label_logit;
    let smoothed = ce + smoothing * (label_logit - mean_logit);
    let mut loss = RowLoss {
        loss: smoothed,
        ce,
        kd: None,
        top1_is_label: top1 == label,
        top1_is_teachers: None,
    };
    if row.soft_ids.is_empty() {
        let factor = weights.scale / sum;
        logits.iter_mut().for_each(|e| *e *= factor);
        pull_to_label(logits, label, smoothing, weights.scale);
        return loss;
    }

    let mass: f32 = row.soft_logprobs.iter().map(|l| l.exp()).sum();
    let tail = 1.0 - mass;
    let student_tail = (outside_sum / sum).max(MIN_STUDENT_TAIL);
    let mut kd: f32 = row
        .soft_logprobs
        .iter()
        .zip(&inside)
        .map(|(l, z)| l.exp() * (l - (z - lse)))
        .sum();
    let has_tail = tail >= MIN_TAIL;
    if has_tail {
        kd += tail * (tail / student_tail).ln();
    }
    loss.kd = Some(kd);
    loss.loss = (1.0 - weights.kd) * smoothed + weights.kd * kd;
    loss.top1_is_teachers = best(row).map(|id| id as usize == top1);

    // d KD / dz_j = q_j - p_j in K, q_j (1 - p_ / q_) outside.
    let pull = if has_tail { tail / student_tail } else { 0.0 };
    let Weights { scale, kd, .. } = weights;
    let factor = scale * (1.0 - kd * pull) / sum;
    logits.iter_mut().for_each(|e| *e *= factor);
    for ((&id, e), l) in row.soft_ids.iter().zip(&inside_exp).zip(row.soft_logprobs) {
        logits[id as usize] = scale * (e / sum - kd * l.exp());
    }
    pull_to_label(logits, label, smoothing, scale * (1.0 - kd));
    loss
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
fn best(row: Row) -> Option<u32> {
    row.soft_ids
        .iter()
        .zip(row.soft_logprobs)
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map(|(&id, _)| id)
}

/// Index and value of the largest logit; the first of equals.
#[inline(always)]
fn top1(logits: &[f32]) -> (usize, f32) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let index = logits.iter().position(|&z| z == max).unwrap_or(0);
    (index, max)
}

/// Replaces each z by e^(z - max) and returns their sum.
#[inline(always)]
fn exp_sum(logits: &mut [f32], max: f32) -> f32 {
    logits.iter_mut().for_each(|z| *z = math::exp(*z - max));
    math::sum(logits)
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

    fn weights(kd: f32, label_smoothing: f32) -> Weights {
        Weights {
            kd,
            label_smoothing,
            scale: 1.0,
        }
    }

    fn kd(logits: &[f32], k: usize) -> (f32, Vec<f32>) {
        let mut gradient = logits.to_vec();
        let ids: Vec<u32> = (0..k as u32).collect();
        let target = Row {
            label: 5,
            soft_ids: &ids,
            soft_logprobs: &teacher_logprobs()[..k],
        };
        let loss = row(&mut gradient, target, weights(1.0, 0.0));
        (loss.kd.expect("soft labels were given"), gradient)
    }

    #[test]
    fn tail_has_the_golden_value_and_gradient() {
        let (loss, gradient) = kd(&STUDENT, 3);
        assert!((loss - 0.236_738_01).abs() < 1e-6, "{loss}");
        let golden = [-0.294939, 0.288398, -0.039916, 0.019155, 0.011618, 0.015683];
        for (got, golden) in gradient.iter().zip(golden) {
            assert!((got - golden).abs() < 2e-6, "{gradient:?}");
        }
    }

    #[test]
    fn tail_equals_the_full_divergence_at_k_of_v_and_grows_with_k() {
        let losses: Vec<f32> = (1..=6).map(|k| kd(&STUDENT, k).0).collect();
        let grows = losses.windows(2).all(|pair| pair[1] > pair[0] - 1e-6);
        assert!(grows && losses[4] > losses[0] + 0.05, "{losses:?}");
        assert!((losses[5] - 0.247_935_45).abs() < 1e-6, "{losses:?}");
    }

    #[test]
    fn tail_is_zero_and_flat_at_a_match() {
        for k in 1..=6 {
            let (loss, gradient) = kd(&TEACHER.map(|z| z as f32), k);
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
            soft_ids: &[],
            soft_logprobs: &[],
        };
        let loss = row(&mut gradient, target, weights(0.5, 0.0));
        let lse = STUDENT
            .iter()
            .map(|z| f64::from(*z).exp())
            .sum::<f64>()
            .ln();
        assert!((f64::from(loss.ce) - (lse - 2.5)).abs() < 1e-6);
        assert!(loss.kd.is_none() && loss.top1_is_label);
        assert!(gradient.iter().sum::<f32>().abs() < 1e-6);
        let (_, gradient) = kd(&STUDENT, 3);
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
            };
            let [mut plain, mut smooth] = [STUDENT.to_vec(), STUDENT.to_vec()];
            let without = row(&mut plain, target, weights(0.4, 0.0));
            let with = row(&mut smooth, target, weights(0.4, 0.3));
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
