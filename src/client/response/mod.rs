//! Lenient parser of a teacher's replies. Pure.
//!
//! ```text
//! bytes --encoding--> body --scan (logprobs), serde--> Completion
//!                          --event_stream, wrapped or json (repair)--> Completion, if that fails
//! ```
//!
//! | file | content |
//! |---|---|
//! | `encoding` | `Content-Encoding`, decoded chunk by chunk |
//! | `json`, `repair`, `json_error` | repair of invalid JSON |
//! | `event_stream`, `wrapped` | bodies that are event streams or inside other objects |
//! | `body`, `fields`, `completion` | body of a chat completion, and the answer parsed from it |
//! | `message`, `text`, `usage` | text, thinking and refusal of a message; token counts |
//! | `scan`, `logprobs` | fast and lenient parser of logprobs |
//! | `error`, `error_body` | errors of every shape |
//!
//! Invariant: an answer is paid for, so it is never discarded because of a missing, mistyped or unknown field, or of
//! JSON that can be repaired.

pub(crate) mod body;
pub(crate) mod completion;
pub(crate) mod encoding;
pub(crate) mod error;
pub(crate) mod error_body;
pub(crate) mod event_stream;
pub(crate) mod fields;
pub(crate) mod json;
pub(crate) mod json_error;
pub(crate) mod logprobs;
pub(crate) mod message;
pub(crate) mod repair;
pub(crate) mod scan;
pub(crate) mod text;
pub(crate) mod usage;
pub(crate) mod wrapped;

use std::cell::Cell;

use serde_json::value::RawValue;

use crate::cache::record::Logprobs;
use crate::client::response::body::parse_body;
use crate::client::response::completion::{Completion, NoAnswer, mentions_choices};
use crate::client::response::json_error::JsonProblem;
use crate::client::response::scan::{BodyWithoutLogprobs, Placeholder};

/// Parses the body of a reply with a success status.
///
/// Top-k logprobs are most of a body, so [`scan`] parses them first if they have the usual format; serde parses all
/// other formats. If both parsers fail, the logprobs are parsed after the answer, so that invalid logprobs do not
/// discard it. A body that is not strict JSON of the usual shape is repaired and parsed again.
pub(crate) fn parse(body: &[u8]) -> Result<Completion, NoAnswer> {
    let completion = match parse_strict(body) {
        Err(_) => parse_repaired(body)?,
        Ok(Ok(completion)) if completion.has_content() => completion,
        // The completion may be nested in, or follow, other data.
        Ok(strict) if mentions_choices(body) => match (parse_repaired(body), strict) {
            (Ok(nested), _) if nested.has_content() => nested,
            (_, Ok(empty)) => empty,
            (nested, Err(_)) => nested?,
        },
        Ok(strict) => strict?,
    };
    Ok(with_usage(completion, body))
}

/// Parses a body that is strict JSON of the usual shape. For any other body, returns the outer error.
fn parse_strict(body: &[u8]) -> Result<Result<Completion, NoAnswer>, serde_json::Error> {
    if let Some(BodyWithoutLogprobs { body, columns }) = scan::remove_logprobs(body) {
        let columns = Cell::new(Some(columns));
        let answer = parse_body(&body, |_: Placeholder, text| {
            Ok(columns.take().and_then(|columns| columns.finish(text)))
        });
        // If the columns were not taken, the removed list belonged to another part of the body.
        if let Ok(answer) = answer
            && columns.take().is_none()
        {
            return Ok(answer);
        }
    }
    parse_body(body, logprobs::columns).or_else(|_| parse_body(body, parse_raw_logprobs))
}

/// Searches the whole body for token counts if the usual field has none.
fn with_usage(mut completion: Completion, body: &[u8]) -> Completion {
    // Parts of the names of token counts. Logprobs do not contain them, though they contain `tokens`.
    let names = ["_tokens", "Tokens", "TokenCount", "_eval_count"];
    let contains = |name: &str| memchr::memmem::find(body, name.as_bytes()).is_some();
    let has_counts = || names.into_iter().any(contains);
    if completion.usage.is_none() && has_counts() {
        let value = event_stream::joined(body).unwrap_or_else(|| json::value(body));
        completion.usage = value.ok().and_then(|value| wrapped::usage_in(&value));
    }
    completion
}

/// Parses logprobs that were kept as raw JSON, after the answer is known.
fn parse_raw_logprobs(raw: &RawValue, text: &str) -> Result<Option<Logprobs>, String> {
    logprobs::parse(raw.get(), text)
}

/// Parses a body that is an event stream, wrapped or invalid JSON.
fn parse_repaired(body: &[u8]) -> Result<Completion, NoAnswer> {
    let value = event_stream::joined(body).unwrap_or_else(|| json::value(body));
    let value = value.map_err(|problem| invalid_json(problem, body))?;
    let mut candidates = wrapped::completions(&value);
    let chunks = candidates
        .iter()
        .filter(|value| event_stream::is_chunk(value));
    let chunk_count = chunks.count();
    if candidates.is_empty() {
        candidates.push(value);
    } else if chunk_count > 1 {
        let joined = event_stream::join_values(candidates);
        candidates = vec![joined.map_err(|problem| invalid_json(problem, body))?];
    }
    let mut answers = candidates.iter().map(|value| {
        let text = value.to_string();
        parse_body(text.as_bytes(), parse_raw_logprobs).unwrap_or_else(|error| {
            Err(if may_contain_answer(body) {
                NoAnswer::Unreadable(format!("the body is not a chat completion: {error}"))
            } else {
                NoAnswer::Malformed(not_a_completion(body))
            })
        })
    });
    let has_content =
        |answer: &Result<Completion, NoAnswer>| answer.as_ref().is_ok_and(Completion::has_content);
    let with_content = answers.clone().find(has_content);
    with_content
        .or_else(|| answers.next())
        .unwrap_or_else(|| Err(NoAnswer::Malformed(not_a_completion(body))))
}

fn invalid_json(problem: JsonProblem, body: &[u8]) -> NoAnswer {
    match problem {
        JsonProblem::NotJson(_) if may_contain_answer(body) => {
            NoAnswer::Unreadable(problem.to_string())
        }
        _ => NoAnswer::Malformed(problem.to_string()),
    }
}

/// Returns true if the body contains a field that indicates a generated text.
fn may_contain_answer(body: &[u8]) -> bool {
    let names = ["\"usage\"", "completion_tokens"];
    let contains = |name: &&str| memchr::memmem::find(body, name.as_bytes()).is_some();
    mentions_choices(body) || names.iter().any(contains)
}

fn not_a_completion(body: &[u8]) -> String {
    format!(
        "the body is not a chat completion: {}",
        crate::client::response::json_error::beginning(body)
    )
}

#[cfg(test)]
mod tests;
