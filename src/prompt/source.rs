//! Rows of a prompt file.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Message;
use crate::exit::Exit;

/// Hands each row of `path` to `on_row`, with the number of its line, from 1: a JSON object, or a line
/// of text as `{"text": line}`. Blank lines, a byte order mark and `\r\n` are tolerated; a name that
/// ends in `.gz` is that of a packed file.
pub fn read(path: &Path, mut on_row: impl FnMut(usize, Value) -> Result<()>) -> Result<()> {
    let bytes = crate::fs::read_data(path).map_err(|error| {
        Exit::Usage(format!(
            "cannot read the prompts in {}: {error}",
            path.display()
        ))
    })?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let is_json = name.ends_with(".jsonl") || name.ends_with(".json");
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let number = index + 1;
        let value = parse(line.strip_suffix(b"\r").unwrap_or(line), is_json)
            .map_err(|problem| Exit::Usage(format!("{}:{number}: {problem}", path.display())))?;
        if let Some(value) = value {
            on_row(number, value)?;
        }
    }
    Ok(())
}

/// None for a blank line.
fn parse(line: &[u8], is_json: bool) -> Result<Option<Value>, String> {
    let line = std::str::from_utf8(line)
        .map_err(|_| "not valid UTF-8: save the file as UTF-8".to_string())?;
    if line.trim().is_empty() {
        return Ok(None);
    }
    if !is_json {
        return Ok(Some(json!({ "text": line })));
    }
    match serde_json::from_str(line) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err("not a JSON object".into()),
        Err(error) => Err(format!("not a JSON object: {error}")),
    }
}

/// The conversation of a row that no template renders.
pub fn messages(row: &Value) -> Result<Vec<Message>, String> {
    if let Some(messages) = row.get("messages") {
        let messages = Vec::<Message>::deserialize(messages).map_err(|error| {
            format!("`messages` is not a list of `{{\"role\", \"content\"}}`: {error}")
        })?;
        if messages.is_empty() {
            return Err("`messages` is empty".into());
        }
        return Ok(messages);
    }
    match row.get("text") {
        // Only a line of text has this shape; an object with a `text` alone is as good as one.
        Some(Value::String(text)) => Ok(vec![Message {
            role: "user".into(),
            content: text.clone(),
        }]),
        _ => Err(
            "there is no `messages` in this row: set `prompts.template` to a file that makes \
                  them from its fields"
                .into(),
        ),
    }
}

/// The row's own id, if it has one.
pub fn id(row: &Value) -> Result<Option<String>, String> {
    match row.get("id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) if !id.is_empty() => Ok(Some(id.clone())),
        Some(Value::Number(id)) => Ok(Some(id.to_string())),
        Some(_) => Err("`id` is neither a text nor a number".into()),
    }
}
