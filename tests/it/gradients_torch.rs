//! Logits, loss and the gradient of every parameter against PyTorch's: row T3 of the promises.
//! `tests/python/make_gradient_golden.py` made the files.

use std::path::Path;

use distill::data::batch::Batch;
use distill::model::tape::Memory;
use distill::model::weights::{self, Tensors};
use distill::model::{Input, ModelConfig};
use serde_json::Value;

use crate::gradients::{Trainable, difference};

/// A golden case: the model, its batch, and PyTorch's numbers.
struct Golden {
    json: Value,
    tensors: Tensors,
    student: Trainable,
}

impl Golden {
    fn load(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/gradients");
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let tensors = weights::load_file(&folder.join(format!("{name}.safetensors"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json["config"].to_string()).unwrap();
        let config = ModelConfig::load(dir.path()).unwrap();
        let start = tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix("weight.")?, tensor)))
            .map(|(name, tensor)| (name.to_string(), tensor.clone()))
            .collect();
        Self {
            student: Trainable::new(&config, &start),
            json,
            tensors,
        }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    fn kd(&self) -> f32 {
        self.json["lambda"].as_f64().unwrap() as f32
    }

    /// All sequences end to end. The last token of each is only a label.
    fn batch(&self) -> Batch {
        let mut batch = Batch {
            soft_offsets: vec![0],
            ..Batch::default()
        };
        for sequence in self.json["sequences"].as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(sequence["ids"].clone()).unwrap();
            let start = batch.input_ids.len();
            batch.input_ids.extend(&ids[..ids.len() - 1]);
            batch.segments.push(start..batch.input_ids.len());
            batch.keys.push(String::new());
            let first = sequence["first"].as_u64().unwrap() as usize;
            for (index, soft) in sequence["soft"].as_array().unwrap().iter().enumerate() {
                let at = first + index;
                batch.positions.push((start + at) as u32);
                batch.labels.push(ids[at + 1]);
                if !soft.is_null() {
                    let ids: Vec<u32> = serde_json::from_value(soft["ids"].clone()).unwrap();
                    let logprobs = soft["logprobs"].clone();
                    let logprobs: Vec<f32> = serde_json::from_value(logprobs).unwrap();
                    batch.soft_ids.extend(ids);
                    batch.soft_logprobs.extend(logprobs);
                }
                batch.soft_offsets.push(batch.soft_ids.len());
            }
        }
        batch
    }
}

#[test]
fn logits_loss_and_gradients_agree_with_pytorch() {
    for name in ["tied", "untied"] {
        let golden = Golden::load(name);
        let batch = golden.batch();
        let all: Vec<u32> = (0..batch.input_ids.len() as u32).collect();
        let input = Input {
            input_ids: &batch.input_ids,
            segments: &batch.segments,
            positions: &all,
        };
        let model = &golden.student.model;
        let logits = model.map_logits(input, |_, row| row.to_vec()).unwrap();
        for (index, segment) in batch.segments.iter().enumerate() {
            let expected = golden.values(&format!("logits.{index}"));
            let ours = logits[segment.clone()].concat();
            let worst = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let worst = worst.fold(0.0, f32::max);
            assert!(
                worst < 1e-4,
                "{name}: logits of {index} differ by {worst:e}"
            );
        }
        let batches = [batch];
        let (loss, gradients) = golden
            .student
            .gradients(&batches, golden.kd(), Memory::Record);
        let expected = golden.json["loss"].as_f64().unwrap();
        assert!(
            (loss - expected).abs() < 1e-5 * expected,
            "{name}: {loss} and {expected}"
        );
        for (parameter, gradient) in &gradients {
            let expected = golden.values(&format!("gradient.{parameter}"));
            let difference = difference(gradient, &expected);
            assert!(
                difference < 2e-5,
                "{name}: {parameter} differs by {difference:e}"
            );
        }
    }
}
