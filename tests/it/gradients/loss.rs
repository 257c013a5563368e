//! The loss of a position with every divergence: its value compared with the formula in f64, and its gradient
//! with central differences of the formula.

use distill::train::loss;
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, PositionTarget, SoftTerm};

use super::formulas::{hinton_loss, kl, log_softmax, position_loss};

/// Returns every divergence, with random parameters.
fn divergences(random: &mut fastrand::Rng) -> [Divergence; 11] {
    let mut parameter = |min: f32, max: f32| min + (max - min) * random.f32();
    [
        Divergence::Tail,
        Divergence::Damped(1.0),
        Divergence::Damped(parameter(0.0, 1.0)),
        Divergence::Temperature(parameter(0.5, 5.0)),
        Divergence::ReverseKl,
        Divergence::Jsd(parameter(0.05, 0.95)),
        Divergence::SkewKl(parameter(0.0, 0.9)),
        Divergence::SkewReverseKl(parameter(0.0, 0.9)),
        Divergence::Tvd,
        Divergence::Renormalize,
        Divergence::RenormalizeBoth,
    ]
}

fn term(divergence: Divergence, weight: f32) -> SoftTerm {
    SoftTerm { divergence, weight }
}

/// A position with random student logits, teacher and top-k.
struct Case {
    logits: Vec<f32>,
    /// Soft labels: tokens, and the teacher's logprobs.
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    label: u32,
    /// The teacher's logprob of the label, if the label is not in `ids`.
    sampled_logprob: Option<f32>,
}

impl Case {
    fn random(random: &mut fastrand::Rng) -> Self {
        let vocabulary = random.usize(2..60);
        let k = random.usize(0..=vocabulary);
        let spread = [0.2, 1.0, 3.0][random.usize(..3)];
        // A sum of four uniform numbers is almost normal.
        let mut random_logits = || -> Vec<f64> {
            let mut logit = || (0..4).map(|_| random.f64() - 0.5).sum::<f64>() * spread;
            (0..vocabulary).map(|_| logit()).collect()
        };
        let logits: Vec<f32> = random_logits().iter().map(|z| *z as f32).collect();
        let teacher = log_softmax(&random_logits());
        let teacher: Vec<f32> = teacher.iter().map(|logprob| *logprob as f32).collect();
        let mut ids: Vec<u32> = (0..vocabulary as u32).collect();
        random.shuffle(&mut ids);
        let label = ids[random.usize(..vocabulary)];
        ids.truncate(k);
        Self {
            logprobs: ids.iter().map(|id| teacher[*id as usize]).collect(),
            sampled_logprob: (!ids.contains(&label)).then_some(teacher[label as usize]),
            logits,
            ids,
            label,
        }
    }

    fn target(&self, is_exact_sample: bool) -> PositionTarget<'_> {
        PositionTarget {
            label: self.label,
            soft_ids_K: &self.ids,
            soft_logprobs_K: &self.logprobs,
            sampled_logprob: self.sampled_logprob,
            is_exact_sample,
            ..PositionTarget::default()
        }
    }
}

#[test]
fn loss_gradients_agree_with_the_formula() {
    let mut random = fastrand::Rng::with_seed(12);
    for number in 0..200 {
        let case = Case::random(&mut random);
        let kd_weight = random.f32();
        let smoothing = [0.0, 0.1][number % 2];
        for divergence in divergences(&mut random) {
            let is_exact_sample = random.bool();
            let target = case.target(is_exact_sample);
            let mut soft = [term(Divergence::Renormalize, 0.5); 2];
            soft[usize::from(is_exact_sample)] = term(divergence, kd_weight);
            let weights = LossWeights {
                soft,
                label_smoothing: smoothing,
                ..LossWeights::default()
            };
            let mut gradient = case.logits.clone();
            let loss = loss::position(&mut gradient, target, weights).loss;
            let expected =
                |logits: &[f64]| position_loss(&log_softmax(logits), divergence, target, weights);
            let case_name = format!("case {number}, {divergence:?}, {target:?}");
            check(&case.logits, loss, &gradient, expected, &case_name);
        }
    }
}

/// The teacher's vocabulary may be smaller or larger than the student's, because model folders pad the vocabulary.
#[test]
fn loss_gradients_with_full_teacher_distribution_agree_with_the_formula() {
    let mut random = fastrand::Rng::with_seed(15);
    for number in 0..100 {
        let case = Case::random(&mut random);
        let vocabulary = case.logits.len();
        let teacher_vocabulary = match number % 3 {
            0 => vocabulary,
            1 => vocabulary + 5,
            _ => vocabulary - vocabulary / 4,
        };
        let teacher: Vec<f32> = (0..teacher_vocabulary)
            .map(|_| random.f32() * 6.0 - 9.0)
            .collect();
        let target = PositionTarget {
            label: case.label,
            teacher_logits_V: Some(&teacher),
            ..PositionTarget::default()
        };
        let target_on_shared_tokens = PositionTarget {
            teacher_logits_V: Some(&teacher[..teacher_vocabulary.min(vocabulary)]),
            ..target
        };
        for divergence in divergences(&mut random) {
            let weights = LossWeights {
                soft: [term(divergence, random.f32()); 2],
                label_smoothing: [0.0, 0.1][number % 2],
                ..LossWeights::default()
            };
            // Without a tail, these divergences equal `Tail`.
            let equivalent = match divergence {
                Divergence::Damped(_) | Divergence::Renormalize | Divergence::RenormalizeBoth => {
                    Divergence::Tail
                }
                other => other,
            };
            let mut gradient = case.logits.clone();
            let losses = loss::position(&mut gradient, target, weights);
            let expected = |logits: &[f64]| match equivalent {
                // If the student has more tokens, the temperature applies to all of them.
                Divergence::Temperature(tau) => {
                    hinton_loss(logits, &teacher, target.label, tau, weights)
                }
                _ => position_loss(
                    &log_softmax(logits),
                    equivalent,
                    target_on_shared_tokens,
                    weights,
                ),
            };
            let case_name = format!(
                "case {number}, {divergence:?}, {vocabulary} and {teacher_vocabulary} tokens"
            );
            check(&case.logits, losses.loss, &gradient, expected, &case_name);
        }
    }
}

/// Checks a loss against `formula`, and its gradient against the central differences of `formula`.
fn check(logits: &[f32], loss: f32, gradient: &[f32], formula: impl Fn(&[f64]) -> f64, case: &str) {
    let logits: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
    let expected = formula(&logits);
    assert!(
        (f64::from(loss) - expected).abs() < 1e-5 * expected.abs().max(1.0),
        "{case}: the loss is {loss} instead of {expected}"
    );
    for (index, gradient) in gradient.iter().enumerate() {
        let mut moved = logits.clone();
        let step = 1e-5;
        moved[index] += step;
        let above = formula(&moved);
        moved[index] -= 2.0 * step;
        let difference = (above - formula(&moved)) / (2.0 * step);
        let error = (f64::from(*gradient) - difference).abs();
        assert!(
            error < 1e-6,
            "{case}, logit {index}: the gradient is {gradient} instead of {difference}"
        );
    }
}

#[test]
fn chunk_loss_gradients_agree_with_the_formula() {
    let mut random = fastrand::Rng::with_seed(16);
    for number in 0..100 {
        let vocabulary = random.usize(2..30);
        let length = random.usize(1..5);
        let logits: Vec<f32> = (0..vocabulary * length)
            .map(|_| random.f32() * 4.0 - 2.0)
            .collect();
        let labels: Vec<usize> = (0..length).map(|_| random.usize(..vocabulary)).collect();
        let teacher_nll = random.f32() * 6.0;
        let targets: Vec<PositionTarget> = labels
            .iter()
            .map(|label| PositionTarget {
                label: *label as u32,
                ..PositionTarget::default()
            })
            .collect();
        let weights = LossWeights {
            soft: [term(Divergence::Tail, random.f32()); 2],
            alm: random.f32(),
            label_smoothing: [0.0, 0.1][number % 2],
            ..LossWeights::default()
        };
        let mut gradient = logits.clone();
        let losses = loss::chunk(&mut gradient, &targets, teacher_nll, weights);
        let loss = losses.iter().map(|losses| losses.loss).sum();
        let expected = |logits: &[f64]| {
            let mut student_nll = 0.0;
            let mut position_losses = 0.0;
            for (logits, target) in logits.chunks(vocabulary).zip(&targets) {
                let logq = log_softmax(logits);
                student_nll -= logq[target.label as usize];
                position_losses += position_loss(&logq, Divergence::Tail, *target, weights);
            }
            let teacher_nll = f64::from(teacher_nll).max(1e-6);
            let alm = student_nll - teacher_nll + teacher_nll * (teacher_nll / student_nll).ln();
            position_losses + f64::from(weights.alm) * alm
        };
        check(
            &logits,
            loss,
            &gradient,
            expected,
            &format!("case {number}"),
        );
        let alm = f64::from(losses[0].alm.unwrap());
        assert!(alm > -1e-6);
        // The first position has the loss of the chunk.
        assert!(losses[1..].iter().all(|losses| losses.alm.is_none()));
    }
    // Golden value for a negative log-likelihood of 2.3 (teacher) and 3.1 (student).
    let mut logits = [0.0, (1.0f32 - (-3.1f32).exp()).ln() + 3.1];
    let target = PositionTarget::default();
    let weights = LossWeights {
        alm: 1.0,
        ..LossWeights::default()
    };
    let losses = loss::chunk(&mut logits, &[target], 2.3, weights)[0];
    assert!((losses.ce - 3.1).abs() < 1e-5, "{losses:?}");
    assert!(
        (losses.alm.unwrap() - 0.113_466_13).abs() < 1e-5,
        "{losses:?}"
    );
}

#[test]
fn divergences_and_their_gradients_are_zero_at_a_match() {
    let mut random = fastrand::Rng::with_seed(13);
    for _ in 0..100 {
        let mut case = Case::random(&mut random);
        let logits: Vec<f64> = case.logits.iter().map(|z| f64::from(*z)).collect();
        let logq = log_softmax(&logits);
        let logprob = |id: &u32| logq[*id as usize] as f32;
        case.logprobs = case.ids.iter().map(logprob).collect();
        case.sampled_logprob = case.sampled_logprob.map(|_| logprob(&case.label));
        for divergence in divergences(&mut random) {
            let target = case.target(false);
            let mut gradient = case.logits.clone();
            let weights = LossWeights {
                soft: [term(divergence, 1.0); 2],
                ..LossWeights::default()
            };
            let losses = loss::position(&mut gradient, target, weights);
            let Some(kd) = losses.kd else { continue };
            // At a match, the mean of the sampled term is zero, but a single sample is not.
            let is_sampled =
                matches!(divergence, Divergence::Damped(_)) && target.sampled_logprob.is_some();
            let steepest = gradient.iter().fold(0.0f32, |max, g| max.max(g.abs()));
            if divergence == Divergence::Renormalize {
                let logprobs = case.logprobs.iter().chain(&case.sampled_logprob);
                let mass: f32 = logprobs.map(|l| l.exp()).sum();
                assert!(
                    mass > 0.99 || kd > 0.0 && steepest > 1e-4,
                    "{kd}, {steepest}"
                );
            } else if !is_sampled {
                assert!(
                    kd.abs() < 3e-6 && (steepest < 1e-6 || divergence == Divergence::Tvd),
                    "{divergence:?}: {kd}, {steepest}, {target:?}"
                );
            }
            let sum: f32 = gradient.iter().sum();
            assert!(
                sum.abs() < 3e-6,
                "{divergence:?}: the gradient sums to {sum}"
            );
        }
    }
}

/// The mean of `damped` over all labels, weighted by the teacher's probabilities, is the divergence on the top-k and
/// the tail, plus lambda times the tail mass times the divergence within the tail. With lambda = 1 (`unbiased`) it is
/// the full divergence. The same holds for the gradients. At a match the gradients are zero for every lambda.
#[test]
fn damped_divergence_is_head_plus_weighted_tail_on_average() {
    let mut random = fastrand::Rng::with_seed(14);
    for number in 0..100 {
        let case = Case::random(&mut random);
        let vocabulary = case.logits.len();
        let is_match = number % 4 == 3;
        let lambda = [1.0, 0.35, random.f32()][number % 3];
        let logits: Vec<f64> = case.logits.iter().map(|z| f64::from(*z)).collect();
        let teacher: Vec<f64> = (0..vocabulary).map(|_| random.f64() * 4.0).collect();
        let teacher = log_softmax(if is_match { &logits } else { &teacher });
        let logprobs: Vec<f32> = teacher.iter().map(|logprob| *logprob as f32).collect();
        let mut ids: Vec<u32> = (0..vocabulary as u32).collect();
        ids.sort_by(|a, b| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]));
        ids.truncate(random.usize(1..=vocabulary));
        let top_logprobs: Vec<f32> = ids.iter().map(|id| logprobs[*id as usize]).collect();
        let weights = LossWeights {
            soft: [term(Divergence::Damped(lambda), 1.0); 2],
            ..LossWeights::default()
        };
        let mut mean = 0.0;
        let mut mean_gradient = vec![0.0; vocabulary];
        for label in 0..vocabulary as u32 {
            let target = PositionTarget {
                label,
                soft_ids_K: &ids,
                soft_logprobs_K: &top_logprobs,
                sampled_logprob: (!ids.contains(&label)).then_some(logprobs[label as usize]),
                is_exact_sample: true,
                ..PositionTarget::default()
            };
            let mut gradient = case.logits.clone();
            let losses = loss::position(&mut gradient, target, weights);
            let probability = teacher[label as usize].exp();
            mean += probability * f64::from(losses.kd.expect("soft labels give a divergence"));
            for (mean, gradient) in mean_gradient.iter_mut().zip(gradient) {
                *mean += probability * f64::from(gradient);
            }
        }
        let is_outside = |id: &usize| !ids.contains(&(*id as u32));
        let expected = |logits: &[f64]| {
            let student = log_softmax(logits);
            // The probabilities of the top-k and of the tail, and the probabilities within the tail.
            let split = |logprobs: &[f64]| -> (Vec<f64>, Vec<f64>) {
                let outside = (0..vocabulary).filter(is_outside);
                let outside: Vec<f64> = outside.map(|id| logprobs[id].exp()).collect();
                let tail_mass: f64 = outside.iter().sum();
                let top = ids.iter().map(|id| logprobs[*id as usize].exp());
                let within_tail = outside.iter().map(|p| p / tail_mass);
                (top.chain([tail_mass]).collect(), within_tail.collect())
            };
            let (t, t_within) = split(&teacher);
            let (s, s_within) = split(&student);
            kl(&t, &s) + f64::from(lambda) * t[ids.len()] * kl(&t_within, &s_within)
        };
        let case_name = format!(
            "case {number}, lambda {lambda}, k {} of {vocabulary}",
            ids.len()
        );
        assert!(
            (mean - expected(&logits)).abs() < 5e-6,
            "{case_name}: {mean}"
        );
        for (index, gradient) in mean_gradient.into_iter().enumerate() {
            let value_at = |step: f64| {
                let mut moved = logits.clone();
                moved[index] += step;
                expected(&moved)
            };
            let difference = (value_at(1e-5) - value_at(-1e-5)) / 2e-5;
            assert!(
                (gradient - difference).abs() < 3e-6,
                "{case_name}: the gradient is {gradient} instead of {difference}"
            );
            assert!(
                !is_match || gradient.abs() < 3e-6,
                "{case_name}: {gradient}"
            );
        }
    }
}
