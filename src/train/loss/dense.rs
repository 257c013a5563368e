//! The loss of a position whose teacher is on this machine, so that nothing of its distribution is
//! missing: K is the whole vocabulary, and there is no tail.

use super::divergence::{Divergence, Position};
use crate::ops::math;
use crate::train::loss::row::{RowLoss, SoftTerm, Weights, pull_to_label, top1};

/// A softmax at a temperature, without its weights.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    /// 1 / tau
    sharpness: f32,
    /// Of e^((z - max) / tau).
    sum: f32,
}

impl Softmax {
    #[inline(always)]
    fn of(logits: &[f32], max: f32, tau: f32) -> Self {
        let sharpness = 1.0 / tau;
        Self {
            max,
            sharpness,
            sum: math::sum_of(logits, |z| math::exp((z - max) * sharpness)),
        }
    }

    /// log of the weight of a logit, before it is divided by the sum.
    #[inline(always)]
    fn log(self, logit: f32) -> f32 {
        (logit - self.max) * self.sharpness
    }
}

/// As [`super::row`], with the logits of a teacher (V, or as many as it has) in place of its top-k.
///
/// `tail`, `unbiased`, `damped` and both kinds of `renormalize` are the same then: the KL divergence. That, and
/// with it `temperature`, is the classic of Hinton et al. (arXiv 1503.02531).
#[inline(always)]
pub(crate) fn row(logits: &mut [f32], teacher: &[f32], label: u32, weights: Weights) -> RowLoss {
    let scale = weights.scale;
    let SoftTerm {
        divergence,
        weight: kd,
    } = weights.soft[0];
    let (label, smoothing) = (label as usize, weights.label_smoothing);
    let teacher = &teacher[..teacher.len().min(logits.len())];
    let ((best, max), (teachers, teacher_max)) = (top1(logits), top1(teacher));
    let student = Softmax::of(logits, max, 1.0);
    let truth = Softmax::of(teacher, teacher_max, 1.0);
    let ce = student.sum.ln() - student.log(logits[label]);
    let mean_logit = match smoothing > 0.0 {
        true => math::sum(logits) / logits.len() as f32,
        false => 0.0,
    };
    let smoothed = ce + smoothing * (logits[label] - mean_logit);
    let kl = kl(logits, teacher, student, truth);
    let tau = match divergence {
        Divergence::Temperature(tau) => Some(tau),
        Divergence::Tail
        | Divergence::Damped(_)
        | Divergence::Renormalize
        | Divergence::RenormalizeBoth => Some(1.0),
        _ => None,
    };
    let of_ce = scale * (1.0 - kd) / student.sum;
    let value = match tau {
        Some(tau) => {
            let cool = Softmax::of(logits, max, tau);
            let cool_truth = Softmax::of(teacher, teacher_max, tau);
            let value = match tau == 1.0 {
                true => kl,
                false => tau * tau * self::kl(logits, teacher, cool, cool_truth),
            };
            let (push, pull) = (
                scale * kd * tau / cool.sum,
                scale * kd * tau / cool_truth.sum,
            );
            for (at, z) in logits.iter_mut().enumerate() {
                let own = of_ce * math::exp(student.log(*z)) + push * math::exp(cool.log(*z));
                let teachers = teacher.get(at);
                *z = own - teachers.map_or(0.0, |l| pull * math::exp(cool_truth.log(*l)));
            }
            value
        }
        None => {
            let (known, rest) = logits.split_at(teacher.len());
            let lse = max + student.sum.ln();
            let log_truth = teacher_max + truth.sum.ln();
            let logprobs: Vec<f32> = teacher.iter().map(|l| l - log_truth).collect();
            let shares: Vec<f32> = known.iter().map(|z| math::exp(z - lse)).collect();
            let position = Position {
                teacher: &logprobs,
                logits: known,
                shares: &shares,
                lse,
                tail: math::sum_of(rest, |z| math::exp(z - lse)),
                masses: (1.0, 0.0),
                drawn: None,
            };
            let term = position.term(divergence);
            let beyond = scale * kd * term.outside / student.sum;
            for (at, z) in logits.iter_mut().enumerate() {
                let e = math::exp(student.log(*z));
                let slope = term.inside.get(at);
                *z = of_ce * e + slope.map_or(beyond * e, |slope| scale * kd * slope);
            }
            term.value
        }
    };
    pull_to_label(logits, label, smoothing, scale * (1.0 - kd));
    RowLoss {
        loss: (1.0 - kd) * smoothed + kd * value,
        ce,
        kd: Some(value),
        kl: Some(kl),
        alm: None,
        top1_is_label: best == label,
        top1_is_teachers: Some(best == teachers),
        confidence: 1.0 / student.sum,
    }
}

/// KL divergence from the teacher to the student.
#[inline(always)]
fn kl(logits: &[f32], teacher: &[f32], student: Softmax, truth: Softmax) -> f32 {
    let difference = math::sum_of_pairs(teacher, logits, |l, z| {
        let log = truth.log(l);
        math::exp(log) * (log - student.log(z))
    });
    difference / truth.sum + student.sum.ln() - truth.sum.ln()
}
