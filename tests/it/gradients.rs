//! Every hand-written backward pass against candle's autograd over the composed operations, and
//! against differences of its forward pass.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::log_softmax;
use distill::config::Train;
use distill::data::batch::Batch;
use distill::model::composed::Composed;
use distill::model::gradients::Gradients;
use distill::model::graph::Graph;
use distill::model::projection::Projection;
use distill::model::tape::{Keys, Memory, Setting, Tape};
use distill::model::{Frame, Input, Model, ModelConfig, weights::Tensors};
use distill::ops::adamw::{self, Step};
use distill::ops::arena::Arena;
use distill::ops::attention::Heads;
use distill::ops::matmul::Precision;
use distill::ops::rope::RopeTable;
use distill::train::loss::Weights;
use distill::train::objective;
use distill::train::optimizer::Optimizer;
use distill::train::student::Student;

use crate::model::tiny;

const VOCABULARY: u32 = 61;

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
        let weights = Weights {
            kd,
            label_smoothing: 0.0,
            scale: 1.0 / positions as f32,
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
        let loss = Tensor::stack(&terms, 0).unwrap().mean_all().unwrap();
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

/// Eight examples of ragged lengths; some positions are prompt, some have no soft labels.
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
            if position % 3 != 2 {
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

/// A little model of its own, with what the decoders of the other tests do not use.
struct Little(Vec<Var>);

impl Little {
    fn new(heads: Heads) -> Self {
        let (wide, narrow) = (heads.query_width(), heads.key_value_width());
        let shapes = [
            vec![VOCABULARY as usize, 24],
            vec![wide, 24],
            vec![wide],
            vec![narrow, 24],
            vec![narrow, 24],
            vec![heads.channels],
            vec![24, wide],
            vec![24],
        ];
        let mut random = fastrand::Rng::with_seed(2);
        let var = |shape: &Vec<usize>| {
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| random.f32() - 0.5)
                .collect();
            let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
            Var::from_tensor(&tensor).unwrap()
        };
        Self(shapes.iter().map(var).collect())
    }

    fn run<G: Graph>(
        &self,
        graph: &mut G,
        ids: &[u32],
        positions: &[u32],
        window: Option<usize>,
    ) -> G::Value {
        let [table, q, q_bias, k, v, head_norm, o, o_bias] = &self.0[..] else {
            unreachable!()
        };
        let x = graph.embed(table, ids).unwrap();
        graph.keep(&x);
        let with_bias = |weight: &Var, bias: &Var| Projection {
            bias: Some(bias.as_tensor().clone()),
            ..Projection::new(weight)
        };
        let q = graph.linear(&x, &with_bias(q, q_bias)).unwrap();
        // The norm of every head, as some architectures have it.
        let q = graph.rms_norm(&q, head_norm, 1e-5).unwrap();
        let k = graph.linear(&x, &Projection::new(k)).unwrap();
        let v = graph.linear(&x, &Projection::new(v)).unwrap();
        let (q, k) = (graph.rope(q).unwrap(), graph.rope(k).unwrap());
        let heads = graph.attention(0, [q, k, v], window).unwrap();
        let y = graph.add_linear(x, &heads, &with_bias(o, o_bias)).unwrap();
        graph.rows(y, positions).unwrap()
    }
}

#[test]
fn windows_biases_and_norms_of_heads_agree_with_candle() {
    let heads = Heads {
        query: 6,
        key_value: 2,
        channels: 8,
    };
    let little = Little::new(heads);
    let rope = RopeTable::new(&[1.0, 0.3, 0.1, 0.01], 200);
    let segments: [Range<usize>; 4] = [0..150, 150..151, 151..214, 214..280];
    let ids: Vec<u32> = (0..280).map(|i| (i * 17 + 5) % VOCABULARY).collect();
    let positions: Vec<u32> = (3..280).step_by(2).collect();
    let arena = Arena::default();
    for window in [None, Some(2), Some(5), Some(70), Some(1000)] {
        let mut composed =
            Composed::new(heads, Some(&rope), &segments, DType::F32, &Device::Cpu).unwrap();
        let expected = little.run(&mut composed, &ids, &positions, window);
        let store = expected
            .sin()
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        for memory in [Memory::Record, Memory::Checkpoint] {
            let setting = Setting {
                arena: &arena,
                heads,
                rope: Some(&rope),
                precision: Precision::F32,
            };
            let mut tape = Tape::new(setting, &segments, Keys::Batch, memory);
            let root = little.run(&mut tape, &ids, &positions, window);
            let values = tape.value(&root).unwrap();
            assert!(difference(&values, &expected) < 1e-5, "window {window:?}");
            let mut gradient = arena.take(values.len()).unwrap();
            for (gradient, value) in gradient.iter_mut().zip(&**values) {
                *gradient = value.cos();
            }
            drop(values);
            let mut gradients = Gradients::new(arena.clone());
            tape.backward(root, gradient, &mut gradients).unwrap();
            for (index, var) in little.0.iter().enumerate() {
                let expected: Vec<f32> = store
                    .get(var)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                let difference = difference(gradients.get(var.as_tensor()).unwrap(), &expected);
                assert!(
                    difference < 1e-4,
                    "window {window:?}, variable {index}: {difference:e}"
                );
            }
        }
    }
}

/// The losses of some steps, whichever operations compute them.
fn losses(frame: Frame) -> Vec<f64> {
    let (config, tensors) = tiny(true);
    let mut student = Student::new(config, tensors, Tensors::new(), &[]).unwrap();
    student.model.set_frame(frame);
    let mut optimizer = Optimizer::new(&student.vars, &[]).unwrap();
    let mut gradients = student.model.gradients();
    let batch = joined(&examples());
    let settings = Train {
        max_grad_norm: 0.5,
        ..Train::default()
    };
    let weights = Weights {
        kd: 0.5,
        label_smoothing: 0.0,
        scale: 1.0 / batch.positions.len() as f32,
    };
    let mut step = || {
        let model = &student.model;
        let pass = objective::gradients(model, &batch, weights, Memory::Record, &mut gradients);
        let norm = optimizer.gradient_norm(&gradients).unwrap();
        optimizer.update(&settings, 1e-2, norm, &gradients).unwrap();
        gradients.clear();
        pass.unwrap().0
    };
    (0..8).map(|_| step()).collect()
}

#[test]
fn a_training_in_composed_operations_goes_the_same_way() {
    let (tape, composed) = (losses(Frame::Tape), losses(Frame::Composed));
    assert!(tape[7] < 0.9 * tape[0], "{tape:?}");
    for (tape, composed) in tape.iter().zip(&composed) {
        assert!(
            (tape - composed).abs() < 1e-3 * tape,
            "{tape} and {composed}"
        );
    }
}

#[test]
fn adamw_in_composed_operations_makes_the_same_updates() {
    let mut random = fastrand::Rng::with_seed(9);
    let mut values = || -> Vec<f32> { (0..500).map(|_| random.f32() - 0.5).collect() };
    let var = |values: &[f32]| Var::from_slice(values, 500, &Device::Cpu).unwrap();
    let start = values();
    let (fused, composed) = (var(&start), var(&start));
    let (mut first, mut second) = (vec![0.0; 500], vec![0.0; 500]);
    let mut moments = [0, 1].map(|_| composed.zeros_like().unwrap());
    for number in 1..=5 {
        let gradient = values();
        let step = Step {
            number,
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 0.7,
        };
        adamw::adamw(&fused, &gradient, &mut first, &mut second, step).unwrap();
        let gradient = Tensor::new(gradient, &Device::Cpu).unwrap();
        adamw::composed(&composed, &gradient, &mut moments, step).unwrap();
    }
    let [fused, composed] = [fused, composed].map(|var| var.to_vec1::<f32>().unwrap());
    assert!(difference(&fused, &composed) < 1e-6);
    assert!(difference(&fused, &start) > 1e-2);
}
