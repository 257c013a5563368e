//! Every hand-written backward pass, compared with candle's autograd and with finite differences of the forward pass.
//!
//! | file | content |
//! |---|---|
//! | `torch.rs` | logits, loss and gradients of every architecture, compared with PyTorch |
//! | `candle.rs` | operations, training and updates, compared with candle |
//! | `loss.rs` | the loss of a position by divergence and its gradient, compared with `formulas.rs` |
//! | `formulas.rs` | the formulas of the losses in f64 |

mod candle;
mod formulas;
mod loss;
mod torch;

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::log_softmax;
use distill::data::batch::Batch;
use distill::model::config::shape::ModelConfig;
use distill::model::gradients::Gradients;
use distill::model::tape::Activations;
use distill::model::weights::Tensors;
use distill::model::{Model, ModelInput, SourceInput};
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, SoftTerm};
use distill::train::objective;

use crate::model::tiny;

const VOCABULARY: u32 = 61;

/// Weight of the ALM loss of chunks.
const ALM_WEIGHT: f64 = 0.3;

/// A trainable model with its variables by name.
pub struct Trainable {
    pub model: Model,
    vars: BTreeMap<String, Var>,
}

impl Trainable {
    pub fn new(config: &ModelConfig, tensors: &Tensors) -> Self {
        Self::with_frozen(config, tensors, |_| false)
    }

    /// As [`Trainable::new`], without variables for the weights that `frozen` selects by their name.
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
        let mut weights = tensors.clone();
        for (name, var) in &vars {
            weights.insert(name.clone(), var.as_tensor().clone());
        }
        let model = Model::new(config.clone(), &weights).unwrap();
        Self { model, vars }
    }

    fn tiny(tied: bool) -> Self {
        let (config, tensors) = tiny(tied);
        Self::new(&config, &tensors)
    }

    /// Returns the loss of `batches` and the gradient of each variable.
    pub fn gradients(
        &self,
        batches: &[Batch],
        kd_weight: f32,
        activations: Activations,
    ) -> (f64, BTreeMap<String, Vec<f32>>) {
        let positions: usize = batches.iter().map(|batch| batch.positions_N.len()).sum();
        let weights = LossWeights {
            soft: [SoftTerm {
                divergence: Divergence::Tail,
                weight: kd_weight,
            }; 2],
            alm: ALM_WEIGHT as f32,
            scale: 1.0 / positions as f32,
            ..LossWeights::default()
        };
        let mut gradients = self.model.gradients();
        let mut loss = 0.0;
        for batch in batches {
            let part =
                objective::gradients(&self.model, batch, weights, activations, &mut gradients);
            loss += part.unwrap().0;
        }
        (loss, self.named(&gradients))
    }

    /// Returns the gradient of each variable by name.
    fn named(&self, gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
        let get = |(name, var): (&String, &Var)| {
            let tape = gradients.get_tape(var.as_tensor()).map(<[f32]>::to_vec);
            let candle = || {
                let gradient = gradients.get_candle(var.as_tensor())?;
                Some(gradient.flatten_all().unwrap().to_vec1().unwrap())
            };
            let gradient = tape.or_else(candle);
            let gradient = gradient.unwrap_or_else(|| panic!("{name} received no gradient"));
            (name.clone(), gradient)
        };
        self.vars.iter().map(get).collect()
    }

    /// As [`Trainable::gradients`] for one batch, computed with candle: the loss from its formula, the gradients from
    /// autograd.
    pub fn reference(&self, batch: &Batch, kd_weight: f32) -> (f64, BTreeMap<String, Vec<f32>>) {
        let input = ModelInput {
            input_ids_T: &batch.input_ids_T,
            segments_B: &batch.segments_B,
            positions_N: &batch.positions_N,
            source: SourceInput {
                ids_U: &batch.source_ids_U,
                segments_B: &batch.source_segments_B,
            },
        };
        let hidden = self.model.candle_hidden(input).unwrap();
        let logits = hidden.matmul(&self.model.head().t().unwrap()).unwrap();
        let logq = log_softmax(&logits, D::Minus1).unwrap();
        let mut terms = Vec::new();
        for n in 0..batch.positions_N.len() {
            let logq = logq.get(n).unwrap();
            let logprob = |id: u32| logq.get(id as usize).unwrap();
            let ce = logprob(batch.labels_N[n]).neg().unwrap();
            let soft = batch.soft_offsets_N1[n]..batch.soft_offsets_N1[n + 1];
            if soft.is_empty() {
                terms.push(ce);
                continue;
            }
            let mut mass = 0.0;
            let mut student_mass = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
            let mut kl = student_mass.clone();
            for i in soft {
                let teacher_logprob = batch.soft_logprobs_NK[i] as f64;
                let probability = teacher_logprob.exp();
                let logq = logprob(batch.soft_ids_NK[i]);
                mass += probability;
                student_mass = (student_mass + logq.exp().unwrap()).unwrap();
                let log_ratio = (logq.neg().unwrap() + teacher_logprob).unwrap();
                kl = (kl + log_ratio * probability).unwrap();
            }
            let tail = 1.0 - mass;
            let log_student_tail = student_mass.affine(-1.0, 1.0).unwrap().log().unwrap();
            let kl = (kl + log_student_tail.affine(-tail, tail * tail.ln()).unwrap()).unwrap();
            let kd_weight = f64::from(kd_weight);
            let weighted_ce = ce.affine(1.0 - kd_weight, 0.0).unwrap();
            terms.push((weighted_ce + kl.affine(kd_weight, 0.0)).unwrap());
        }
        let mut loss = Tensor::stack(&terms, 0).unwrap().sum_all().unwrap();
        for (span, nll) in &batch.chunks_C {
            let label_loss = |n: usize| {
                let logq = logq.get(n).unwrap();
                logq.get(batch.labels_N[n] as usize).unwrap().neg().unwrap()
            };
            let label_losses: Vec<Tensor> = span.clone().map(label_loss).collect();
            // The ALM loss is b - a + a log(a / b) for the negative log-likelihoods a of the teacher and b of the
            // student.
            let b = Tensor::stack(&label_losses, 0).unwrap().sum_all().unwrap();
            let a = f64::from(*nll);
            let log = b.log().unwrap().affine(-a, a * a.ln() - a).unwrap();
            loss = (loss + ((b + log).unwrap() * ALM_WEIGHT).unwrap()).unwrap();
        }
        let loss = (loss / batch.positions_N.len() as f64).unwrap();
        let store = loss.backward().unwrap();
        let get = |(name, var): (&String, &Var)| {
            let gradient = store
                .get(var)
                .unwrap_or_else(|| panic!("candle computed no gradient of {name}"));
            let gradient = gradient.flatten_all().unwrap().to_vec1().unwrap();
            (name.clone(), gradient)
        };
        let loss = f64::from(loss.to_scalar::<f32>().unwrap());
        (loss, self.vars.iter().map(get).collect())
    }
}

/// A batch of one sequence.
type Example = Batch;

/// Returns eight examples of different lengths. Some positions belong to the prompt. Some supervised positions have no
/// soft labels, and some pairs of positions are chunks.
fn examples() -> Vec<Example> {
    let mut random = fastrand::Rng::with_seed(5);
    let example = |(row, &length): (usize, &usize)| {
        let ids: Vec<u32> = (0..length + 1).map(|_| random.u32(..VOCABULARY)).collect();
        let mut batch = Batch {
            segments_B: std::iter::once(0..length + 1).collect(),
            keys_B: vec![row.to_string()],
            soft_offsets_N1: vec![0],
            ..Batch::default()
        };
        for position in random.usize(0..length)..length {
            batch.positions_N.push(position as u32);
            batch.labels_N.push(ids[position + 1]);
            let number = batch.positions_N.len() - 1;
            if position % 5 == 3 && number > 0 {
                batch.chunks_C.push((number - 1..number + 1, 2.5));
            }
            if position % 5 < 2 || position % 5 == 4 {
                batch
                    .soft_ids_NK
                    .extend([3, ids[position + 1].max(10) - 6, 59]);
                batch.soft_logprobs_NK.extend([-1.2, -0.9, -2.5]);
            }
            batch.soft_offsets_N1.push(batch.soft_ids_NK.len());
        }
        batch.input_ids_T = ids;
        batch
    };
    let lengths = [70, 13, 1, 33, 2, 64, 65, 40];
    lengths.iter().enumerate().map(example).collect()
}

/// Concatenates examples to one batch.
fn joined<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Batch {
    let mut batch = Batch {
        soft_offsets_N1: vec![0],
        ..Batch::default()
    };
    for example in examples {
        let (token, soft) = (batch.input_ids_T.len(), batch.soft_ids_NK.len());
        let first = batch.labels_N.len();
        let chunks = example.chunks_C.iter();
        let chunks = chunks.map(|(span, nll)| (first + span.start..first + span.end, *nll));
        batch.chunks_C.extend(chunks);
        batch.input_ids_T.extend(&example.input_ids_T);
        batch.segments_B.push(token..batch.input_ids_T.len());
        batch.keys_B.extend(example.keys_B.clone());
        let positions = example.positions_N.iter();
        batch
            .positions_N
            .extend(positions.map(|position| position + token as u32));
        batch.labels_N.extend(&example.labels_N);
        let offsets = example.soft_offsets_N1[1..].iter();
        batch
            .soft_offsets_N1
            .extend(offsets.map(|offset| offset + soft));
        batch.soft_ids_NK.extend(&example.soft_ids_NK);
        batch.soft_logprobs_NK.extend(&example.soft_logprobs_NK);
    }
    batch
}

fn norm(values: &[f32]) -> f64 {
    let squares = values.iter().map(|v| f64::from(*v).powi(2));
    squares.sum::<f64>().sqrt()
}

/// Returns the norm of the difference of two gradients, relative to the larger norm.
pub fn difference(a: &[f32], b: &[f32]) -> f64 {
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    // Without the floor, two gradients near zero could have a large relative difference.
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
fn tape_gradients_agree_with_candle_autograd() {
    for (tied, kd) in [(true, 0.5), (false, 1.0), (true, 0.0)] {
        let student = Trainable::tiny(tied);
        let batch = joined(&examples());
        let (loss, gradients) =
            student.gradients(std::slice::from_ref(&batch), kd, Activations::Keep);
        let (expected_loss, expected) = student.reference(&batch, kd);
        assert!((loss - expected_loss).abs() < 1e-4 * expected_loss);
        for (name, gradient) in &gradients {
            assert!(norm(gradient) > 1e-6, "{name} has a zero gradient");
        }
        assert_same(&gradients, &expected, 1e-4);
    }
}

#[test]
fn activation_recomputation_gives_identical_gradients() {
    let student = Trainable::tiny(true);
    let batches = [joined(&examples())];
    let without_recomputation = student.gradients(&batches, 0.5, Activations::Keep);
    let recomputed = student.gradients(&batches, 0.5, Activations::Recompute);
    assert_eq!(without_recomputation, recomputed);
}

#[test]
fn gradients_are_identical_for_any_number_of_threads() {
    let student = Trainable::tiny(true);
    let batches = [joined(&examples())];
    let gradients_with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.build().unwrap();
        pool.install(|| student.gradients(&batches, 0.5, Activations::Keep))
    };
    let one = gradients_with(1);
    assert_eq!(one, gradients_with(2));
    assert_eq!(one, gradients_with(3));
}

#[test]
fn gradients_do_not_depend_on_micro_batch_size_or_order() {
    let student = Trainable::tiny(true);
    let examples = examples();
    let micro_batches =
        |micro: usize| -> Vec<Batch> { examples.chunks(micro).map(joined).collect() };
    let (loss, expected) = student.gradients(&micro_batches(8), 0.5, Activations::Keep);
    for micro in [4, 2, 1] {
        let (other_loss, other) = student.gradients(&micro_batches(micro), 0.5, Activations::Keep);
        assert!((loss - other_loss).abs() < 1e-6 * loss);
        assert_same(&expected, &other, 1e-5);
    }
    let reversed = joined(examples.iter().rev());
    let (_, other) = student.gradients(&[reversed], 0.5, Activations::Keep);
    assert_same(&expected, &other, 1e-5);
}

/// Moves each parameter along a random direction. The slope of the loss along the direction must equal the product of
/// gradient and direction.
#[test]
fn tape_gradients_agree_with_finite_differences() {
    let (config, tensors) = tiny(true);
    let student = Trainable::new(&config, &tensors);
    let batches = [joined(&examples())];
    let (_, gradients) = student.gradients(&batches, 0.5, Activations::Keep);
    let mut random = fastrand::Rng::with_seed(3);
    for (name, gradient) in &gradients {
        let norm = norm(gradient);
        // The direction is partly the one of the gradient, so that the loss changes by more than rounding errors.
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
            moved.gradients(&batches, 0.5, Activations::Keep).0
        };
        let step = (2e-3 / norm).min(1e-2);
        let measured = (loss_at(step) - loss_at(-step)) / (2.0 * step);
        let error = (measured - expected).abs() / expected.abs();
        assert!(
            error < 0.02,
            "{name}: the finite difference is {measured}, the backward pass gives {expected}"
        );
    }
}
