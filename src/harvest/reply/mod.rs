//! A teacher's reply, read leniently, in this one place. Pure.
//!
//! ```text
//! bytes --encoding--> body --scan (logprobs), serde--> Completion
//!                          --event_stream or json (repair)--> the same, where it is not strict JSON
//! ```
//!
//! Every answer has been paid for: a field that is missing, of another type or unknown to us is never a
//! reason to lose one, and neither is a flaw of its JSON. `message` tells text, thinking and refusal apart,
//! `usage` reads token counts, `logprobs` makes columns, `error` reads errors of every shape.

mod body;
pub mod encoding;
pub mod error;
mod event_stream;
mod fields;
pub mod json;
pub mod logprobs;
mod message;
mod repair;
mod scan;
pub mod usage;

use std::cell::Cell;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::secrets::Secrets;
use crate::cache::record::{Answer, Logprobs, Usage};
use body::read;
use error::ApiError;
use json::Problem;
use scan::{Cut, Mark};

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
    /// Why nothing of it could be read.
    pub unreadable: Option<String>,
}

impl Completion {
    /// An answer that was paid for and cannot be read.
    pub fn unreadable(problem: String) -> Completion {
        Completion {
            unreadable: Some(problem),
            ..Completion::default()
        }
    }

    /// Takes keys out of an answer that came in pieces, none of which held one.
    pub fn clean(&mut self, secrets: &Secrets) {
        // The key was taken out of the text, and is left in the bytes of tokens.
        let is_in_tokens = self.logprobs.as_ref().is_some_and(|logprobs| {
            secrets.is_in(&logprobs.token.concat())
                || logprobs
                    .top
                    .iter()
                    .flatten()
                    .any(|token| secrets.is_in(token))
        });
        secrets.clean_text(&mut self.model);
        secrets.clean_text(&mut self.fingerprint);
        for value in self.extra.values_mut() {
            secrets.clean_value(value);
        }
        if secrets.clean_answer(&mut self.answer) | is_in_tokens {
            let problem = "the answer held the key";
            self.logprobs_fault = self.logprobs.take().map(|_| problem.into());
        }
    }
}

/// A body with a good status that holds no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// An error in a good status, as some routers send once generation has begun.
    Error(Box<ApiError>),
    /// Nothing, a body that ends early, or no completion at all: the text says which. Asking again may
    /// help.
    Malformed(String),
    /// There are signs of an answer, which was paid for, but it cannot be read.
    Unreadable(String),
}

impl NoAnswer {
    pub fn error(error: ApiError) -> NoAnswer {
        NoAnswer::Error(Box::new(error))
    }
}

/// Reads the body of a reply with a good status.
///
/// Top-k logprobs are nearly all of a body, so they are read by themselves where they are as usual,
/// and else as what they should be. Where that fails, they are left unparsed, so that broken logprobs
/// cost no answer. A body that is not strict JSON of this shape is repaired first.
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
    match read(body, logprobs::columns).or_else(|_| read(body, parse_later)) {
        Ok(Ok(completion)) => Ok(completion),
        // The choices may be inside of something.
        Ok(Err(_)) if names_choices(body) => parse_repaired(body),
        Ok(no_answer) => no_answer,
        Err(_) => parse_repaired(body),
    }
}

fn parse_later(raw: &RawValue, text: &str) -> Result<Option<Logprobs>, String> {
    logprobs::parse(raw.get(), text)
}

fn parse_repaired(body: &[u8]) -> Result<Completion, NoAnswer> {
    let value = event_stream::joined(body).unwrap_or_else(|| json::value(body));
    let value = value.map_err(|problem| no_json(problem, body))?;
    let text = unwrapped(value).to_string();
    match read(text.as_bytes(), parse_later) {
        Ok(answer) => answer,
        Err(error) if has_signs_of_an_answer(body) => {
            let problem = format!("the body is no chat completion: {error}");
            Err(NoAnswer::Unreadable(problem))
        }
        Err(_) => Err(NoAnswer::Malformed(no_completion(body))),
    }
}

fn no_json(problem: Problem, body: &[u8]) -> NoAnswer {
    match problem {
        Problem::NotJson(_) if has_signs_of_an_answer(body) => {
            NoAnswer::Unreadable(problem.to_string())
        }
        _ => NoAnswer::Malformed(problem.to_string()),
    }
}

/// Is there a sign that something was generated?
fn has_signs_of_an_answer(body: &[u8]) -> bool {
    let signs = ["\"usage\"", "completion_tokens"];
    let has = |sign: &&str| memchr::memmem::find(body, sign.as_bytes()).is_some();
    names_choices(body) || signs.iter().any(has)
}

/// Is there a field of this name, also in JSON within JSON?
pub fn names_choices(body: &[u8]) -> bool {
    ["\"choices\"", "\"choices\\"]
        .iter()
        .any(|name| memchr::memmem::find(body, name.as_bytes()).is_some())
}

fn no_completion(body: &[u8]) -> String {
    format!("the body is no chat completion: {}", json::beginning(body))
}

/// Takes a completion out of what gateways put around it: a list, a text, objects of their own.
fn unwrapped(value: Value) -> Value {
    const DEEPEST: usize = 6;
    match inner(&value, DEEPEST) {
        Some(mut completion) => {
            // One choice without a list around it.
            if let Some(choices @ Value::Object(_)) = completion.get_mut("choices") {
                *choices = Value::Array(listed(choices.take()));
            }
            completion
        }
        None => value,
    }
}

/// Choices without a list around them: one, or several by their index.
fn listed(choices: Value) -> Vec<Value> {
    match choices {
        Value::Object(fields) if fields.keys().all(|name| name.parse::<u32>().is_ok()) => {
            fields.into_iter().map(|(_, choice)| choice).collect()
        }
        choice => vec![choice],
    }
}

/// The outermost object with choices.
fn inner(value: &Value, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    match value {
        Value::Object(fields) if fields.contains_key("choices") => Some(value.clone()),
        Value::Object(fields) => fields.values().find_map(|value| inner(value, depth)),
        Value::Array(items) => items.iter().find_map(|value| inner(value, depth)),
        Value::String(text) => {
            let text = text.trim_start();
            let may_be = text.starts_with(['{', '[', '"']) && text.contains("choices");
            let value = may_be.then(|| json::value(text.as_bytes()).ok())??;
            inner(&value, depth)
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

#[cfg(test)]
mod tests;
