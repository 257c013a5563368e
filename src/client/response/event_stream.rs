//! Joins an event stream that was not requested into one body. Pure.
//!
//! Some gateways stream unless the request contains `"stream": false`, and some send a complete answer as one event.
//! Texts and logprobs of the chunks are concatenated. Of every other field, the last value that is not null counts.

use serde_json::{Map, Value};

use crate::client::response::completion::mentions_choices;
use crate::client::response::error::ApiError;
use crate::client::response::json;
use crate::client::response::json_error::JsonProblem;
use crate::client::response::text::has_text;
use crate::client::response::{usage, wrapped};

/// First byte of each value in a JSON text sequence (RFC 7464).
const SEPARATOR: u8 = 0x1e;

/// Data of the last event, as OpenAI and others write it.
const DONE: [&[u8]; 3] = [b"[DONE]", b"DONE", b"[done]"];

/// Joins an event stream, or a sequence of bare chunks, into one body. Several objects that are not chunks become a
/// list. Returns None for any other body.
///
/// # Errors
/// If the stream is truncated or contains no JSON, or a chunk that may contain a part of the answer is invalid.
pub(crate) fn joined(body: &[u8]) -> Option<Result<Value, JsonProblem>> {
    let body = body.trim_ascii_start();
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    if body.starts_with(&[SEPARATOR]) {
        let lines: Vec<&[u8]> = body.split(|byte| *byte == SEPARATOR).collect();
        return joined(&lines.concat());
    }
    let names = ["data:", "event:", "id:", "retry:", ":"];
    if names.iter().any(|name| body.starts_with(name.as_bytes())) {
        let joined = join(&events(body));
        // The stream may consist of keep-alive comments before a plain JSON body.
        let plain = memchr::memmem::find(body, b"\n{").map(|line_end| &body[line_end + 1..]);
        return Some(match (joined, plain) {
            (Err(_), Some(plain)) => json::value(plain),
            (joined, _) => joined,
        });
    }
    let (values, after) = leading_objects(body)?;
    if !values.iter().any(is_chunk) {
        // Several objects: keep-alive objects before the answer.
        return (values.len() > 1).then_some(Ok(Value::Array(values)));
    }
    if after.starts_with(b"{") {
        return Some(Err(JsonProblem::NotJson(
            crate::client::response::json_error::beginning(after),
        )));
    }
    Some(join_values(values))
}

/// Returns the objects at the beginning of a body and the bytes after them, or the chunks of a list.
fn leading_objects(body: &[u8]) -> Option<(Vec<Value>, &[u8])> {
    if body.starts_with(b"[") {
        let values: Vec<Value> = serde_json::from_slice(body).ok()?;
        return values.iter().any(is_chunk).then_some((values, b""));
    }
    if !body.starts_with(b"{") {
        return None;
    }
    let mut read = serde_json::Deserializer::from_slice(body).into_iter::<Value>();
    let mut values = Vec::new();
    let mut end = 0;
    while let Some(Ok(value)) = read.next() {
        values.push(value);
        end = read.byte_offset();
    }
    let are_objects = values.iter().all(Value::is_object);
    are_objects.then(|| (values, body[end..].trim_ascii_start()))
}

/// Returns true if the value is a chunk of a streamed completion.
pub(crate) fn is_chunk(value: &Value) -> bool {
    let choice = value.get("choices").and_then(|choices| choices.get(0));
    choice.is_some_and(|choice| choice.get("delta").is_some() && choice.get("message").is_none())
}

/// Joins the chunks of a stream without an end marker.
pub(crate) fn join_values(values: Vec<Value>) -> Result<Value, JsonProblem> {
    let mut joined = JoinedStream::default();
    for value in values {
        if let Value::Object(chunk) = value {
            joined.add(chunk);
        }
    }
    joined.finish(false)
}

/// Splits a stream into lines, which end with `\n`, `\r\n` or `\r`.
fn lines(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = body.split(|byte| *byte == b'\n');
    lines.flat_map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        line.split(|byte| *byte == b'\r')
    })
}

/// Returns the data of each event. A blank line ends an event.
fn events(body: &[u8]) -> Vec<Vec<u8>> {
    let mut events: Vec<Vec<u8>> = Vec::new();
    let mut data: Option<Vec<u8>> = None;
    let mut is_error = false;
    for line in lines(body) {
        if let Some(kind) = line.strip_prefix(b"event:") {
            // Some servers omit the blank line.
            events.extend(data.take().map(|data| event_data(data, is_error)));
            is_error = kind.trim_ascii() == b"error";
        } else if let Some(text) = line.strip_prefix(b"data:") {
            let text = text.strip_prefix(b" ").unwrap_or(text);
            match &mut data {
                // The blank line is also missing if one object ends and another begins.
                Some(before) if before.ends_with(b"}") && text.starts_with(b"{") => {
                    events.push(std::mem::replace(before, text.to_vec()));
                }
                Some(before) => {
                    before.push(b'\n');
                    before.extend_from_slice(text);
                }
                None => data = Some(text.to_vec()),
            }
        } else if line.is_empty() {
            events.extend(data.take().map(|data| event_data(data, is_error)));
            is_error = false;
        }
    }
    events.extend(data.map(|data| event_data(data, is_error)));
    events
}

/// Returns the data of an event. Data of an `error` event that contain no error object are wrapped in one.
fn event_data(data: Vec<u8>, is_error: bool) -> Vec<u8> {
    let has_error = || matches!(json::value(&data), Ok(Value::Object(fields)) if ApiError::in_body(&fields).is_some());
    if !is_error || has_error() {
        return data;
    }
    let text = String::from_utf8_lossy(&data);
    serde_json::json!({ "error": text })
        .to_string()
        .into_bytes()
}

/// Joins the data of all events up to the end marker.
fn join(events: &[Vec<u8>]) -> Result<Value, JsonProblem> {
    let mut joined = JoinedStream::default();
    let mut is_done = false;
    let mut not_json = None;
    for data in events {
        // Without a blank line, the last chunk and the end marker share one event.
        let data = data.trim_ascii();
        let last_chunk = DONE.iter().find_map(|done| data.strip_suffix(*done));
        is_done |= last_chunk.is_some();
        let data = last_chunk.unwrap_or(data).trim_ascii();
        if data.starts_with(b"{") || data.starts_with(b"[") {
            match json::value(data) {
                Ok(Value::Object(chunk)) => joined.add(chunk),
                Ok(Value::Array(chunks)) if chunks.iter().all(Value::is_object) => {
                    for chunk in chunks {
                        if let Value::Object(chunk) = chunk {
                            joined.add(chunk);
                        }
                    }
                }
                Ok(other) => not_json = Some(other.to_string()),
                // After the finish reason, an unreadable chunk cannot contain a part of the answer.
                Err(_) if joined.is_complete => {
                    not_json = Some(crate::client::response::json_error::beginning(data))
                }
                Err(problem) if mentions_choices(data) => return Err(problem),
                Err(problem) => {
                    not_json = Some(crate::client::response::json_error::beginning(data));
                    joined.chunk_error.get_or_insert(problem);
                }
            }
        } else if !data.is_empty() {
            // Words such as `ping` or `null` are not part of an answer.
            not_json.get_or_insert_with(|| crate::client::response::json_error::beginning(data));
        }
        if is_done {
            break;
        }
    }
    match not_json {
        Some(not_json) if joined.body.is_empty() => Err(JsonProblem::NotJson(not_json)),
        _ => joined.finish(is_done),
    }
}

/// The body joined from the chunks so far.
#[derive(Default)]
struct JoinedStream {
    body: Map<String, Value>,
    /// A choice has a finish reason, or arrived as a complete message.
    is_complete: bool,
    /// The last chunk contains the usage of the stream.
    ends_with_usage: bool,
    /// Some chunks contained deltas.
    has_deltas: bool,
    /// Error of the first chunk that could not be parsed.
    chunk_error: Option<JsonProblem>,
}

impl JoinedStream {
    /// Returns the body. `is_done` is true if the stream contained an end marker.
    fn finish(self, is_done: bool) -> Result<Value, JsonProblem> {
        let mut body = self.body;
        if body.is_empty() {
            return Err(if is_done {
                JsonProblem::NotJson("an event stream without data".into())
            } else {
                JsonProblem::CutOff
            });
        }
        // The chunk that could not be parsed may have contained a part of the text.
        if let Some(problem) = self.chunk_error.filter(|_| self.has_deltas) {
            return Err(problem);
        }
        let mut has_received_text = false;
        if let Some(Value::Array(choices)) = body.get_mut("choices") {
            choices.sort_by_key(choice_index);
            has_received_text = choices.iter().any(has_text);
        }
        let has_failed = ApiError::in_body(&body).is_some();
        let has_ended = is_done || self.ends_with_usage && has_received_text;
        if self.is_complete || has_ended && !has_failed {
            return Ok(Value::Object(body));
        }
        // An error needs no end marker. The partial text before an error is not an answer.
        body.remove("choices");
        if has_failed {
            Ok(Value::Object(body))
        } else {
            Err(JsonProblem::CutOff)
        }
    }

    /// Adds the fields of a chunk.
    fn add(&mut self, mut chunk: Map<String, Value>) {
        if !chunk.contains_key("choices")
            && let Some(Value::Object(inner)) =
                wrapped::completions(&Value::Object(chunk.clone())).pop()
        {
            chunk = inner;
        }
        // A complete answer in one event may have no finish reason, but has a usage.
        let has_usage = chunk.get("usage").is_some_and(Value::is_object);
        if let Some(Value::Array(choices)) = chunk.get("choices") {
            self.ends_with_usage = choices.is_empty() && has_completion_tokens(chunk.get("usage"));
        }
        for (name, value) in chunk {
            match value {
                Value::Array(choices) if name == "choices" => self.add_choices(choices, has_usage),
                _ if name == "choices" => {
                    self.body
                        .entry(name)
                        .or_insert_with(|| Value::Array(Vec::new()));
                }
                value => merge(&mut self.body, name, value),
            }
        }
    }

    fn add_choices(&mut self, choices: Vec<Value>, has_usage: bool) {
        let joined_choices = self.body.entry("choices");
        let Value::Array(joined_choices) =
            joined_choices.or_insert_with(|| Value::Array(Vec::new()))
        else {
            return;
        };
        for choice in choices {
            let index = choice_index(&choice);
            let Value::Object(choice) = choice else {
                continue;
            };
            let finish_reason = choice.get("finish_reason");
            let has_reason = finish_reason.is_some_and(|reason| !reason.is_null() && reason != "");
            self.is_complete |= has_reason || has_usage && choice.contains_key("message");
            self.has_deltas |= choice.contains_key("delta");
            let position = joined_choices
                .iter()
                .position(|joined| choice_index(joined) == index);
            let position = position.unwrap_or_else(|| {
                joined_choices.push(Value::Object(Map::new()));
                joined_choices.len() - 1
            });
            if let Value::Object(joined) = &mut joined_choices[position] {
                add_choice(joined, choice);
            }
        }
    }
}

/// Returns the index of a choice.
fn choice_index(choice: &Value) -> u64 {
    choice.get("index").and_then(Value::as_u64).unwrap_or(0)
}

/// Returns true if a usage contains completion tokens, as only the usage of the complete stream does.
fn has_completion_tokens(value: Option<&Value>) -> bool {
    let counts = value.map(|value| usage::usage(value.clone()).0);
    counts
        .flatten()
        .is_some_and(|usage| usage.completion_tokens > 0)
}

fn add_choice(joined: &mut Map<String, Value>, choice: Map<String, Value>) {
    for (name, value) in choice {
        match name.as_str() {
            "delta" => join_texts(joined, "message".into(), value),
            // A part to append, or the complete message, which replaces the parts before it.
            "message" if !repeats(joined.get("message"), &value) => join_texts(joined, name, value),
            "logprobs" | "text" => join_texts(joined, name, value),
            _ => merge(joined, name, value),
        }
    }
}

/// Returns true if a message begins with the text received so far.
fn repeats(before: Option<&Value>, message: &Value) -> bool {
    let text = |message: &Value| Some(message.get("content")?.as_str()?.to_owned());
    let before = before.and_then(text).unwrap_or_default();
    text(message).is_some_and(|text| text.starts_with(&before))
}

/// Sets a field, unless null would overwrite a value.
fn merge(fields: &mut Map<String, Value>, name: String, value: Value) {
    if !value.is_null() || !fields.contains_key(&name) {
        fields.insert(name, value);
    }
}

/// As [`merge`], but appends to texts and lists.
fn join_texts(fields: &mut Map<String, Value>, name: String, value: Value) {
    match (fields.get_mut(&name), value) {
        (Some(Value::String(text)), Value::String(more)) => {
            // Every chunk repeats the complete value of these fields.
            if !matches!(name.as_str(), "role" | "type" | "id") {
                text.push_str(&more);
            }
        }
        (Some(Value::Array(list)), Value::Array(more)) => join_lists(list, more),
        (Some(Value::Object(object)), Value::Object(more)) => {
            for (name, value) in more {
                join_texts(object, name, value);
            }
        }
        (_, value) => merge(fields, name, value),
    }
}

/// Joins items with the same index, such as parts of a tool call, and appends all other items.
fn join_lists(list: &mut Vec<Value>, more: Vec<Value>) {
    let item_index = |item: &Value| item.get("index").and_then(Value::as_u64);
    for item in more {
        let index = item_index(&item);
        let mut earlier_items = list.iter_mut();
        let earlier =
            index.and_then(|_| earlier_items.find(|earlier| item_index(earlier) == index));
        match (earlier, item) {
            (Some(Value::Object(earlier)), Value::Object(fields)) => {
                for (name, value) in fields {
                    join_texts(earlier, name, value);
                }
            }
            (_, item) => list.push(item),
        }
    }
}

#[cfg(test)]
mod tests;
