//! Training of an encoder-decoder.

use distill::config::{BestMetric, Config, KdMode, LayerChoice, StudentInit, StudentType};
use distill::data::batch::Batch;
use distill::model::tape::Activations;
use distill::model::{Model, network, weights};
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use distill::train::loss::position::LossWeights;
use distill::train::summary::{StartMode, TrainSummary};
use distill::train::trainable::TrainableModel;
use distill::train::{self, objective};
use serde_json::json;

use super::write_model;
use crate::train::small_config;

/// Creates a run folder with a tiny T5, and conversations in which the source determines the answer.
pub(super) fn run_folder() -> (tempfile::TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    write_model(&model, 1);
    let rows: String = (0..60)
        .map(|i| {
            let (word, answer) = [("the", "in"), ("red", "he sat")][i % 2];
            let row = json!({"id": i.to_string(), "messages": [
                {"role": "user", "content": format!("question {} {word} one", i * 7)},
                {"role": "assistant", "content": answer},
            ]});
            format!("{row}\n")
        })
        .collect();
    std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    let mut config = small_config(dir.path());
    config.train.learning_rate = 1e-2;
    (dir, config)
}

fn run(config: &Config) -> TrainSummary {
    train::run(config, StartMode::Fresh.into()).unwrap()
}

fn student_weights(config: &Config) -> Vec<u8> {
    std::fs::read(config.student_dir().join("model.safetensors")).unwrap()
}

fn card(config: &Config) -> String {
    std::fs::read_to_string(config.student_dir().join("README.md")).unwrap()
}

#[test]
fn student_learns_answers_that_sources_determine_and_generates_them() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(60);
    for init in [StudentInit::Pretrained, StudentInit::Random] {
        config.student.init = init;
        config.student.model_type = StudentType::T5;
        config.student.hidden_size = 16;
        config.student.intermediate_size = 32;
        config.student.num_hidden_layers = 2;
        config.student.num_attention_heads = 2;
        let accuracy = run(&config).validation.token_accuracy.unwrap();
        assert!(accuracy > 0.95, "{init:?}: token accuracy {accuracy}");
        let model = Model::load(&config.student_dir()).unwrap();
        let tokenizer = Tokenizer::load(&config.student_dir()).unwrap();
        let prompts: Vec<Vec<u32>> = ["question 3 the one", "question 9 red one"]
            .map(|text| {
                tokenizer
                    .encode_prompt(&[Message::new("user", text)])
                    .unwrap()
            })
            .into();
        let options = distill::model::batcher::GenerateOptions::default();
        let answers =
            distill::model::generate::batch(&model, &tokenizer, &prompts, &options, 2).unwrap();
        let texts: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        assert_eq!(texts, ["in", "he sat"], "{init:?}");
    }
}

/// Micro-batches, packing by the tokens of both sides, activation checkpointing and threads only change rounding, or
/// nothing.
#[test]
fn division_into_micro_batches_does_not_change_gradient_norms() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(3);
    let mut norms = Vec::new();
    for change in [
        |_: &mut Config| {},
        |c: &mut Config| c.train.micro_batch_size = 1,
        |c: &mut Config| c.train.micro_batch_tokens = 30,
        |c: &mut Config| c.train.activation_checkpointing = true,
    ] {
        let mut config = config.clone();
        change(&mut config);
        run(&config);
        let lines = std::fs::read_to_string(config.run_dir.join("metrics.jsonl")).unwrap();
        let norm = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["grad_norm"].as_f64()
        };
        norms.push(lines.lines().filter_map(norm).collect::<Vec<_>>());
    }
    for other in &norms {
        assert_eq!(other.len(), 3);
        for (a, b) in other.iter().zip(&norms[0]) {
            assert!((a - b).abs() / b < 1e-5, "{norms:?}");
        }
    }
    config.train.threads = 1;
    run(&config);
    let one_thread = student_weights(&config);
    config.train.threads = 2;
    run(&config);
    assert!(student_weights(&config) == one_thread);
}

/// The gradients of a packed batch are the sums of those of its examples: documents see neither the sources nor the
/// answers of others.
#[test]
fn packed_examples_are_isolated_on_both_sides() {
    let (_dir, config) = run_folder();
    let tokenizer = Tokenizer::load(&config.student.path).unwrap();
    let data = crate::data::dataset::load(&config, &tokenizer).unwrap();
    let examples: Vec<_> = data.train().iter().take(5).collect();
    let (shape, tensors) = network::load(&config.student.path).unwrap();
    let student = TrainableModel::new(shape, tensors, weights::Tensors::new(), |_| false).unwrap();
    let gradients = |batches: &[Batch], activations| {
        let mut gradients = student.model.gradients();
        for batch in batches {
            let weights = LossWeights::default();
            objective::gradients(&student.model, batch, weights, activations, &mut gradients)
                .unwrap();
        }
        let values = |var: &candle_core::Var| gradients.get_tape(var).unwrap().to_vec();
        student.vars.values().flat_map(values).collect::<Vec<f32>>()
    };
    let packed = gradients(&[Batch::new(examples.clone())], Activations::Keep);
    let separate: Vec<Batch> = examples
        .iter()
        .map(|example| Batch::new([*example]))
        .collect();
    let separate = gradients(&separate, Activations::Keep);
    let scale = packed
        .iter()
        .fold(0.0f32, |max, value| max.max(value.abs()));
    crate::model::assert_close(&packed, &separate, 1e-5 * scale);
    // Every parameter has a gradient.
    assert!(student.vars.len() > 30);
    let recomputed = gradients(&[Batch::new(examples)], Activations::Recompute);
    assert_eq!(recomputed, packed);
}

/// Adam's first step changes each value by the learning rate, here times the root mean square of its parameter.
#[test]
fn learning_rates_follow_the_scale_of_parameters() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(1);
    config.train.warmup_steps = 0;
    config.train.learning_rate = 1e-3;
    config.train.min_learning_rate_ratio = 1.0;
    config.train.weight_decay = 0.0;
    config.train.scale_parameter = true;
    run(&config);
    let (_, before) = network::load(&config.student.path).unwrap();
    let (_, after) = network::load(&config.student_dir()).unwrap();
    let values = |tensor: &candle_core::Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let mut scales = Vec::new();
    for (name, tensor) in &before {
        let (old, new) = (values(tensor).unwrap(), values(&after[name]).unwrap());
        let squares: f32 = old.iter().map(|value| value * value).sum();
        let rms = (squares / old.len() as f32).sqrt();
        let changes = old.iter().zip(&new).map(|(old, new)| (old - new).abs());
        let largest = changes.fold(0.0f32, f32::max);
        let expected = 1e-3 * rms.max(1e-3);
        assert!(
            (largest / expected - 1.0).abs() < 0.05,
            "{name}: {largest}, expected {expected}"
        );
        scales.push(rms);
    }
    let smallest = scales.iter().copied().fold(f32::INFINITY, f32::min);
    assert!(scales.iter().copied().fold(0.0, f32::max) > 2.0 * smallest);
}

/// A run with every feature that has state, interrupted after any step.
#[test]
fn interrupted_run_ends_with_the_same_bytes() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(8);
    config.train.micro_batch_tokens = 40;
    config.train.ema_decay = 0.9;
    config.train.eval_every = 3;
    config.train.checkpoint_every = 1;
    config.train.keep_checkpoints = 100;
    config.train.best = BestMetric::Ce;
    config.loss.kd = KdMode::Temperature;
    config.teacher.local = Some(config.student.path.clone());
    config.teacher.cotrain = true;
    config.train.on_policy = true;
    config.on_policy.max_tokens = 6;
    run(&config);
    let uninterrupted = student_weights(&config);
    let metrics = std::fs::read_to_string(config.run_dir.join("metrics.jsonl")).unwrap();
    for step in [1, 4, 7] {
        for later in step + 1..=8 {
            let path = config.run_dir.join(format!("checkpoints/step-{later:06}"));
            std::fs::remove_dir_all(path).unwrap();
        }
        train::run(&config, StartMode::Resume.into()).unwrap();
        assert!(
            student_weights(&config) == uninterrupted,
            "from step {step}"
        );
    }
    let lines = |text: &str| text.lines().count();
    let resumed = std::fs::read_to_string(config.run_dir.join("metrics.jsonl")).unwrap();
    assert_eq!(lines(&metrics), lines(&resumed));
}

/// Dense KL at each temperature, from a frozen and a co-trained teacher.
#[test]
fn distillation_from_a_local_encoder_decoder_reduces_the_divergence() {
    let (dir, mut config) = run_folder();
    let teacher = dir.path().join("teacher");
    std::fs::create_dir(&teacher).unwrap();
    write_model(&teacher, 77);
    config.teacher.local = Some(teacher);
    config.train.steps = Some(60);
    for (kd, temperature, cotrain) in [
        (KdMode::Temperature, 1.0, false),
        (KdMode::Temperature, 2.0, false),
        (KdMode::Temperature, 4.0, false),
        (KdMode::Tail, 1.0, true),
        (KdMode::ReverseKl, 1.0, false),
    ] {
        config.loss.kd = kd;
        config.loss.kd_weight = Some(0.8);
        config.loss.temperature = temperature;
        config.teacher.cotrain = cotrain;
        let summary = run(&config);
        let kl = summary.validation.kl.unwrap();
        let lines = std::fs::read_to_string(config.run_dir.join("metrics.jsonl")).unwrap();
        let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        let first = first["kl"].as_f64().unwrap();
        assert!(
            kl < 0.7 * first,
            "{kd:?} at {temperature}: from {first} to {kl}"
        );
        assert_eq!(
            summary.validation.soft_positions,
            summary.validation.positions
        );
    }
}

#[test]
fn student_of_kept_layers_trains_and_its_card_names_them() {
    let (_dir, mut config) = run_folder();
    config.student.init = StudentInit::Layers;
    config.student.encoder_layers = Some(LayerChoice::Indices(vec![0, 2]));
    config.student.decoder_layers = Some(LayerChoice::Count(1));
    run(&config);
    let model = Model::load(&config.student_dir()).unwrap();
    assert_eq!(model.config().num_hidden_layers, 1);
    let card = card(&config);
    let kept = "- initial weights: encoder layers 0, 2 of 3; decoder layers 0 of 2 of ";
    let (_, source) = card.split_once(kept).unwrap();
    assert!(source.lines().next().unwrap().ends_with("/model"), "{card}");
    assert!(
        card.contains("pipeline_tag: text2text-generation"),
        "{card}"
    );
}

#[test]
fn adapters_train_and_are_merged() {
    let (_dir, mut config) = run_folder();
    config.lora.rank = 4;
    config.train.steps = Some(60);
    let summary = run(&config);
    let first = summary.validation.ce.unwrap();
    assert!(first < 1.5, "{first}");
    let (_, tensors) = network::load(&config.student_dir()).unwrap();
    assert!(!tensors.keys().any(|name| name.contains("lora")));
}

#[test]
fn source_template_is_saved_with_the_student() {
    let (_dir, mut config) = run_folder();
    config.student.source_template = Some("answer {{ messages[-1]['content'] }}".into());
    run(&config);
    let tokenizer = Tokenizer::load(&config.student_dir()).unwrap();
    let source = tokenizer
        .encode_prompt(&[Message::new("user", "the")])
        .unwrap();
    assert_eq!(source, ["▁answer", "▁the", "</s>"].map(super::id));
    let card = card(&config);
    for text in [
        "answer {{ messages[-1]['content'] }}",
        "apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        "tokenizer(text, return_tensors",
    ] {
        assert!(card.contains(text), "{text}: {card}");
    }
}
