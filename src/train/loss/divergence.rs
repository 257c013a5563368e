//! The loss term of soft labels at one position, and its gradient with respect to the logits.
//!
//! The teacher reveals p_i = exp l_i on its top-k set K; P is their sum, and p_tail = 1 - P the tail. The student's
//! q = softmax(z) is collapsed in the same way: q_i on K, Q their sum, and q_tail = 1 - Q. The label is y. If the
//! teacher sampled it from outside its top-k and its logprob is known, K includes y, except for `unbiased` and
//! `damped`. With t and s these two distributions over the tokens of K and the tail, the terms are
//!
//! | name | value | source |
//! |---|---|---|
//! | `tail` | KL(t, s) | |
//! | `unbiased`, `damped` | KL(t, s) - lambda 1\[y not in K\] (log(q_y / q_tail) - log(p_y / p_tail)) | |
//! | `temperature` | tau^2 P KL(softmax_K(l / tau), softmax_K(z / tau)) + KL((P, p_tail), (Q, q_tail)) | Hinton et al., arXiv 1503.02531, for a top-k |
//! | `reverse_kl` | KL(s, t) | MiniLLM, arXiv 2306.08543 |
//! | `jsd` | beta KL(t, m) + (1 - beta) KL(s, m), m = beta t + (1 - beta) s | GKD, arXiv 2306.13649 |
//! | `skew_kl` | KL(t, alpha t + (1 - alpha) s) | DistiLLM, arXiv 2402.03898 |
//! | `skew_reverse_kl` | KL(s, (1 - alpha) t + alpha s) | DistiLLM, arXiv 2402.03898 |
//! | `tvd` | sum abs(t - s) / 2 | arXiv 2307.15190 |
//! | `renormalize` | KL(p / P, q), q over the whole vocabulary | only for comparison |
//! | `renormalize_both` | KL(p / P, softmax_K(z)) | only for comparison |
//!
//! If p_y is unknown, log(p_y / p_tail) is left out; it does not affect the gradient.
//!
//! Where the distributions match, the rows above `renormalize` are zero and have a zero gradient (`unbiased` and
//! `damped`: in expectation over y). `renormalize` is -log P there, and its gradient teaches over-confidence.
//! `renormalize_both` ignores the student's probability outside K.
//!
//! `unbiased` (lambda = 1) and `damped` (lambda = `loss.tail_weight`) need a y that was sampled from p itself:
//! temperature 1, no truncation, no penalties. Then the expectation of `unbiased` over y is the divergence of the full
//! distributions, and its expected gradient is the gradient of that divergence. At a match, the expected gradient
//! is zero for every lambda: lambda trades the speed of learning the tail against the noise of one sampled token.

use std::fmt;

use crate::config::{KdMode, LossConfig};
use crate::ops::math;

/// Smallest tail of the teacher that is not a rounding error. A smaller tail counts as 0 in a product, and as this
/// value in a logarithm.
const MIN_TAIL: f32 = 1e-6;

/// Lower bound of the student's tail; it bounds the gradient.
const MIN_STUDENT_TAIL: f32 = 1e-7;

/// Lower bound of a student's probability in a logarithm.
const MIN_PROBABILITY: f32 = 1e-30;

/// The divergence between the teacher's and the student's distribution of a position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divergence {
    Tail,
    /// lambda, the weight of the conditional likelihood of a sampled token outside K; 1 is `unbiased`.
    Damped(f32),
    /// tau, the temperature of both distributions.
    Temperature(f32),
    ReverseKl,
    /// beta, the teacher's share of the mixture.
    Jsd(f32),
    /// alpha, the teacher's share of the mixture.
    SkewKl(f32),
    /// alpha, the student's share of the mixture.
    SkewReverseKl(f32),
    Tvd,
    Renormalize,
    RenormalizeBoth,
}

impl Divergence {
    /// Returns the divergences that the settings select, for positions where [`is_exact_sample`] is false and true, in
    /// this order; None for cross-entropy alone.
    ///
    /// [`is_exact_sample`]: crate::train::loss::position::PositionTarget::is_exact_sample
    pub(crate) fn from_config(settings: &LossConfig) -> Option<[Self; 2]> {
        let damped = Self::Damped(settings.tail_weight as f32);
        let divergence = match settings.kd {
            KdMode::None => return None,
            KdMode::Auto => return Some([Self::Tail, damped]),
            KdMode::Tail => Self::Tail,
            KdMode::Unbiased => Self::Damped(1.0),
            KdMode::Damped => damped,
            KdMode::Temperature => Self::Temperature(settings.temperature as f32),
            KdMode::ReverseKl => Self::ReverseKl,
            KdMode::Jsd => Self::Jsd(settings.beta as f32),
            KdMode::SkewKl => Self::SkewKl(settings.alpha as f32),
            KdMode::SkewReverseKl => Self::SkewReverseKl(settings.alpha as f32),
            KdMode::Tvd => Self::Tvd,
            KdMode::Renormalize => Self::Renormalize,
            KdMode::RenormalizeBoth => Self::RenormalizeBoth,
        };
        Some([divergence; 2])
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Divergence::Tail => f.write_str("tail"),
            Divergence::Damped(1.0) => f.write_str("unbiased"),
            Divergence::Damped(lambda) => write!(f, "damped {lambda}"),
            Divergence::Temperature(tau) => write!(f, "temperature {tau}"),
            Divergence::ReverseKl => f.write_str("reverse_kl"),
            Divergence::Jsd(beta) => write!(f, "jsd {beta}"),
            Divergence::SkewKl(alpha) => write!(f, "skew_kl {alpha}"),
            Divergence::SkewReverseKl(alpha) => write!(f, "skew_reverse_kl {alpha}"),
            Divergence::Tvd => f.write_str("tvd"),
            Divergence::Renormalize => f.write_str("renormalize"),
            Divergence::RenormalizeBoth => f.write_str("renormalize_both"),
        }
    }
}

/// The teacher's and the student's distributions of a position over K and the tail.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DistributionPair<'a> {
    /// l: the teacher's logprobs on K.
    pub teacher_logprobs_K: &'a [f32],
    /// z: the student's logits on K.
    pub logits_K: &'a [f32],
    /// q: the student's probabilities on K.
    pub probs_K: &'a [f32],
    /// Logarithm of the sum of e^z over the vocabulary, without an end token that the teacher's logprobs leave out.
    pub lse: f32,
    /// q_tail, the sum of the student's probabilities outside K.
    pub tail: f32,
    /// P and p_tail, see [`masses`].
    pub masses: (f32, f32),
    /// The label, if the teacher sampled it from outside its top-k. Only [`Divergence::Damped`] uses it.
    pub tail_sample: Option<TailSample>,
}

/// A label y outside the teacher's top-k.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TailSample {
    /// The student's logit of y.
    pub logit: f32,
    /// The teacher's logprob of y, if it is known.
    pub teacher_logprob: Option<f32>,
}

/// A divergence and its gradient.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct DivergenceTerm {
    pub value: f32,
    /// Derivatives with respect to the logits on K.
    pub slopes_K: Vec<f32>,
    /// Derivative with respect to a logit outside K, divided by q of that token.
    pub tail_slope: f32,
    /// Amount to subtract from the derivative with respect to the logit of y, a label outside K.
    pub label_slope: f32,
}

/// The probabilities of one event (a token of K, or the tail): t by the teacher, s by the student.
#[derive(Clone, Copy)]
struct EventProbs {
    t: f32,
    log_t: f32,
    s: f32,
    log_s: f32,
}

/// The summand of one event, and its derivative with respect to s, scaled (multiplied) by s: this avoids a division by
/// s, which may be 0.
type ValueAndScaledSlope = (f32, f32);

/// Returns P, the sum of the probabilities on K, and the tail 1 - P. A tail below [`MIN_TAIL`] is returned as 0.
pub(crate) fn masses(teacher_logprobs_K: &[f32]) -> (f32, f32) {
    let mass: f64 = teacher_logprobs_K.iter().map(|l| f64::from(*l).exp()).sum();
    let tail = (1.0 - mass) as f32;
    (mass as f32, if tail < MIN_TAIL { 0.0 } else { tail })
}

impl DistributionPair<'_> {
    fn student_tail(&self) -> f32 {
        self.tail.max(MIN_STUDENT_TAIL)
    }

    /// Returns the events of K, and the event of the tail.
    fn events(&self) -> (impl Iterator<Item = EventProbs>, EventProbs) {
        let student = self.logits_K.iter().zip(self.probs_K);
        let inside = self
            .teacher_logprobs_K
            .iter()
            .zip(student)
            .map(|(&log_t, (z, &s))| {
                let t = log_t.exp();
                let log_s = z - self.lse;
                EventProbs { t, log_t, s, log_s }
            });
        let t = self.masses.1;
        let s = self.student_tail();
        let tail = EventProbs {
            t,
            log_t: t.max(MIN_TAIL).ln(),
            s,
            log_s: s.ln(),
        };
        (inside, tail)
    }

    /// Computes the value and the gradient of `divergence`.
    pub(crate) fn term(&self, divergence: Divergence) -> DivergenceTerm {
        match divergence {
            Divergence::Damped(lambda) => self.damped(lambda),
            // Without K the whole distribution is the tail.
            _ if self.teacher_logprobs_K.is_empty() => self.sum_over_events(forward_kl),
            Divergence::Tail => self.sum_over_events(forward_kl),
            Divergence::Temperature(tau) => self.tempered(tau),
            Divergence::ReverseKl => self.sum_over_events(
                |EventProbs {
                     s, log_s, log_t, ..
                 }| {
                    let log_ratio = log_s - log_t;
                    (s * log_ratio, s * (log_ratio + 1.0))
                },
            ),
            Divergence::Jsd(beta) => self.sum_over_events(|EventProbs { t, log_t, s, log_s }| {
                let log_m = log(beta * t + (1.0 - beta) * s);
                let student_term = (1.0 - beta) * s * (log_s - log_m);
                let teacher_term = weighted(beta * t, log_t - log_m);
                (teacher_term + student_term, student_term)
            }),
            Divergence::SkewKl(alpha) => {
                self.sum_over_events(|EventProbs { t, log_t, s, .. }| {
                    let m = (alpha * t + (1.0 - alpha) * s).max(MIN_PROBABILITY);
                    let value = weighted(t, log_t - m.ln());
                    (value, -(1.0 - alpha) * t * (s / m))
                })
            }
            Divergence::SkewReverseKl(alpha) => {
                self.sum_over_events(|EventProbs { t, s, log_s, .. }| {
                    let m = ((1.0 - alpha) * t + alpha * s).max(MIN_PROBABILITY);
                    let log_ratio = log_s - m.ln();
                    (s * log_ratio, s * (log_ratio + 1.0 - alpha * s / m))
                })
            }
            Divergence::Tvd => self.sum_over_events(|EventProbs { t, s, .. }| {
                let sign = match s.total_cmp(&t) {
                    std::cmp::Ordering::Less => -1.0,
                    std::cmp::Ordering::Equal => 0.0,
                    std::cmp::Ordering::Greater => 1.0,
                };
                (0.5 * (t - s).abs(), 0.5 * sign * s)
            }),
            Divergence::Renormalize => self.renormalized(),
            Divergence::RenormalizeBoth => self.renormalized_both(),
        }
    }

    /// Sums `summand`, a function of t and s, over the events. With g_j its derivative with respect to s_j, the
    /// derivative of the sum with respect to z_j is s_j g_j - s_j (sum_i s_i g_i) for j in K. For a token j outside K,
    /// it is q_j g - q_j (sum_i s_i g_i), where g is the derivative with respect to the tail.
    fn sum_over_events(
        &self,
        summand: impl Fn(EventProbs) -> ValueAndScaledSlope,
    ) -> DivergenceTerm {
        let (inside, tail) = self.events();
        let (mut value, scaled_tail_slope) = summand(tail);
        let mut scaled_sum = scaled_tail_slope;
        let mut scaled_slopes_and_s_K: Vec<(f32, f32)> =
            Vec::with_capacity(self.teacher_logprobs_K.len());
        for event in inside {
            let (event_value, scaled_slope) = summand(event);
            value += event_value;
            scaled_sum += scaled_slope;
            scaled_slopes_and_s_K.push((scaled_slope, event.s));
        }
        DivergenceTerm {
            value,
            slopes_K: scaled_slopes_and_s_K
                .iter()
                .map(|(scaled_slope, s)| scaled_slope - s * scaled_sum)
                .collect(),
            tail_slope: scaled_tail_slope / tail.s - scaled_sum,
            label_slope: 0.0,
        }
    }

    /// `damped` and, with `lambda` = 1, `unbiased`.
    fn damped(&self, lambda: f32) -> DivergenceTerm {
        let mut term = self.sum_over_events(forward_kl);
        if let Some(sample) = self.tail_sample {
            let student_tail = self.student_tail();
            let (_, teacher_tail) = self.masses;
            term.value -= lambda * (sample.logit - self.lse - student_tail.ln());
            let teacher_logprob = sample.teacher_logprob.filter(|_| teacher_tail > 0.0);
            if let Some(logprob) = teacher_logprob {
                term.value += lambda * (logprob - teacher_tail.ln());
            }
            // d(log q_tail - log q_y) / dz_j = q_j / q_tail outside K, 0 inside, and another -1 at y.
            term.tail_slope += lambda / student_tail;
            term.label_slope = lambda;
        }
        term
    }

    /// `temperature`.
    fn tempered(&self, tau: f32) -> DivergenceTerm {
        let teacher_K = softmax(self.teacher_logprobs_K, tau);
        let student_K = softmax(self.logits_K, tau);
        let (teacher_mass, teacher_tail) = self.masses;
        let student_tail = self.student_tail();
        let student_mass = self.probs_K.iter().sum::<f32>().max(MIN_PROBABILITY);
        let kl_within_K: f32 = teacher_K
            .iter()
            .zip(&student_K)
            .map(|((t, log_t), (_, log_s))| weighted(*t, log_t - log_s))
            .sum();
        let kl_of_masses = teacher_mass * (teacher_mass / student_mass).ln()
            + weighted(teacher_tail, log(teacher_tail / student_tail));
        let teacher_total = teacher_mass + teacher_tail;
        let mass_ratio = teacher_mass / student_mass;
        let inside = teacher_K.iter().zip(&student_K).zip(self.probs_K);
        DivergenceTerm {
            value: tau * tau * teacher_mass * kl_within_K + kl_of_masses,
            slopes_K: inside
                .map(|(((t, _), (s, _)), q)| {
                    tau * teacher_mass * (s - t) + q * (teacher_total - mass_ratio)
                })
                .collect(),
            tail_slope: teacher_total - teacher_tail / student_tail,
            label_slope: 0.0,
        }
    }

    /// `renormalize`.
    fn renormalized(&self) -> DivergenceTerm {
        let teacher_K = softmax(self.teacher_logprobs_K, 1.0);
        let teacher_and_logits = teacher_K.iter().zip(self.logits_K);
        DivergenceTerm {
            value: teacher_and_logits
                .map(|((t, log_t), z)| weighted(*t, log_t - (z - self.lse)))
                .sum(),
            slopes_K: teacher_K
                .iter()
                .zip(self.probs_K)
                .map(|((t, _), q)| q - t)
                .collect(),
            tail_slope: 1.0,
            label_slope: 0.0,
        }
    }

    /// `renormalize_both`.
    fn renormalized_both(&self) -> DivergenceTerm {
        let teacher_K = softmax(self.teacher_logprobs_K, 1.0);
        let student_K = softmax(self.logits_K, 1.0);
        let events = teacher_K.iter().zip(&student_K);
        DivergenceTerm {
            value: events
                .clone()
                .map(|((t, log_t), (_, log_s))| weighted(*t, log_t - log_s))
                .sum(),
            slopes_K: events.map(|((t, _), (s, _))| s - t).collect(),
            tail_slope: 0.0,
            label_slope: 0.0,
        }
    }
}

/// t log(t / s)
fn forward_kl(
    EventProbs {
        t, log_t, log_s, ..
    }: EventProbs,
) -> ValueAndScaledSlope {
    (weighted(t, log_t - log_s), -t)
}

/// Returns `weight * factor`, and 0 for a weight of 0 even if the factor is infinite.
fn weighted(weight: f32, factor: f32) -> f32 {
    if weight == 0.0 { 0.0 } else { weight * factor }
}

fn log(probability: f32) -> f32 {
    probability.max(MIN_PROBABILITY).ln()
}

/// Returns softmax(values_K / tau) and its logarithm, as a pair for each value.
fn softmax(values_K: &[f32], tau: f32) -> Vec<(f32, f32)> {
    let max = math::max(values_K);
    let sum: f32 = values_K.iter().map(|v| ((v - max) / tau).exp()).sum();
    let logs = values_K.iter().map(|v| (v - max) / tau - sum.ln());
    logs.map(|log| (log.exp(), log)).collect()
}
