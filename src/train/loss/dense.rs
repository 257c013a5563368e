//! Loss of a position with a local teacher, whose whole distribution is known: K is the teacher's whole vocabulary,
//! and the teacher has no tail.

use super::divergence::{DistributionPair, Divergence};
use crate::ops::math;
use crate::train::loss::position::{
    LossWeights, PositionLoss, SoftTerm, argmax, mean_logit, subtract_label,
};

/// Normaliser of a softmax at a temperature tau; the probabilities themselves are not stored.
#[derive(Clone, Copy)]
struct Softmax {
    /// The largest logit.
    max: f32,
    /// 1 / tau.
    sharpness: f32,
    /// Sum of e^((z - max) / tau).
    sum: f32,
}

impl Softmax {
    #[inline(always)]
    fn new(logits_V: &[f32], max: f32, tau: f32) -> Self {
        let sharpness = 1.0 / tau;
        Self {
            max,
            sharpness,
            sum: math::sum_of(logits_V, |z| math::exp((z - max) * sharpness)),
        }
    }

    /// Returns the logarithm of e^((z - max) / tau), the unnormalised probability.
    #[inline(always)]
    fn log(self, logit: f32) -> f32 {
        (logit - self.max) * self.sharpness
    }
}

/// Computes the loss and the gradient like [`super::position()`], from the teacher's logits instead of its top-k. There
/// are V teacher logits, or as many as the teacher's vocabulary has tokens; logits beyond V are ignored.
///
/// `tail`, `unbiased`, `damped` and both kinds of `renormalize` are identical here: the KL divergence. `temperature` is
/// the loss of Hinton et al. (arXiv 1503.02531).
#[inline(always)]
pub(crate) fn position(
    logits_V: &mut [f32],
    teacher_logits_V: &[f32],
    label: u32,
    weights: LossWeights,
) -> PositionLoss {
    let scale = weights.scale;
    let SoftTerm {
        divergence,
        weight: kd,
    } = weights.soft[0];
    let label = label as usize;
    let smoothing = weights.label_smoothing;
    let teacher_logits_V = &teacher_logits_V[..teacher_logits_V.len().min(logits_V.len())];
    let (top1, max) = argmax(logits_V);
    let (teacher_top1, teacher_max) = argmax(teacher_logits_V);
    let student = Softmax::new(logits_V, max, 1.0);
    let teacher = Softmax::new(teacher_logits_V, teacher_max, 1.0);
    let ce = student.sum.ln() - student.log(logits_V[label]);
    let mean_logit = mean_logit(logits_V, smoothing);
    let smoothed = ce + smoothing * (logits_V[label] - mean_logit);
    let kl = kl(logits_V, teacher_logits_V, student, teacher);
    let tau = match divergence {
        Divergence::Temperature(tau) => Some(tau),
        Divergence::Tail
        | Divergence::Damped(_)
        | Divergence::Renormalize
        | Divergence::RenormalizeBoth => Some(1.0),
        _ => None,
    };
    let ce_factor = scale * (1.0 - kd) / student.sum;
    let value = match tau {
        Some(tau) => {
            let soft_student = Softmax::new(logits_V, max, tau);
            let soft_teacher = Softmax::new(teacher_logits_V, teacher_max, tau);
            let value = if tau == 1.0 {
                kl
            } else {
                tau * tau * self::kl(logits_V, teacher_logits_V, soft_student, soft_teacher)
            };
            let student_factor = scale * kd * tau / soft_student.sum;
            let teacher_factor = scale * kd * tau / soft_teacher.sum;
            for (id, z) in logits_V.iter_mut().enumerate() {
                let student_term = ce_factor * math::exp(student.log(*z))
                    + student_factor * math::exp(soft_student.log(*z));
                let teacher_term = teacher_logits_V
                    .get(id)
                    .map_or(0.0, |l| teacher_factor * math::exp(soft_teacher.log(*l)));
                *z = student_term - teacher_term;
            }
            value
        }
        None => {
            let (logits_K, tail_logits) = logits_V.split_at(teacher_logits_V.len());
            let lse = max + student.sum.ln();
            let teacher_lse = teacher_max + teacher.sum.ln();
            let teacher_logprobs_K: Vec<f32> =
                teacher_logits_V.iter().map(|l| l - teacher_lse).collect();
            let probs_K: Vec<f32> = logits_K.iter().map(|z| math::exp(z - lse)).collect();
            let pair = DistributionPair {
                teacher_logprobs_K: &teacher_logprobs_K,
                logits_K,
                probs_K: &probs_K,
                lse,
                tail: math::sum_of(tail_logits, |z| math::exp(z - lse)),
                masses: (1.0, 0.0),
                tail_sample: None,
            };
            let term = pair.term(divergence);
            let tail_factor = scale * kd * term.tail_slope / student.sum;
            for (id, z) in logits_V.iter_mut().enumerate() {
                let e = math::exp(student.log(*z));
                let slope = term.slopes_K.get(id);
                *z = ce_factor * e + slope.map_or(tail_factor * e, |slope| scale * kd * slope);
            }
            term.value
        }
    };
    subtract_label(logits_V, label, smoothing, scale * (1.0 - kd));
    PositionLoss {
        loss: (1.0 - kd) * smoothed + kd * value,
        ce,
        kd: Some(value),
        kl: Some(kl),
        alm: None,
        top1_is_label: top1 == label,
        top1_is_teachers: Some(top1 == teacher_top1),
        confidence: 1.0 / student.sum,
    }
}

/// Returns the KL divergence from the teacher to the student.
#[inline(always)]
fn kl(logits_V: &[f32], teacher_logits_V: &[f32], student: Softmax, teacher: Softmax) -> f32 {
    let difference = math::sum_of_pairs(teacher_logits_V, logits_V, |l, z| {
        let log = teacher.log(l);
        math::exp(log) * (log - student.log(z))
    });
    difference / teacher.sum + student.sum.ln() - teacher.sum.ln()
}
