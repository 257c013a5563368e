//! Reads the messages, request fields and id of a row.

use serde_json::{Map, Value};

use crate::prompt::message::Message;

/// Fields of a row that are copied into its request.
const REQUEST_FIELDS: [&str; 3] = ["tools", "tool_choice", "parallel_tool_calls"];

/// Parts of a row that are sent unchanged, as JSON.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RawRequest {
    /// `messages` of the row, if a message has fields other than `role` and `content`, or a `content` that is not a
    /// string.
    pub messages: Option<Value>,
    /// Those of `REQUEST_FIELDS` that the row has.
    pub fields: Map<String, Value>,
}

impl RawRequest {
    pub fn is_empty(&self) -> bool {
        self.messages.is_none() && self.fields.is_empty()
    }
}

/// Returns the fields of a row that are copied into its request.
pub(crate) fn request_fields(row: &Value) -> Map<String, Value> {
    let fields = REQUEST_FIELDS.iter().filter_map(|name| {
        let value = row.get(*name).filter(|value| !value.is_null())?;
        Some((name.to_string(), value.clone()))
    });
    fields.collect()
}

/// Returns the names of the row's fields that would have no effect in a run without a template.
pub(crate) fn unsent_fields(row: &Value) -> impl Iterator<Item = &str> {
    let has_messages = row.get("messages").is_some();
    let names = row.as_object().into_iter().flat_map(Map::keys);
    names.map(String::as_str).filter(move |name| match *name {
        "id" | "messages" => false,
        "text" => has_messages,
        name => !REQUEST_FIELDS.contains(&name),
    })
}

/// Returns the conversation of a row that is sent without a template: the roles and texts, and the value of
/// [`RawRequest::messages`].
///
/// # Errors
/// A message for the user, without the location of the row.
pub(crate) fn messages(row: &Value) -> Result<(Vec<Message>, Option<Value>), String> {
    let Some(raw) = row.get("messages") else {
        return match row.get("text") {
            Some(Value::String(text)) if text.trim().is_empty() => {
                Err("`text` is empty: fill it, or remove the row".into())
            }
            Some(Value::String(text)) => Ok((vec![Message::new("user", text.as_str())], None)),
            Some(other) if !other.is_null() && !other.is_object() => Err(format!(
                "`text` is {other}, which is not a string: put the text in quotes"
            )),
            _ => Err(without_conversation(row)),
        };
    };
    let list = raw.as_array().ok_or("`messages` is not a list")?;
    if list.is_empty() {
        return Err("`messages` is empty: fill it, or remove the row".into());
    }
    let mut is_plain = true;
    let mut messages = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let error = |problem: String| format!("`messages[{index}]` {problem}");
        let fields = message
            .as_object()
            .ok_or_else(|| error("is not an object with `role` and `content`".into()))?;
        let role = match fields.get("role") {
            Some(Value::String(role)) => role.as_str(),
            None | Some(Value::Null) => return Err(error("has no `role`".into())),
            Some(_) => return Err(error("has a `role` that is not a string".into())),
        };
        let content = content(fields).map_err(error)?;
        is_plain &= fields.len() == 2 && fields.get("content").is_some_and(Value::is_string);
        messages.push(Message::new(role, content));
    }
    Ok((messages, (!is_plain).then(|| raw.clone())))
}

/// Describes a row that has neither `messages` nor a `text` to send.
fn without_conversation(row: &Value) -> String {
    /// Maximum number of field names in the message.
    const MAX_LISTED: usize = 10;
    let names = row.as_object().into_iter().flat_map(Map::keys);
    let names: Vec<_> = names
        .take(MAX_LISTED)
        .map(|name| format!("`{name}`"))
        .collect();
    if names.is_empty() {
        return "the row is empty: give it `messages` or `text`, or remove it".into();
    }
    format!(
        "the row has no `messages`, but {}: set `prompts.template` to a file that makes messages from these fields",
        names.join(", ")
    )
}

/// Returns the text of a message.
fn content(fields: &Map<String, Value>) -> Result<String, String> {
    match fields.get("content") {
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) if fields.contains_key("tool_calls") => Ok(String::new()),
        None | Some(Value::Null) => Err("has no `content`".into()),
        Some(Value::Array(parts)) => parts.iter().map(part_text).collect(),
        Some(_) => Err("has a `content` that is neither a string nor a list of parts".into()),
    }
}

/// Returns the text of a part of a message: a string, or an object with a `text`.
fn part_text(part: &Value) -> Result<String, String> {
    if let Some(text) = part.as_str() {
        return Ok(text.to_owned());
    }
    let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
    if !["text", "input_text", "output_text"].contains(&kind) {
        return Err(format!(
            "has a part of type {kind:?}: distill supports only text, so remove rows with images or audio"
        ));
    }
    let text = part.get("text").and_then(Value::as_str);
    text.map(str::to_owned)
        .ok_or_else(|| "has a part that is not a string and has no string `text`".into())
}

/// Returns the `id` of the row, if it has one.
///
/// # Errors
/// A message for the user, without the location of the row.
pub(crate) fn id(row: &Value) -> Result<Option<String>, String> {
    /// Maximum length of an id.
    const MAX_BYTES: usize = 1_000;
    match row.get("id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) if id.is_empty() => {
            Err("`id` is empty: fill it, or remove the field".into())
        }
        Some(Value::String(id)) if id.len() > MAX_BYTES => {
            Err(format!("`id` is longer than {MAX_BYTES} bytes: shorten it"))
        }
        Some(Value::String(id)) => Ok(Some(id.clone())),
        Some(Value::Number(id)) => Ok(Some(id.to_string())),
        Some(_) => Err("`id` is neither a string nor a number".into()),
    }
}
