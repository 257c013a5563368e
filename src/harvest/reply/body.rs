//! The body of a chat completion, taken apart into an answer and what came along. Pure.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{ApiError, is_error, text};
use super::fields::fields;
use super::{Completion, NoAnswer, json, message, usage};
use crate::cache::record::{Answer, Logprobs};

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

/// Reads a body whose logprobs are an `L`.
///
/// # Errors
/// Where the body is no JSON of this shape.
pub(super) fn read<'a, L: Deserialize<'a>>(
    body: &'a [u8],
    logprobs: impl Fn(L, &str) -> Result<Option<Logprobs>, String>,
) -> Result<Result<Completion, NoAnswer>, serde_json::Error> {
    Ok(completion(serde_json::from_slice(body)?, logprobs))
}

fn completion<L>(
    body: Body<L>,
    logprobs: impl Fn(L, &str) -> Result<Option<Logprobs>, String>,
) -> Result<Completion, NoAnswer> {
    let mut extra = body.extra;
    let first = body.choices.into_iter().flatten().next();
    let is_filtered =
        is_error(&body.error) && ApiError::from_value(&body.error).is_of_the_content();
    if is_error(&body.error) && !(is_filtered && first.is_some()) {
        return Err(NoAnswer::error(ApiError::from_value(&body.error)));
    }
    let (usage, usage_extra) = usage::usage(usage_of(body.usage, &mut extra));
    let Some(choice) = first else {
        // What was read of the prompt is paid for, and nothing was said.
        if usage.is_none() && usage_extra.is_empty() {
            return Err(no_choice(&extra));
        }
        if !usage_extra.is_empty() {
            extra.insert("usage".into(), Value::Object(usage_extra));
        }
        return Ok(Completion {
            answer: Answer {
                finish_reason: if is_blocked(&extra) {
                    "content_filter"
                } else {
                    ""
                }
                .into(),
                ..Answer::default()
            },
            usage,
            model: text(&body.model),
            fingerprint: text(&body.system_fingerprint),
            extra,
            ..Completion::default()
        });
    };
    let mut finish_reason = text(&choice.finish_reason);
    if !is_filtered && (finish_reason == "error" || is_error(&choice.error)) {
        return Err(NoAnswer::error(ApiError::from_value(&choice.error)));
    }
    if is_filtered && finish_reason.is_empty() {
        finish_reason = "content_filter".into();
    }
    let mut choice_extra = choice.extra;
    choice_extra.remove("index");
    let mut message = match choice.message {
        Value::Object(message) => message,
        // As text completions have it, or a piece of a stream in one piece.
        _ => match choice_extra.remove("text").or(choice_extra.remove("delta")) {
            Some(Value::Object(delta)) => delta,
            Some(text) => Map::from_iter([("content".to_owned(), text)]),
            None => Map::new(),
        },
    };
    let answer = message::answer(&mut message, finish_reason);
    let (logprobs, logprobs_fault) = match choice.logprobs {
        None => (None, None),
        Some(raw) => match logprobs(raw, &answer.text) {
            Ok(logprobs) => (logprobs, None),
            Err(fault) => (None, Some(fault)),
        },
    };
    for (name, rest) in [
        ("choice", choice_extra),
        ("message", message),
        ("usage", usage_extra),
    ] {
        if !rest.is_empty() {
            extra.insert(name.into(), Value::Object(rest));
        }
    }
    if is_filtered {
        extra.insert("error".into(), body.error);
    }
    Ok(Completion {
        answer,
        usage,
        model: text(&body.model),
        fingerprint: text(&body.system_fingerprint),
        logprobs,
        logprobs_fault,
        extra,
        unreadable: None,
    })
}

/// The token counts, which some servers have under another name, or beside each other at the top.
fn usage_of(usage: Value, extra: &mut Map<String, Value>) -> Value {
    if usage.is_object() {
        return usage;
    }
    let elsewhere = extra
        .remove("usageMetadata")
        .or_else(|| extra.get("x_groq")?.get("usage").cloned());
    elsewhere.unwrap_or(usage)
}

/// Was the prompt refused by a filter, as Azure's and Google's say it beside an empty list of choices?
fn is_blocked(extra: &Map<String, Value>) -> bool {
    let names = ["prompt_filter_results", "promptFeedback", "prompt_feedback"];
    names.iter().any(|name| extra.contains_key(*name))
}

/// A body with neither a choice nor usage.
fn no_choice(extra: &Map<String, Value>) -> NoAnswer {
    match ApiError::in_body(extra) {
        Some(error) => NoAnswer::error(error),
        None => {
            let body = Value::Object(extra.clone()).to_string();
            NoAnswer::Malformed(format!(
                "there is no choice in the body: {}",
                json::beginning(body.as_bytes())
            ))
        }
    }
}
