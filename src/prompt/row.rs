//! Reads the messages, request fields and id of a row.

use serde_json::{Map, Value};

use crate::prompt::message::Message;

/// Fields of a row that are sent as fields of its request.
const REQUEST_FIELDS: [&str; 3] = ["tools", "tool_choice", "parallel_tool_calls"];

/// Parts of a row that are sent unchanged.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RawRequest {
    /// Messages, if one of them is more than a role and a text.
    pub messages: Option<Value>,
    /// Fields of the request in `REQUEST_FIELDS`.
    pub fields: Map<String, Value>,
}

impl RawRequest {
    pub fn is_empty(&self) -> bool {
        self.messages.is_none() && self.fields.is_empty()
    }
}

/// Returns the fields of a row that are sent as fields of its request.
pub(crate) fn fields(row: &Value) -> Map<String, Value> {
    let wanted = REQUEST_FIELDS.iter().filter_map(|name| {
        let value = row.get(*name).filter(|value| !value.is_null())?;
        Some((name.to_string(), value.clone()))
    });
    wanted.collect()
}

/// Returns the names of the fields that are not sent without a template.
pub(crate) fn unsent(row: &Value) -> impl Iterator<Item = &str> {
    let has_messages = row.get("messages").is_some();
    let names = row.as_object().into_iter().flat_map(Map::keys);
    names.map(String::as_str).filter(move |name| match *name {
        "id" | "messages" => false,
        "text" => has_messages,
        name => !REQUEST_FIELDS.contains(&name),
    })
}

/// Returns the conversation of a row without a template: as text, and unchanged if it is more than text.
///
/// # Errors
/// A description of the problem.
pub(crate) fn messages(row: &Value) -> Result<(Vec<Message>, Option<Value>), String> {
    let Some(raw) = row.get("messages") else {
        return match row.get("text") {
            // A line of plain text, or a JSON object with only a `text`.
            Some(Value::String(text)) if text.trim().is_empty() => {
                Err("`text` is empty: fill it, or remove the row".into())
            }
            Some(Value::String(text)) => Ok((vec![Message::new("user", text.as_str())], None)),
            Some(other) if !other.is_null() && !other.is_object() => Err(format!(
                "`text` is {other}, which is not a string: put the text in quotes"
            )),
            _ => {
                let fields = row.as_object().into_iter().flat_map(Map::keys);
                let fields: Vec<_> = fields.take(10).map(|name| format!("`{name}`")).collect();
                Err(format!(
                    "there is no `messages` in this row, but {}: set `prompts.template` to a file that makes \
                     messages from these fields",
                    if fields.is_empty() {
                        "no field at all".to_owned()
                    } else {
                        fields.join(", ")
                    }
                ))
            }
        };
    };
    let list = raw.as_array().ok_or("`messages` is not a list")?;
    if list.is_empty() {
        return Err("`messages` is empty".into());
    }
    let mut is_plain = true;
    let mut messages = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let problem = |problem: String| format!("`messages[{index}]` {problem}");
        let fields = message
            .as_object()
            .ok_or_else(|| problem("is not an object of `role` and `content`".into()))?;
        let role = fields.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| problem("has no `role`".into()))?;
        let content = content(fields).map_err(problem)?;
        is_plain &= fields.len() == 2 && fields.get("content").is_some_and(Value::is_string);
        messages.push(Message::new(role, content));
    }
    Ok((messages, (!is_plain).then(|| raw.clone())))
}

/// Returns the text of a message.
fn content(fields: &Map<String, Value>) -> Result<String, String> {
    match fields.get("content") {
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) if fields.contains_key("tool_calls") => Ok(String::new()),
        None | Some(Value::Null) => Err("has no `content`".into()),
        Some(Value::Array(parts)) => parts.iter().map(part).collect(),
        Some(_) => Err("has a `content` that is neither a text nor a list of parts".into()),
    }
}

fn part(part: &Value) -> Result<String, String> {
    let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
    let text = part.get("text").and_then(Value::as_str);
    match (kind, text) {
        ("text" | "input_text" | "output_text", Some(text)) => Ok(text.to_owned()),
        ("text", None) if part.is_string() => Ok(part.as_str().unwrap_or_default().to_owned()),
        _ => Err(format!(
            "holds a part of the type {kind:?}: distill supports only text, so remove rows with images or audio"
        )),
    }
}

/// Returns the row's own id, if it has one.
pub(crate) fn id(row: &Value) -> Result<Option<String>, String> {
    const MAX_BYTES: usize = 1_000;
    match row.get("id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) if id.len() > MAX_BYTES => {
            Err(format!("`id` is longer than {MAX_BYTES} bytes"))
        }
        Some(Value::String(id)) if !id.is_empty() => Ok(Some(id.clone())),
        Some(Value::Number(id)) => Ok(Some(id.to_string())),
        Some(_) => Err("`id` is neither a text nor a number".into()),
    }
}
