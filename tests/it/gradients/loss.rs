//! Row T2: the gradient of a position's loss against central differences of its formula in f64.

use distill::train::loss::{self, Row, Weights};

/// The formula of `train::loss`, term by term.
fn formula(logits: &[f64], row: Row, kd: f64, smoothing: f64) -> f64 {
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = logits.iter().map(|z| (z - largest).exp()).sum();
    let logq: Vec<f64> = logits.iter().map(|z| z - largest - sum.ln()).collect();
    let uniform = -logq.iter().sum::<f64>() / logq.len() as f64;
    let ce = -(1.0 - smoothing) * logq[row.label as usize] + smoothing * uniform;
    if row.soft_ids.is_empty() {
        return ce;
    }
    let (mut divergence, mut mass, mut kept) = (0.0, 0.0, 0.0);
    for (id, l) in row.soft_ids.iter().zip(row.soft_logprobs) {
        let (l, logq) = (f64::from(*l), logq[*id as usize]);
        divergence += l.exp() * (l - logq);
        mass += l.exp();
        kept += logq.exp();
    }
    let (tail, rest) = (1.0 - mass, 1.0 - kept);
    if tail > 1e-6 && row.soft_ids.len() < logits.len() {
        divergence += tail * (tail.ln() - rest.ln());
    }
    (1.0 - kd) * ce + kd * divergence
}

#[test]
fn gradients_are_those_of_the_formula() {
    let mut random = fastrand::Rng::with_seed(12);
    for case in 0..200 {
        let vocabulary = random.usize(2..60);
        let k = random.usize(0..=vocabulary);
        let spread = [0.2, 1.0, 3.0][random.usize(..3)];
        let mut normal = |scale: f64| -> Vec<f64> {
            let mut value = || (0..4).map(|_| random.f64() - 0.5).sum::<f64>() * scale;
            (0..vocabulary).map(|_| value()).collect()
        };
        let logits: Vec<f32> = normal(spread).iter().map(|z| *z as f32).collect();
        let teacher = normal(spread);
        let sum: f64 = teacher.iter().map(|z| z.exp()).sum();
        let mut ids: Vec<u32> = (0..vocabulary as u32).collect();
        random.shuffle(&mut ids);
        ids.truncate(k);
        let logprob = |id: &u32| (teacher[*id as usize] - sum.ln()) as f32;
        let logprobs: Vec<f32> = ids.iter().map(logprob).collect();
        let row = Row {
            label: random.u32(..vocabulary as u32),
            soft_ids: &ids,
            soft_logprobs: &logprobs,
        };
        let (kd, smoothing) = (random.f32(), [0.0, 0.1][case % 2]);
        let weights = Weights {
            kd,
            label_smoothing: smoothing,
            scale: 1.0,
        };
        let mut gradient = logits.clone();
        let loss = loss::row(&mut gradient, row, weights).loss;

        let logits: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
        let at = |logits: &[f64]| formula(logits, row, f64::from(kd), f64::from(smoothing));
        let expected = at(&logits);
        assert!((f64::from(loss) - expected).abs() < 2e-6 * expected.max(1.0));
        for (index, gradient) in gradient.iter().enumerate() {
            let mut moved = logits.clone();
            let step = 1e-5;
            moved[index] += step;
            let above = at(&moved);
            moved[index] -= 2.0 * step;
            let difference = (above - at(&moved)) / (2.0 * step);
            let error = (f64::from(*gradient) - difference).abs();
            assert!(
                error < 1e-6,
                "case {case}, V = {vocabulary}, K = {k}, logit {index}: {gradient} and {difference}"
            );
        }
    }
}
