//! Text of JSON values.

use serde_json::Value;

/// Returns true if a value of a reply (a choice, a message, a part of one) contains a string that is not empty, such as
/// text or the arguments of a tool call. Fields named `role`, `type`, `id` or `name` do not count.
pub(crate) fn has_text(value: &Value) -> bool {
    match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(parts) => parts.iter().any(has_text),
        Value::Object(fields) => fields.iter().any(|(name, value)| {
            !["role", "type", "id", "name"].contains(&&**name) && has_text(value)
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Returns a string or number as text; empty for anything else.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    }
}
