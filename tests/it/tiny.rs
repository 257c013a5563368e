//! A tiny model folder in Hugging Face's layout, with random weights and a byte-level tokenizer.
//!
//! The model has the features of real ones: grouped-query attention, a padded vocabulary, tokens that are parts of
//! characters, control tokens, and a chat template.

use std::fs;
use std::path::Path;

use candle_core::DType;
use distill::config::StudentConfig;
use distill::model::config::shape::ModelConfig;
use distill::model::{parameters, weights};
use serde_json::{Map, Value, json};

/// Number of tokens: bytes, merges and control tokens.
pub const VOCABULARY: usize = 256 + MERGES.len() + CONTROL.len();
/// Rows of the embedding: a few more than tokens, as in real models.
pub const PADDED_VOCABULARY: usize = 272;

const MERGES: [(&str, &str); 6] = [
    ("h", "e"),
    ("t", "he"),
    ("Ġ", "the"),
    ("i", "n"),
    // The two bytes of é.
    ("Ã", "©"),
    // Two of the three bytes of €.
    ("â", "Ĥ"),
];
pub const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
    {{ message['content'] }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes a llama model with random weights and a context of `context` tokens to `dir`.
pub fn write_model(dir: &Path, seed: u64, context: usize) {
    let student = StudentConfig {
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        tie_word_embeddings: false,
        max_position_embeddings: context,
        ..StudentConfig::default()
    };
    let end_of_turn = VOCABULARY as u32 - 1;
    let config =
        ModelConfig::from_student(&student, PADDED_VOCABULARY, &[end_of_turn], None).unwrap();
    let mut weights = parameters::random_weights(&config, seed).unwrap();
    for (name, tensor) in &mut weights {
        // Enlarged, because the distribution of the next token would be almost uniform with initial weights.
        if !name.contains("norm") {
            *tensor = (&*tensor * 12.0).unwrap();
        }
    }
    write_json(dir, "config.json", &config.to_json("float32").0);
    write_tokenizer(dir, 0..=255, &MERGES);
    write_weights(dir, &weights);
}

fn write_json(dir: &Path, name: &str, value: &Value) {
    fs::write(dir.join(name), value.to_string()).unwrap();
}

/// Writes a tokenizer of these bytes and merges, and of the control tokens.
pub fn write_tokenizer(dir: &Path, bytes: impl IntoIterator<Item = u8>, merges: &[(&str, &str)]) {
    write_json(dir, "tokenizer.json", &tokenizer(bytes, merges));
    let settings = json!({"eos_token": CONTROL[2], "chat_template": CHAT_TEMPLATE});
    write_json(dir, "tokenizer_config.json", &settings);
}

/// Writes the weights of the model folder `dir`. Replaces existing ones.
pub fn write_weights(dir: &Path, weights: &weights::Tensors) {
    let entries = weights::entries(weights, DType::F32).unwrap();
    let path = dir.join("model.safetensors");
    if path.exists() {
        fs::remove_file(&path).unwrap();
    }
    weights::write(&path, entries).unwrap();
}

fn tokenizer(bytes: impl IntoIterator<Item = u8>, merges: &[(&str, &str)]) -> Value {
    let mut vocabulary = Map::new();
    let mut add = |token: String| {
        let id = vocabulary.len();
        vocabulary.insert(token, id.into());
    };
    for byte in bytes {
        add(byte_character(byte).to_string());
    }
    for (left, right) in merges {
        add(format!("{left}{right}"));
    }
    let first_control = vocabulary.len();
    let control = |(index, content): (usize, &&str)| {
        json!({
            "id": first_control + index, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": CONTROL.iter().enumerate().map(control).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges.iter().map(|(left, right)| [left, right]).collect::<Vec<_>>(),
        },
    })
}

/// Returns the character that stands for a byte in GPT-2's byte-level tokenizers.
fn byte_character(byte: u8) -> char {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(&byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|byte| !printable(byte)).count();
    char::from_u32(256 + rank as u32).unwrap()
}
