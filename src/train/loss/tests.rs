use super::*;
use crate::train::loss::position::EndToken;

// Logits of the golden values: V = 6, K = {0, 1, 2}.
const TEACHER: [f64; 6] = [3.0, 2.0, 1.0, 0.5, 0.0, -1.0];
const STUDENT: [f32; 6] = [2.0, 2.5, 0.0, 0.3, -0.2, 0.1];

fn teacher_logprobs() -> Vec<f32> {
    let lse = TEACHER.iter().map(|z| z.exp()).sum::<f64>().ln();
    TEACHER.iter().map(|z| (z - lse) as f32).collect()
}

fn weights(weight: f32, label_smoothing: f32, divergence: Divergence) -> LossWeights {
    LossWeights {
        soft: [SoftTerm { divergence, weight }; 2],
        label_smoothing,
        ..LossWeights::default()
    }
}

fn kd(logits: &[f32], k: usize, divergence: Divergence) -> (f32, Vec<f32>) {
    let mut gradient = logits.to_vec();
    let ids: Vec<u32> = (0..k as u32).collect();
    let target = PositionTarget {
        label: 5,
        soft_ids_K: &ids,
        soft_logprobs_K: &teacher_logprobs()[..k],
        ..PositionTarget::default()
    };
    let loss = position(&mut gradient, target, weights(1.0, 0.0, divergence));
    (loss.kd.expect("soft labels were given"), gradient)
}

#[test]
fn divergences_match_golden_values_and_gradients() {
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
fn damped_matches_golden_values_and_gradients() {
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
        let target = PositionTarget {
            label: 5,
            soft_ids_K: &[0, 1, 2],
            soft_logprobs_K: &teacher[..3],
            sampled_logprob: Some(teacher[5]),
            ..PositionTarget::default()
        };
        let weights = weights(1.0, 0.0, Divergence::Damped(lambda));
        let loss = position(&mut gradient, target, weights).kd.unwrap();
        assert!((loss - value).abs() < 1e-6, "{lambda}: {loss}");
        for (got, golden) in gradient.iter().zip(slopes) {
            assert!((got - golden).abs() < 2e-6, "{lambda}: {gradient:?}");
        }
    }
}

#[test]
fn tail_grows_with_k_to_the_full_divergence() {
    let losses: Vec<f32> = (1..=6)
        .map(|k| kd(&STUDENT, k, Divergence::Tail).0)
        .collect();
    let grows = losses.windows(2).all(|pair| pair[1] > pair[0] - 1e-6);
    assert!(grows && losses[4] > losses[0] + 0.05, "{losses:?}");
    assert!((losses[5] - 0.247_935_45).abs() < 1e-6, "{losses:?}");
}

#[test]
fn tail_has_zero_value_and_gradient_at_a_match() {
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
fn gradient_sums_to_zero_and_cross_entropy_is_exact() {
    let mut gradient = STUDENT.to_vec();
    let target = PositionTarget {
        label: 1,
        ..PositionTarget::default()
    };
    let loss = position(&mut gradient, target, weights(0.5, 0.0, Divergence::Tail));
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
        let target = PositionTarget {
            label: 1,
            soft_ids_K: &[0, 1, 2][..soft],
            soft_logprobs_K: &teacher[..soft],
            ..PositionTarget::default()
        };
        let [mut plain, mut smooth] = [STUDENT.to_vec(), STUDENT.to_vec()];
        let without = position(&mut plain, target, weights(0.4, 0.0, Divergence::Tail));
        let with = position(&mut smooth, target, weights(0.4, 0.3, Divergence::Tail));
        assert_eq!(without.ce, with.ce);
        let share = if soft > 0 { 0.6 } else { 1.0 };
        let uniform = lse - STUDENT.iter().map(|z| f64::from(*z)).sum::<f64>() / 6.0;
        let expected_increase = share * 0.3 * (uniform - f64::from(with.ce));
        assert!((f64::from(with.loss - without.loss) - expected_increase).abs() < 1e-6);
        for (j, (plain, smooth)) in plain.iter().zip(&smooth).enumerate() {
            let label = if j == 1 { 1.0 } else { 0.0 };
            let expected_increase = share * 0.3 * (label - 1.0 / 6.0);
            assert!((smooth - plain - expected_increase as f32).abs() < 1e-6);
        }
    }
}

/// p over six tokens; token 4 ends the turn.
const WITH_END: [f32; 6] = [0.3, 0.2, 0.1, 0.1, 0.25, 0.05];
const END: u32 = 4;
/// The end token is not listed by default.
const UNLISTED: Option<EndToken> = Some(EndToken {
    token: END,
    is_listed: false,
});
/// Divergences with a zero gradient at a match.
const SMOOTH: [Divergence; 8] = [
    Divergence::Tail,
    Divergence::Damped(1.0),
    Divergence::Damped(0.35),
    Divergence::Temperature(2.0),
    Divergence::ReverseKl,
    Divergence::Jsd(0.5),
    Divergence::SkewKl(0.1),
    Divergence::SkewReverseKl(0.1),
];

/// Loss of `label` with a teacher that lists the tokens `listed`, but nothing at the end of a turn.
fn without_listed_end(
    logits: &mut [f32],
    listed: &[u32],
    label: u32,
    weights: LossWeights,
) -> PositionLoss {
    let listed = if label == END { &[] } else { listed };
    let logprobs: Vec<f32> = listed
        .iter()
        .map(|&id| WITH_END[id as usize].ln())
        .collect();
    let is_outside = label != END && !listed.contains(&label);
    let target = PositionTarget {
        label,
        soft_ids_K: listed,
        soft_logprobs_K: &logprobs,
        sampled_logprob: is_outside.then(|| WITH_END[label as usize].ln()),
        ..PositionTarget::default()
    };
    position(logits, target, weights)
}

#[test]
fn unlisted_ends_have_zero_expected_gradient_at_a_match() {
    let largest_mean = |listed: &[u32], weights: LossWeights| {
        let mut mean = [0.0; 6];
        for (label, p) in (0..).zip(WITH_END) {
            let mut logits = WITH_END.map(f32::ln);
            without_listed_end(&mut logits, listed, label, weights);
            mean.iter_mut()
                .zip(logits)
                .for_each(|(sum, g)| *sum += p * g);
        }
        mean.iter().fold(0.0f32, |most, g| most.max(g.abs()))
    };
    for divergence in SMOOTH {
        for weight in [0.5, 1.0] {
            let weights = weights(weight, 0.0, divergence);
            for listed in [
                &[0, 1, 2][..],
                &[0, 1, 2, 3, 5],
                &[4, 0, 1],
                &[0, 4, 1, 2, 3, 5],
            ] {
                let biased = largest_mean(listed, weights);
                let weights = LossWeights {
                    end: UNLISTED,
                    ..weights
                };
                let corrected = largest_mean(listed, weights);
                assert!(
                    corrected < 1e-6,
                    "{divergence}, {weight}, {listed:?}: {corrected}"
                );
                assert!(
                    biased > 0.02,
                    "{divergence}, {weight}, {listed:?}: {biased}"
                );
            }
        }
    }
}

#[test]
fn unlisted_ends_have_the_gradient_of_the_loss() {
    for divergence in [
        Divergence::Tail,
        Divergence::Damped(0.35),
        Divergence::Temperature(2.0),
        Divergence::Jsd(0.5),
        Divergence::Renormalize,
    ] {
        // The end token is in the top-k, so its teacher probability does not depend on the student.
        for (label, listed) in [(0, [0, 1, 4]), (3, [0, 4, 2]), (5, [4, 1, 2])] {
            let weights = LossWeights {
                end: UNLISTED,
                ..weights(0.7, 0.1, divergence)
            };
            let loss = |logits: &[f32]| {
                without_listed_end(&mut logits.to_vec(), &listed, label, weights).loss
            };
            let mut gradient = STUDENT.to_vec();
            without_listed_end(&mut gradient, &listed, label, weights);
            for j in 0..6 {
                let step = 0.01;
                let [mut more, mut less] = [STUDENT, STUDENT];
                more[j] += step;
                less[j] -= step;
                let slope = (loss(&more) - loss(&less)) / (2.0 * step);
                assert!(
                    (slope - gradient[j]).abs() < 1e-4,
                    "{divergence}, {label}, {j}: {slope} {gradient:?}"
                );
            }
        }
    }
}

#[test]
fn lists_end_of_the_position_overrides_the_default() {
    let loss = |lists_end, is_listed| {
        let mut logits = STUDENT;
        let target = PositionTarget {
            label: 1,
            soft_ids_K: &[0, 1],
            soft_logprobs_K: &[-1.0, -1.5],
            lists_end,
            ..PositionTarget::default()
        };
        let end = Some(EndToken {
            token: END,
            is_listed,
        });
        let weights = LossWeights {
            end,
            ..weights(1.0, 0.0, Divergence::Tail)
        };
        (position(&mut logits, target, weights).loss, logits)
    };
    let listed = loss(None, true);
    let unlisted = loss(None, false);
    assert_ne!(listed, unlisted);
    assert_eq!(loss(Some(true), false), listed);
    assert_eq!(loss(Some(false), true), unlisted);
}

#[test]
fn top_k_with_only_an_unlisted_end_gives_finite_losses() {
    let others = [
        Divergence::Tvd,
        Divergence::Renormalize,
        Divergence::RenormalizeBoth,
    ];
    for divergence in SMOOTH.into_iter().chain(others) {
        let mut logits = STUDENT;
        let target = PositionTarget {
            label: 2,
            soft_ids_K: &[END],
            soft_logprobs_K: &[-0.7],
            sampled_logprob: Some(f32::NEG_INFINITY),
            ..PositionTarget::default()
        };
        let weights = LossWeights {
            end: UNLISTED,
            ..weights(0.9, 0.0, divergence)
        };
        let loss = position(&mut logits, target, weights);
        assert!(loss.loss.is_finite(), "{divergence}: {loss:?}");
        let sum: f32 = logits.iter().sum();
        assert!(sum.abs() < 1e-6, "{divergence}: {logits:?}");
    }
}
