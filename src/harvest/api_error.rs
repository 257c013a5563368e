//! What an endpoint says went wrong, in any of the usual shapes. Pure.

use serde_json::Value;

/// What an endpoint says went wrong; fields are empty where it does not say.
#[derive(Debug, Default, PartialEq)]
pub struct ApiError {
    /// An HTTP status in place of a code, as vLLM, llama.cpp and OpenRouter send.
    pub status: Option<u16>,
    pub code: String,
    pub kind: String,
    pub message: String,
}

impl ApiError {
    /// Reads the body of a reply with a bad status: any of the usual shapes, or text.
    pub fn parse(body: &[u8]) -> ApiError {
        match serde_json::from_slice::<Value>(body) {
            Ok(Value::Array(errors)) if !errors.is_empty() => ApiError::from_body(&errors[0]),
            Ok(value @ Value::Object(_)) => ApiError::from_body(&value),
            _ => {
                let text = String::from_utf8_lossy(body);
                let text = text.trim();
                ApiError {
                    message: match text.starts_with('<') {
                        true => "an HTML page instead of an answer".into(),
                        false => text.into(),
                    },
                    ..ApiError::default()
                }
            }
        }
    }

    fn from_body(body: &Value) -> ApiError {
        ApiError::from_value(body.get("error").unwrap_or(body))
    }

    /// From what stands under `error`: an object, a text, or null where nothing is said.
    pub fn from_value(error: &Value) -> ApiError {
        let Value::Object(fields) = error else {
            return ApiError {
                message: text(error),
                ..ApiError::default()
            };
        };
        let field = |name: &str| fields.get(name).map(text).unwrap_or_default();
        let code = field("code");
        let status = code
            .parse()
            .ok()
            .filter(|status| (300..600).contains(status));
        let message = ["message", "detail", "msg"]
            .map(field)
            .into_iter()
            .find(|message| !message.is_empty());
        ApiError {
            status,
            code,
            kind: field("type"),
            message: message.unwrap_or_else(|| error.to_string()),
        }
    }
}

/// A scalar as text; empty for anything else.
pub fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_read_in_any_shape() {
        let cases = [
            (
                r#"{"error":{"message":"m","type":"t","code":"c"}}"#,
                (None, "c", "t", "m"),
            ),
            (
                r#"{"error":{"message":"m","code":429}}"#,
                (Some(429), "429", "", "m"),
            ),
            (r#"[{"error":{"message":"m"}}]"#, (None, "", "", "m")),
            (r#"{"error":"m"}"#, (None, "", "", "m")),
            (r#"{"detail":"Not Found"}"#, (None, "", "", "Not Found")),
            (r#"{"detail":[1]}"#, (None, "", "", r#"{"detail":[1]}"#)),
            ("upstream gone\n", (None, "", "", "upstream gone")),
            (
                "<html>",
                (None, "", "", "an HTML page instead of an answer"),
            ),
        ];
        for (body, (status, code, kind, message)) in cases {
            let expected = ApiError {
                status,
                code: code.into(),
                kind: kind.into(),
                message: message.into(),
            };
            assert_eq!(ApiError::parse(body.as_bytes()), expected);
        }
    }
}
