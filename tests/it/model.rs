//! Models built from weights: incremental decoding, packed sequences, and errors for weights that do not match.

use candle_core::{DType, Device, Tensor};
use distill::config::StudentConfig;
use distill::model::config::shape::ModelConfig;
use distill::model::weights::{self, Tensors};
use distill::model::{Model, ModelInput, SourceInput, parameters};

/// Returns a small decoder with grouped-query attention: hidden size 32, 2 layers, 4 query and 2 key/value heads, and a
/// vocabulary of 61.
pub fn tiny(tied: bool) -> (ModelConfig, Tensors) {
    let student = StudentConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        tie_word_embeddings: tied,
        max_position_embeddings: 256,
        ..StudentConfig::default()
    };
    let config = ModelConfig::from_student(&student, 61, &[0], None).unwrap();
    let mut tensors = parameters::random_weights(&config, 7).unwrap();
    // Enlarged, so that attention is far from uniform.
    for (name, tensor) in &mut tensors {
        if !name.contains("norm") {
            *tensor = (&*tensor * 8.0).unwrap();
        }
    }
    (config, tensors)
}

/// Returns the logits at every position of one sequence.
pub fn all_logits(model: &Model, ids: &[u32]) -> Vec<Vec<f32>> {
    let positions: Vec<u32> = (0..ids.len() as u32).collect();
    logits_at(
        model,
        ids,
        std::slice::from_ref(&(0..ids.len())),
        &positions,
    )
}

fn logits_at(
    model: &Model,
    input_ids: &[u32],
    segments: &[std::ops::Range<usize>],
    positions: &[u32],
) -> Vec<Vec<f32>> {
    let input = ModelInput {
        input_ids_T: input_ids,
        segments_B: segments,
        positions_N: positions,
        source: SourceInput::default(),
    };
    model
        .map_logits(input, |_, logits| logits.to_vec())
        .unwrap()
}

pub fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() < tolerance, "value {i}: {a} and {b}");
    }
}

#[test]
fn kv_cache_steps_give_the_logits_of_one_pass() {
    let (config, tensors) = tiny(true);
    let model = Model::new(config, &tensors).unwrap();
    let a: Vec<u32> = (0..90).map(|i| (i * 7 + 1) % 61).collect();
    let b: Vec<u32> = (0..40).map(|i| (i * 5 + 3) % 61).collect();
    let all_a = all_logits(&model, &a);
    let all_b = all_logits(&model, &b);
    let mut cache_a = model.new_cache();
    let mut cache_b = model.new_cache();
    model.step(&[&a[..70]], &mut [&mut cache_a]).unwrap();
    // `a` decodes one token per step. `b` starts with its prompt, then decodes as well.
    let mut caches = [&mut cache_a, &mut cache_b];
    let logits = model.step(&[&a[70..71], &b[..33]], &mut caches).unwrap();
    assert_close(&logits[..61], &all_a[70], 1e-4);
    assert_close(&logits[61..], &all_b[32], 1e-4);
    for i in 1..7 {
        let next_a = &a[70 + i..71 + i];
        let next_b = &b[32 + i..33 + i];
        let logits = model.step(&[next_a, next_b], &mut caches).unwrap();
        assert_close(&logits[..61], &all_a[70 + i], 1e-4);
        assert_close(&logits[61..], &all_b[32 + i], 1e-4);
    }
    assert_eq!(cache_b.len(), 39);
}

#[test]
fn segments_do_not_attend_to_each_other() {
    let (config, tensors) = tiny(true);
    let model = Model::new(config, &tensors).unwrap();
    let a: Vec<u32> = (0..20).collect();
    let b: Vec<u32> = (20..61).collect();
    let joined: Vec<u32> = a.iter().chain(&b).copied().collect();
    let separate = logits_at(&model, &b, std::slice::from_ref(&(0..41)), &[40]);
    let packed = logits_at(&model, &joined, &[0..20, 20..61], &[60]);
    assert_close(&separate[0], &packed[0], 1e-5);
}

#[test]
fn weights_that_do_not_match_the_config_are_named() {
    let (config, mut tensors) = tiny(true);
    tensors.remove("model.layers.1.mlp.up_proj.weight");
    let error = Model::new(config.clone(), &tensors).err().unwrap();
    assert!(
        error
            .to_string()
            .contains("model.layers.1.mlp.up_proj.weight")
    );
    // The weights have more layers than the config.
    let names = tensors.keys().cloned().collect();
    let error = weights::check_layers(&names, "model.layers.", 1, "num_hidden_layers");
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("model.layers.1.") && error.contains("= 1"),
        "{error}"
    );
    weights::check_layers(&names, "model.layers.", 2, "num_hidden_layers").unwrap();
    let (_, mut tensors) = tiny(true);
    let wrong = Tensor::zeros((3, 3), DType::F32, &Device::Cpu).unwrap();
    tensors.insert("model.layers.0.self_attn.q_proj.weight".into(), wrong);
    let error = Model::new(config, &tensors).err().unwrap();
    assert!(error.to_string().contains("[3, 3]"), "{error}");
}
