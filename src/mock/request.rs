//! TODO

use crate::mock::response::{HttpReply, MockResponse};

/// A request as it arrived.
#[derive(Debug, Clone, Copy, Default)]
pub struct MockRequest<'a> {
    pub method: &'a str,
    /// With its query, if it has one.
    pub path: &'a str,
    pub authorization: Option<&'a str>,
    pub content_type: Option<&'a str>,
    pub body: &'a [u8],
}

impl<'a> MockRequest<'a> {
    /// A request for an answer.
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

pub(crate) fn method_not_allowed(path: &str, method: &str) -> MockResponse {
    let message = format!("{path} does not take {method}");
    MockResponse::Complete(HttpReply::error(405, &message, "method_not_allowed"))
}

pub(crate) const CHAT_PATH: &str = "/v1/chat/completions";
