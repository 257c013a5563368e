//! The fused operations of the CPU, compared with the candle operations of other devices: single operations, a training
//! run, and optimizer updates.

use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use distill::config::TrainConfig;
use distill::model::candle_graph::CandleGraph;
use distill::model::gradients::Gradients;
use distill::model::graph::{AttentionKind, AttentionLayer, Graph, Segments};
use distill::model::projection::Projection;
use distill::model::tape::{Activations, KeyValueSource, Tape, TapeSettings};
use distill::model::weights::{self, Tensors};
use distill::model::{Backend, Model};
use distill::ops::adamw::{self, AdamWStep};
use distill::ops::arena::Arena;
use distill::ops::attention::Heads;
use distill::ops::matmul::Precision;
use distill::ops::rope::RopeTable;
use distill::train::ema::Ema;
use distill::train::loss::divergence::Divergence;
use distill::train::loss::position::{LossWeights, SoftTerm};
use distill::train::objective::{self, ModelPair};
use distill::train::optimizer::Optimizer;
use distill::train::trainable::TrainableModel;

use super::{VOCABULARY, difference, examples, joined};
use crate::model::tiny;

/// The variables of one attention layer with biases and a norm of the queries. The window is a parameter of `run`.
struct TinyGraphModel(Vec<Var>);

impl TinyGraphModel {
    fn new(heads: Heads) -> Self {
        let q_width = heads.query_width();
        let kv_width = heads.key_value_width();
        let shapes = [
            vec![VOCABULARY as usize, 24],
            vec![q_width, 24],
            vec![q_width],
            vec![kv_width, 24],
            vec![kv_width, 24],
            vec![heads.head_dim],
            vec![24, q_width],
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
        graph.mark_checkpoint(&x);
        let with_bias = |weight: &Var, bias: &Var| Projection {
            bias: Some(bias.as_tensor().clone()),
            ..Projection::new(weight)
        };
        let q = graph.linear(&x, &with_bias(q, q_bias)).unwrap();
        // A norm per head, as in Qwen 3.
        let q = graph.rms_norm(&q, head_norm, 1e-5).unwrap();
        let k = graph.linear(&x, &Projection::new(k)).unwrap();
        let v = graph.linear(&x, &Projection::new(v)).unwrap();
        let (q, k) = (graph.rope(q).unwrap(), graph.rope(k).unwrap());
        let layer = AttentionLayer {
            index: 0,
            kind: AttentionKind::Causal { window },
            bias: None,
        };
        let heads = graph.attention(&layer, q, Some([k, v])).unwrap();
        let y = graph.add_linear(x, &heads, &with_bias(o, o_bias)).unwrap();
        graph.select_rows(y, positions).unwrap()
    }
}

#[test]
fn windows_biases_and_qk_norms_agree_with_candle() {
    let heads = Heads::new(6, 2, 8);
    let tiny_model = TinyGraphModel::new(heads);
    let rope = RopeTable::new(&[1.0, 0.3, 0.1, 0.01], 200);
    let ranges: [Range<usize>; 4] = [0..150, 150..151, 151..214, 214..280];
    let segments = Segments {
        decoder: &ranges,
        source: &[],
    };
    let ids: Vec<u32> = (0..280).map(|i| (i * 17 + 5) % VOCABULARY).collect();
    let positions: Vec<u32> = (3..280).step_by(2).collect();
    let arena = Arena::default();
    for window in [None, Some(2), Some(5), Some(70), Some(1000)] {
        let mut candle =
            CandleGraph::new(heads, Some(&rope), segments, DType::F32, &Device::Cpu).unwrap();
        let expected = tiny_model.run(&mut candle, &ids, &positions, window);
        let store = expected
            .sin()
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        for activations in [Activations::Keep, Activations::Recompute] {
            let settings = TapeSettings {
                arena: &arena,
                heads,
                rope: Some(&rope),
                precision: Precision::F32,
            };
            let mut tape = Tape::new(settings, segments, KeyValueSource::Batch, activations);
            let root = tiny_model.run(&mut tape, &ids, &positions, window);
            let values = tape.value(&root).unwrap();
            assert!(difference(&values, &expected) < 1e-5, "window {window:?}");
            let mut gradient = arena.take(values.len()).unwrap();
            for (gradient, value) in gradient.iter_mut().zip(&**values) {
                *gradient = value.cos();
            }
            drop(values);
            let mut gradients = Gradients::new(arena.clone());
            tape.backward(root, gradient, &mut gradients).unwrap();
            for (index, var) in tiny_model.0.iter().enumerate() {
                let expected: Vec<f32> = store
                    .get(var)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                let difference =
                    difference(gradients.get_tape(var.as_tensor()).unwrap(), &expected);
                assert!(
                    difference < 1e-4,
                    "window {window:?}, variable {index}: {difference:e}"
                );
            }
        }
    }
}

/// Results of a training run.
struct TrainingResult {
    losses: Vec<f64>,
    /// Moving average of the weights.
    average: Tensors,
    /// State of the optimizer.
    moments: Tensors,
}

fn train(backend: Backend) -> TrainingResult {
    let (config, tensors) = tiny(true);
    let mut student = TrainableModel::new(config, tensors, Tensors::new(), |_| false).unwrap();
    student.model.set_backend(backend);
    let mut optimizer = Optimizer::new(&student, &[]).unwrap();
    let ema = Ema::new(&student, 0.5).unwrap();
    let mut gradients = student.model.gradients();
    let batch = joined(&examples());
    let (config, tensors) = tiny(false);
    let mut teacher = Model::new(config, &tensors).unwrap();
    teacher.set_backend(backend);
    let settings = TrainConfig {
        max_grad_norm: 0.5,
        ..TrainConfig::default()
    };
    let weights = LossWeights {
        soft: [SoftTerm {
            divergence: Divergence::Tail,
            weight: 0.5,
        }; 2],
        scale: 1.0 / batch.positions_N.len() as f32,
        ..LossWeights::default()
    };
    let mut step = |number: u64| {
        let models = ModelPair {
            student: &student.model,
            teacher: (number > 6).then_some(&teacher),
        };
        let pass = objective::gradients(models, &batch, weights, Activations::Keep, &mut gradients);
        let norm = optimizer.gradient_norm(&gradients).unwrap();
        optimizer.update(&settings, 1e-2, norm, &gradients).unwrap();
        ema.update(&student, number).unwrap();
        gradients.clear();
        pass.unwrap().0
    };
    let losses = (1..=8).map(&mut step).collect();

    // Writing and reading preserves the state of the optimizer.
    let dir = tempfile::tempdir().unwrap();
    let [path, restored_path] = ["a", "b"].map(|name| dir.path().join(name));
    weights::write(&path, optimizer.state().unwrap()).unwrap();
    let mut restored = Optimizer::new(&student, &[]).unwrap();
    weights::with_safetensors(&path, |file| restored.restore(file, 8)).unwrap();
    weights::write(&restored_path, restored.state().unwrap()).unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(restored_path).unwrap());
    TrainingResult {
        losses,
        average: ema.tensors().unwrap(),
        moments: weights::load_file(&path).unwrap(),
    }
}

#[test]
fn training_on_candle_agrees_with_training_on_tape() {
    let (tape, candle) = (train(Backend::CpuTape), train(Backend::Candle));
    assert!(tape.losses[5] < 0.9 * tape.losses[0], "{:?}", tape.losses);
    for (tape, candle) in tape.losses.iter().zip(&candle.losses) {
        assert!(
            (tape - candle).abs() < 1e-3 * tape,
            "losses {tape} and {candle}"
        );
    }
    for (tape, candle) in [
        (&tape.average, &candle.average),
        (&tape.moments, &candle.moments),
    ] {
        assert!(tape.keys().eq(candle.keys()));
        for ((name, tape), candle) in tape.iter().zip(candle.values()) {
            let [a, b] = [tape, candle].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let difference = difference(&a, &b);
            assert!(difference < 1e-2, "{name} differs by {difference:e}");
        }
    }
}

#[test]
fn adamw_on_candle_makes_the_same_updates() {
    let mut random = fastrand::Rng::with_seed(9);
    let mut values = || -> Vec<f32> { (0..500).map(|_| random.f32() - 0.5).collect() };
    let var = |values: &[f32]| Var::from_slice(values, 500, &Device::Cpu).unwrap();
    let start = values();
    let (fused, candle) = (var(&start), var(&start));
    let (mut first, mut second) = (vec![0.0; 500], vec![0.0; 500]);
    let mut moments = [0, 1].map(|_| candle.zeros_like().unwrap());
    for number in 1..=5 {
        let gradient = values();
        let step = AdamWStep {
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
        adamw::adamw_candle(&candle, &gradient, &mut moments, step).unwrap();
    }
    let [fused, candle] = [fused, candle].map(|var| var.to_vec1::<f32>().unwrap());
    assert!(difference(&fused, &candle) < 1e-6);
    assert!(difference(&fused, &start) > 1e-2);
}
