//! The formulas of the losses in f64, from which `loss.rs` computes expected values and finite differences.

use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, PositionTarget};

/// Computes a divergence by the formulas in the table of `train::loss::divergence`. `logq_V` are the log-probabilities
/// of the student. Returns None if the position has no soft labels.
///
/// Formula symbols: `t` and `s` are the probabilities of teacher and student for the teacher's tokens, followed by the
/// probability of the tail.
#[allow(non_snake_case, reason = "shapes as suffixes")]
fn divergence_value(divergence: Divergence, logq_V: &[f64], target: PositionTarget) -> Option<f64> {
    // Token and log-probability.
    let mut teacher: Vec<(usize, f64)> = match target.teacher_logits_V {
        Some(logits) => {
            let logits: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
            log_softmax(&logits).into_iter().enumerate().collect()
        }
        None => target
            .soft_ids_K
            .iter()
            .zip(target.soft_logprobs_K)
            .map(|(id, logprob)| (*id as usize, f64::from(*logprob)))
            .collect(),
    };
    let sampled = target.sampled_logprob.map(f64::from);
    if let (Some(logprob), false) = (sampled, matches!(divergence, Divergence::Damped(_))) {
        teacher.push((target.label as usize, logprob));
    }
    if teacher.is_empty() {
        return None;
    }
    let mut t: Vec<f64> = teacher.iter().map(|(_, logprob)| logprob.exp()).collect();
    let mut s: Vec<f64> = teacher.iter().map(|(id, _)| logq_V[*id].exp()).collect();
    let teacher_mass: f64 = t.iter().sum();
    let student_mass: f64 = s.iter().sum();
    let softmax = |values: Vec<f64>| -> Vec<f64> {
        let sum: f64 = values.iter().map(|value| value.exp()).sum();
        values.iter().map(|value| value.exp() / sum).collect()
    };
    let scaled_logq = |tau: f64| teacher.iter().map(|(id, _)| logq_V[*id] / tau).collect();
    let renormalized: Vec<f64> = t.iter().map(|t| t / teacher_mass).collect();
    // A distribution over all tokens has no tail. The student's tail is set to the lower bound of `divergence`, because
    // some formulas take its logarithm.
    let is_complete = teacher.len() == logq_V.len();
    let (teacher_tail, student_tail) = if is_complete {
        (0.0, 1e-7)
    } else {
        (1.0 - teacher_mass, 1.0 - student_mass)
    };
    let s_without_tail = s.clone();
    t.push(teacher_tail);
    s.push(student_tail);
    Some(match divergence {
        Divergence::Tail => kl(&t, &s),
        Divergence::Damped(lambda) => {
            let label_term = sampled.map_or(0.0, |logprob| {
                let student_logprob = logq_V[target.label as usize] - student_tail.ln();
                logprob - teacher_tail.ln() - student_logprob
            });
            kl(&t, &s) + f64::from(lambda) * label_term
        }
        Divergence::Temperature(tau) => {
            let tau = f64::from(tau);
            let tempered = softmax(teacher.iter().map(|(_, logprob)| logprob / tau).collect());
            let within = kl(&tempered, &softmax(scaled_logq(tau)));
            let between = kl(&[teacher_mass, teacher_tail], &[student_mass, student_tail]);
            tau * tau * teacher_mass * within + between
        }
        Divergence::ReverseKl => {
            let k = teacher.len();
            let tail_floor = teacher_tail.max(1e-6);
            kl(&s[..k], &t[..k]) + kl(&s[k..], &[tail_floor])
        }
        Divergence::Jsd(beta) => {
            let beta = f64::from(beta);
            let m = mixture(&t, &s, beta);
            beta * kl(&t, &m) + (1.0 - beta) * kl(&s, &m)
        }
        Divergence::SkewKl(alpha) => kl(&t, &mixture(&t, &s, f64::from(alpha))),
        Divergence::SkewReverseKl(alpha) => kl(&s, &mixture(&s, &t, f64::from(alpha))),
        Divergence::Tvd => t.iter().zip(&s).map(|(t, s)| (t - s).abs() / 2.0).sum(),
        Divergence::Renormalize => kl(&renormalized, &s_without_tail),
        Divergence::RenormalizeBoth => kl(&renormalized, &softmax(scaled_logq(1.0))),
    })
}

/// Computes the sum of a log(a / b).
pub fn kl(a: &[f64], b: &[f64]) -> f64 {
    let term = |(a, b): (&f64, &f64)| {
        if *a > 0.0 { a * (a / b).ln() } else { 0.0 }
    };
    a.iter().zip(b).map(term).sum()
}

/// Computes `share` * a + (1 - `share`) * b.
fn mixture(a: &[f64], b: &[f64], share: f64) -> Vec<f64> {
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| share * a + (1.0 - share) * b).collect()
}

pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = logits.iter().map(|z| (z - largest).exp()).sum();
    logits.iter().map(|z| z - largest - sum.ln()).collect()
}

/// Computes the distillation loss of Hinton et al. (arXiv 1503.02531): the weighted sum of cross-entropy and of `tau`
/// squared times the KL divergence at the temperature `tau`. `student` and `teacher` are the logits of their whole
/// vocabularies. The teacher's distribution is over the tokens that both have, the student's over all of its tokens.
pub fn hinton_loss(
    student: &[f64],
    teacher: &[f32],
    label: u32,
    tau: f32,
    weights: LossWeights,
) -> f64 {
    let tau = f64::from(tau);
    let kd_weight = f64::from(weights.soft[0].weight);
    let shared = teacher.len().min(student.len());
    let log_probs_at_tau =
        |logits: Vec<f64>| log_softmax(&logits.iter().map(|logit| logit / tau).collect::<Vec<_>>());
    let logp = log_probs_at_tau(teacher[..shared].iter().map(|l| f64::from(*l)).collect());
    let logq = log_probs_at_tau(student.to_vec());
    let kl: f64 = logp
        .iter()
        .zip(&logq)
        .map(|(logp, logq)| logp.exp() * (logp - logq))
        .sum();
    let ce = position_loss(
        &log_softmax(student),
        Divergence::Tail,
        PositionTarget {
            label,
            ..PositionTarget::default()
        },
        weights,
    );
    (1.0 - kd_weight) * ce + kd_weight * tau * tau * kl
}

/// Computes the loss of a position, the weighted sum of cross-entropy and divergence. `logq_V` are the
/// log-probabilities of the student.
#[allow(non_snake_case, reason = "shapes as suffixes")]
pub fn position_loss(
    logq_V: &[f64],
    divergence: Divergence,
    target: PositionTarget,
    weights: LossWeights,
) -> f64 {
    let uniform = -logq_V.iter().sum::<f64>() / logq_V.len() as f64;
    let kd_weight = f64::from(weights.soft[usize::from(target.is_exact_sample)].weight);
    let smoothing = f64::from(weights.label_smoothing);
    let ce = -(1.0 - smoothing) * logq_V[target.label as usize] + smoothing * uniform;
    match divergence_value(divergence, logq_V, target) {
        Some(value) => (1.0 - kd_weight) * ce + kd_weight * value,
        None => ce,
    }
}
