//! TODO

use serde_json::Value;

/// Returns true if there is text in a message, or a call of a tool.
pub(crate) fn speaks(value: &Value) -> bool {
    match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(parts) => parts.iter().any(speaks),
        Value::Object(fields) => fields.iter().any(|(name, value)| {
            !["role", "type", "id", "name"].contains(&&**name) && speaks(value)
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A scalar as text; empty for anything else.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    }
}
