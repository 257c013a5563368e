//! Requests to the mock.

use crate::mock::response::{MockReply, MockResponse};

/// Route of chat completions.
pub(crate) const CHAT_PATH: &str = "/v1/chat/completions";

/// The parts of an HTTP request that the mock reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct MockRequest<'a> {
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    pub authorization: Option<&'a str>,
    pub content_type: Option<&'a str>,
    pub body: &'a [u8],
}

impl<'a> MockRequest<'a> {
    /// Creates a chat completion request.
    pub fn chat(body: &'a [u8]) -> MockRequest<'a> {
        MockRequest {
            method: "POST",
            path: CHAT_PATH,
            content_type: Some("application/json"),
            body,
            ..MockRequest::default()
        }
    }
}

/// Creates an error with status 405.
pub(crate) fn method_not_allowed(path: &str, method: &str) -> MockResponse {
    let message = format!("{path} does not support {method}");
    MockResponse::Complete(MockReply::error(405, &message, "method_not_allowed"))
}
