//! Every hand-written backward pass against candle's autograd over the composed operations, and
//! against differences of its forward pass.

mod composed;
mod loss;
mod torch;

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::log_softmax;
use distill::data::batch::Batch;
use distill::model::config::shape::ModelConfig;
use distill::model::gradients::Gradients;
use distill::model::tape::Memory;
use distill::model::weights::Tensors;
use distill::model::{Input, Model};
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, SoftTerm};
use distill::train::objective;

use crate::model::tiny;

const VOCABULARY: u32 = 61;

/// The weight of chunks.
const ALM: f64 = 0.3;

/// A trainable model with its variables by name.
pub struct Trainable {
    pub model: Model,
    vars: BTreeMap<String, Var>,
}

impl Trainable {
    pub fn new(config: &ModelConfig, tensors: &Tensors) -> Self {
        Self::with_frozen(config, tensors, |_| false)
    }

    /// With the weights that `frozen` names as constants.
    pub fn with_frozen(
        config: &ModelConfig,
        tensors: &Tensors,
        frozen: impl Fn(&str) -> bool,
    ) -> Self {
        let vars: BTreeMap<String, Var> = tensors
            .iter()
            .filter(|(name, _)| !frozen(name))
            .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
            .collect();
        let mut all = tensors.clone();
        for (name, var) in &vars {
            all.insert(name.clone(), var.as_tensor().clone());
        }
        let model = Model::new(config.clone(), &all).unwrap();
        Self { model, vars }
    }

    fn tiny(tied: bool) -> Self {
        let (config, tensors) = tiny(tied);
        Self::new(&config, &tensors)
    }

    /// The loss of `batches` and the gradient of each variable.
    pub fn gradients(
        &self,
        batches: &[Batch],
        kd: f32,
        memory: Memory,
    ) -> (f64, BTreeMap<String, Vec<f32>>) {
        let positions: usize = batches.iter().map(|batch| batch.positions.len()).sum();
        let weights = LossWeights {
            soft: [SoftTerm {
                divergence: Divergence::Tail,
                weight: kd,
            }; 2],
            alm: ALM as f32,
            scale: 1.0 / positions as f32,
            ..LossWeights::default()
        };
        let mut gradients = self.model.gradients();
        let mut loss = 0.0;
        for batch in batches {
            let part = objective::gradients(&self.model, batch, weights, memory, &mut gradients);
            loss += part.unwrap().0;
        }
        (loss, self.named(&gradients))
    }

    fn named(&self, gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
        let get = |(name, var): (&String, &Var)| {
            let here = gradients.get(var.as_tensor()).map(<[f32]>::to_vec);
            let elsewhere = || {
                let gradient = gradients.elsewhere(var.as_tensor())?;
                Some(gradient.flatten_all().unwrap().to_vec1().unwrap())
            };
            let gradient = here.or_else(elsewhere);
            let gradient = gradient.unwrap_or_else(|| panic!("{name} received no gradient"));
            (name.clone(), gradient)
        };
        self.vars.iter().map(get).collect()
    }

    /// The same by candle: the loss from its formula, the gradients by its autograd.
    pub fn oracle(&self, batch: &Batch, kd: f32) -> (f64, BTreeMap<String, Vec<f32>>) {
        let input = Input {
            input_ids: &batch.input_ids,
            segments: &batch.segments,
            positions: &batch.positions,
        };
        let hidden = self.model.composed_hidden(input).unwrap();
        let logits = hidden.matmul(&self.model.head().t().unwrap()).unwrap();
        let logq = log_softmax(&logits, D::Minus1).unwrap();
        let mut terms = Vec::new();
        for n in 0..batch.positions.len() {
            let logq = logq.get(n).unwrap();
            let at = |id: u32| logq.get(id as usize).unwrap();
            let ce = at(batch.labels[n]).neg().unwrap();
            let soft = batch.soft_offsets[n]..batch.soft_offsets[n + 1];
            if soft.is_empty() {
                terms.push(ce);
                continue;
            }
            let (mut mass, mut kept) = (0.0, Tensor::zeros((), DType::F32, &Device::Cpu).unwrap());
            let mut tail = kept.clone();
            for i in soft {
                let (l, logq) = (batch.soft_logprobs[i] as f64, at(batch.soft_ids[i]));
                mass += l.exp();
                kept = (kept + logq.exp().unwrap()).unwrap();
                tail = (tail + (logq.neg().unwrap() + l).unwrap() * l.exp()).unwrap();
            }
            let rest = 1.0 - mass;
            let log_rest = kept.affine(-1.0, 1.0).unwrap().log().unwrap();
            let tail = (tail + log_rest.affine(-rest, rest * rest.ln()).unwrap()).unwrap();
            let kd = f64::from(kd);
            terms.push((ce.affine(1.0 - kd, 0.0).unwrap() + tail.affine(kd, 0.0)).unwrap());
        }
        let mut loss = Tensor::stack(&terms, 0).unwrap().sum_all().unwrap();
        for (span, nll) in &batch.chunks {
            let of_label = |n: usize| {
                let logq = logq.get(n).unwrap();
                logq.get(batch.labels[n] as usize).unwrap().neg().unwrap()
            };
            let all: Vec<Tensor> = span.clone().map(of_label).collect();
            let b = Tensor::stack(&all, 0).unwrap().sum_all().unwrap();
            let a = f64::from(*nll);
            let log = b.log().unwrap().affine(-a, a * a.ln() - a).unwrap();
            loss = (loss + ((b + log).unwrap() * ALM).unwrap()).unwrap();
        }
        let loss = (loss / batch.positions.len() as f64).unwrap();
        let store = loss.backward().unwrap();
        let get = |(name, var): (&String, &Var)| {
            let gradient = store.get(var).unwrap_or_else(|| panic!("{name} has none"));
            let gradient = gradient.flatten_all().unwrap().to_vec1().unwrap();
            (name.clone(), gradient)
        };
        let loss = f64::from(loss.to_scalar::<f32>().unwrap());
        (loss, self.vars.iter().map(get).collect())
    }
}

/// An example, as a batch of its own.
type Example = Batch;

/// Eight examples of ragged lengths; some positions are prompt, some have no soft labels, and pairs of
/// these are chunks.
fn examples() -> Vec<Example> {
    let mut random = fastrand::Rng::with_seed(5);
    let example = |(row, &length): (usize, &usize)| {
        let ids: Vec<u32> = (0..length + 1).map(|_| random.u32(..VOCABULARY)).collect();
        let mut batch = Batch {
            segments: std::iter::once(0..length + 1).collect(),
            keys: vec![row.to_string()],
            soft_offsets: vec![0],
            ..Batch::default()
        };
        for position in random.usize(0..length)..length {
            batch.positions.push(position as u32);
            batch.labels.push(ids[position + 1]);
            let number = batch.positions.len() - 1;
            if position % 5 == 3 && number > 0 {
                batch.chunks.push((number - 1..number + 1, 2.5));
            }
            if position % 5 < 2 || position % 5 == 4 {
                batch
                    .soft_ids
                    .extend([3, ids[position + 1].max(10) - 6, 59]);
                batch.soft_logprobs.extend([-1.2, -0.9, -2.5]);
            }
            batch.soft_offsets.push(batch.soft_ids.len());
        }
        batch.input_ids = ids;
        batch
    };
    let lengths = [70, 13, 1, 33, 2, 64, 65, 40];
    lengths.iter().enumerate().map(example).collect()
}

/// Examples end to end.
fn joined<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Batch {
    let mut all = Batch {
        soft_offsets: vec![0],
        ..Batch::default()
    };
    for example in examples {
        let (token, soft) = (all.input_ids.len(), all.soft_ids.len());
        let first = all.labels.len();
        let chunks = example.chunks.iter();
        let chunks = chunks.map(|(span, nll)| (first + span.start..first + span.end, *nll));
        all.chunks.extend(chunks);
        all.input_ids.extend(&example.input_ids);
        all.segments.push(token..all.input_ids.len());
        all.keys.extend(example.keys.clone());
        let positions = example.positions.iter();
        all.positions.extend(positions.map(|at| at + token as u32));
        all.labels.extend(&example.labels);
        let offsets = example.soft_offsets[1..].iter();
        all.soft_offsets.extend(offsets.map(|at| at + soft));
        all.soft_ids.extend(&example.soft_ids);
        all.soft_logprobs.extend(&example.soft_logprobs);
    }
    all
}

fn norm(values: &[f32]) -> f64 {
    let squares = values.iter().map(|v| f64::from(*v).powi(2));
    squares.sum::<f64>().sqrt()
}

/// By how much two gradients differ, relative to the larger.
pub fn difference(a: &[f32], b: &[f32]) -> f64 {
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    // Where both are nearly zero, so is their difference.
    norm(&difference) / norm(a).max(norm(b)).max(1e-3)
}

pub fn assert_same(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>, tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for ((name, a), b) in a.iter().zip(b.values()) {
        let difference = difference(a, b);
        assert!(difference < tolerance, "{name} differs by {difference:e}");
    }
}

#[test]
fn every_parameter_has_the_gradient_that_candle_finds() {
    for (tied, kd) in [(true, 0.5), (false, 1.0), (true, 0.0)] {
        let student = Trainable::tiny(tied);
        let batch = joined(&examples());
        let (loss, gradients) = student.gradients(std::slice::from_ref(&batch), kd, Memory::Record);
        let (expected_loss, expected) = student.oracle(&batch, kd);
        assert!((loss - expected_loss).abs() < 1e-4 * expected_loss);
        for (name, gradient) in &gradients {
            assert!(norm(gradient) > 1e-6, "{name} has a zero gradient");
        }
        assert_same(&gradients, &expected, 1e-4);
    }
}

#[test]
fn checkpointing_changes_no_bit_of_a_gradient() {
    let student = Trainable::tiny(true);
    let batches = [joined(&examples())];
    let recorded = student.gradients(&batches, 0.5, Memory::Record);
    let checkpointed = student.gradients(&batches, 0.5, Memory::Checkpoint);
    assert_eq!(recorded, checkpointed);
}

#[test]
fn the_number_of_threads_changes_no_bit_of_a_gradient() {
    let student = Trainable::tiny(true);
    let batches = [joined(&examples())];
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.build().unwrap();
        pool.install(|| student.gradients(&batches, 0.5, Memory::Record))
    };
    let one = with(1);
    assert_eq!(one, with(2));
    assert_eq!(one, with(3));
}

#[test]
fn gradients_do_not_depend_on_how_a_step_is_cut() {
    let student = Trainable::tiny(true);
    let examples = examples();
    let cut = |micro: usize| -> Vec<Batch> { examples.chunks(micro).map(joined).collect() };
    let (loss, whole) = student.gradients(&cut(8), 0.5, Memory::Record);
    for micro in [4, 2, 1] {
        let (other_loss, other) = student.gradients(&cut(micro), 0.5, Memory::Record);
        assert!((loss - other_loss).abs() < 1e-6 * loss);
        assert_same(&whole, &other, 1e-5);
    }
    let backwards = joined(examples.iter().rev());
    let (_, other) = student.gradients(&[backwards], 0.5, Memory::Record);
    assert_same(&whole, &other, 1e-5);
}

/// Moves each parameter along a random direction: the change of the loss must be the gradient's
/// component along it.
#[test]
fn every_parameter_has_the_gradient_that_differences_show() {
    let (config, tensors) = tiny(true);
    let student = Trainable::new(&config, &tensors);
    let batches = [joined(&examples())];
    let (_, gradients) = student.gradients(&batches, 0.5, Memory::Record);
    let mut random = fastrand::Rng::with_seed(3);
    for (name, gradient) in &gradients {
        let norm = norm(gradient);
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
        let direction = Tensor::from_vec(direction, tensors[name].shape(), &Device::Cpu).unwrap();
        let loss_at = |distance: f64| {
            let mut moved = tensors.clone();
            moved.insert(
                name.clone(),
                (&tensors[name] + (&direction * distance).unwrap()).unwrap(),
            );
            let moved = Trainable::new(&config, &moved);
            moved.gradients(&batches, 0.5, Memory::Record).0
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
