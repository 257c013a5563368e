//! An event stream that nobody asked for, joined into the one body that was asked for. Pure.
//!
//! Some gateways stream unless `"stream": false` is sent, and some answer whole in the frame of a stream.
//! The chunks of a chat completion hold pieces of one message: texts and logprobs follow each other, of
//! all else the last word counts.

use serde_json::{Map, Value};

use crate::client::response::completion::names_choices;
use crate::client::response::error::ApiError;
use crate::client::response::json;
use crate::client::response::json_error::JsonProblem;
use crate::client::response::text::speaks;
use crate::client::response::{usage, wrapped};

/// Begins each value of a JSON text sequence (RFC 7464).
const SEPARATOR: u8 = 0x1e;

/// The end of a stream in OpenAI's dialect, and as others write it.
const DONE: [&[u8]; 3] = [b"[DONE]", b"DONE", b"[done]"];

/// The body that an event stream amounts to, or chunks that follow each other without the frame of one;
/// None where `body` is neither.
///
/// # Errors
/// Where the stream ends early, or holds no JSON.
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
        // A body in the clear, behind comments that kept the connection open.
        let clear = memchr::memmem::find(body, b"\n{").map(|at| &body[at + 1..]);
        return Some(match (joined, clear) {
            (Err(_), Some(clear)) => json::value(clear),
            (joined, _) => joined,
        });
    }
    let (values, rest) = several(body)?;
    if !values.iter().any(is_chunk) {
        // Signs of life before the answer.
        return (values.len() > 1).then_some(Ok(Value::Array(values)));
    }
    if rest.starts_with(b"{") {
        return Some(Err(JsonProblem::NotJson(
            crate::client::response::json_error::beginning(rest),
        )));
    }
    Some(join_values(values))
}

/// The objects with which a body begins, one after the other, and what is behind them; or chunks in a list.
fn several(body: &[u8]) -> Option<(Vec<Value>, &[u8])> {
    if body.starts_with(b"[") {
        let values: Vec<Value> = serde_json::from_slice(body).ok()?;
        return values.iter().any(is_chunk).then_some((values, b""));
    }
    if !body.starts_with(b"{") {
        return None;
    }
    let mut read = serde_json::Deserializer::from_slice(body).into_iter::<Value>();
    let (mut values, mut end) = (Vec::new(), 0);
    while let Some(Ok(value)) = read.next() {
        values.push(value);
        end = read.byte_offset();
    }
    let are_objects = values.iter().all(Value::is_object);
    are_objects.then(|| (values, body[end..].trim_ascii_start()))
}

pub(crate) fn is_chunk(value: &Value) -> bool {
    let choice = value.get("choices").and_then(|choices| choices.get(0));
    choice.is_some_and(|choice| choice.get("delta").is_some() && choice.get("message").is_none())
}

pub(crate) fn join_values(values: Vec<Value>) -> Result<Value, JsonProblem> {
    let mut joined = JoinedStream::default();
    for value in values {
        if let Value::Object(chunk) = value {
            joined.add(chunk);
        }
    }
    joined.finish(false)
}

/// The lines of a stream, each of which ends with `\n`, `\r\n` or `\r`.
fn lines(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = body.split(|byte| *byte == b'\n');
    lines.flat_map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        line.split(|byte| *byte == b'\r')
    })
}

/// The data of each event, which a blank line ends.
fn events(body: &[u8]) -> Vec<Vec<u8>> {
    let (mut events, mut data): (Vec<Vec<u8>>, Option<Vec<u8>>) = (Vec::new(), None);
    let mut is_error = false;
    for line in lines(body) {
        if let Some(kind) = line.strip_prefix(b"event:") {
            // Some servers leave the blank line out.
            events.extend(data.take().map(|data| named(data, is_error)));
            is_error = kind.trim_ascii() == b"error";
        } else if let Some(rest) = line.strip_prefix(b"data:") {
            let rest = rest.strip_prefix(b" ").unwrap_or(rest);
            match &mut data {
                // Here too, if an object ends and another one begins.
                Some(before) if before.ends_with(b"}") && rest.starts_with(b"{") => {
                    events.push(std::mem::replace(before, rest.to_vec()));
                }
                Some(before) => {
                    before.push(b'\n');
                    before.extend_from_slice(rest);
                }
                None => data = Some(rest.to_vec()),
            }
        } else if line.is_empty() {
            events.extend(data.take().map(|data| named(data, is_error)));
            is_error = false;
        }
    }
    events.extend(data.map(|data| named(data, is_error)));
    events
}

/// The data of an event that is called an error, as an error where they do not say so themselves.
fn named(data: Vec<u8>, is_error: bool) -> Vec<u8> {
    let says_so = || matches!(json::value(&data), Ok(Value::Object(fields)) if ApiError::in_body(&fields).is_some());
    if !is_error || says_so() {
        return data;
    }
    let text = String::from_utf8_lossy(&data);
    serde_json::json!({ "error": text })
        .to_string()
        .into_bytes()
}

fn join(events: &[Vec<u8>]) -> Result<Value, JsonProblem> {
    let (mut joined, mut is_over, mut odd) = (JoinedStream::default(), false, None);
    for data in events {
        // In one event with the last chunk, where no blank line is between them.
        let data = data.trim_ascii();
        let before_the_end = DONE.iter().find_map(|done| data.strip_suffix(*done));
        is_over |= before_the_end.is_some();
        let data = before_the_end.unwrap_or(data).trim_ascii();
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
                Ok(other) => odd = Some(other.to_string()),
                // No piece of the answer is missed.
                Err(_) if joined.is_whole => {
                    odd = Some(crate::client::response::json_error::beginning(data))
                }
                Err(problem) if names_choices(data) => return Err(problem),
                Err(problem) => {
                    odd = Some(crate::client::response::json_error::beginning(data));
                    joined.hole.get_or_insert(problem);
                }
            }
        } else if !data.is_empty() {
            // A word, as `ping` and `null`: no piece of an answer.
            odd.get_or_insert_with(|| crate::client::response::json_error::beginning(data));
        }
        if is_over {
            break;
        }
    }
    match odd {
        Some(odd) if joined.body.is_empty() => Err(JsonProblem::NotJson(odd)),
        _ => joined.finish(is_over),
    }
}

/// What the chunks so far amount to.
#[derive(Default)]
struct JoinedStream {
    body: Map<String, Value>,
    /// A choice has a reason to finish, or came whole.
    is_whole: bool,
    /// The last chunk has counted the tokens of all before it.
    is_counted: bool,
    /// There were pieces of a message.
    has_pieces: bool,
    /// Problem of a chunk that could not be read.
    hole: Option<JsonProblem>,
}

impl JoinedStream {
    /// The body. `is_over` says that the stream has named its end.
    fn finish(self, is_over: bool) -> Result<Value, JsonProblem> {
        let mut body = self.body;
        if body.is_empty() {
            return Err(if is_over {
                JsonProblem::NotJson("an event stream without data".into())
            } else {
                JsonProblem::CutOff
            });
        }
        // It may have been a piece, too.
        if let Some(problem) = self.hole.filter(|_| self.has_pieces) {
            return Err(problem);
        }
        let mut has_text = false;
        if let Some(Value::Array(choices)) = body.get_mut("choices") {
            choices.sort_by_key(place);
            has_text = choices.iter().any(speaks);
        }
        let has_failed = ApiError::in_body(&body).is_some();
        let has_ended = is_over || self.is_counted && has_text;
        if self.is_whole || has_ended && !has_failed {
            return Ok(Value::Object(body));
        }
        // An error needs no end, and half a text before it is no answer.
        body.remove("choices");
        if has_failed {
            Ok(Value::Object(body))
        } else {
            Err(JsonProblem::CutOff)
        }
    }

    fn add(&mut self, mut chunk: Map<String, Value>) {
        if !chunk.contains_key("choices")
            && let Some(Value::Object(inner)) =
                wrapped::completions(&Value::Object(chunk.clone())).pop()
        {
            chunk = inner;
        }
        // A whole answer in the frame of a stream may have no finish reason.
        let is_measured = chunk.get("usage").is_some_and(Value::is_object);
        if let Some(Value::Array(choices)) = chunk.get("choices") {
            self.is_counted = choices.is_empty() && counts(chunk.get("usage"));
        }
        for (name, value) in chunk {
            match value {
                Value::Array(choices) if name == "choices" => {
                    self.add_choices(choices, is_measured)
                }
                _ if name == "choices" => {
                    self.body
                        .entry(name)
                        .or_insert_with(|| Value::Array(Vec::new()));
                }
                value => merge(&mut self.body, name, value),
            }
        }
    }

    fn add_choices(&mut self, choices: Vec<Value>, is_measured: bool) {
        let whole = self.body.entry("choices");
        let Value::Array(whole) = whole.or_insert_with(|| Value::Array(Vec::new())) else {
            return;
        };
        for choice in choices {
            let at = place(&choice);
            let Value::Object(choice) = choice else {
                continue;
            };
            let finish_reason = choice.get("finish_reason");
            let has_reason = finish_reason.is_some_and(|reason| !reason.is_null() && reason != "");
            self.is_whole |= has_reason || is_measured && choice.contains_key("message");
            self.has_pieces |= choice.contains_key("delta");
            let known = whole.iter().position(|known| place(known) == at);
            let known = known.unwrap_or_else(|| {
                whole.push(Value::Object(Map::new()));
                whole.len() - 1
            });
            if let Value::Object(known) = &mut whole[known] {
                add_choice(known, choice);
            }
        }
    }
}

/// Index of a choice.
fn place(choice: &Value) -> u64 {
    choice.get("index").and_then(Value::as_u64).unwrap_or(0)
}

/// Returns true if a usage counts tokens of an answer, as that of the whole stream does.
fn counts(value: Option<&Value>) -> bool {
    let counts = value.map(|value| usage::usage(value.clone()).0);
    counts
        .flatten()
        .is_some_and(|usage| usage.completion_tokens > 0)
}

fn add_choice(whole: &mut Map<String, Value>, choice: Map<String, Value>) {
    for (name, value) in choice {
        match name.as_str() {
            "delta" => join_texts(whole, "message".into(), value),
            // Pieces, or all of it once more.
            "message" if !repeats(whole.get("message"), &value) => join_texts(whole, name, value),
            "logprobs" | "text" => join_texts(whole, name, value),
            _ => merge(whole, name, value),
        }
    }
}

/// Returns true if a message begins with the text of the one before.
fn repeats(before: Option<&Value>, message: &Value) -> bool {
    let text = |message: &Value| Some(message.get("content")?.as_str()?.to_owned());
    let before = before.and_then(text).unwrap_or_default();
    text(message).is_some_and(|text| text.starts_with(&before))
}

/// The last value that says something.
fn merge(fields: &mut Map<String, Value>, name: String, value: Value) {
    if !value.is_null() || !fields.contains_key(&name) {
        fields.insert(name, value);
    }
}

/// As [`merge`], but texts and lists go on where they were.
fn join_texts(fields: &mut Map<String, Value>, name: String, value: Value) {
    match (fields.get_mut(&name), value) {
        (Some(Value::String(text)), Value::String(more)) => {
            // These come again and again, whole.
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

/// Items that tell their place (tool calls) are joined there; all others follow.
fn join_lists(list: &mut Vec<Value>, more: Vec<Value>) {
    let place = |item: &Value| item.get("index").and_then(Value::as_u64);
    for item in more {
        let known =
            place(&item).and_then(|at| list.iter_mut().find(|known| place(known) == Some(at)));
        match (known, item) {
            (Some(Value::Object(known)), Value::Object(fields)) => {
                for (name, value) in fields {
                    join_texts(known, name, value);
                }
            }
            (_, item) => list.push(item),
        }
    }
}

#[cfg(test)]
mod tests;
