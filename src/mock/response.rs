//! [`MockResponse`]: a response or a failure, independent of TCP. [`crate::mock::http`] sends it over TCP; tests use it
//! directly.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

/// The response to a request: a reply, or a failure of the connection. A request that is never
/// answered has no response: the future of [`crate::mock::Mock::respond`] stays pending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MockResponse {
    /// A complete reply.
    Complete(MockReply),
    /// A refused connection. Over TCP a reset, because the mock has already accepted the connection.
    Refused,
    /// A reset before the first byte.
    Reset,
    /// The head, half of the body, then a reset.
    ResetInBody(MockReply),
    /// The head, half of the body, then a regular close. The content length announces the complete body.
    ShortBody(MockReply),
    /// A chunked body without its last chunk, then a regular close.
    UnfinishedChunks(MockReply),
    /// The head and half of the body; the connection stays open.
    StallInBody(MockReply),
    /// The first `slow` bytes of the body one by one, each after `interval`, then the other bytes at once.
    Drip {
        reply: MockReply,
        slow: usize,
        interval: Duration,
    },
}

/// Name, in lower case, and value of a header.
pub(crate) type ReplyHeader = (Cow<'static, str>, Cow<'static, str>);

/// A valid HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MockReply {
    pub status: u16,
    /// All headers except `content-type` and the headers that frame the body.
    pub headers: Vec<ReplyHeader>,
    pub content_type: &'static str,
    pub body: Bytes,
}

impl MockReply {
    pub fn json(status: u16, body: impl Into<Bytes>) -> MockReply {
        MockReply {
            status,
            headers: Vec::new(),
            content_type: "application/json",
            body: body.into(),
        }
    }

    /// Creates an error in OpenAI's format.
    pub fn error(status: u16, message: &str, code: impl Into<Value>) -> MockReply {
        MockReply::json(
            status,
            error_body(status, message, Value::Null, code.into()),
        )
    }

    /// Creates an error with status 400 that names the invalid field.
    pub(crate) fn bad_field(param: &str, message: &str, code: impl Into<Value>) -> MockReply {
        MockReply::json(400, error_body(400, message, param.into(), code.into()))
    }

    /// Returns the value of the first header with this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(other, _)| other == name);
        header.map(|(_, value)| value.as_ref())
    }

    /// Adds a header.
    pub(crate) fn with_header(
        mut self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<Cow<'static, str>>,
    ) -> MockReply {
        self.headers.push((name.into(), value.into()));
        self
    }
}

impl MockResponse {
    /// Returns the reply that is sent, completely or in part.
    pub(crate) fn reply_mut(&mut self) -> Option<&mut MockReply> {
        match self {
            MockResponse::Refused | MockResponse::Reset => None,
            MockResponse::Complete(reply)
            | MockResponse::ResetInBody(reply)
            | MockResponse::ShortBody(reply)
            | MockResponse::UnfinishedChunks(reply)
            | MockResponse::StallInBody(reply)
            | MockResponse::Drip { reply, .. } => Some(reply),
        }
    }
}

fn error_body(status: u16, message: &str, param: Value, code: Value) -> Vec<u8> {
    let kind = match status {
        401 | 403 => "authentication_error",
        429 if code == "insufficient_quota" => "insufficient_quota",
        429 => "requests",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let error = json!({"message": message, "type": kind, "param": param, "code": code});
    json!({ "error": error }).to_string().into_bytes()
}
