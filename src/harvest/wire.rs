//! The teacher's reply, read leniently. Pure.
//!
//! Every answer has been paid for: a field that is missing, of another type or unknown to us is
//! never a reason to lose one. Only a body without an answer in it is an error.

use std::cell::Cell;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::api_error::{ApiError, text};
use super::fields::fields;
use super::logprobs;
use super::scan::{self, Cut, Mark};
use crate::cache::record::{Answer, Logprobs, Usage};

/// An answer with what came along.
#[derive(Debug, Default)]
pub struct Completion {
    pub answer: Answer,
    pub usage: Option<Usage>,
    /// As reported; empty if it was not.
    pub model: String,
    pub fingerprint: String,
    pub logprobs: Option<Logprobs>,
    /// Why logprobs that did come cannot be used.
    pub logprobs_fault: Option<String>,
    /// Everything else in the body, as it came.
    pub extra: Map<String, Value>,
}

/// A body with status 200 that holds no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// Not JSON, cut off, or without a choice; the text says which.
    Malformed(String),
    /// An error in a good status, as some routers send once generation has begun.
    Error(ApiError),
}

/// A body, its logprobs as an `L`.
struct Body<L> {
    choices: Option<Vec<Choice<L>>>,
    usage: Value,
    model: Value,
    system_fingerprint: Value,
    error: Value,
    extra: Map<String, Value>,
}

struct Choice<L> {
    message: Value,
    finish_reason: Value,
    logprobs: Option<L>,
    error: Value,
    extra: Map<String, Value>,
}

fields! {
    Body: choices, usage, model, system_fingerprint, error;
    Choice: message, finish_reason, logprobs, error;
}

/// Reads the body of a reply with a good status.
///
/// Top-k logprobs are nearly all of a body, so they are read by themselves where they are as usual,
/// and else as what they should be. Where that fails, they are first left unparsed, so that broken
/// logprobs cost no answer, and last without the `NaN` and `Infinity` that Python writes, which are
/// no JSON.
pub fn parse(body: &[u8]) -> Result<Completion, NoAnswer> {
    if let Some(Cut { rest, columns }) = scan::cut(body) {
        let columns = Cell::new(Some(columns));
        let answer = read(&rest, |_: Mark, text| {
            Ok(columns.take().and_then(|columns| columns.finish(text)))
        });
        // Else what was cut out was not the answer's.
        if let Ok(answer) = answer
            && columns.take().is_none()
        {
            return answer;
        }
    }
    let parse_later = |raw: Box<RawValue>, text: &str| logprobs::parse(raw.get(), text);
    let answer = read(body, logprobs::columns)
        .or_else(|_| read(body, parse_later))
        .or_else(|error| {
            let patched = null_for_bare_words(body);
            read(&patched, parse_later).map_err(|_| error)
        });
    answer.unwrap_or_else(|error| {
        let problem = if body.trim_ascii().is_empty() {
            "the body is empty".into()
        } else {
            format!("the body is no chat completion: {error}")
        };
        Err(NoAnswer::Malformed(problem))
    })
}

/// Reads a body whose logprobs are an `L`.
///
/// # Errors
/// Where the body is no JSON of this shape.
fn read<'a, L: Deserialize<'a>>(
    body: &'a [u8],
    logprobs: impl Fn(L, &str) -> Result<Option<Logprobs>, String>,
) -> Result<Result<Completion, NoAnswer>, serde_json::Error> {
    Ok(completion(serde_json::from_slice(body)?, logprobs))
}

fn completion<L>(
    body: Body<L>,
    logprobs: impl Fn(L, &str) -> Result<Option<Logprobs>, String>,
) -> Result<Completion, NoAnswer> {
    if is_error(&body.error) {
        return Err(NoAnswer::Error(ApiError::from_value(&body.error)));
    }
    let Some(choice) = body.choices.into_iter().flatten().next() else {
        return Err(NoAnswer::Malformed("there is no choice in the body".into()));
    };
    let finish_reason = text(&choice.finish_reason);
    if finish_reason == "error" || is_error(&choice.error) {
        return Err(NoAnswer::Error(ApiError::from_value(&choice.error)));
    }
    let Value::Object(mut message) = choice.message else {
        return Err(NoAnswer::Malformed(
            "there is no message in the choice".into(),
        ));
    };
    message.remove("role");
    let answer = Answer {
        text: content(message.remove("content")),
        finish_reason,
        refusal: text(&message.remove("refusal").unwrap_or_default()),
        reasoning: reasoning(&mut message),
    };
    let (logprobs, logprobs_fault) = match choice.logprobs {
        None => (None, None),
        Some(raw) => match logprobs(raw, &answer.text) {
            Ok(logprobs) => (logprobs, None),
            Err(fault) => (None, Some(fault)),
        },
    };

    let mut extra = body.extra;
    let mut choice_extra = choice.extra;
    choice_extra.remove("index");
    let (usage, usage_extra) = usage(body.usage);
    for (name, rest) in [
        ("choice", choice_extra),
        ("message", message),
        ("usage", usage_extra),
    ] {
        if !rest.is_empty() {
            extra.insert(name.into(), Value::Object(rest));
        }
    }
    Ok(Completion {
        answer,
        usage,
        model: text(&body.model),
        fingerprint: text(&body.system_fingerprint),
        logprobs,
        logprobs_fault,
        extra,
    })
}

/// Does this say that something went wrong? Some servers always send the field, and leave it empty.
pub fn is_error(error: &Value) -> bool {
    match error {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// The text of `content`: a string, null, or a list of parts.
fn content(content: Option<Value>) -> String {
    match content {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts
            .iter()
            .filter_map(|part| part.get("text")?.as_str())
            .collect(),
        _ => String::new(),
    }
}

/// Takes the visible trace of a reasoning model out of the message, by either of its names.
fn reasoning(message: &mut Map<String, Value>) -> String {
    for name in ["reasoning_content", "reasoning"] {
        if let Some(Value::String(trace)) = message.get(name) {
            let trace = trace.clone();
            message.remove(name);
            return trace;
        }
    }
    String::new()
}

/// The counts that we know, and the rest.
pub fn usage(value: Value) -> (Option<Usage>, Map<String, Value>) {
    let Value::Object(mut fields) = value else {
        return (None, Map::new());
    };
    let detail = |object: &str, name: &str| count(fields.get(object).and_then(|o| o.get(name)));
    let cached_tokens = detail("prompt_tokens_details", "cached_tokens")
        .or(count(fields.get("prompt_cache_hit_tokens")))
        .unwrap_or(0);
    let reasoning_tokens = detail("completion_tokens_details", "reasoning_tokens").unwrap_or(0);
    let prompt_tokens = count(fields.get("prompt_tokens"));
    let completion_tokens = count(fields.get("completion_tokens"));
    if prompt_tokens.is_none() && completion_tokens.is_none() {
        return (None, fields);
    }
    let prompt_tokens = prompt_tokens.unwrap_or(0);
    let mut completion_tokens = completion_tokens.unwrap_or(0);
    // Where the total says so, what was thought is billed beside the completion (xAI).
    let total = count(fields.get("total_tokens"));
    if reasoning_tokens > 0 && total == Some(prompt_tokens + completion_tokens + reasoning_tokens) {
        completion_tokens += reasoning_tokens;
    }
    fields.retain(|name, _| {
        !["prompt_tokens", "completion_tokens", "total_tokens"].contains(&name.as_str())
    });
    let usage = Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens,
        reasoning_tokens,
    };
    (Some(usage), fields)
}

/// A count, be it written as an integer or as a float.
fn count(value: Option<&Value>) -> Option<u64> {
    let value = value?;
    value
        .as_u64()
        .or_else(|| value.as_f64().map(|count| count as u64))
}

/// The body with `NaN`, `Infinity` and `-Infinity` outside strings replaced by `null`.
pub fn null_for_bare_words(body: &[u8]) -> Vec<u8> {
    let mut patched = Vec::with_capacity(body.len());
    let mut rest = body;
    let mut in_string = false;
    while let Some(&byte) = rest.first() {
        if !in_string {
            let word = [&b"NaN"[..], b"Infinity", b"-Infinity"]
                .into_iter()
                .find(|word| rest.starts_with(word));
            if let Some(word) = word {
                patched.extend_from_slice(b"null");
                rest = &rest[word.len()..];
                continue;
            }
        }
        let taken = match byte {
            b'\\' if in_string => rest.len().min(2),
            _ => 1,
        };
        in_string ^= byte == b'"';
        patched.extend_from_slice(&rest[..taken]);
        rest = &rest[taken..];
    }
    patched
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(body: Value) -> Completion {
        parse(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_full_answer_is_taken_apart_and_nothing_is_lost() {
        let completion = answer(json!({
            "id": "x", "created": 1.5, "model": "m-1", "system_fingerprint": "f",
            "service_tier": "on_demand",
            "choices": [{"index": 0, "finish_reason": "eos", "stop_reason": 7,
                "message": {"role": "assistant", "content": "hi", "reasoning": "hm", "tool_calls": []}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2.0, "total_tokens": 7, "cost": 0.1,
                "prompt_tokens_details": {"cached_tokens": 4}},
        }));
        assert_eq!(
            completion.answer,
            Answer {
                text: "hi".into(),
                finish_reason: "eos".into(),
                refusal: String::new(),
                reasoning: "hm".into(),
            }
        );
        let usage = completion.usage.unwrap();
        assert_eq!(
            (
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens
            ),
            (5, 2, 4)
        );
        assert_eq!(
            (completion.model.as_str(), completion.fingerprint.as_str()),
            ("m-1", "f")
        );
        let extra = json!({
            "id": "x", "created": 1.5, "service_tier": "on_demand",
            "choice": {"stop_reason": 7}, "message": {"tool_calls": []},
            "usage": {"cost": 0.1, "prompt_tokens_details": {"cached_tokens": 4}},
        });
        assert_eq!(Value::Object(completion.extra), extra);
    }

    #[test]
    fn thinking_is_billed_once_wherever_it_is_counted() {
        let usage = |completion_tokens: u64, total_tokens: u64| {
            let details = json!({"reasoning_tokens": 30});
            let completion = answer(json!({
                "choices": [{"message": {"content": "x"}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": completion_tokens,
                    "total_tokens": total_tokens, "completion_tokens_details": details},
            }));
            completion.usage.unwrap().completion_tokens
        };
        assert_eq!(usage(35, 45), 35, "among the completion's tokens");
        assert_eq!(usage(5, 45), 35, "beside them");
    }

    #[test]
    fn odd_answers_are_still_answers() {
        let choice = |message: Value| json!({"choices": [{"message": message}]});
        let cases = [
            (choice(json!({"content": null})), ""),
            (choice(json!({})), ""),
            (
                choice(json!({"content": [{"type": "text", "text": "a"}, {"text": "b"}]})),
                "ab",
            ),
            (choice(json!({"content": "x", "refusal": 3})), "x"),
            (
                json!({"choices": [{"message": {"content": "x"}, "logprobs": "none"}], "usage": []}),
                "x",
            ),
            (
                json!({"choices": [{"message": {"content": "x"}}], "error": {}}),
                "x",
            ),
        ];
        for (body, expected) in cases {
            assert_eq!(answer(body).answer.text, expected);
        }
        let spaced = b"\n\n\n {\"choices\":[{\"message\":{\"content\":\"x\"}}]}";
        assert_eq!(parse(spaced).unwrap().answer.text, "x");
    }

    #[test]
    fn broken_logprobs_cost_no_answer() {
        let body = br#"{"choices":[{"message":{"content":"a \" NaN"},"logprobs":{"content":[
            {"token":"a \" NaN","logprob":-Infinity,"top_logprobs":[{"token":"b","logprob":NaN}]}]}}]}"#;
        let completion = parse(body).unwrap();
        assert_eq!(completion.answer.text, "a \" NaN");
        let logprobs = completion.logprobs.unwrap();
        assert_eq!(
            (logprobs.logprob, logprobs.top_logprob),
            (vec![None], vec![vec![None]])
        );

        let completion = answer(json!({"choices": [{"message": {"content": "x"},
            "logprobs": {"content": [{"token": 1}]}}]}));
        assert!(completion.logprobs.is_none() && completion.logprobs_fault.is_some());
    }

    #[test]
    fn a_body_without_an_answer_says_why() {
        let nested = format!("{{\"usage\":{}", "[".repeat(100_000));
        let cases: [(&[u8], &str); 7] = [
            (b"", "empty"),
            (b"{\"choices\":[{\"mess", "EOF"),
            (b"<html>", "expected"),
            (b"{}", "no choice"),
            (b"{\"choices\":[]}", "no choice"),
            (
                b"{\"choices\":[{\"finish_reason\":\"stop\"}]}",
                "no message",
            ),
            (nested.as_bytes(), "recursion"),
        ];
        for (body, expected) in cases {
            match parse(body).unwrap_err() {
                NoAnswer::Malformed(problem) => assert!(problem.contains(expected), "{problem}"),
                NoAnswer::Error(error) => panic!("{error:?}"),
            }
        }
    }

    #[test]
    fn an_error_may_come_with_a_good_status() {
        let body = br#"{"error":{"code":502,"message":"m"},"choices":[]}"#;
        assert!(matches!(parse(body), Err(NoAnswer::Error(error)) if error.status == Some(502)));
        let body = br#"{"choices":[{"message":{"content":"x"},"finish_reason":"error"}]}"#;
        assert!(matches!(parse(body), Err(NoAnswer::Error(_))));
    }
}
