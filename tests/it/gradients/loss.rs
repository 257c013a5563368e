//! The loss of a position with every divergence: its value compared with the formula in f64, and its gradient
//! with central differences of the formula.

use distill::train::loss;
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, PositionTarget, SoftTerm};

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

/// Computes a divergence by the formulas in the table of `train::loss::divergence`. `logq` are the
/// log-probabilities of the student (V).
fn formula(divergence: Divergence, logq: &[f64], row: PositionTarget) -> Option<f64> {
    let mut teacher: Vec<(usize, f64)> = match row.teacher_logits_V {
        Some(logits) => {
            let logits: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
            log_softmax(&logits).into_iter().enumerate().collect()
        }
        None => row
            .soft_ids_K
            .iter()
            .zip(row.soft_logprobs_K)
            .map(|(id, l)| (*id as usize, f64::from(*l)))
            .collect(),
    };
    let sampled = row.sampled_logprob.map(f64::from);
    if let (Some(logprob), false) = (sampled, matches!(divergence, Divergence::Damped(_))) {
        teacher.push((row.label as usize, logprob));
    }
    if teacher.is_empty() {
        return None;
    }
    let mut t: Vec<f64> = teacher.iter().map(|(_, l)| l.exp()).collect();
    let mut s: Vec<f64> = teacher.iter().map(|(id, _)| logq[*id].exp()).collect();
    let mass: f64 = t.iter().sum();
    let student_mass: f64 = s.iter().sum();
    let softmax = |values: Vec<f64>| -> Vec<f64> {
        let sum: f64 = values.iter().map(|v| v.exp()).sum();
        values.iter().map(|v| v.exp() / sum).collect()
    };
    let logits = |tau: f64| teacher.iter().map(|(id, _)| logq[*id] / tau).collect();
    let renormalized: Vec<f64> = t.iter().map(|t| t / mass).collect();
    let is_complete = teacher.len() == logq.len();
    let (tail, student_tail) = if is_complete {
        (0.0, 1e-7)
    } else {
        (1.0 - mass, 1.0 - student_mass)
    };
    let conditional = s.clone();
    t.push(tail);
    s.push(student_tail);
    Some(match divergence {
        Divergence::Tail => kl(&t, &s),
        Divergence::Damped(lambda) => {
            let label_term = sampled.map_or(0.0, |logprob| {
                let student = logq[row.label as usize] - student_tail.ln();
                logprob - tail.ln() - student
            });
            kl(&t, &s) + f64::from(lambda) * label_term
        }
        Divergence::Temperature(tau) => {
            let tau = f64::from(tau);
            let tempered = softmax(teacher.iter().map(|(_, l)| l / tau).collect());
            let within = kl(&tempered, &softmax(logits(tau)));
            let between = kl(&[mass, tail], &[student_mass, student_tail]);
            tau * tau * mass * within + between
        }
        Divergence::ReverseKl => {
            let floor: Vec<f64> = t.iter().map(|t| t.max(1e-6)).collect();
            let k = teacher.len();
            kl(&s[..k], &t[..k]) + kl(&s[k..], &floor[k..])
        }
        Divergence::Jsd(beta) => {
            let m = mixed(&t, &s, f64::from(beta));
            f64::from(beta) * kl(&t, &m) + (1.0 - f64::from(beta)) * kl(&s, &m)
        }
        Divergence::SkewKl(alpha) => kl(&t, &mixed(&t, &s, f64::from(alpha))),
        Divergence::SkewReverseKl(alpha) => kl(&s, &mixed(&s, &t, f64::from(alpha))),
        Divergence::Tvd => t.iter().zip(&s).map(|(t, s)| (t - s).abs() / 2.0).sum(),
        Divergence::Renormalize => kl(&renormalized, &conditional),
        Divergence::RenormalizeBoth => kl(&renormalized, &softmax(logits(1.0))),
    })
}

fn kl(a: &[f64], b: &[f64]) -> f64 {
    let term = |(a, b): (&f64, &f64)| {
        if *a > 0.0 { a * (a / b).ln() } else { 0.0 }
    };
    a.iter().zip(b).map(term).sum()
}

fn mixed(a: &[f64], b: &[f64], share: f64) -> Vec<f64> {
    let both = a.iter().zip(b);
    both.map(|(a, b)| share * a + (1.0 - share) * b).collect()
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = logits.iter().map(|z| (z - largest).exp()).sum();
    logits.iter().map(|z| z - largest - sum.ln()).collect()
}

/// A position with random student logits, teacher and top-k.
struct Case {
    logits: Vec<f32>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    label: u32,
    sampled_logprob: Option<f32>,
}

impl Case {
    fn random(random: &mut fastrand::Rng) -> Self {
        let vocabulary = random.usize(2..60);
        let k = random.usize(0..=vocabulary);
        let spread = [0.2, 1.0, 3.0][random.usize(..3)];
        let mut normal = || -> Vec<f64> {
            let mut value = || (0..4).map(|_| random.f64() - 0.5).sum::<f64>() * spread;
            (0..vocabulary).map(|_| value()).collect()
        };
        let logits: Vec<f32> = normal().iter().map(|z| *z as f32).collect();
        let teacher: Vec<f32> = log_softmax(&normal()).iter().map(|l| *l as f32).collect();
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

    fn row(&self, is_exact_sample: bool) -> PositionTarget<'_> {
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
        let kd = random.f32();
        let smoothing = [0.0, 0.1][number % 2];
        for divergence in divergences(&mut random) {
            let exact = random.bool();
            let row = case.row(exact);
            let mut soft = [term(Divergence::Renormalize, 0.5); 2];
            soft[usize::from(exact)] = term(divergence, kd);
            let weights = LossWeights {
                soft,
                label_smoothing: smoothing,
                ..LossWeights::default()
            };
            let mut gradient = case.logits.clone();
            let loss = loss::position(&mut gradient, row, weights).loss;
            let expected =
                |logits: &[f64]| position(&log_softmax(logits), divergence, row, weights);
            let case_name = format!("case {number}, {divergence:?}, {row:?}");
            check(&case.logits, loss, &gradient, expected, &case_name);
        }
    }
}

/// The teacher's vocabulary may be smaller or larger than the student's, because embeddings are padded.
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
        let row = PositionTarget {
            label: case.label,
            teacher_logits_V: Some(&teacher),
            ..PositionTarget::default()
        };
        let shared = PositionTarget {
            teacher_logits_V: Some(&teacher[..teacher_vocabulary.min(vocabulary)]),
            ..row
        };
        for divergence in divergences(&mut random) {
            let weights = LossWeights {
                soft: [term(divergence, random.f32()); 2],
                label_smoothing: [0.0, 0.1][number % 2],
                ..LossWeights::default()
            };
            // Without a tail, these divergences are equal.
            let equivalent = match divergence {
                Divergence::Damped(_) | Divergence::Renormalize | Divergence::RenormalizeBoth => {
                    Divergence::Tail
                }
                other => other,
            };
            let mut gradient = case.logits.clone();
            let losses = loss::position(&mut gradient, row, weights);
            let expected = |logits: &[f64]| match equivalent {
                // If the student has more tokens, the temperature applies to all of them.
                Divergence::Temperature(tau) => tempered(logits, &teacher, row.label, tau, weights),
                _ => position(&log_softmax(logits), equivalent, shared, weights),
            };
            let case_name = format!(
                "case {number}, {divergence:?}, {vocabulary} and {teacher_vocabulary} tokens"
            );
            check(&case.logits, losses.loss, &gradient, expected, &case_name);
        }
    }
}

/// Computes the distillation loss of Hinton et al. (arXiv 1503.02531): the KL divergence at a temperature,
/// times the square of the temperature.
fn tempered(logits: &[f64], teacher: &[f32], label: u32, tau: f32, weights: LossWeights) -> f64 {
    let tau = f64::from(tau);
    let kd = f64::from(weights.soft[0].weight);
    let shared = teacher.len().min(logits.len());
    let at_temperature =
        |values: Vec<f64>| log_softmax(&values.iter().map(|v| v / tau).collect::<Vec<_>>());
    let p = at_temperature(teacher[..shared].iter().map(|l| f64::from(*l)).collect());
    let q = at_temperature(logits.to_vec());
    let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
    let ce = position(
        &log_softmax(logits),
        Divergence::Tail,
        PositionTarget {
            label,
            ..PositionTarget::default()
        },
        weights,
    );
    (1.0 - kd) * ce + kd * tau * tau * kl
}

/// Computes the loss of a position by its formula, at the log-probabilities `logq` (V).
fn position(
    logq: &[f64],
    divergence: Divergence,
    row: PositionTarget,
    weights: LossWeights,
) -> f64 {
    let uniform = -logq.iter().sum::<f64>() / logq.len() as f64;
    let kd = f64::from(weights.soft[usize::from(row.is_exact_sample)].weight);
    let smoothing = f64::from(weights.label_smoothing);
    let ce = -(1.0 - smoothing) * logq[row.label as usize] + smoothing * uniform;
    match formula(divergence, logq, row) {
        Some(value) => (1.0 - kd) * ce + kd * value,
        None => ce,
    }
}

/// Checks a loss against `formula`, and its gradient against the central differences of `formula`.
fn check(logits: &[f32], loss: f32, gradient: &[f32], formula: impl Fn(&[f64]) -> f64, case: &str) {
    let logits: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
    let expected = formula(&logits);
    assert!(
        (f64::from(loss) - expected).abs() < 1e-5 * expected.abs().max(1.0),
        "{case}: {loss} and {expected}"
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
            "{case}, logit {index}: {gradient} and {difference}"
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
        let nll = random.f32() * 6.0;
        let rows: Vec<PositionTarget> = labels
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
        let losses = loss::chunk(&mut gradient, &rows, nll, weights);
        let loss = losses.iter().map(|row| row.loss).sum();
        let expected = |logits: &[f64]| {
            let mut student_nll = 0.0;
            let mut total = 0.0;
            for (logits, row) in logits.chunks(vocabulary).zip(&rows) {
                let logq = log_softmax(logits);
                student_nll -= logq[row.label as usize];
                total += position(&logq, Divergence::Tail, *row, weights);
            }
            let teacher_nll = f64::from(nll).max(1e-6);
            let difference =
                student_nll - teacher_nll + teacher_nll * (teacher_nll / student_nll).ln();
            total + f64::from(weights.alm) * difference
        };
        check(
            &logits,
            loss,
            &gradient,
            expected,
            &format!("case {number}"),
        );
        let alm = f64::from(losses[0].alm.unwrap());
        assert!(alm > -1e-6 && losses[1..].iter().all(|row| row.alm.is_none()));
    }
    // Golden value: a = 2.3, b = 3.1.
    let mut logits = [0.0, (1.0f32 - (-3.1f32).exp()).ln() + 3.1];
    let row = PositionTarget::default();
    let weights = LossWeights {
        alm: 1.0,
        ..LossWeights::default()
    };
    let losses = loss::chunk(&mut logits, &[row], 2.3, weights)[0];
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
        let logq = log_softmax(
            &case
                .logits
                .iter()
                .map(|z| f64::from(*z))
                .collect::<Vec<_>>(),
        );
        let logprob = |id: &u32| logq[*id as usize] as f32;
        case.logprobs = case.ids.iter().map(logprob).collect();
        case.sampled_logprob = case.sampled_logprob.map(|_| logprob(&case.label));
        for divergence in divergences(&mut random) {
            let row = case.row(false);
            let mut gradient = case.logits.clone();
            let weights = LossWeights {
                soft: [term(divergence, 1.0); 2],
                ..LossWeights::default()
            };
            let losses = loss::position(&mut gradient, row, weights);
            let Some(kd) = losses.kd else { continue };
            // The mean of the sampled term is zero at a match, a single sample is not.
            let is_sampled =
                matches!(divergence, Divergence::Damped(_)) && row.sampled_logprob.is_some();
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
                    "{divergence:?}: {kd}, {steepest}, {row:?}"
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

/// The mean of `damped` over all y, weighted by the teacher's probabilities, is the divergence on the top-k
/// and the tail, plus lambda times the tail mass times the divergence within the tail. With lambda = 1
/// (`unbiased`) it is the full divergence. The same holds for the gradients. At a match they are zero for
/// every lambda.
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
        let logprobs: Vec<f32> = teacher.iter().map(|l| *l as f32).collect();
        let mut ids: Vec<u32> = (0..vocabulary as u32).collect();
        ids.sort_by(|a, b| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]));
        ids.truncate(random.usize(1..=vocabulary));
        let inside: Vec<f32> = ids.iter().map(|id| logprobs[*id as usize]).collect();
        let weights = LossWeights {
            soft: [term(Divergence::Damped(lambda), 1.0); 2],
            ..LossWeights::default()
        };
        let mut mean = 0.0;
        let mut slope = vec![0.0; vocabulary];
        for y in 0..vocabulary as u32 {
            let row = PositionTarget {
                label: y,
                soft_ids_K: &ids,
                soft_logprobs_K: &inside,
                sampled_logprob: (!ids.contains(&y)).then_some(logprobs[y as usize]),
                is_exact_sample: true,
                ..PositionTarget::default()
            };
            let mut gradient = case.logits.clone();
            let losses = loss::position(&mut gradient, row, weights);
            let p = teacher[y as usize].exp();
            mean += p * f64::from(losses.kd.expect("soft labels give a divergence"));
            for (slope, g) in slope.iter_mut().zip(gradient) {
                *slope += p * f64::from(g);
            }
        }
        let is_outside = |id: &usize| !ids.contains(&(*id as u32));
        let expected = |logits: &[f64]| {
            let student = log_softmax(logits);
            let split = |log: &[f64]| -> (Vec<f64>, Vec<f64>) {
                let outside: Vec<f64> = (0..vocabulary)
                    .filter(is_outside)
                    .map(|id| log[id].exp())
                    .collect();
                let mass: f64 = outside.iter().sum();
                let head = ids.iter().map(|id| log[*id as usize].exp());
                (
                    head.chain([mass]).collect(),
                    outside.iter().map(|p| p / mass).collect(),
                )
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
        for (index, slope) in slope.into_iter().enumerate() {
            let value_at = |step: f64| {
                let mut moved = logits.clone();
                moved[index] += step;
                expected(&moved)
            };
            let difference = (value_at(1e-5) - value_at(-1e-5)) / 2e-5;
            assert!(
                (slope - difference).abs() < 3e-6,
                "{case_name}: {slope} and {difference}"
            );
            assert!(!is_match || slope.abs() < 3e-6, "{case_name}: {slope}");
        }
    }
}
