//! Encoder-decoders: T5, T5 v1.1 and mT5.
//!
//! | file | content |
//! |---|---|
//! | `buckets.rs` | buckets of relative positions, compared with transformers |
//! | `generation.rs` | greedy answers compared with transformers, sampling, incremental decoding |
//! | `folders.rs` | `config.json` and weights as both versions of transformers write them; bad folders |
//! | `data.rs` | sources, labels and soft labels of examples |
//! | `training.rs` | losses, resume, kept layers |
//! | `serving.rs` | the OpenAI API over an encoder-decoder |

mod align;
mod buckets;
mod data;
mod folders;
mod generation;
mod serving;
mod training;

use std::path::{Path, PathBuf};

use distill::config::StudentConfig;
use distill::config::StudentType;
use distill::model::config::shape::ModelConfig;
use distill::model::parameters;
use serde_json::{Value, json};

use crate::tiny;

/// Words of the tiny vocabulary, after the control tokens, the space and the letters.
const WORDS: [&str; 13] = [
    "▁the",
    "▁cat",
    "▁sat",
    "▁on",
    "▁mat",
    "▁red",
    "▁question",
    "▁answer",
    "▁in",
    "▁he",
    "ing",
    "▁one",
    "▁\u{e9}",
];

/// Vocabulary in order: `<pad>`, `</s>`, `<unk>`, the space, letters, words, and one sentinel.
fn vocabulary() -> Vec<(String, f64)> {
    let control = ["<pad>", "</s>", "<unk>"].map(|name| (name.to_owned(), 0.0));
    let letters = ('a'..='z').chain('0'..='9').map(|c| (c.to_string(), -6.0));
    let words = WORDS.iter().map(|word| ((*word).to_owned(), -3.0));
    let mut vocabulary: Vec<(String, f64)> = control.into();
    vocabulary.push(("▁".to_owned(), -4.0));
    vocabulary.extend(letters);
    vocabulary.extend(words);
    vocabulary.push(("<extra_id_0>".to_owned(), 0.0));
    vocabulary
}

/// Changes a JSON file.
fn change_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    change(&mut json);
    write_json(path, &json);
}

/// Changes the tokenizer.json of a folder.
fn change_tokenizer(dir: &Path, change: impl FnOnce(&mut Value)) {
    change_json(&dir.join("tokenizer.json"), change);
}

/// Writes a SentencePiece Unigram tokenizer as T5 has it: no byte fallback, and no chat template.
fn write_tokenizer(dir: &Path) {
    let vocabulary = vocabulary();
    let control = |id: usize| {
        json!({
            "id": id, "content": vocabulary[id].0, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let sentinel = vocabulary.len() - 1;
    let added: Vec<Value> = [0, 1, 2, sentinel].into_iter().map(control).collect();
    let metaspace = json!({
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true,
    });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, metaspace,
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": false, "vocab": vocabulary},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = json!({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"});
    std::fs::write(dir.join("tokenizer_config.json"), settings.to_string()).unwrap();
}

/// Returns the shape of a tiny T5.
fn student() -> StudentConfig {
    StudentConfig {
        model_type: StudentType::T5,
        hidden_size: 16,
        intermediate_size: 32,
        num_hidden_layers: 2,
        num_encoder_layers: Some(3),
        num_attention_heads: 2,
        ..StudentConfig::default()
    }
}

/// Writes a tiny T5 with random weights to `dir`.
fn write_model(dir: &Path, seed: u64) {
    let rows = vocabulary().len() + 5;
    let config = ModelConfig::from_student(&student(), rows, &[1], Some(0)).unwrap();
    let weights = parameters::random_weights(&config, seed).unwrap();
    write_json(&dir.join("config.json"), &config.to_json("float32").0);
    write_tokenizer(dir);
    tiny::write_weights(dir, &weights);
}

fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// Returns the path of a golden file that `tests/python/make_t5_golden.py` made.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/golden/t5")
        .join(name)
}

fn read_golden(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
}

/// Returns the id of a token of the tiny vocabulary.
fn id(token: &str) -> u32 {
    let index = vocabulary().iter().position(|(name, _)| name == token);
    index.unwrap() as u32
}

/// Returns the ids of tokens of the tiny vocabulary.
fn ids(tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| id(token)).collect()
}

/// Returns a folder with the tokenizer of a T5.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path());
    let config = json!({"model_type": "t5", "decoder_start_token_id": 0, "eos_token_id": 1});
    write_json(&dir.path().join("config.json"), &config);
    dir
}
