//! Model folders as transformers 4 and 5 write them, and the student folders that training writes.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use distill::config::{Config, KdMode, StudentConfig, StudentInit};
use distill::exit::Exit;
use distill::model::config::shape::ModelConfig;
use distill::model::weights::{self, Tensors};
use distill::model::{Model, ModelInput, SourceInput, network};
use distill::train;
use distill::train::summary::StartMode;
use serde_json::{Value, json};

use crate::tiny;

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = json_of(path);
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Creates a model folder.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_model(dir.path(), 1, 64);
    dir
}

fn stored_weights(dir: &Path) -> Tensors {
    weights::load_file(&dir.join("model.safetensors")).unwrap()
}

/// Returns the logits after 20 tokens.
fn logits(model: &Model) -> Vec<f32> {
    let ids: Vec<u32> = (0..20).map(|id| id * 7 % 200).collect();
    let input = ModelInput {
        input_ids_T: &ids,
        segments_B: std::slice::from_ref(&(0..20)),
        positions_N: &[19],
        source: SourceInput::default(),
    };
    let rows = model.map_logits(input, |_, row| row.to_vec()).unwrap();
    rows.into_iter().next().unwrap()
}

#[test]
fn weights_without_the_prefix_model_are_loaded() {
    let dir = folder();
    let expected = logits(&Model::load(dir.path()).unwrap());
    let weights = stored_weights(dir.path()).into_iter();
    let without_prefix = weights.map(|(name, tensor)| {
        let name = name.strip_prefix("model.").unwrap_or(&name).to_owned();
        (name, tensor)
    });
    tiny::write_weights(dir.path(), &without_prefix.collect());
    assert_eq!(logits(&Model::load(dir.path()).unwrap()), expected);
}

/// Some folders contain buffers, such as attention masks, of a data type that weights do not have.
#[test]
fn unused_tensors_are_reported_and_not_read() {
    let dir = folder();
    let expected = logits(&Model::load(dir.path()).unwrap());
    let path = dir.path().join("model.safetensors");
    let mut tensors = stored_weights(dir.path());
    let mask = Tensor::ones((4, 4), DType::U8, &Device::Cpu).unwrap();
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.self_attn.bias");
        tensors.insert(name, mask.clone());
    }
    tensors.insert("score.weight".into(), mask);
    fs::remove_file(&path).unwrap();
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    assert_eq!(logits(&Model::load(dir.path()).unwrap()), expected);

    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["generate", "--max-tokens", "2", "--model"])
        .arg(dir.path())
        .arg("hello")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stderr.matches("score.weight").count(), 1, "{stderr}");
    let buffers = "model.layers.*.self_attn.bias (2)";
    assert!(stderr.contains(buffers), "{stderr}");
}

#[test]
fn null_settings_equal_missing_settings() {
    let dir = folder();
    let expected = logits(&Model::load(dir.path()).unwrap());
    edit(&dir.path().join("config.json"), |config| {
        for name in [
            "attention_bias",
            "mlp_bias",
            "use_sliding_window",
            "layer_types",
            "head_dim",
        ] {
            config[name] = Value::Null;
        }
    });
    assert_eq!(logits(&Model::load(dir.path()).unwrap()), expected);
}

#[test]
fn adapter_beside_the_weights_is_refused() {
    let dir = folder();
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let error = network::load(dir.path()).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2);
    let message = error.to_string();
    assert!(
        message.contains("adapter_config.json") && message.contains("merge_and_unload"),
        "{message}"
    );
}

/// Trains the model in `dir` for one step at a learning rate of 0, so the weights stay the same.
fn train_one_step(dir: &Path) -> (Config, distill::train::summary::TrainSummary) {
    let rows =
        r#"{"messages":[{"role":"user","content":"the"},{"role":"assistant","content":"in"}]}"#;
    fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let mut config = Config {
        run_dir: dir.join("run"),
        student: StudentConfig {
            init: StudentInit::Pretrained,
            path: dir.into(),
            ..StudentConfig::default()
        },
        ..Config::default()
    };
    config.data.source = Some(dir.join("rows.jsonl"));
    config.data.validation_share = 0.0;
    config.loss.kd = KdMode::None;
    config.train.steps = Some(1);
    config.train.learning_rate = 0.0;
    let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
    (config, summary)
}

#[test]
fn rope_settings_are_written_for_both_versions_of_transformers() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    let with_theta = |settings: &Value| {
        let mut settings = settings.clone();
        settings["rope_theta"] = 5e5.into();
        settings
    };
    let default = json!({"rope_type": "default"});
    for (scaling, settings) in [(Value::Null, &default), (llama3.clone(), &llama3)] {
        let version_4 = json!({"rope_theta": 5e5, "rope_scaling": scaling});
        let version_5 = json!({"rope_parameters": with_theta(settings)});
        for rope_settings in [version_4, version_5] {
            let dir = folder();
            edit(&dir.path().join("config.json"), |config| {
                for name in ["rope_theta", "rope_scaling", "rope_parameters"] {
                    config.as_object_mut().unwrap().remove(name);
                }
                for (name, value) in rope_settings.as_object().unwrap() {
                    config[name] = value.clone();
                }
            });
            let expected = logits(&Model::load(dir.path()).unwrap());
            let (config, summary) = train_one_step(dir.path());
            let written = json_of(&config.student_dir().join("config.json"));
            assert_eq!(written["rope_theta"], 5e5, "{rope_settings}");
            assert_eq!(written["rope_scaling"], scaling, "{rope_settings}");
            assert_eq!(
                written["rope_parameters"],
                with_theta(settings),
                "{rope_settings}"
            );
            let changes = summary.changes.join("\n");
            assert!(changes.contains("config.json: rope settings"), "{changes}");
            assert_eq!(
                logits(&Model::load(&config.student_dir()).unwrap()),
                expected
            );
        }
    }
}

#[test]
fn changes_of_settings_by_saving_are_reported() {
    let dir = folder();
    edit(&dir.path().join("config.json"), |config| {
        config["quantization_config"] = json!({"quant_method": "fp8"});
    });
    edit(&dir.path().join("tokenizer_config.json"), |config| {
        config["tokenizer_class"] = "TokenizersBackend".into();
        config["extra_special_tokens"] = json!(["<|im_start|>"]);
    });
    let (config, summary) = train_one_step(dir.path());
    let student = config.student_dir();
    let written = json_of(&student.join("config.json"));
    assert_eq!(written["quantization_config"], Value::Null);
    let tokenizer = json_of(&student.join("tokenizer_config.json"));
    assert_eq!(tokenizer["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(
        tokenizer["additional_special_tokens"],
        json!(["<|im_start|>"])
    );
    let changes = summary.changes.join("\n");
    for word in [
        "quantization_config",
        "tokenizer_config.json",
        "eos_token_id",
    ] {
        assert!(changes.contains(word), "{changes}");
    }
    // Saving the saved student again changes nothing.
    let second = dir.path().join("second");
    fs::rename(&student, &second).unwrap();
    let (_, summary) = train_one_step(&second);
    assert_eq!(summary.changes, [""; 0]);
}

#[test]
fn examples_longer_than_the_context_of_the_model_are_left_out() {
    let dir = folder();
    let row = |words: usize| {
        let content = "the ".repeat(words);
        json!({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "in"}]})
    };
    let rows = [row(1), row(200), row(2)].map(|row| row.to_string());
    let (mut config, _) = train_one_step(dir.path());
    fs::write(dir.path().join("rows.jsonl"), rows.join("\n")).unwrap();
    config.train.batch_size = 3;
    let summary = train::run(&config, StartMode::Fresh.into()).unwrap();
    assert_eq!((summary.data.records, summary.data.kept), (3, 2));
    let shown = summary.data.to_string();
    assert!(shown.contains("1 longer than 64 tokens"), "{shown}");
    let model_config = ModelConfig::load(dir.path()).unwrap();
    assert_eq!(model_config.max_position_embeddings, 64);
}

#[test]
fn contradictory_or_unsupported_settings_are_refused() {
    let set_rope_parameters = |value: Value| {
        move |dir: &Path| {
            edit(&dir.join("config.json"), |config| {
                config["rope_parameters"] = value
            })
        }
    };
    let repeat_norm = |dir: &Path| {
        let mut tensors = stored_weights(dir);
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert("norm.weight".into(), norm);
        tiny::write_weights(dir, &tensors);
    };
    type Change = Box<dyn FnOnce(&Path)>;
    let scaling = |name: &str, value: f64| {
        let mut scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        scaling[name] = value.into();
        scaling
    };
    let cases: Vec<(Change, &str)> = vec![
        (
            Box::new(set_rope_parameters(json!({"rope_theta": 0}))),
            "rope_theta is 0; expected a finite number above 0",
        ),
        (
            Box::new(set_rope_parameters(json!({"rope_theta": -1e4}))),
            "rope_theta is -10000; expected a finite number above 0",
        ),
        (
            Box::new(set_rope_parameters(scaling("factor", 0.0))),
            "factor of the rope scaling is 0;",
        ),
        (
            Box::new(set_rope_parameters(scaling("low_freq_factor", -1.0))),
            "low_freq_factor of the rope scaling is -1;",
        ),
        (
            Box::new(set_rope_parameters(scaling("low_freq_factor", 4.0))),
            "expected less than high_freq_factor, which is 4",
        ),
        (Box::new(repeat_norm), "model.norm.weight twice"),
        (
            Box::new(set_rope_parameters(
                json!({"full_attention": {"rope_theta": 1e6}}),
            )),
            "per layer type",
        ),
        (
            Box::new(set_rope_parameters(
                json!({"rope_type": "default", "rope_theta": "1e6"}),
            )),
            "expected a number",
        ),
    ];
    for (change, expected) in cases {
        let dir = folder();
        change(dir.path());
        let error = network::load(dir.path()).unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains(expected), "{message}");
        assert_eq!(Exit::code_of(&error), 2, "{message}");
    }
    // An empty `rope_scaling` equals a missing one.
    let dir = folder();
    edit(&dir.path().join("config.json"), |config| {
        config["rope_scaling"] = json!({});
        config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500.0});
        config.as_object_mut().unwrap().remove("rope_theta");
    });
    assert_eq!(
        ModelConfig::load(dir.path()).unwrap().rope().unwrap().theta,
        500.0
    );
}

#[test]
fn settings_that_cannot_be_saved_are_refused_before_training() {
    let dir = folder();
    let (config, _) = train_one_step(dir.path());
    fs::write(dir.path().join("generation_config.json"), "null").unwrap();
    fs::remove_dir_all(&config.run_dir).unwrap();
    let error = train::run(&config, StartMode::Fresh.into()).unwrap_err();
    let message = format!("{error:#}");
    assert!(message.contains("generation_config.json"), "{message}");
    assert_eq!(Exit::code_of(&error), 2, "{message}");
    assert!(!config.run_dir.join("metrics.jsonl").exists());
}
