//! Finds completions that gateways wrap in lists, texts or other objects. Pure.

use serde_json::{Map, Value};

use crate::cache::usage::Usage;
use crate::client::response::{json, usage};

/// Maximum nesting depth of the search.
const MAX_DEPTH: usize = 8;

/// Returns a copy of every object with choices, outer objects first. The copy has the choices as a list, unless their
/// shape is unknown.
pub(crate) fn completions(value: &Value) -> Vec<Value> {
    let mut completions = Vec::new();
    search(value, MAX_DEPTH, &mut |fields| {
        if let Some(choices) = fields.get("choices") {
            let mut fields = fields.clone();
            let list = choices_as_list(choices, MAX_DEPTH);
            // Choices of an unknown shape stay unchanged: the reply is then kept as unreadable.
            if !list.is_empty() {
                fields.insert("choices".into(), Value::Array(list));
            }
            completions.push(Value::Object(fields));
        }
    });
    completions
}

/// Returns the first plausible token counts in a body. Skips the answer and an echo of the request, which may
/// contain an example of such counts.
pub(crate) fn usage_in(value: &Value) -> Option<Usage> {
    const SKIPPED: [&str; 6] = ["request", "message", "messages", "delta", "content", "text"];
    let mut first_usage = None;
    let mut visit = |fields: &Map<String, Value>| {
        let counts = usage::usage(Value::Object(fields.clone())).0;
        first_usage = first_usage.or(counts.filter(|usage| usage.prompt_tokens > 0));
    };
    search_except(value, &SKIPPED, MAX_DEPTH, &mut visit);
    first_usage
}

/// Calls `visit` with every object down to a nesting depth of `depth`, outer ones first. Texts that are JSON are
/// searched as well if they contain `choices`.
fn search(value: &Value, depth: usize, visit: &mut impl FnMut(&Map<String, Value>)) {
    search_except(value, &[], depth, visit);
}

/// As [`search`], without the fields in `skipped`.
fn search_except(
    value: &Value,
    skipped: &[&str],
    depth: usize,
    visit: &mut impl FnMut(&Map<String, Value>),
) {
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    match value {
        Value::Object(fields) => {
            visit(fields);
            let inner = fields
                .iter()
                .filter(|(name, _)| !skipped.contains(&name.as_str()));
            inner.for_each(|(_, value)| search_except(value, skipped, depth, visit));
        }
        Value::Array(items) => {
            items
                .iter()
                .for_each(|value| search_except(value, skipped, depth, visit));
        }
        Value::String(text) => {
            if let Some(value) = json_in_text(text, "choices") {
                search_except(&value, skipped, depth, visit);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Parses a text as JSON if it contains `word`.
fn json_in_text(text: &str, word: &str) -> Option<Value> {
    let text = text.trim_start();
    let may_be_json = text.starts_with(['{', '[', '"']) && text.contains(word);
    may_be_json.then(|| json::value(text.as_bytes()).ok())?
}

/// Converts choices to a list of objects, from one choice, a map by index, nested lists or texts.
fn choices_as_list(choices: &Value, depth: usize) -> Vec<Value> {
    const FIELDS: [&str; 6] = [
        "message",
        "delta",
        "text",
        "messages",
        "content",
        "finish_reason",
    ];
    let Some(depth) = depth.checked_sub(1) else {
        return Vec::new();
    };
    match choices {
        Value::Array(items) => items
            .iter()
            .flat_map(|item| choices_as_list(item, depth))
            .collect(),
        Value::Object(fields) if fields.is_empty() => Vec::new(),
        Value::Object(fields) if FIELDS.iter().any(|name| fields.contains_key(*name)) => {
            vec![choices.clone()]
        }
        Value::Object(fields) => {
            let inner: Vec<Value> = fields
                .values()
                .flat_map(|item| choices_as_list(item, depth))
                .collect();
            if inner.iter().any(Value::is_object) {
                inner
            } else {
                vec![choices.clone()]
            }
        }
        Value::String(text) if text.is_empty() => Vec::new(),
        Value::String(text) => match json_in_text(text, "message") {
            Some(value) => choices_as_list(&value, depth),
            None => vec![serde_json::json!({ "text": text })],
        },
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}
