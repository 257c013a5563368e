//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

/// Why a request is refused.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

#[derive(Debug, Serialize)]
struct ErrorBody {
    message: String,
    r#type: &'static str,
    /// The field of the request that is at fault.
    param: Option<&'static str>,
    code: Option<&'static str>,
}

impl ApiError {
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

    /// 400: the request as a whole is no good.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message.into())
    }

    /// 400: one field is no good.
    pub(crate) fn bad_field(param: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::bad_request(message);
        error.body.param = Some(param);
        error
    }

    /// 400: the prompt in `field` leaves no room for an answer.
    pub(crate) fn context_length_exceeded(
        field: &'static str,
        tokens: usize,
        context: usize,
    ) -> Self {
        let has = if field == "messages" { "have" } else { "has" };
        let mut error = Self::bad_field(
            field,
            format!(
                "this model's context is {context} tokens, and the {field} {has} {tokens}: shorten it"
            ),
        );
        error.body.code = Some("context_length_exceeded");
        error
    }

    /// 404: another model is served.
    pub(crate) fn model_not_found(asked: &str, served: &str) -> Self {
        let message = format!("the model `{asked}` does not exist; this server has `{served}`");
        let mut error = Self::new(StatusCode::NOT_FOUND, message);
        error.body.param = Some("model");
        error.body.code = Some("model_not_found");
        error
    }

    /// Anything that HTTP itself has a status for: 404, 405, 413.
    pub(crate) fn http(status: StatusCode, message: String) -> Self {
        Self::new(status, message)
    }

    /// 500: the model failed.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message.into())
    }

    /// 503: as many requests wait as may wait.
    pub(crate) fn overloaded() -> Self {
        let message = "the queue is full; try again later".to_string();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The body; also sent as an event, where the stream has begun and the status is gone.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": self.body })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
