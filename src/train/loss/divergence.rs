//! What the soft labels of one position add to its loss, and the gradient of that at its logits.
//!
//! The teacher reveals p_i = exp l_i on its top-k set K, and with it the tail p_ = 1 - P, P their
//! sum. The student's q = softmax(z) collapses likewise: q_i on K, q_ = 1 - Q. With t and s these two
//! distributions over k + 1 events, the terms are
//!
//! | name | value | source |
//! |---|---|---|
//! | `tail` | KL(t, s) | |
//! | `unbiased`, `damped` | KL(t, s) - lambda 1\[y not in K\] (log(q_y / q_) - log(p_y / p_)) | |
//! | `temperature` | tau^2 P KL(softmax_K(l / tau), softmax_K(z / tau)) + KL((P, p_), (Q, q_)) | Hinton et al., arXiv 1503.02531, for a top-k |
//! | `reverse_kl` | KL(s, t) | MiniLLM, arXiv 2306.08543 |
//! | `jsd` | beta KL(t, m) + (1 - beta) KL(s, m), m = beta t + (1 - beta) s | GKD, arXiv 2306.13649 |
//! | `skew_kl` | KL(t, alpha t + (1 - alpha) s) | DistiLLM, arXiv 2402.03898 |
//! | `skew_reverse_kl` | KL(s, (1 - alpha) t + alpha s) | the same |
//! | `tvd` | sum abs(t - s) / 2 | arXiv 2307.15190 |
//! | `renormalize` | KL(p / P, q), q over the whole vocabulary | for comparison alone |
//! | `renormalize_both` | KL(p / P, softmax_K(z)) | for comparison alone |
//!
//! The first eight are zero, with zero gradient, where the distributions match. `renormalize` is not
//! (it teaches over-confidence: -log P is left), and `renormalize_both` does not see what the
//! student gives to tokens outside K.
//!
//! `unbiased` (lambda = 1) and `damped` (lambda = `loss.tail_weight`) need a y that was drawn from p itself:
//! temperature 1, nothing cut off, no penalties. Then the expectation over y of `unbiased` is the divergence
//! of the full distributions, and so is that of its gradient. At a match, the expected gradient vanishes for
//! every lambda: it only trades how fast the shape of the tail is learnt against the noise of one token.

use std::fmt;

use crate::config::{KdMode, LossConfig};
use crate::ops::math;

/// Masses below this are rounding, not information: a tail of the teacher is left out of what it is
/// a weight of, and counts as this where it is divided by.
const MIN_TAIL: f32 = 1e-6;

/// The student's tail never counts as smaller than this, which bounds the gradient.
const MIN_STUDENT_TAIL: f32 = 1e-7;

/// A student's probability never counts as smaller than this in a logarithm.
const MIN_PROBABILITY: f32 = 1e-30;

/// How the two distributions of a position are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divergence {
    Tail,
    /// lambda, the weight of the conditional likelihood of a token outside K; 1 is `unbiased`
    Damped(f32),
    /// tau
    Temperature(f32),
    ReverseKl,
    /// beta
    Jsd(f32),
    /// alpha
    SkewKl(f32),
    /// alpha
    SkewReverseKl(f32),
    Tvd,
    Renormalize,
    RenormalizeBoth,
}

impl Divergence {
    /// What the settings choose for answers of a teacher; the second for those that were drawn from
    /// the very distribution that the logprobs tell. None: cross-entropy alone.
    pub fn of(settings: &LossConfig) -> Option<[Self; 2]> {
        let damped = Self::Damped(settings.tail_weight as f32);
        let one = match settings.kd {
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
        Some([one, one])
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

/// A position's two distributions.
#[derive(Debug, Clone, Copy)]
pub struct Position<'a> {
    /// l: the teacher's logprobs on K (k).
    pub teacher: &'a [f32],
    /// z: the student's logits on K (k).
    pub logits: &'a [f32],
    /// q: the student's probabilities on K (k).
    pub shares: &'a [f32],
    /// log of the sum of e^z over the vocabulary.
    pub lse: f32,
    /// q_, the sum of the student's probabilities outside K.
    pub tail: f32,
    /// P and p_, of [`masses`].
    pub masses: (f32, f32),
    /// Where y lies outside K: the logits of y, and its logprob, if the teacher told it.
    pub drawn: Option<(f32, Option<f32>)>,
}

/// A term and its gradient.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Term {
    pub value: f32,
    /// Its derivative by the logits on K (k).
    pub inside: Vec<f32>,
    /// Its derivative by a logit elsewhere is this, times q of that token.
    pub outside: f32,
    /// To be subtracted from the derivative by the logit of y.
    pub at_label: f32,
}

/// A probability of both sides.
#[derive(Clone, Copy)]
struct Bucket {
    t: f32,
    log_t: f32,
    s: f32,
    log_s: f32,
}

/// The value of a divergence at a bucket, and s times its derivative by s: in this form nothing is
/// divided by an s that may be 0.
type Part = (f32, f32);

/// The sum of the probabilities on K, given their logarithms, and the tail: what is left of 1, or 0
/// where that is rounding.
pub fn masses(teacher: &[f32]) -> (f32, f32) {
    let mass: f64 = teacher.iter().map(|l| f64::from(*l).exp()).sum();
    let tail = (1.0 - mass) as f32;
    (mass as f32, if tail < MIN_TAIL { 0.0 } else { tail })
}

impl Position<'_> {
    fn student_tail(&self) -> f32 {
        self.tail.max(MIN_STUDENT_TAIL)
    }

    /// The buckets of K, and that of the tail.
    fn buckets(&self) -> (impl Iterator<Item = Bucket>, Bucket) {
        let student = self.logits.iter().zip(self.shares);
        let inside = self.teacher.iter().zip(student).map(|(&log_t, (z, &s))| {
            let (t, log_s) = (log_t.exp(), z - self.lse);
            Bucket { t, log_t, s, log_s }
        });
        let (t, s) = (self.masses.1, self.student_tail());
        let tail = Bucket {
            t,
            log_t: t.max(MIN_TAIL).ln(),
            s,
            log_s: s.ln(),
        };
        (inside, tail)
    }

    /// The term that `divergence` makes.
    pub fn term(&self, divergence: Divergence) -> Term {
        match divergence {
            Divergence::Damped(lambda) => self.damped(lambda),
            // Nothing is known but that all is tail.
            _ if self.teacher.is_empty() => self.of_buckets(forward),
            Divergence::Tail => self.of_buckets(forward),
            Divergence::Temperature(tau) => self.tempered(tau),
            Divergence::ReverseKl => self.of_buckets(|b| {
                let ratio = b.log_s - b.log_t;
                (b.s * ratio, b.s * (ratio + 1.0))
            }),
            Divergence::Jsd(beta) => self.of_buckets(|b| {
                let log_m = log(beta * b.t + (1.0 - beta) * b.s);
                let of_student = (1.0 - beta) * b.s * (b.log_s - log_m);
                let of_teacher = times(beta * b.t, b.log_t - log_m);
                (of_teacher + of_student, of_student)
            }),
            Divergence::SkewKl(alpha) => self.of_buckets(|b| {
                let m = (alpha * b.t + (1.0 - alpha) * b.s).max(MIN_PROBABILITY);
                let value = times(b.t, b.log_t - m.ln());
                (value, -(1.0 - alpha) * b.t * (b.s / m))
            }),
            Divergence::SkewReverseKl(alpha) => self.of_buckets(|b| {
                let m = ((1.0 - alpha) * b.t + alpha * b.s).max(MIN_PROBABILITY);
                let ratio = b.log_s - m.ln();
                (b.s * ratio, b.s * (ratio + 1.0 - alpha * b.s / m))
            }),
            Divergence::Tvd => self.of_buckets(|b| {
                let sign = match b.s.total_cmp(&b.t) {
                    std::cmp::Ordering::Less => -1.0,
                    std::cmp::Ordering::Equal => 0.0,
                    std::cmp::Ordering::Greater => 1.0,
                };
                (0.5 * (b.t - b.s).abs(), 0.5 * sign * b.s)
            }),
            Divergence::Renormalize => self.renormalized(),
            Divergence::RenormalizeBoth => self.renormalized_both(),
        }
    }

    /// A sum over the buckets of what depends on t and s alone. With g its derivatives by s, that by
    /// z_j is s_j g_j - s_j (sum_i s_i g_i), and in the tail q_j in place of s_j.
    fn of_buckets(&self, part: impl Fn(Bucket) -> Part) -> Term {
        let (inside, tail) = self.buckets();
        let (mut value, tail_slope) = part(tail);
        let mut mean = tail_slope;
        let mut slopes: Vec<(f32, f32)> = Vec::with_capacity(self.teacher.len());
        for bucket in inside {
            let (more, slope) = part(bucket);
            value += more;
            mean += slope;
            slopes.push((slope, bucket.s));
        }
        Term {
            value,
            inside: slopes.iter().map(|(slope, s)| slope - s * mean).collect(),
            outside: tail_slope / tail.s - mean,
            at_label: 0.0,
        }
    }

    fn damped(&self, lambda: f32) -> Term {
        let mut term = self.of_buckets(forward);
        if let Some((logit, logprob)) = self.drawn {
            let tail = self.student_tail();
            term.value -= lambda * (logit - self.lse - tail.ln());
            let known = logprob.filter(|_| self.masses.1 > 0.0);
            if let Some(logprob) = known {
                term.value += lambda * (logprob - self.masses.1.ln());
            }
            // d(log q_ - log q_y) / dz_j = q_j / q_ outside K, 0 inside, and -1 more at y.
            term.outside += lambda / tail;
            term.at_label = lambda;
        }
        term
    }

    fn tempered(&self, tau: f32) -> Term {
        let teacher = softmax(self.teacher, tau);
        let student = softmax(self.logits, tau);
        let (mass, tail) = self.masses;
        let student_tail = self.student_tail();
        let student_mass = self.shares.iter().sum::<f32>().max(MIN_PROBABILITY);
        let within: f32 = teacher
            .iter()
            .zip(&student)
            .map(|((t, log_t), (_, log_s))| times(*t, log_t - log_s))
            .sum();
        let between = mass * (mass / student_mass).ln() + times(tail, log(tail / student_tail));
        let both = mass + tail;
        let pull = mass / student_mass;
        let inside = teacher.iter().zip(&student).zip(self.shares);
        Term {
            value: tau * tau * mass * within + between,
            inside: inside
                .map(|(((t, _), (s, _)), q)| tau * mass * (s - t) + q * (both - pull))
                .collect(),
            outside: both - tail / student_tail,
            at_label: 0.0,
        }
    }

    fn renormalized(&self) -> Term {
        let teacher = softmax(self.teacher, 1.0);
        let logits = teacher.iter().zip(self.logits);
        Term {
            value: logits
                .map(|((t, log_t), z)| times(*t, log_t - (z - self.lse)))
                .sum(),
            inside: teacher
                .iter()
                .zip(self.shares)
                .map(|((t, _), q)| q - t)
                .collect(),
            outside: 1.0,
            at_label: 0.0,
        }
    }

    fn renormalized_both(&self) -> Term {
        let teacher = softmax(self.teacher, 1.0);
        let student = softmax(self.logits, 1.0);
        let parts = teacher.iter().zip(&student);
        Term {
            value: parts
                .clone()
                .map(|((t, log_t), (_, log_s))| times(*t, log_t - log_s))
                .sum(),
            inside: parts.map(|((t, _), (s, _))| s - t).collect(),
            outside: 0.0,
            at_label: 0.0,
        }
    }
}

/// t log(t / s)
fn forward(b: Bucket) -> Part {
    (times(b.t, b.log_t - b.log_s), -b.t)
}

/// `weight * factor`, and 0 where the weight is, whatever the factor.
fn times(weight: f32, factor: f32) -> f32 {
    if weight == 0.0 { 0.0 } else { weight * factor }
}

fn log(probability: f32) -> f32 {
    probability.max(MIN_PROBABILITY).ln()
}

/// softmax(values / tau) with its logarithm.
fn softmax(values: &[f32], tau: f32) -> Vec<(f32, f32)> {
    let max = math::max(values);
    let sum: f32 = values.iter().map(|v| ((v - max) / tau).exp()).sum();
    let logs = values.iter().map(|v| (v - max) / tau - sum.ln());
    logs.map(|log| (log.exp(), log)).collect()
}
