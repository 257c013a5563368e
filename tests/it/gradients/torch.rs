//! Logits, loss and the gradient of every parameter, compared with PyTorch. `tests/python/make_gradient_golden.py` and
//! `tests/python/make_t5_golden.py` made the golden files.

use std::path::Path;

use candle_core::Tensor;
use distill::data::batch::Batch;
use distill::model::config::shape::ModelConfig;
use distill::model::tape::Activations;
use distill::model::weights::{self, Tensors};
use distill::model::{Backend, ModelInput, SourceInput};
use serde_json::Value;

use super::{Trainable, assert_same, difference};

/// A golden case: the model, its batch, and the results of PyTorch.
struct Golden {
    json: Value,
    tensors: Tensors,
    gradients: Tensors,
    student: Trainable,
}

impl Golden {
    fn load(name: &str) -> Self {
        let folder = if T5_CASES.contains(&name) {
            "t5"
        } else {
            "gradients"
        };
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden");
        let folder = golden.join(folder);
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let tensors = weights::load_file(&folder.join(format!("{name}.safetensors"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json["config"].to_string()).unwrap();
        let mut config = ModelConfig::load(dir.path()).unwrap();
        config.adapter_scale = json["adapter_scale"].as_f64().unwrap();
        let with_prefix = |prefix: &str| -> Tensors {
            let strip = |(name, tensor): (&String, &Tensor)| {
                Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()))
            };
            let stored: Tensors = tensors.iter().filter_map(strip).collect();
            // Gradients are converted to the layout in memory like weights.
            config.to_memory_layout(stored).unwrap()
        };
        let weights = with_prefix("weight.");
        let gradients = with_prefix("gradient.");
        let frozen = |name: &str| !gradients.contains_key(name);
        Self {
            student: Trainable::with_frozen(&config, &weights, frozen),
            gradients,
            json,
            tensors,
        }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    fn kd_weight(&self) -> f32 {
        self.json["lambda"].as_f64().unwrap() as f32
    }

    /// Returns all sequences as one batch. The last token of each sequence is a label, not an input.
    fn batch(&self) -> Batch {
        let mut batch = Batch {
            soft_offsets_N1: vec![0],
            ..Batch::default()
        };
        for sequence in self.json["sequences"].as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(sequence["ids"].clone()).unwrap();
            let start = batch.input_ids_T.len();
            batch.input_ids_T.extend(&ids[..ids.len() - 1]);
            batch.segments_B.push(start..batch.input_ids_T.len());
            batch.keys_B.push(String::new());
            if !sequence["source"].is_null() {
                let source: Vec<u32> = serde_json::from_value(sequence["source"].clone()).unwrap();
                let start = batch.source_ids_U.len();
                batch.source_ids_U.extend(source);
                batch
                    .source_segments_B
                    .push(start..batch.source_ids_U.len());
            }
            let first = sequence["first"].as_u64().unwrap() as usize;
            for (index, soft) in sequence["soft"].as_array().unwrap().iter().enumerate() {
                let position = first + index;
                batch.positions_N.push((start + position) as u32);
                batch.labels_N.push(ids[position + 1]);
                if !soft.is_null() {
                    let ids: Vec<u32> = serde_json::from_value(soft["ids"].clone()).unwrap();
                    let logprobs = soft["logprobs"].clone();
                    let logprobs: Vec<f32> = serde_json::from_value(logprobs).unwrap();
                    batch.soft_ids_NK.extend(ids);
                    batch.soft_logprobs_NK.extend(logprobs);
                }
                batch.soft_offsets_N1.push(batch.soft_ids_NK.len());
            }
        }
        batch
    }
}

/// Encoder-decoders: ReLU and a tied head, GEGLU and an untied head.
const T5_CASES: [&str; 3] = ["t5", "t5_v1_1", "mt5"];

/// Golden cases of decoders: every architecture, tied and untied embeddings, biases and LoRA.
const DECODER_CASES: [&str; 8] = [
    "tied", "untied", "biases", "mistral", "qwen2", "qwen3", "gpt2", "lora",
];

fn all_cases() -> impl Iterator<Item = &'static str> {
    DECODER_CASES.into_iter().chain(T5_CASES)
}

/// Returns the largest absolute difference of two values at the same index.
fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn logits_loss_and_gradients_agree_with_pytorch() {
    for name in all_cases() {
        let golden = Golden::load(name);
        let batch = golden.batch();
        let positions: Vec<u32> = (0..batch.input_ids_T.len() as u32).collect();
        let input = ModelInput {
            input_ids_T: &batch.input_ids_T,
            segments_B: &batch.segments_B,
            positions_N: &positions,
            source: SourceInput {
                ids_U: &batch.source_ids_U,
                segments_B: &batch.source_segments_B,
            },
        };
        let model = &golden.student.model;
        let logits = model.map_logits(input, |_, row| row.to_vec()).unwrap();
        for (index, segment) in batch.segments_B.iter().enumerate() {
            let expected = golden.values(&format!("logits.{index}"));
            let ours = logits[segment.clone()].concat();
            let difference = largest_difference(&ours, &expected);
            assert!(
                difference < 1e-4,
                "{name}: logits of sequence {index} differ by {difference:e}"
            );
        }
        let batches = [batch];
        let (loss, gradients) =
            golden
                .student
                .gradients(&batches, golden.kd_weight(), Activations::Keep);
        let expected = golden.json["loss"].as_f64().unwrap();
        assert!(
            (loss - expected).abs() < 1e-5 * expected,
            "{name}: the loss is {loss} instead of {expected}"
        );
        assert_eq!(gradients.len(), golden.gradients.len());
        for (parameter, gradient) in &gradients {
            let expected = &golden.gradients[parameter];
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            let difference = difference(gradient, &expected);
            assert!(
                difference < 2e-5,
                "{name}: {parameter} differs by {difference:e}"
            );
            assert!(gradient.iter().any(|value| *value != 0.0));
        }
    }
}

#[test]
fn candle_graph_agrees_with_tape_in_every_architecture() {
    for name in all_cases() {
        let mut golden = Golden::load(name);
        let batch = golden.batch();
        let (loss, expected) = golden.student.reference(&batch, golden.kd_weight());
        for activations in [Activations::Keep, Activations::Recompute] {
            let (ours, gradients) = golden.student.gradients(
                std::slice::from_ref(&batch),
                golden.kd_weight(),
                activations,
            );
            assert!(
                (loss - ours).abs() < 1e-5 * loss,
                "{name}: the loss is {ours} instead of {loss}"
            );
            assert_same(&gradients, &expected, 1e-4);
        }
        // The candle backend, in two micro-batches.
        golden.student.model.set_backend(Backend::Candle);
        let batches = [batch.clone(), batch];
        let (ours, gradients) =
            golden
                .student
                .gradients(&batches, golden.kd_weight(), Activations::Keep);
        assert!(
            (loss - ours).abs() < 1e-5 * loss,
            "{name}: the loss is {ours} instead of {loss}"
        );
        assert_same(&gradients, &expected, 1e-4);
    }
}

#[test]
fn kv_cache_gives_the_logits_of_one_pass_in_every_architecture() {
    for name in DECODER_CASES {
        let golden = Golden::load(name);
        let model = &golden.student.model;
        let batch = golden.batch();
        // The two longest sequences. The second one starts while the first one decodes.
        let first = &batch.input_ids_T[batch.segments_B[0].clone()];
        let second = &batch.input_ids_T[batch.segments_B[3].clone()];
        let first_logits = golden.values("logits.0");
        let second_logits = golden.values("logits.3");
        let mut cache = model.new_cache();
        let mut second_cache = model.new_cache();
        model.step(&[&first[..20]], &mut [&mut cache]).unwrap();
        let mut caches = [&mut cache, &mut second_cache];
        let mut lengths = (20, 0);
        while lengths.0 < first.len() {
            // The second sequence starts with a prompt of 30 tokens, then decodes one token per step.
            let second_length = if lengths.1 == 0 { 30 } else { lengths.1 + 1 };
            let next = (lengths.0 + 1, second_length);
            let tokens = [&first[lengths.0..next.0], &second[lengths.1..next.1]];
            let logits = model.step(&tokens, &mut caches).unwrap();
            let vocabulary = logits.len() / 2;
            for (ours, (expected, length)) in logits
                .chunks(vocabulary)
                .zip([(&first_logits, next.0), (&second_logits, next.1)])
            {
                let expected = &expected[(length - 1) * vocabulary..length * vocabulary];
                let difference = largest_difference(ours, expected);
                assert!(difference < 1e-4, "{name}, token {length}: {difference:e}");
            }
            lengths = next;
        }
    }
}
