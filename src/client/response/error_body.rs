//! Parses the error in the body of a reply with an error status. Pure.

use serde_json::Value;

use crate::client::response::error::ApiError;
use crate::client::response::{event_stream, json};

impl ApiError {
    /// Parses the body of a reply with an error status: JSON of any known shape, or text.
    pub fn parse(body: &[u8]) -> ApiError {
        if body.trim_ascii().is_empty() {
            return ApiError {
                is_empty: true,
                ..ApiError::default()
            };
        }
        let text = body.trim_ascii();
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let value = match (event_stream::joined(text), text.first()) {
            (Some(joined), _) => joined.ok(),
            (None, Some(b'{' | b'[' | b'"')) => json::value(text).ok(),
            _ => None,
        };
        match value {
            Some(Value::Array(errors)) if !errors.is_empty() => ApiError::from_body(&errors[0]),
            Some(value @ Value::Object(_)) => ApiError::from_body(&value),
            Some(Value::String(text)) => ApiError::from_text(&text),
            _ => ApiError::from_text(&String::from_utf8_lossy(body)),
        }
    }
}
