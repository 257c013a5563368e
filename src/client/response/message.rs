//! Separates text, thinking and refusal in the message of a choice, in every known format. Pure.

use serde_json::{Map, Value};

use crate::cache::record::Answer;
use crate::client::response::text::text;

/// Fields that contain the visible thinking of a reasoning model, the preferred one first.
const REASONING: [&str; 4] = [
    "reasoning_content",
    "reasoning",
    "thinking",
    "reasoning_text",
];

/// Types of content parts that contain thinking.
const THINKING: [&str; 5] = [
    "thinking",
    "reasoning",
    "reasoning_text",
    "redacted_thinking",
    "thought",
];

/// Takes the answer out of a message. Unknown fields stay in the message.
pub(crate) fn answer(message: &mut Map<String, Value>, finish_reason: String) -> Answer {
    message.remove("role");
    let mut answer = Answer {
        finish_reason,
        ..Answer::default()
    };
    match message.remove("content") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => answer.text = text,
        Some(content) => {
            let unknown_parts = add_content(content, &mut answer);
            if !unknown_parts.is_empty() {
                message.insert("content".into(), Value::Array(unknown_parts));
            }
        }
    }
    if let Some(refusal) = message.remove("refusal") {
        answer.refusal.push_str(&text(&refusal));
    }
    for name in REASONING {
        let Some(Value::String(trace)) = message.get(name) else {
            continue;
        };
        if answer.reasoning.is_empty() {
            answer.reasoning.clone_from(trace);
        }
        // An empty or equal second field adds no information.
        if trace.is_empty() || *trace == answer.reasoning {
            message.remove(name);
        }
    }
    answer
}

/// Adds content, a list of parts or one part, to the answer. Returns the unknown parts.
fn add_content(content: Value, answer: &mut Answer) -> Vec<Value> {
    let parts = match content {
        Value::Array(parts) => parts,
        part => vec![part],
    };
    parts
        .into_iter()
        .filter_map(|part| add_part(part, answer))
        .collect()
}

/// Adds a part to the answer. Returns the part if its type is unknown.
fn add_part(part: Value, answer: &mut Answer) -> Option<Value> {
    let fields = match &part {
        Value::Null => return None,
        Value::String(text) => {
            answer.text.push_str(text);
            return None;
        }
        Value::Object(fields) => fields,
        _ => return Some(part),
    };
    let kind = fields.get("type").and_then(Value::as_str).unwrap_or("text");
    let target = match kind {
        "text" | "output_text" => &mut answer.text,
        "refusal" => &mut answer.refusal,
        kind if THINKING.contains(&kind) => &mut answer.reasoning,
        _ => return Some(part),
    };
    // The text of a part is in the field named after its type, or else in one of these fields, and may be nested.
    let inner = [kind, "text", "thinking", "summary"]
        .into_iter()
        .find_map(|name| fields.get(name).filter(|value| !value.is_null()));
    match inner.map(joined_text) {
        Some(Some(text)) => {
            target.push_str(&text);
            None
        }
        _ => Some(part),
    }
}

/// Returns a text, or the joined texts of a list of parts.
fn joined_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(fields) => joined_text(fields.get("text").or(fields.get("value"))?),
        Value::Array(parts) => parts.iter().map(joined_text).collect(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn content_parts_are_assigned_by_type() {
        let thinking = json!([{"type": "thinking", "thinking": [{"type": "text", "text": "Let me think."}]}, {"type": "text", "text": "Four."}]);
        let cases = [
            (json!("Four."), ["Four.", "", ""]),
            (json!(["Four", "."]), ["Four.", "", ""]),
            (json!({"type": "text", "text": "Four."}), ["Four.", "", ""]),
            (
                json!([{"type": "output_text", "text": "Fo"}, {"text": "ur."}]),
                ["Four.", "", ""],
            ),
            (
                json!([{"type": "text", "text": {"value": "Four."}}]),
                ["Four.", "", ""],
            ),
            (thinking, ["Four.", "Let me think.", ""]),
            (
                json!([{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Four."}]),
                ["Four.", "Hm.", ""],
            ),
            (
                json!([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}, "Four."]),
                ["Four.", "Hm.", ""],
            ),
            (
                json!([{"type": "refusal", "refusal": "I can't."}]),
                ["", "", "I can't."],
            ),
            (json!([null, "x"]), ["x", "", ""]),
        ];
        for (content, [text, reasoning, refusal]) in cases {
            let Value::Object(mut message) = json!({"role": "assistant", "content": content})
            else {
                unreachable!()
            };
            let found = answer(&mut message, "stop".into());
            assert_eq!(
                (found.text, found.reasoning, found.refusal),
                (text.into(), reasoning.into(), refusal.into()),
                "{content}"
            );
            assert!(message.is_empty(), "{content}: {message:?}");
        }
    }

    #[test]
    fn unknown_content_parts_are_kept() {
        let audio = json!({"type": "audio", "data": "AAAA"});
        for (content, unknown_parts) in [
            (json!({"answer": 4}), json!([{"answer": 4}])),
            (json!(["x", audio]), json!([audio])),
            (json!(4), json!([4])),
            (
                json!([{"type": "text", "text": 4}]),
                json!([{"type": "text", "text": 4}]),
            ),
        ] {
            let Value::Object(mut message) = json!({"content": content, "tool_calls": [1]}) else {
                unreachable!()
            };
            answer(&mut message, String::new());
            assert_eq!(
                Value::Object(message),
                json!({"content": unknown_parts, "tool_calls": [1]})
            );
        }
    }

    #[test]
    fn thinking_is_found_in_every_field_name() {
        let parse = |message: Value| {
            let Value::Object(mut message) = message else {
                unreachable!()
            };
            let answer = answer(&mut message, String::new());
            (answer.reasoning, Value::Object(message))
        };
        let cases = [
            (json!({"reasoning_content": "hm"}), ("hm", json!({}))),
            (
                json!({"reasoning_content": "", "reasoning": "hm"}),
                ("hm", json!({})),
            ),
            (
                json!({"reasoning_content": "hm", "reasoning": "hm"}),
                ("hm", json!({})),
            ),
            (
                json!({"reasoning_content": "a", "reasoning": "b"}),
                ("a", json!({"reasoning": "b"})),
            ),
            (
                json!({"reasoning": {"a": 1}}),
                ("", json!({"reasoning": {"a": 1}})),
            ),
        ];
        for (message, (reasoning, other_fields)) in cases {
            assert_eq!(parse(message), (reasoning.into(), other_fields));
        }
    }
}
