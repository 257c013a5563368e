//! Chat templates with the properties of real ones, and datasets that are prepared with them.

use std::collections::BTreeMap;

use distill::config::Config;
use distill::data::dataset;
use distill::data::groups::Selection;
use distill::data::report::DataReport;
use distill::prompt::message::Message;
use distill::tokenizer::Tokenizer;
use serde_json::json;
use tempfile::TempDir;

use super::dataset::load;
use super::{ask, folder};

/// As in Qwen 3: writes an empty thinking block before the last answer.
pub const EMPTY_THINKING_BLOCK: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}";
/// As in DeepSeek-R1: the generation prompt opens a thinking block, and answers lose their thinking.
pub const OPENS_THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
/// As in Mistral Nemo: the system message is a part of the last user message.
pub const SYSTEM_IN_LAST_USER: &str = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% if loop.last or (loop.index == messages | length - 1) %}{{ messages[0].content }} {% endif %}{{ m.content }}<|im_end|>{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}";
/// As in Qwen 3: reformats the thinking of the last answer, and drops the thinking of other answers.
pub const KEEPS_LAST_THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}{% if loop.last %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// Drops the thinking of every answer.
pub const DROPS_THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// Begins the generation prompt differently from the conversation.
pub const DATED_PROMPT: &str = "{% if add_generation_prompt %}Today. {% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
pub const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Creates a folder with the byte-level tokenizer and this chat template, and loads it.
pub fn tokenizer_with_template(template: &str) -> (TempDir, Tokenizer) {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder("bytelevel").join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    (dir, tokenizer)
}

/// Returns the text of tokens, with the names of control tokens.
pub fn spell(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|id| tokenizer.spelling(*id).unwrap().into_owned())
        .collect();
    String::from_utf8(bytes).unwrap()
}

/// Returns a conversation of two turns with these answers.
pub fn two_turns(first_answer: &str, second_answer: &str) -> Vec<Message> {
    let mut messages = ask("Hello", first_answer);
    messages.extend(ask("And now?", second_answer));
    messages
}

/// Prepares a dataset of conversations. Returns its report, and the supervised texts of each example by its key.
pub fn prepare(
    template: &str,
    conversations: &[Vec<Message>],
    change: impl Fn(&mut Config),
) -> (DataReport, BTreeMap<String, Vec<String>>) {
    let (dir, tokenizer) = tokenizer_with_template(template);
    let source = dir.path().join("rows.jsonl");
    std::fs::write(&source, rows(conversations)).unwrap();
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.source = Some(source);
    config.data.validation_share = 0.0;
    change(&mut config);
    let data = load(&config, &tokenizer).unwrap();
    let prompts = dataset::prompts(&config.data, &config.run_dir, &Selection::All).unwrap();
    let mut texts_by_key = BTreeMap::new();
    for example in data.train().iter() {
        assert!(prompts.contains_key(example.key()), "{}", example.key());
        let ids: Vec<u32> = example.input_ids().collect();
        // Labels of consecutive positions form one text.
        let mut spans: Vec<Vec<u32>> = Vec::new();
        let mut next_position = None;
        for position in example.positions() {
            if next_position != Some(position) {
                spans.push(Vec::new());
            }
            spans.last_mut().unwrap().push(ids[position as usize + 1]);
            next_position = Some(position + 1);
        }
        let texts = spans.iter().map(|ids| spell(&tokenizer, ids)).collect();
        texts_by_key.insert(example.key().to_owned(), texts);
    }
    (data.report.clone(), texts_by_key)
}

/// Returns the lines of a JSONL file of conversations.
pub fn rows(conversations: &[Vec<Message>]) -> String {
    let row = |messages| format!("{}\n", json!({"messages": messages}));
    conversations.iter().map(row).collect()
}
