//! Token counts in every provider's spelling, with a plausibility check. Pure.

use serde_json::{Map, Value};

use crate::cache::usage::Usage;

/// Maximum plausible token count of a request. A larger count, such as -1 as an unsigned integer, is an error of the
/// server.
const MAX_TOKENS: u64 = 10_000_000;

/// Names of the prompt token count.
const PROMPT: [&str; 5] = [
    "prompt_tokens",
    "input_tokens",
    "promptTokenCount",
    "prompt_eval_count",
    "inputTokens",
];

/// Names of the completion token count.
const COMPLETION: [&str; 6] = [
    "completion_tokens",
    "output_tokens",
    "candidatesTokenCount",
    "eval_count",
    "outputTokens",
    "generated_tokens",
];

/// Names of the total token count.
const TOTAL: [&str; 3] = ["total_tokens", "totalTokenCount", "totalTokens"];

/// Takes the token counts out of a `usage` object. Returns them and the other fields; or None and all fields if the
/// counts are missing, incomplete or implausible.
pub(crate) fn usage(value: Value) -> (Option<Usage>, Map<String, Value>) {
    let mut fields = match value {
        Value::Object(fields) => fields,
        Value::Array(mut items) if items.len() == 1 => return usage(items.remove(0)),
        Value::Null => return (None, Map::new()),
        other => return (None, Map::from_iter([("counts".to_owned(), other)])),
    };
    let Some(usage) = parse_counts(&fields) else {
        return (None, fields);
    };
    fields.retain(|name, _| {
        let mut parsed = PROMPT.iter().chain(&COMPLETION).chain(&TOTAL);
        parsed.all(|parsed| name != parsed)
    });
    (Some(usage), fields)
}

fn parse_counts(fields: &Map<String, Value>) -> Option<Usage> {
    // With few fields and many names, comparing is faster than hashing each name.
    let field = |name: &str| {
        let mut fields = fields.iter();
        fields.find_map(|(field_name, value)| (field_name == name).then_some(value))
    };
    let first = |names: &[&str]| names.iter().find_map(|name| count(field(name)));
    let detail = |objects: &[&str], name: &str| {
        let mut objects = objects.iter().filter_map(|object| field(object));
        objects.find_map(|object| count(object.get(name)))
    };
    let mut prompt_tokens = first(&PROMPT)?;
    let total = first(&TOTAL);
    let mut completion_tokens = first(&COMPLETION).or_else(|| total?.checked_sub(prompt_tokens))?;
    let mut cached_tokens = detail(
        &["prompt_tokens_details", "input_tokens_details"],
        "cached_tokens",
    )
    .or_else(|| {
        first(&[
            "prompt_cache_hit_tokens",
            "cached_tokens",
            "cachedContentTokenCount",
        ])
    })
    .unwrap_or(0);
    // Anthropic does not include cached tokens in the input tokens.
    if fields.contains_key("input_tokens") && !fields.contains_key("prompt_tokens") {
        let read = count(fields.get("cache_read_input_tokens"));
        let created = count(fields.get("cache_creation_input_tokens")).unwrap_or(0);
        prompt_tokens = prompt_tokens.saturating_add(read.unwrap_or(0));
        prompt_tokens = prompt_tokens.saturating_add(created);
        cached_tokens = read.unwrap_or(cached_tokens);
    }
    let reasoning_tokens = detail(
        &["completion_tokens_details", "output_tokens_details"],
        "reasoning_tokens",
    )
    .or_else(|| first(&["reasoning_tokens", "thoughtsTokenCount"]))
    .unwrap_or(0);
    // Some providers (xAI, Gemini) do not count thinking as completion tokens. Then the total is larger than the sum of
    // prompt and completion. Without a total, this shows only if there are more reasoning than completion tokens.
    match total {
        Some(total) => {
            completion_tokens = completion_tokens.max(total.saturating_sub(prompt_tokens))
        }
        None if reasoning_tokens > completion_tokens => {
            completion_tokens = completion_tokens.saturating_add(reasoning_tokens);
        }
        None => {}
    }
    let usage = Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens: cached_tokens.min(prompt_tokens),
        reasoning_tokens: reasoning_tokens.min(completion_tokens),
    };
    let is_plausible = prompt_tokens <= MAX_TOKENS && completion_tokens <= MAX_TOKENS;
    is_plausible.then_some(usage)
}

/// Returns the largest prompt and completion counts in a value, which need not be a complete usage.
fn largest_counts(value: &Value) -> Usage {
    let mut counts = Usage::default();
    match value {
        Value::Object(fields) => {
            let largest = |names: &[&str]| {
                let counts = names.iter().filter_map(|name| count(fields.get(*name)));
                counts
                    .filter(|count| *count <= MAX_TOKENS)
                    .max()
                    .unwrap_or(0)
            };
            let total = largest(&TOTAL);
            counts.prompt_tokens = largest(&PROMPT);
            counts.completion_tokens =
                largest(&COMPLETION).max(total.saturating_sub(counts.prompt_tokens));
            fields.values().for_each(|value| raise(&mut counts, value));
        }
        Value::Array(items) => items.iter().for_each(|value| raise(&mut counts, value)),
        _ => {}
    }
    counts
}

/// Raises the counts of `usage` to the largest counts in `extra`, the remaining fields of a body.
pub(crate) fn raise_to_counts_in(usage: &mut Usage, extra: &Map<String, Value>) {
    // The text in these fields may contain JSON that looks like token counts.
    let other_fields = extra
        .iter()
        .filter(|(name, _)| !["message", "choice", "request"].contains(&name.as_str()));
    other_fields.for_each(|(_, value)| raise(usage, value));
}

fn raise(usage: &mut Usage, value: &Value) {
    let other = largest_counts(value);
    usage.prompt_tokens = usage.prompt_tokens.max(other.prompt_tokens);
    usage.completion_tokens = usage.completion_tokens.max(other.completion_tokens);
}

/// Parses a count: an integer, float or text. Fractions are rounded up.
fn count(value: Option<&Value>) -> Option<u64> {
    let value = match value? {
        Value::String(text) => text.trim().replace(',', "").parse().ok()?,
        Value::Number(number) => number
            .as_u64()
            .map_or_else(|| number.as_f64(), |integer| Some(integer as f64))?,
        _ => return None,
    };
    (value.is_finite() && value >= 0.0).then_some(value.ceil() as u64)
}

/// Returns the reported usage of an answer of `text_bytes` bytes if it is plausible: the prompt has tokens, and a text
/// that is not empty has completion tokens.
pub(crate) fn plausible(usage: Option<Usage>, text_bytes: usize) -> Option<Usage> {
    usage
        .filter(|usage| usage.prompt_tokens > 0 && (usage.completion_tokens > 0 || text_bytes == 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn read(value: Value) -> Option<[u64; 4]> {
        usage(value).0.map(|usage| {
            [
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                usage.reasoning_tokens,
            ]
        })
    }

    #[test]
    fn usage_is_parsed_in_the_spellings_of_providers() {
        let cases = [
            (
                json!({"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}),
                [12, 3, 0, 0],
            ),
            (
                json!({"prompt_tokens": "12", "completion_tokens": " 3 "}),
                [12, 3, 0, 0],
            ),
            (
                json!({"prompt_tokens": 11.9, "completion_tokens": 3.0}),
                [12, 3, 0, 0],
            ),
            (
                json!({"input_tokens": 12, "output_tokens": 3}),
                [12, 3, 0, 0],
            ),
            (
                json!({"prompt_tokens": 12, "total_tokens": 15}),
                [12, 3, 0, 0],
            ),
            (
                json!({"promptTokenCount": 12, "candidatesTokenCount": 3, "thoughtsTokenCount": 4, "totalTokenCount": 19}),
                [12, 7, 0, 4],
            ),
            (
                json!({"prompt_eval_count": 12, "eval_count": 3}),
                [12, 3, 0, 0],
            ),
            (
                json!({"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}),
                [12, 3, 8, 0],
            ),
            (
                json!({"prompt_tokens": 12, "completion_tokens": 3, "prompt_cache_hit_tokens": 8}),
                [12, 3, 8, 0],
            ),
            (
                json!({"prompt_tokens": 12, "completion_tokens": 3, "cached_tokens": 80}),
                [12, 3, 12, 0],
            ),
            (
                json!({"input_tokens": 2, "output_tokens": 3, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 2}),
                [12, 3, 8, 0],
            ),
            (
                json!({"input_tokens": 2, "output_tokens": 3, "cache_creation_input_tokens": 10}),
                [12, 3, 0, 0],
            ),
            (
                json!({"prompt_tokens": "1,012", "completion_tokens": 3, "total_tokens": 1_515}),
                [1_012, 503, 0, 0],
            ),
            (
                json!({"prompt_tokens": 12, "completion_tokens": 3, "reasoning_tokens": 40}),
                [12, 43, 0, 40],
            ),
            (
                json!({"input_tokens": 12, "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 4}}),
                [12, 9, 0, 4],
            ),
        ];
        for (value, expected) in cases {
            assert_eq!(read(value.clone()), Some(expected), "{value}");
        }
    }

    #[test]
    fn missing_incomplete_and_implausible_usage_is_none_and_kept() {
        let huge = u64::MAX;
        let cases = [
            json!({}),
            json!({"prompt_tokens": 5}),
            json!({"completion_tokens": 5}),
            json!({"total_tokens": 5}),
            json!({"prompt_tokens": -1, "completion_tokens": -1}),
            json!({"prompt_tokens": null, "completion_tokens": 3}),
            json!({"prompt_tokens": 12, "total_tokens": 3}),
            json!({"prompt_tokens": huge, "completion_tokens": huge, "total_tokens": 5, "completion_tokens_details": {"reasoning_tokens": huge}}),
            json!({"prompt_tokens": 1e300, "completion_tokens": 1}),
            json!({"prompt_tokens": "many", "completion_tokens": 1}),
        ];
        for value in cases {
            let (found, other_fields) = usage(value.clone());
            assert_eq!((found, Value::Object(other_fields)), (None, value));
        }
        let counts = Map::from_iter([("counts".to_owned(), json!([1, 2]))]);
        assert_eq!(usage(json!([1, 2])), (None, counts));
        assert_eq!(
            read(json!([{"prompt_tokens": 12, "completion_tokens": 3}])),
            Some([12, 3, 0, 0])
        );
    }

    #[test]
    fn counts_inside_an_answer_or_request_are_ignored() {
        let counts = json!({"usage": {"prompt_tokens": 1_200, "completion_tokens": 3}});
        let prompt_tokens_in = |name: &str| {
            let mut usage = Usage::default();
            let extra = Map::from_iter([(name.to_owned(), json!({"parsed": counts}))]);
            raise_to_counts_in(&mut usage, &extra);
            usage.prompt_tokens
        };
        assert_eq!(
            ["message", "choice", "request", "x_groq"].map(prompt_tokens_in),
            [0, 0, 0, 1_200]
        );
    }

    #[test]
    fn zero_counts_of_a_text_are_implausible() {
        let is_plausible_usage = |prompt_tokens, completion_tokens, bytes| {
            let usage = Usage {
                prompt_tokens,
                completion_tokens,
                ..Usage::default()
            };
            plausible(Some(usage), bytes).is_some()
        };
        assert!(is_plausible_usage(10, 2, 5) && is_plausible_usage(10, 0, 0));
        assert!(
            !is_plausible_usage(0, 0, 5)
                && !is_plausible_usage(10, 0, 5)
                && !is_plausible_usage(0, 3, 5)
        );
    }
}
