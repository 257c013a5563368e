//! Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

/// A response with an error: its status and body.
#[derive(Debug)]
pub(crate) struct ErrorResponse {
    status: StatusCode,
    body: ErrorBody,
}

#[derive(Debug, Serialize)]
struct ErrorBody {
    message: String,
    r#type: &'static str,
    /// Name of the invalid request field.
    param: Option<&'static str>,
    code: Option<&'static str>,
}

impl ErrorResponse {
    fn new(status: StatusCode, message: String) -> Self {
        let r#type = if status.is_server_error() {
            "server_error"
        } else {
            "invalid_request_error"
        };
        Self {
            status,
            body: ErrorBody {
                message,
                r#type,
                param: None,
                code: None,
            },
        }
    }

    /// 400: the request is invalid as a whole.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message.into())
    }

    /// 400: one field is invalid.
    pub(crate) fn bad_field(param: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::bad_request(message);
        error.body.param = Some(param);
        error
    }

    /// 400: the prompt in `field` does not fit the context.
    pub(crate) fn context_length_exceeded(
        field: &'static str,
        tokens: usize,
        context: usize,
    ) -> Self {
        let mut error = Self::bad_field(
            field,
            format!(
                "the prompt in `{field}` has {tokens} tokens, which leaves no room for an answer in the model's \
                 context of {context} tokens; shorten it"
            ),
        );
        error.body.code = Some("context_length_exceeded");
        error
    }

    /// 404: the requested model is not the served one.
    pub(crate) fn model_not_found(requested: &str, served: &str) -> Self {
        let message =
            format!("the model `{requested}` does not exist; this server serves `{served}`");
        let mut error = Self::new(StatusCode::NOT_FOUND, message);
        error.body.param = Some("model");
        error.body.code = Some("model_not_found");
        error
    }

    /// An error of the HTTP request, not of its JSON fields: 404, 405 or 413, or 400 if the body cannot be read.
    pub(crate) fn http(status: StatusCode, message: String) -> Self {
        Self::new(status, message)
    }

    /// 500: the model failed.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message.into())
    }

    /// 503: the queue is full.
    pub(crate) fn overloaded() -> Self {
        let message = "the queue is full; try again later".to_string();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The JSON body. After a stream has begun, the body is sent as an event, because the status was already sent.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": self.body })
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
