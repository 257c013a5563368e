//! An event stream that nobody asked for, joined into the one body that was asked for. Pure.
//!
//! Some gateways stream unless `"stream": false` is sent, and some answer whole in the frame of a stream.
//! The chunks of a chat completion hold pieces of one message: texts and logprobs follow each other, of
//! all else the last word counts.

use serde_json::{Map, Value};

use super::error::is_error;
use super::json::{self, Problem};
use super::{names_choices, usage, wrapped};

/// Begins each value of a JSON text sequence (RFC 7464).
const SEPARATOR: u8 = 0x1e;

/// The end of a stream in OpenAI's dialect, and as others write it.
const DONE: [&[u8]; 3] = [b"[DONE]", b"DONE", b"[done]"];

/// The body that an event stream amounts to, or chunks that follow each other without the frame of one;
/// None where `body` is neither.
///
/// # Errors
/// Where the stream ends early, or holds no JSON.
pub fn joined(body: &[u8]) -> Option<Result<Value, Problem>> {
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
        return Some(Err(Problem::NotJson(json::beginning(rest))));
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

pub fn is_chunk(value: &Value) -> bool {
    let choice = value.get("choices").and_then(|choices| choices.get(0));
    choice.is_some_and(|choice| choice.get("delta").is_some() && choice.get("message").is_none())
}

pub fn join_values(values: Vec<Value>) -> Result<Value, Problem> {
    let (mut body, mut is_whole) = (Map::new(), false);
    for value in values {
        if let Value::Object(chunk) = value {
            is_whole |= add(&mut body, chunk);
        }
    }
    finish(body, is_whole)
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
    for line in lines(body) {
        if let Some(rest) = line.strip_prefix(b"data:") {
            let rest = rest.strip_prefix(b" ").unwrap_or(rest);
            match &mut data {
                // Some servers leave the blank line out.
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
            events.extend(data.take());
        }
    }
    events.extend(data);
    events
}

fn join(events: &[Vec<u8>]) -> Result<Value, Problem> {
    let (mut body, mut is_whole, mut is_over) = (Map::new(), false, false);
    let mut odd = None;
    for data in events {
        // In one event with the last chunk, where no blank line is between them.
        let data = data.trim_ascii();
        let before_the_end = DONE.iter().find_map(|done| data.strip_suffix(*done));
        is_over |= before_the_end.is_some();
        let data = before_the_end.unwrap_or(data).trim_ascii();
        if data.starts_with(b"{") || data.starts_with(b"[") {
            match json::value(data) {
                Ok(Value::Object(chunk)) => is_whole |= add(&mut body, chunk),
                Ok(other) => odd = Some(other.to_string()),
                // No piece of the answer is missed.
                Err(_) if is_whole || !names_choices(data) => odd = Some(json::beginning(data)),
                Err(problem) => return Err(problem),
            }
        } else if !data.is_empty() {
            // A word, as `ping` and `null`: no piece of an answer.
            odd.get_or_insert_with(|| json::beginning(data));
        }
        if is_over {
            break;
        }
    }
    if body.is_empty()
        && let Some(odd) = odd
    {
        return Err(Problem::NotJson(odd));
    }
    finish(body, is_whole || is_over)
}

fn finish(mut body: Map<String, Value>, is_whole: bool) -> Result<Value, Problem> {
    if body.is_empty() {
        return Err(if is_whole {
            Problem::NotJson("an event stream without data".into())
        } else {
            Problem::CutOff
        });
    }
    if let Some(Value::Array(choices)) = body.get_mut("choices") {
        choices.sort_by_key(place);
    }
    if is_whole {
        return Ok(Value::Object(body));
    }
    // An error needs no end, and half a text before it is no answer.
    body.remove("choices");
    if body.get("error").is_some_and(is_error) {
        Ok(Value::Object(body))
    } else {
        Err(Problem::CutOff)
    }
}

/// Index of a choice.
fn place(choice: &Value) -> u64 {
    choice.get("index").and_then(Value::as_u64).unwrap_or(0)
}

/// Adds a chunk. True if it ends an answer.
fn add(body: &mut Map<String, Value>, mut chunk: Map<String, Value>) -> bool {
    if !chunk.contains_key("choices")
        && let Some(Value::Object(inner)) =
            wrapped::completions(&Value::Object(chunk.clone())).pop()
    {
        chunk = inner;
    }
    let choices = chunk.get("choices").and_then(Value::as_array);
    let is_last_word = choices.is_some_and(Vec::is_empty) && counts(chunk.get("usage"));
    let mut ends = is_last_word && body.contains_key("choices");
    // A whole answer in the frame of a stream may have no finish reason.
    let is_measured = chunk.get("usage").is_some_and(Value::is_object);
    for (name, value) in chunk {
        if name != "choices" {
            merge(body, name, value);
            continue;
        }
        let whole = body
            .entry("choices")
            .or_insert_with(|| Value::Array(Vec::new()));
        let (Value::Array(choices), Value::Array(whole)) = (value, whole) else {
            continue;
        };
        for choice in choices {
            let at = place(&choice);
            let Value::Object(choice) = choice else {
                continue;
            };
            let finish_reason = choice.get("finish_reason");
            let has_reason = finish_reason.is_some_and(|reason| !reason.is_null() && reason != "");
            ends |= has_reason || is_measured && choice.contains_key("message");
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
    ends
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
mod tests {
    use super::*;
    use serde_json::json;

    fn stream(chunks: &[Value], end: &str) -> Value {
        let mut text = String::from(": keep-alive\n\n");
        for chunk in chunks {
            text.push_str(&format!("data: {chunk}\n\n"));
        }
        joined(format!("{text}{end}").as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn chunks_become_the_body_that_was_asked_for() {
        let chunk = |delta: Value, logprobs: Value, finish: Value| json!({"id": "x", "model": "m", "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]});
        let token =
            |text: &str| json!({"content": [{"token": text, "logprob": -1.0}], "refusal": null});
        let call = |id: Value, arguments: &str| json!({"tool_calls": [{"index": 0, "id": id, "function": {"arguments": arguments}}]});
        let chunks = [
            chunk(
                json!({"role": "assistant", "content": ""}),
                Value::Null,
                Value::Null,
            ),
            chunk(json!({"content": "Hel"}), token("Hel"), Value::Null),
            chunk(json!({"reasoning_content": "hm"}), Value::Null, Value::Null),
            json!({"choices": [{"index": 1, "delta": {"content": "another"}}]}),
            chunk(call(json!("c1"), "{\"a\""), Value::Null, Value::Null),
            chunk(call(json!("c1"), ":1}"), Value::Null, Value::Null),
            chunk(
                json!({"role": "assistant", "content": "lo"}),
                token("lo"),
                Value::Null,
            ),
            chunk(json!({}), Value::Null, json!("stop")),
            json!({"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
        ];
        for (end, separator) in [
            ("data: [DONE]\n\n", "\n"),
            ("", "\n"),
            ("data: [DONE]", "\r\n"),
        ] {
            let text: String = chunks
                .iter()
                .map(|chunk| format!("event: chunk{separator}data: {chunk}{separator}{separator}"))
                .collect();
            let body = joined(format!("{text}{end}").as_bytes()).unwrap().unwrap();
            let choice = &body["choices"][0];
            assert_eq!(
                choice["message"],
                json!({
                    "role": "assistant", "content": "Hello", "reasoning_content": "hm",
                    "tool_calls": [{"index": 0, "id": "c1", "function": {"arguments": "{\"a\":1}"}}],
                })
            );
            assert_eq!(choice["finish_reason"], "stop");
            let tokens: Vec<_> = choice["logprobs"]["content"]
                .as_array()
                .unwrap()
                .iter()
                .map(|t| &t["token"])
                .collect();
            assert_eq!(tokens, ["Hel", "lo"]);
            assert_eq!(
                (&body["model"], &body["usage"]["prompt_tokens"]),
                (&json!("m"), &json!(3))
            );
            assert_eq!(body["choices"][1]["message"]["content"], "another");
        }
    }

    #[test]
    fn what_is_no_piece_of_an_answer_is_passed_over() {
        let chunk = |text: &str, finish: Value| json!({"choices": [{"delta": {"content": text}, "finish_reason": finish}]});
        let (first, last) = (chunk("Hel", Value::Null), chunk("lo", json!("stop")));
        let several_lines = serde_json::to_string_pretty(&last).unwrap();
        let several_lines = several_lines.replace('\n', "\r\ndata: ");
        let bodies = [
            format!("data: ping\n\ndata: null\n\ndata: {first}\n\ndata: {last}\n\n"),
            format!("data: {first}\n\ndata: {last}\n\nevent: error\ndata: overloaded\n\n"),
            format!("data: {first}\r\n\r\ndata: {several_lines}\r\n\r\ndata: [DONE]\r\n\r\n"),
            format!("data: {first}\r\rdata: {last}\r\r"),
            format!("{first}\n{last}\n"),
            format!("{first}{last}[DONE]"),
            format!("[{first}, {last}]"),
            format!("\u{1e}{first}\n\u{1e}{last}\n"),
        ];
        for body in bodies {
            let joined = joined(body.as_bytes())
                .unwrap()
                .unwrap_or_else(|e| panic!("{body}: {e}"));
            assert_eq!(
                joined["choices"][0]["message"]["content"], "Hello",
                "{body}"
            );
        }
        // A piece that cannot be read is missed.
        let broken = format!("{first}\n{{\"choices\": x\n{last}");
        assert!(joined(broken.as_bytes()).unwrap().is_err());
        let cut = format!("{first}\n{first}\n");
        assert_eq!(joined(cut.as_bytes()), Some(Err(Problem::CutOff)));
    }

    #[test]
    fn a_whole_answer_in_the_frame_of_a_stream_is_that_answer() {
        let whole =
            json!({"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": 1}});
        assert_eq!(stream(std::slice::from_ref(&whole), ""), whole);
        let lines = format!("data: {whole}\ndata: [DONE]\n");
        assert_eq!(joined(lines.as_bytes()).unwrap().unwrap(), whole);
    }

    #[test]
    fn a_stream_that_breaks_off_is_cut_off_and_an_error_in_it_is_told() {
        let chunk = json!({"choices": [{"delta": {"content": "hel"}}]});
        let cut = format!("data: {chunk}\n\n");
        assert_eq!(joined(cut.as_bytes()), Some(Err(Problem::CutOff)));
        assert_eq!(joined(b": wait\n\n"), Some(Err(Problem::CutOff)));
        let body = stream(
            &[chunk.clone(), json!({"error": {"message": "overloaded"}})],
            "",
        );
        assert_eq!(body["error"]["message"], "overloaded");
        // Done is done, also without a reason.
        assert_eq!(
            stream(&[chunk], "data: [DONE]\n\n")["choices"][0]["message"]["content"],
            "hel"
        );
        // So is what its tokens are counted for.
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
        let chunk = json!({"choices": [{"delta": {"content": "hel"}}]});
        assert_eq!(
            stream(&[chunk.clone(), usage], "")["choices"][0]["message"]["content"],
            "hel"
        );
        let done = format!("data: {chunk}\n\ndata: DONE\n\n");
        assert!(joined(done.as_bytes()).unwrap().is_ok());
        assert_eq!(joined(b"{\"a\":1}"), None);
        assert!(joined(b"data: hello\n\n").unwrap().is_err());
    }
}
