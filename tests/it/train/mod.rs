//! Training: it learns, resumes to the same bytes, and does not depend on micro-batch size or threads.

mod adapters;
mod demo;
mod identity;
mod local_teacher;
mod on_policy;
mod options;
mod resume;
mod soft_labels;

use std::path::Path;

use distill::config::{Config, KdMode, SaveDtype, StudentInit};
use distill::exit::Exit;
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use distill::train;
use distill::train::summary::StartMode;
use serde_json::json;

use crate::tiny;

/// A ChatML template whose generation prompt contains the variable `mood`.
const TEMPLATE_WITH_MOOD: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ mood }}: {% endif %}";

/// Creates a run folder with a tiny model, and conversations in which the prompt determines the answer.
fn run_folder() -> (tempfile::TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    tiny::write_model(&model, 1, 128);
    let rows: String = (0..40)
        .map(|i| {
            let (word, answer) = [("the", "in"), ("in", "he")][i % 2];
            format!(
                "{{\"id\":\"{i}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{word} {i}\"}},\
                 {{\"role\":\"assistant\",\"content\":\"{answer}\"}}]}}\n"
            )
        })
        .collect();
    std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    let mut config = small_config(dir.path());
    config.student.init = StudentInit::Random;
    config.student.hidden_size = 16;
    config.student.intermediate_size = 32;
    config.student.num_hidden_layers = 2;
    config.student.num_attention_heads = 2;
    config.student.num_key_value_heads = 1;
    config.train.learning_rate = 2e-2;
    (dir, config)
}

/// Returns the config of a short run in `dir`, on the conversations in `rows.jsonl` and the model in `model`.
pub fn small_config(dir: &Path) -> Config {
    let mut config = Config {
        run_dir: dir.join("run"),
        ..Config::default()
    };
    config.data.source = Some(dir.join("rows.jsonl"));
    config.data.validation_share = 0.2;
    config.student.path = dir.join("model");
    config.loss.kd = KdMode::None;
    config.train.steps = Some(12);
    config.train.batch_size = 6;
    config.train.micro_batch_size = 6;
    config.train.warmup_steps = 2;
    config.train.eval_every = 0;
    config.train.checkpoint_every = 0;
    config.train.threads = 2;
    config
}

fn weights(config: &Config) -> Vec<u8> {
    std::fs::read(config.student_dir().join("model.safetensors")).unwrap()
}

/// Returns the lines of `metrics.jsonl` without `tokens_per_s`, the only value that may differ between equal runs.
fn metrics(config: &Config) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(config.run_dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().remove("tokens_per_s");
            line
        })
        .collect()
}

#[test]
fn training_learns_answers_that_prompts_determine() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(60);
    let summary = train::run(&config, StartMode::New.into()).unwrap();
    let accuracy = summary.validation.token_accuracy.unwrap();
    assert!(
        accuracy > 0.95,
        "token accuracy {accuracy} on held-out prompts"
    );
    let first = &metrics(&config)[0];
    assert!(first["loss"].as_f64().unwrap() > 10.0 * summary.last_loss);
}

/// The loss is divided by the supervised tokens of the step, so the micro-batch size only changes rounding errors.
#[test]
fn micro_batch_size_does_not_change_gradient_norms() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(3);
    let mut results = Vec::new();
    for micro_batch_size in [6, 4, 2, 1] {
        config.train.micro_batch_size = micro_batch_size;
        train::run(&config, StartMode::Fresh.into()).unwrap();
        let norms: Vec<f64> = metrics(&config)
            .iter()
            .filter_map(|line| line["grad_norm"].as_f64())
            .collect();
        results.push(norms);
    }
    for norms in &results {
        assert_eq!(norms.len(), 3);
        for (norm, first) in norms.iter().zip(&results[0]) {
            assert!((norm - first).abs() / first < 1e-5, "{results:?}");
        }
    }
}

#[test]
fn thread_count_does_not_change_the_weights() {
    let (_dir, mut config) = run_folder();
    train::run(&config, StartMode::New.into()).unwrap();
    let with_two_threads = weights(&config);
    config.train.threads = 1;
    train::run(&config, StartMode::Fresh.into()).unwrap();
    assert!(weights(&config) == with_two_threads);
}

#[test]
fn existing_checkpoint_needs_resume_or_fresh_and_the_same_settings() {
    let (_dir, mut config) = run_folder();
    let error_of = |config: &Config, start: StartMode| {
        let error = train::run(config, start.into()).err().unwrap();
        (Exit::code_of(&error), format!("{error:#}"))
    };
    let (status, message) = error_of(&config, StartMode::Resume);
    assert!(
        status == 2 && message.contains("no checkpoint"),
        "{message}"
    );
    train::run(&config, StartMode::New.into()).unwrap();
    let (status, message) = error_of(&config, StartMode::New);
    assert!(status == 2 && message.contains("--resume") && message.contains("--fresh"));
    config.train.learning_rate = 1e-3;
    let (status, message) = error_of(&config, StartMode::Resume);
    assert!(status == 2 && message.contains("have changed"), "{message}");
    config.train.learning_rate = 2e-2;
    let checkpoint = config
        .run_dir
        .join("checkpoints/step-000012/optimizer.safetensors");
    let bytes = std::fs::read(&checkpoint).unwrap();
    std::fs::write(&checkpoint, &bytes[..bytes.len() / 2]).unwrap();
    let (status, message) = error_of(&config, StartMode::Resume);
    assert!(
        status == 5 && message.contains("optimizer.safetensors"),
        "{message}"
    );
}

#[test]
fn saved_student_has_the_template_arguments_and_stop_ids() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(0);
    // The eos token of a base model differs from the end of turn in the chat template.
    let generation = json!({"eos_token_id": 262, "temperature": 0.7});
    let path = config.student.path.join("generation_config.json");
    std::fs::write(path, generation.to_string()).unwrap();
    let path = config.student.path.join("chat_template.jinja");
    std::fs::write(path, TEMPLATE_WITH_MOOD).unwrap();
    config.student.template_args = [("mood".to_owned(), json!("kind"))].into();
    let prompt = [Message::new("user", "the")];
    let trained = Tokenizer::for_student(&config.student).unwrap();
    let expected = trained.encode_prompt(&prompt).unwrap();
    train::run(&config, StartMode::New.into()).unwrap();
    let saved = Tokenizer::load(&config.student_dir()).unwrap();
    assert_eq!(saved.encode_prompt(&prompt).unwrap(), expected);
    assert!(saved.decode(&expected).unwrap().ends_with("kind: "));
    let without_arguments = Tokenizer::load(&config.student.path).unwrap();
    assert_ne!(without_arguments.encode_prompt(&prompt).unwrap(), expected);
    let text = std::fs::read(config.student_dir().join("generation_config.json")).unwrap();
    let generation: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(
        generation,
        json!({"eos_token_id": [262, 264], "temperature": 0.7})
    );
    assert_eq!(saved.stop_ids(), [262, 264]);
}

/// Older folders have several templates in tokenizer_config.json.
#[test]
fn template_arguments_are_saved_in_each_template_of_a_list() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(0);
    let templates = json!([
        {"name": "default", "template": TEMPLATE_WITH_MOOD},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]);
    let path = config.student.path.join("tokenizer_config.json");
    let mut settings: serde_json::Value =
        std::fs::read(&path).map_or(json!({}), |text| serde_json::from_slice(&text).unwrap());
    settings["chat_template"] = templates;
    std::fs::write(path, settings.to_string()).unwrap();
    config.student.template_args = [("mood".to_owned(), json!("kind"))].into();
    train::run(&config, StartMode::New.into()).unwrap();
    let saved = Tokenizer::load(&config.student_dir()).unwrap();
    let prompt = saved.encode_prompt(&[Message::new("user", "the")]).unwrap();
    assert!(saved.decode(&prompt).unwrap().ends_with("kind: "));
    let text = std::fs::read(config.student_dir().join("tokenizer_config.json")).unwrap();
    let settings: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(settings["chat_template"][1]["template"], "{{ tools }}");
}

#[test]
fn zero_steps_save_the_initial_student_and_f16_halves_its_size() {
    let (_dir, mut config) = run_folder();
    config.train.steps = Some(0);
    train::run(&config, StartMode::New.into()).unwrap();
    let f32_bytes = weights(&config).len();
    config.student.save_dtype = SaveDtype::F16;
    train::run(&config, StartMode::New.into()).unwrap();
    let f16_bytes = weights(&config).len();
    assert!(
        f16_bytes < f32_bytes * 6 / 10,
        "{f16_bytes} of {f32_bytes} bytes"
    );
    let metadata = |file: &str| std::fs::metadata(config.student_dir().join(file)).unwrap();
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    ] {
        // All files have the same permissions.
        let permissions = metadata(file).permissions();
        assert_eq!(permissions, metadata("model.safetensors").permissions());
    }
    // The saved folder loads as a pretrained student.
    config.student.init = StudentInit::Pretrained;
    config.student.path = config.student_dir();
    config.run_dir = config.run_dir.join("second");
    train::run(&config, StartMode::New.into()).unwrap();
    assert!(
        Path::new(&config.student_dir())
            .join("model.safetensors")
            .exists()
    );
}

#[test]
fn tokenizer_larger_than_the_embedding_is_refused() {
    let (_dir, mut config) = run_folder();
    config.student.init = StudentInit::Pretrained;
    // One token more than the embedding has rows.
    let path = config.student.path.join("tokenizer.json");
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for id in tiny::VOCABULARY..=tiny::PADDED_VOCABULARY {
        let mut token = tokenizer["added_tokens"][0].clone();
        token["id"] = id.into();
        token["content"] = format!("<|late-{id}|>").into();
        tokenizer["added_tokens"]
            .as_array_mut()
            .unwrap()
            .push(token);
    }
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let error = train::run(&config, StartMode::New.into()).err().unwrap();
    let message = format!("{error:#}");
    assert_eq!(Exit::code_of(&error), 2, "{message}");
    for number in [tiny::PADDED_VOCABULARY, tiny::PADDED_VOCABULARY + 1] {
        assert!(message.contains(&number.to_string()), "{message}");
    }
}
