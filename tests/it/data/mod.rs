//! Tokenizers, chat templates, alignment, datasets and batches.

mod added_tokens;
mod align;
mod align_servers;
mod batches;
mod chat_template;
pub mod dataset;
mod end_of_turn;
mod prepared;
mod prompts;
mod show;
mod template_date;
mod templates;
mod thinking;
mod tokenizer;
mod unsupported_fields;

use std::path::PathBuf;

use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use serde_json::Value;

/// Folders of small tokenizers in the formats of real models. `tests/python/make_tokenizer_fixtures.py` makes them and
/// their golden values.
const FOLDERS: [&str; 3] = ["bytelevel", "sentencepiece", "metaspace"];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/golden/tokenizers")
        .join(name)
}

pub fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::load(&folder(name)).unwrap()
}

fn golden(name: &str) -> Value {
    let text = std::fs::read_to_string(folder(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
    }
}

/// Returns a conversation of one turn.
fn ask(prompt: &str, answer: &str) -> Vec<Message> {
    vec![message("user", prompt), message("assistant", answer)]
}
