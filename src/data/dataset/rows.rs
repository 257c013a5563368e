//! The two sources of training data, a cache and a file of conversations, as rows of one kind.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::cache::record::{Logprobs, Record, Status};
use crate::config;
use crate::prompt::Message;

/// A conversation that ends in an answer.
pub struct Row {
    /// Names the row in errors.
    pub key: String,
    /// Rows with the same id land on the same side of the split.
    pub prompt_id: String,
    pub messages: Vec<Message>,
    /// Is every answer to be learnt, or only the last? A prompt's few-shot examples were not said
    /// by the teacher.
    pub every_answer: bool,
    /// Did the teacher end its answer? If it was cut off, the student must not learn to end there.
    pub ended: bool,
    /// Of the last answer.
    pub logprobs: Option<Logprobs>,
}

/// A record as a row, or the reason to leave it out.
pub fn of_record(record: Record, settings: &config::Data) -> Result<Row, String> {
    let mut messages = prompt_of(&record, settings)?;
    messages.push(Message {
        role: "assistant".into(),
        content: record.answer.text,
    });
    Ok(Row {
        key: record.key,
        prompt_id: record.prompt_id,
        messages,
        every_answer: false,
        ended: !matches!(
            record.answer.finish_reason.as_str(),
            "length" | "max_tokens"
        ),
        logprobs: record.logprobs,
    })
}

/// What was asked in a record whose answer is to be learnt, or the reason to leave it out.
pub fn prompt_of(record: &Record, settings: &config::Data) -> Result<Vec<Message>, String> {
    let finish_reason = &record.answer.finish_reason;
    if record.status != Status::Ok {
        return Err("quarantined".into());
    }
    if !settings.keep_finish_reasons.contains(finish_reason) {
        return Err(format!(
            "finish_reason `{finish_reason}` is not in `data.keep_finish_reasons`"
        ));
    }
    messages_of_request(&record.request)
        .ok_or_else(|| "the request has messages that are not text".into())
}

fn messages_of_request(request: &Value) -> Option<Vec<Message>> {
    let messages = request["messages"].as_array()?;
    messages
        .iter()
        .map(|message| {
            let content = match &message["content"] {
                Value::String(text) => text.clone(),
                Value::Array(parts) => parts
                    .iter()
                    .map(|part| part["text"].as_str())
                    .collect::<Option<_>>()?,
                _ => return None,
            };
            Some(Message {
                role: message["role"].as_str()?.into(),
                content,
            })
        })
        .collect()
}

/// A line of a file of conversations; other fields are for others.
#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    messages: Vec<Message>,
}

/// The rows of a JSONL file of `{"messages": [{"role", "content"}, ...]}`, packed if its name ends
/// in `.gz`.
///
/// # Errors
/// If the file cannot be read; and for each line that is no such row, with its number.
pub fn of_file(path: &Path) -> Result<Vec<Row>> {
    let bytes = crate::fs::read_data(path)
        .with_context(|| format!("reading `data.source` {}", path.display()))?;
    let text = String::from_utf8(bytes)
        .with_context(|| format!("`data.source` {} is no UTF-8", path.display()))?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(at, line)| {
            let number = at + 1;
            of_line(line, number).with_context(|| format!("{}:{number}", path.display()))
        })
        .collect()
}

fn of_line(line: &str, number: usize) -> Result<Row> {
    let line: Line = serde_json::from_str(line)
        .context(r#"expected {"messages": [{"role": "...", "content": "..."}, ...]}"#)?;
    let last = line.messages.iter().rposition(|m| m.role == "assistant");
    let last = last.context("the conversation has no message of the role `assistant`")?;
    let prompt_id = match line.id {
        Some(Value::String(id)) => id,
        Some(id) => id.to_string(),
        None => {
            let prompt = serde_json::to_vec(&line.messages[..last])?;
            blake3::hash(&prompt).to_hex().to_string()
        }
    };
    Ok(Row {
        key: number.to_string(),
        prompt_id,
        messages: line.messages,
        every_answer: true,
        ended: true,
        logprobs: None,
    })
}
