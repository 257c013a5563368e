//! Parses the body of a chat completion into an answer and the other fields. Pure.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::cache::record::{Answer, Logprobs};
use crate::cache::usage::Usage;
use crate::client::response::completion::{Completion, NoAnswer};
use crate::client::response::error::{ApiError, is_error};
use crate::client::response::fields::fields;
use crate::client::response::text::{has_text, text};
use crate::client::response::{message, usage};

/// Body of a chat completion with logprobs of type `L`.
struct Body<L> {
    choices: Option<Vec<Option<Choice<L>>>>,
    usage: Value,
    model: Value,
    system_fingerprint: Value,
    error: Value,
    extra: Map<String, Value>,
}

/// One choice of the body.
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

/// Parses a body with logprobs of type `L`, which `logprobs` converts.
///
/// # Errors
/// If the body is not JSON of this shape.
pub(crate) fn parse_body<'a, L: Deserialize<'a>>(
    body: &'a [u8],
    logprobs: impl Fn(L, &str) -> Result<Option<Logprobs>, String>,
) -> Result<Result<Completion, NoAnswer>, serde_json::Error> {
    Ok(completion(serde_json::from_slice(body)?, logprobs))
}

/// Builds the completion, or the error, from a deserialized body.
fn completion<L>(
    body: Body<L>,
    logprobs: impl Fn(L, &str) -> Result<Option<Logprobs>, String>,
) -> Result<Completion, NoAnswer> {
    let mut extra = body.extra;
    let choice = first_with_content(body.choices.unwrap_or_default());
    let error = is_error(&body.error).then(|| ApiError::from_value(&body.error));
    let is_filtered = error.as_ref().is_some_and(ApiError::is_content_filter);
    // Despite an error, text is an answer unless its finish reason is `error`. With the error of a content filter, any
    // choice is an answer.
    let is_answer = choice.as_ref().is_some_and(|choice| {
        is_filtered || has_content(choice) && reason(&choice.finish_reason) != "error"
    });
    if let Some(error) = error.filter(|_| !is_answer) {
        return Err(NoAnswer::error(error));
    }
    let (usage, usage_extra) = usage::usage(take_usage(body.usage, &mut extra));
    let Some(choice) = choice else {
        let body_error = ApiError::in_body(&extra).filter(|_| is_missing_or_zero(usage));
        if let Some(error) = body_error {
            return Err(NoAnswer::error(error));
        }
        // With usage but without a choice, the prompt was billed and the answer is empty.
        if usage.is_none() && usage_extra.is_empty() {
            return Err(no_choice(&extra));
        }
        if !usage_extra.is_empty() {
            extra.insert("usage".into(), Value::Object(usage_extra));
        }
        let finish_reason = if is_blocked(&extra) {
            "content_filter"
        } else {
            ""
        };
        return Ok(Completion {
            answer: Answer {
                finish_reason: finish_reason.into(),
                ..Answer::default()
            },
            usage,
            model: text(&body.model),
            fingerprint: text(&body.system_fingerprint),
            extra,
            ..Completion::default()
        });
    };
    if !is_filtered && !is_answer && has_failed(&choice) {
        return Err(NoAnswer::error(ApiError::from_value(&choice.error)));
    }
    let mut finish_reason = reason(&choice.finish_reason);
    let is_stream_delta = finish_reason.is_empty() && usage.is_none() && is_stream_delta(&choice);
    if is_filtered && finish_reason.is_empty() {
        finish_reason = "content_filter".into();
    } else if finish_reason.is_empty() && (is_error(&body.error) || is_error(&choice.error)) {
        // The text is billed, but may be incomplete.
        finish_reason = "error".into();
    }
    let mut choice_extra = choice.extra;
    choice_extra.remove("index");
    let mut message = take_message(choice.message, &mut choice_extra);
    let answer = message::answer(&mut message, finish_reason);
    let (logprobs, logprobs_fault) = match choice.logprobs {
        None => (None, None),
        Some(raw) => match logprobs(raw, &answer.text) {
            Ok(logprobs) => (logprobs, None),
            Err(reason) => (None, Some(reason)),
        },
    };
    for (name, fields) in [
        ("choice", choice_extra),
        ("message", message),
        ("usage", usage_extra),
    ] {
        if !fields.is_empty() {
            extra.insert(name.into(), Value::Object(fields));
        }
    }
    for (error, name) in [(body.error, "error"), (choice.error, "choice_error")] {
        if is_error(&error) {
            extra.insert(name.into(), error);
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
        is_stream_delta,
        unreadable: None,
    })
}

/// Fields of a choice that may contain its message instead of `message`.
const ALTERNATIVE_FIELDS: [&str; 4] = ["delta", "text", "messages", "content"];

/// Returns the first choice with content, else the first choice.
fn first_with_content<L>(choices: Vec<Option<Choice<L>>>) -> Option<Choice<L>> {
    let mut choices: Vec<_> = choices.into_iter().flatten().collect();
    if choices.len() == 1 {
        return choices.pop();
    }
    // Requests ask for one choice, so of several choices with content, only the one with the lowest index counts.
    choices.sort_by_key(|choice| choice.extra.get("index").and_then(Value::as_u64));
    let first = choices.iter().position(has_content).unwrap_or(0);
    (!choices.is_empty()).then(|| choices.swap_remove(first))
}

/// Returns true if the choice has a stream delta but no message.
fn is_stream_delta<L>(choice: &Choice<L>) -> bool {
    !has_text(&choice.message) && choice.extra.get("delta").is_some_and(has_text)
}

fn has_content<L>(choice: &Choice<L>) -> bool {
    let mut alternatives = ALTERNATIVE_FIELDS
        .iter()
        .filter_map(|name| choice.extra.get(*name));
    has_text(&choice.message) || alternatives.any(has_text)
}

fn has_failed<L>(choice: &Choice<L>) -> bool {
    reason(&choice.finish_reason) == "error" || is_error(&choice.error)
}

/// Returns a finish reason, which may be nested in an object.
fn reason(value: &Value) -> String {
    let inner = ["type", "reason", "name"]
        .iter()
        .find_map(|name| value.get(*name));
    text(inner.unwrap_or(value))
}

/// Takes the message of a choice: the first of `message` and [`ALTERNATIVE_FIELDS`] that contains text. Other fields
/// with text stay in `extra`.
fn take_message(message: Value, extra: &mut Map<String, Value>) -> Map<String, Value> {
    let mut candidates = vec![("message", message)];
    for name in ALTERNATIVE_FIELDS {
        candidates.extend(extra.remove(name).map(|value| (name, value)));
    }
    let first = candidates.iter().position(|(_, value)| has_text(value));
    let (_, chosen) = candidates.swap_remove(first.unwrap_or(0));
    let others = candidates.into_iter().filter(|(_, other)| has_text(other));
    extra.extend(others.map(|(name, other)| (name.to_owned(), other)));
    match chosen {
        Value::Object(message) => message,
        Value::Null => Map::new(),
        Value::Array(mut messages) if messages.last().is_some_and(Value::is_object) => {
            match messages.pop() {
                Some(Value::Object(message)) => message,
                _ => Map::new(),
            }
        }
        text => Map::from_iter([("content".to_owned(), text)]),
    }
}

fn is_missing_or_zero(usage: Option<Usage>) -> bool {
    usage.is_none_or(|usage| usage.prompt_tokens == 0 && usage.completion_tokens == 0)
}

/// Takes the token counts, which some servers send under another name.
fn take_usage(usage: Value, extra: &mut Map<String, Value>) -> Value {
    if usage.as_object().is_some_and(|counts| !counts.is_empty()) {
        return usage;
    }
    let alternatives = extra
        .remove("usageMetadata")
        .or_else(|| extra.get("x_groq")?.get("usage").cloned());
    alternatives.unwrap_or(usage)
}

/// Returns true if a body without choices has a field in which Azure or Google reports that a content filter refused
/// the prompt. Bodies with choices may have the field too.
fn is_blocked(extra: &Map<String, Value>) -> bool {
    let names = ["prompt_filter_results", "promptFeedback", "prompt_feedback"];
    names.iter().any(|name| extra.contains_key(*name))
}

/// Returns the error for a body with neither a choice nor usage.
fn no_choice(extra: &Map<String, Value>) -> NoAnswer {
    match ApiError::in_body(extra) {
        Some(error) => NoAnswer::error(error),
        None => {
            let body = Value::Object(extra.clone()).to_string();
            NoAnswer::Malformed(format!(
                "the body contains no choice: {}",
                crate::client::response::json_error::beginning(body.as_bytes())
            ))
        }
    }
}
