//! LoRA: only the adapters are trained, and the saved student has them merged.

use std::collections::BTreeSet;

use candle_core::Tensor;
use distill::config::{Config, StudentInit};
use distill::exit::Exit;
use distill::model::weights::{self, Tensors};
use distill::train;
use distill::train::summary::StartMode;

use super::{metrics, run_folder, weights};
use crate::gradients::difference;

const RANK: usize = 2;
const ALPHA: f64 = 3.0;

fn with_adapters(config: &mut Config) {
    config.lora.rank = RANK;
    config.lora.alpha = ALPHA;
    config.lora.targets = ["q_proj", r"layers\.1\.mlp\.down"]
        .map(|pattern| pattern.parse().unwrap())
        .into();
    config.train.checkpoint_every = 1;
    config.train.keep_checkpoints = 100;
}

fn has_adapter(name: &str) -> bool {
    name.contains("q_proj") || name.contains("layers.1.mlp.down")
}

fn student(config: &Config) -> Tensors {
    weights::load_file(&config.student_dir().join("model.safetensors")).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn lora_trains_only_adapters_and_saves_them_merged() {
    let (dir, mut config) = run_folder();
    config.train.steps = Some(40);
    train::run(&config, StartMode::New.into()).unwrap();
    let before = student(&config);
    config.student.init = StudentInit::Pretrained;
    config.student.path = config.student_dir();
    config.run_dir = config.run_dir.with_file_name("adapted");
    // Swap the answers, so that the pretrained student is wrong.
    let rows = dir.path().join("rows.jsonl");
    let text = std::fs::read_to_string(&rows).unwrap();
    let [first, second] = ["\"content\":\"in\"", "\"content\":\"he\""];
    let swapped = text
        .replace(first, "?")
        .replace(second, first)
        .replace('?', second);
    std::fs::write(&rows, swapped).unwrap();

    config.train.steps = Some(12);
    with_adapters(&mut config);
    let summary = train::run(&config, StartMode::New.into()).unwrap();
    let lines = metrics(&config);
    let losses: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    assert!(losses[11] < 0.9 * losses[0], "{losses:?}");

    let checkpoint = config.run_dir.join("checkpoints/step-000012");
    let adapters = weights::load_file(&checkpoint.join("model.safetensors")).unwrap();
    let parameters: usize = adapters.values().map(|tensor| tensor.elem_count()).sum();
    assert_eq!(summary.trained_parameters, parameters);
    assert!(parameters < summary.parameters / 2);
    let modules: BTreeSet<&str> = adapters
        .keys()
        .map(|name| name.split(".lora_").next().unwrap())
        .collect();
    assert_eq!(modules.len(), 3, "{modules:?}");

    let after = student(&config);
    assert!(after.keys().eq(before.keys()));
    for (name, after) in &after {
        let before = &before[name];
        let module = name.strip_suffix(".weight").unwrap();
        assert_eq!(modules.contains(module), has_adapter(name), "{name}");
        if !has_adapter(name) {
            assert_eq!(values(after), values(before), "{name}");
            continue;
        }
        let part = |part: &str| &adapters[&format!("{module}.{part}.weight")];
        let added = part("lora_B").matmul(part("lora_A")).unwrap();
        let expected = (before + (added * (ALPHA / RANK as f64)).unwrap()).unwrap();
        assert!(difference(&values(after), &values(&expected)) < 1e-6);
        assert!(difference(&values(after), &values(before)) > 1e-3);
    }
}

#[test]
fn lora_resumes_to_the_same_bytes_and_refuses_other_frozen_weights() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(0);
    train::run(&config, StartMode::New.into()).unwrap();
    // The saved student becomes the base of the adapters.
    let base = config.run_dir.with_file_name("base");
    std::fs::rename(config.student_dir(), &base).unwrap();
    config.student.init = StudentInit::Pretrained;
    config.student.path = base.clone();
    config.train.steps = Some(12);
    config.train.ema_decay = 0.9;
    with_adapters(&mut config);
    train::run(&config, StartMode::New.into()).unwrap();
    let uninterrupted = weights(&config);

    for step in 6..=12 {
        let checkpoint = config.run_dir.join(format!("checkpoints/step-{step:06}"));
        std::fs::remove_dir_all(checkpoint).unwrap();
    }
    let path = base.join("model.safetensors");
    let base_weights = std::fs::read(&path).unwrap();
    let mut changed_weights = base_weights.clone();
    *changed_weights.last_mut().unwrap() ^= 1;
    std::fs::write(&path, changed_weights).unwrap();
    let error = train::run(&config, StartMode::Resume.into()).err().unwrap();
    assert!(
        format!("{error:#}").contains("the frozen weights"),
        "{error:#}"
    );
    assert_eq!(Exit::code_of(&error), 2);

    std::fs::write(&path, base_weights).unwrap();
    train::run(&config, StartMode::Resume.into()).unwrap();
    assert!(weights(&config) == uninterrupted);
}

#[test]
fn lora_target_that_matches_no_layer_is_refused_with_a_layer_name() {
    let (_dir, mut config) = run_folder();
    config.lora.rank = RANK;
    for targets in [&["c_attn"][..], &["q_proj", "c_attn"]] {
        let targets = targets.iter().map(|target| target.parse().unwrap());
        config.lora.targets = targets.collect();
        let error = train::run(&config, StartMode::New.into()).err().unwrap();
        let message = format!("{error:#}");
        for part in ["\"c_attn\"", "model.layers.0.self_attn.q_proj"] {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(Exit::code_of(&error), 2);
    }
}
