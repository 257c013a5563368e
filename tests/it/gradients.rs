//! Every hand-written backward pass against differences of its forward pass.

use candle_core::{Device, Tensor, Var};
use distill::model::{Model, weights::Tensors};
use distill::ops::head_loss::head_loss;
use distill::train::loss::{self, Row};

use crate::model::tiny;

const SEGMENTS: [std::ops::Range<usize>; 2] = [0..70, 70..83];

fn total_loss(model: &Model, kd_weight: f32) -> Tensor {
    let ids: Vec<u32> = (0..83).map(|i| (i * 17 + 5) % 61).collect();
    let positions: Vec<u32> = (40..69).chain(72..82).collect();
    let labels: Vec<u32> = positions.iter().map(|p| ids[*p as usize + 1]).collect();
    let hidden = model.hidden_at(&ids, &SEGMENTS, &positions).unwrap();
    let row = move |n: usize, logits: &mut [f32]| {
        let target = Row {
            label: labels[n],
            soft_ids: &[3, labels[n].max(10) - 6, 59],
            soft_logprobs: &[-1.2, -0.9, -2.5],
        };
        let result = loss::row(logits, target, kd_weight, 0.05);
        let kd = result.kd.unwrap();
        (0.05 * ((1.0 - kd_weight) * result.ce + kd_weight * kd), ())
    };
    head_loss(&hidden, model.head(), row).unwrap().0
}

/// Moves each parameter along a random direction: the change of the loss must be the gradient's
/// component along it.
#[test]
fn every_parameter_has_the_gradient_that_differences_show() {
    for (tied, kd_weight) in [(true, 0.5), (false, 1.0), (true, 0.0)] {
        let (config, tensors) = tiny(tied);
        let vars: Vec<(String, Var)> = tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
            .collect();
        let trainable: Tensors = vars
            .iter()
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
            .collect();
        let model = Model::new(config.clone(), &trainable).unwrap();
        let gradients = total_loss(&model, kd_weight).backward().unwrap();
        let mut random = fastrand::Rng::with_seed(3);
        for (name, var) in &vars {
            let gradient = gradients
                .get(var)
                .unwrap_or_else(|| panic!("{name} has none"));
            let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            let norm = gradient
                .iter()
                .map(|g| f64::from(*g).powi(2))
                .sum::<f64>()
                .sqrt();
            assert!(norm > 1e-6, "{name} has a zero gradient");
            // Half along the gradient, so that the change is well above rounding.
            let direction: Vec<f32> = gradient
                .iter()
                .map(|g| {
                    (f64::from(*g) / norm) as f32
                        + 0.3 * (random.f32() - 0.5) / (gradient.len() as f32).sqrt()
                })
                .collect();
            let expected: f64 = gradient
                .iter()
                .zip(&direction)
                .map(|(g, d)| f64::from(g * d))
                .sum();
            let direction = Tensor::from_vec(direction, var.shape(), &Device::Cpu).unwrap();
            let loss_at = |distance: f64| {
                let mut moved = trainable.clone();
                let tensor = (var.as_tensor() + (&direction * distance).unwrap()).unwrap();
                moved.insert(name.clone(), tensor.detach());
                let model = Model::new(config.clone(), &moved).unwrap();
                f64::from(total_loss(&model, kd_weight).to_scalar::<f32>().unwrap())
            };
            let step = (2e-3 / norm).min(1e-2);
            let measured = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            let error = (measured - expected).abs() / expected.abs();
            assert!(
                error < 0.02,
                "{name}: differences give {measured}, backward {expected}"
            );
        }
    }
}
