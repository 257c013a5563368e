//! Parses an endpoint's error from any known shape. Pure.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::client::response::text::text;
use crate::rate_limit::wait::{duration, wait_from_s};

/// An endpoint's error. Missing fields are empty.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct ApiError {
    /// HTTP status in a field for the code, as vLLM, llama.cpp and OpenRouter send it.
    pub status: Option<u16>,
    pub code: String,
    pub kind: String,
    pub message: String,
    /// The values of all fields that classify the error, in lower case: code, type, status, reason and parameter, and
    /// the codes of an inner error.
    pub codes: Vec<String>,
    /// Requested wait, from a field of the body.
    pub retry_delay: Option<Duration>,
    /// Header `X-RateLimit-Reset` of a router's upstream provider, which the router repeats in the body.
    pub reset: String,
    /// The body was empty.
    pub is_empty: bool,
}

impl ApiError {
    /// Returns the error for a body that is not JSON.
    pub(crate) fn from_text(text: &str) -> ApiError {
        let text = text.trim();
        let message = if text.starts_with('<') {
            match title(text) {
                Some(title) => format!("an HTML page instead of an answer: {title}"),
                None => "an HTML page instead of an answer".into(),
            }
        } else {
            text.into()
        };
        ApiError {
            message,
            ..ApiError::default()
        }
    }

    /// Parses the JSON body of a reply with an error status.
    pub(crate) fn from_body(body: &Value) -> ApiError {
        match body.as_object() {
            Some(fields) => ApiError::in_body(fields).unwrap_or_else(|| ApiError::from_value(body)),
            None => ApiError::from_value(body),
        }
    }

    /// Returns the error in the body of a reply of any status; None if its fields report no error.
    pub fn in_body(fields: &Map<String, Value>) -> Option<ApiError> {
        if let Some(error) = fields.get("error").filter(|error| is_error(error)) {
            let mut error = ApiError::from_value(error);
            // TGI sends the type in a field next to `error`.
            error.add_code(fields.get("error_type"));
            let delay_beside_error = || retry_delay(fields).filter(|wait| !wait.is_zero());
            error.retry_delay = error.retry_delay.or_else(delay_beside_error);
            return Some(error);
        }
        if let Some(Value::Object(status)) = fields.get("base_resp") {
            return minimax_error(status);
        }
        let errors = fields.get("errors").and_then(Value::as_array);
        if let Some(error) = errors.and_then(|errors| errors.first()) {
            return Some(ApiError::from_value(error));
        }
        let reports_error = fields.get("object").is_some_and(|object| object == "error")
            || fields
                .get("success")
                .is_some_and(|success| success == false)
            || [
                "detail",
                "error_msg",
                "message",
                "msg",
                "error_message",
                "Message",
            ]
            .iter()
            .any(|name| fields.get(*name).is_some_and(is_error));
        reports_error.then(|| ApiError::from_value(&Value::Object(fields.clone())))
    }

    /// Parses the value of the field `error`: an object, a text or null.
    pub fn from_value(error: &Value) -> ApiError {
        let Value::Object(fields) = error else {
            return ApiError {
                message: text(error),
                ..ApiError::default()
            };
        };
        let field = |name: &str| fields.get(name).map(text).unwrap_or_default();
        let first = |names: &[&str]| -> String {
            let mut texts = names.iter().map(|name| field(name));
            texts.find(|text| !text.is_empty()).unwrap_or_default()
        };
        let code = first(&["code", "error_code", "status_code", "Code"]);
        let status = code
            .parse()
            .ok()
            .filter(|status| (300..600).contains(status));
        let message = first(&[
            "message",
            "detail",
            "msg",
            "error_msg",
            "error_message",
            "Message",
            "status_msg",
        ]);
        let mut parsed = ApiError {
            status,
            code,
            kind: field("type"),
            message: if message.is_empty() {
                error.to_string()
            } else {
                message
            },
            retry_delay: retry_delay(fields).filter(|wait| !wait.is_zero()),
            ..ApiError::default()
        };
        for name in [
            "code",
            "error_code",
            "Code",
            "type",
            "status",
            "reason",
            "param",
        ] {
            parsed.add_code(fields.get(name));
        }
        if let Some(headers) = error.pointer("/metadata/headers") {
            parsed.reset = headers
                .get("X-RateLimit-Reset")
                .map(text)
                .unwrap_or_default();
        }
        for inner in ["innererror", "metadata", "inner_error"] {
            if let Some(Value::Object(inner)) = fields.get(inner) {
                parsed.add_code(inner.get("code"));
                parsed.add_code(inner.get("error_type"));
            }
        }
        parsed
    }

    /// Returns true if a content filter refused the prompt or the answer.
    pub fn is_content_filter(&self) -> bool {
        const CODES: [&str; 11] = [
            "content_filter",
            "contentfilter",
            "responsibleai",
            "inspection",
            "content_policy",
            "contentpolicy",
            "moderation",
            "prohibited_content",
            "invalid_prompt",
            "sensitive",
            "safety",
        ];
        const WORDS: [&str; 12] = [
            "content management policy",
            "content filter",
            "content policy",
            "content_policy",
            "moderation",
            "was flagged",
            "been flagged",
            "safety system",
            "inappropriate content",
            "content exists risk",
            "usage polic",
            "sensitive content",
        ];
        let message = self.message.to_lowercase();
        let is_filter_code = |code: &String| CODES.iter().any(|part| code.contains(part));
        self.codes.iter().any(is_filter_code) || WORDS.iter().any(|word| message.contains(word))
    }

    fn add_code(&mut self, value: Option<&Value>) {
        let code = value.map(text).unwrap_or_default().to_ascii_lowercase();
        if !code.is_empty() {
            self.codes.push(code);
        }
    }
}

/// Parses MiniMax's own error numbers, which it sends with status 200. 0 means success.
fn minimax_error(fields: &Map<String, Value>) -> Option<ApiError> {
    let number = fields.get("status_code").and_then(Value::as_i64)?;
    if number == 0 {
        return None;
    }
    let (status, code) = match number {
        1002 | 1039 | 1041 => (429, "rate_limit"),
        1008 => (402, "insufficient_balance"),
        1004 | 2049 => (401, "invalid_api_key"),
        1026 | 1027 => (400, "content_filter"),
        2013 | 2056 => (400, "invalid_request"),
        _ => (500, "server_error"),
    };
    Some(ApiError {
        status: Some(status),
        code: number.to_string(),
        message: fields.get("status_msg").map(text).unwrap_or_default(),
        codes: vec![code.into()],
        ..ApiError::default()
    })
}

/// Returns the wait in a field of the error or of an object inside it: `retry_after` in any spelling, in seconds or
/// milliseconds; `details[].retryDelay` of Google's errors, such as `"1.5s"`; or `estimated_time`.
fn retry_delay(fields: &Map<String, Value>) -> Option<Duration> {
    const MAX_DEPTH: usize = 3;
    wait_in(fields, MAX_DEPTH)
}

fn wait_in(fields: &Map<String, Value>, depth: usize) -> Option<Duration> {
    let depth = depth.checked_sub(1)?;
    let direct = fields.iter().find_map(|(name, value)| {
        let name = name.to_ascii_lowercase().replace(['_', '-'], "");
        match name.as_str() {
            "retryafter" | "retryafterseconds" | "retrydelay" | "retrydelayseconds"
            | "estimatedtime" => delay(value, 1.0),
            "retryafterms" | "retryaftermilliseconds" | "retrydelayms" => delay(value, 1e-3),
            _ => None,
        }
    });
    direct.or_else(|| {
        fields.values().find_map(|value| match value {
            Value::Object(fields) => wait_in(fields, depth),
            Value::Array(items) => {
                let mut objects = items.iter().filter_map(Value::as_object);
                objects.find_map(|fields| wait_in(fields, depth))
            }
            _ => None,
        })
    })
}

/// Parses a wait, at most [`MAX_WAIT_S`](crate::rate_limit::wait::MAX_WAIT_S). A number without a unit is in units of
/// `unit_s` seconds.
fn delay(value: &Value, unit_s: f64) -> Option<Duration> {
    let in_units = |number: f64| {
        let is_wait = number.is_finite() && number >= 0.0;
        is_wait.then_some(number * unit_s).and_then(wait_from_s)
    };
    match value {
        Value::String(text) => match text.trim().parse() {
            Ok(number) => in_units(number),
            Err(_) => duration(text),
        },
        Value::Number(number) => in_units(number.as_f64()?),
        // A protobuf duration: {"seconds": 1, "nanos": 500000000}.
        Value::Object(parts) => {
            let number = |name: &str| parts.get(name).and_then(Value::as_f64).unwrap_or(0.0);
            let seconds = number("seconds") + number("nanos") / 1e9;
            (seconds >= 0.0).then_some(seconds).and_then(wait_from_s)
        }
        _ => None,
    }
}

/// Returns the title of an HTML page.
fn title(page: &str) -> Option<&str> {
    let (_, after) = page.split_once("<title>")?;
    let (title, _) = after.split_once("</title>")?;
    Some(title.trim()).filter(|title| !title.is_empty())
}

/// Returns true if the value of an error field reports an error. Some servers always send the field, empty or with a
/// success code.
pub(crate) fn is_error(error: &Value) -> bool {
    const SUCCESS: [&str; 7] = ["", "0", "200", "ok", "success", "none", "null"];
    match error {
        Value::Null => false,
        Value::Bool(is_error) => *is_error,
        Value::Number(_) => !SUCCESS.contains(&text(error).trim_end_matches(".0")),
        Value::String(text) => !SUCCESS.contains(&text.trim().to_ascii_lowercase().as_str()),
        Value::Object(fields) => fields.values().any(is_error),
        Value::Array(items) => items.iter().any(is_error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limit::wait::MAX_WAIT_S;

    #[test]
    fn errors_are_parsed_in_every_shape() {
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
            ("\u{feff}{\"error\":\"m\"}", (None, "", "", "m")),
            ("{\"error\":\"a\nb\"}", (None, "", "", "a\nb")),
            (r#"{"detail":"Not Found"}"#, (None, "", "", "Not Found")),
            (r#"{"detail":[1]}"#, (None, "", "", r#"{"detail":[1]}"#)),
            (
                r#"{"errors":[{"code":7003,"message":"No route"}],"success":false}"#,
                (None, "7003", "", "No route"),
            ),
            (
                r#"{"object":"error","message":"overloaded","code":50001}"#,
                (None, "50001", "", "overloaded"),
            ),
            (
                r#"{"base_resp":{"status_code":1002,"status_msg":"rate limit"}}"#,
                (Some(429), "1002", "", "rate limit"),
            ),
            (
                r#"{"error_code":18,"error_msg":"qps"}"#,
                (None, "18", "", "qps"),
            ),
            ("\"a text\"", (None, "", "", "a text")),
            ("upstream gone\n", (None, "", "", "upstream gone")),
            (
                "<html>",
                (None, "", "", "an HTML page instead of an answer"),
            ),
            (
                "<html><title> Sign in </title>",
                (None, "", "", "an HTML page instead of an answer: Sign in"),
            ),
        ];
        for (body, (status, code, kind, message)) in cases {
            let error = ApiError::parse(body.as_bytes());
            let parsed = (
                error.status,
                error.code.as_str(),
                error.kind.as_str(),
                error.message.as_str(),
            );
            assert_eq!(parsed, (status, code, kind, message), "{body}");
        }
        assert!(ApiError::parse(b" \n").is_empty && !ApiError::parse(b"x").is_empty);
    }

    #[test]
    fn codes_types_and_inner_codes_are_collected() {
        let codes = |body: &str| ApiError::parse(body.as_bytes()).codes.join(" ");
        assert_eq!(
            codes(
                r#"{"error":{"code":400,"innererror":{"code":"ResponsibleAIPolicyViolation"},"type":null}}"#
            ),
            "400 responsibleaipolicyviolation"
        );
        assert_eq!(
            codes(r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED"}}"#),
            "429 resource_exhausted"
        );
        assert_eq!(
            codes(r#"{"error":"x","error_type":"generation"}"#),
            "generation"
        );
        assert_eq!(codes(r#"{"code":"Arrearage","message":"m"}"#), "arrearage");
    }

    #[test]
    fn retry_delay_is_parsed_from_fields() {
        let wait = |error: &str| {
            ApiError::parse(format!("{{\"error\":{error}}}").as_bytes())
                .retry_delay
                .map(|wait| wait.as_secs_f64())
        };
        let cases = [
            (
                r#"{"message":"m","details":[{"x":1},{"retryDelay":"1.5s"}]}"#,
                Some(1.5),
            ),
            (
                r#"{"message":"m","details":[{"retryDelay":{"seconds":2,"nanos":500000000}}]}"#,
                Some(2.5),
            ),
            (r#"{"message":"m","retry_after":3}"#, Some(3.0)),
            (r#"{"message":"m","retry_after":"3"}"#, Some(3.0)),
            (r#"{"message":"m","retry_after_ms":2500}"#, Some(2.5)),
            (
                r#"{"message":"m","parameters":{"retry_after":3}}"#,
                Some(3.0),
            ),
            (
                r#"{"message":"m","metadata":{"retry_after_seconds":"3s"}}"#,
                Some(3.0),
            ),
            (r#"{"message":"m"},"retry_after":4"#, Some(4.0)),
            (r#"{"message":"m","retry_after":"soon"}"#, None),
            (r#"{"message":"m","retry_after":-3}"#, None),
            (
                r#"{"message":"m","retry_after":9223372036854775807}"#,
                Some(MAX_WAIT_S),
            ),
            (
                r#"{"message":"m","retryDelay":{"seconds":1e18}}"#,
                Some(MAX_WAIT_S),
            ),
        ];
        for (error, expected) in cases {
            assert_eq!(wait(error), expected, "{error}");
        }
    }

    #[test]
    fn content_filter_errors_are_distinguished_from_others() {
        let is_filtered = |error: &str| ApiError::parse(error.as_bytes()).is_content_filter();
        for error in [
            r#"{"error":{"message":"The response was filtered due to the prompt triggering the content management policy.","code":"content_filter"}}"#,
            r#"{"error":{"message":"m","innererror":{"code":"ResponsibleAIPolicyViolation"}}}"#,
            r#"{"error":{"code":403,"message":"Input was flagged by moderation"}}"#,
            r#"{"code":"DataInspectionFailed","message":"Input data may contain inappropriate content."}"#,
            r#"{"error":{"message":"Content Exists Risk","type":"invalid_request_error"}}"#,
            r#"{"error":{"message":"Invalid prompt: your prompt was flagged as potentially violating our usage policy.","code":"invalid_prompt"}}"#,
            r#"{"base_resp":{"status_code":1026,"status_msg":"input new_sensitive"}}"#,
        ] {
            assert!(is_filtered(error), "{error}");
        }
        for error in [
            r#"{"error":{"message":"maximum context length is 8192 tokens","code":"context_length_exceeded"}}"#,
            r#"{"error":{"message":"Unsupported value: 'temperature'","code":"unsupported_value"}}"#,
            r#"{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}"#,
            "<html><title>Attention Required!</title>",
            "",
        ] {
            assert!(!is_filtered(error), "{error}");
        }
    }

    #[test]
    fn success_bodies_with_error_fields_are_not_errors() {
        let has_error = |body: &str| {
            let Ok(Value::Object(fields)) = serde_json::from_str(body) else {
                unreachable!()
            };
            ApiError::in_body(&fields).is_some()
        };
        for body in [
            r#"{"error":null,"choices":[]}"#,
            r#"{"error":"","errors":[],"success":true}"#,
            r#"{"base_resp":{"status_code":0,"status_msg":"ok"}}"#,
            r#"{"message":"","object":"chat.completion"}"#,
            r#"{"error":{"message":"","type":"","param":null,"code":null}}"#,
            r#"{"error":{"code":0,"message":"success"},"msg":"OK"}"#,
            r#"{"code":200,"message":"success"}"#,
        ] {
            assert!(!has_error(body), "{body}");
        }
    }
}
