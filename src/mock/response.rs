//! What a mock does with a request, as values: [`crate::mock::http`] puts them on the wire, and a
//! simulation can take them as they are.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

/// What becomes of a request. A request that is never answered has no reaction: the future of
/// [`crate::mock::Mock::respond`] does not end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MockResponse {
    Complete(HttpReply),
    /// Nobody listens. Over TCP, where the connection has been accepted by then, a reset.
    Refused,
    /// A reset before a byte is sent.
    Reset,
    /// The head, half of the body, then a reset.
    ResetInBody(HttpReply),
    /// The head announces the whole body; half of it is sent, and the connection closed in good
    /// order.
    ShortBody(HttpReply),
    /// A chunked body whose last chunk does not come before the connection closes.
    UnfinishedChunks(HttpReply),
    /// The head, half of the body, then nothing, with the connection open.
    StallInBody(HttpReply),
    /// The first `slow` bytes of the body one by one, `interval` before each, the rest at once.
    Drip {
        reply: HttpReply,
        slow: usize,
        interval: Duration,
    },
}

/// A header's name in lower case, and its value.
pub type ReplyHeader = (Cow<'static, str>, Cow<'static, str>);

/// A proper HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpReply {
    pub status: u16,
    /// Besides `content-type` and those that frame the body.
    pub headers: Vec<ReplyHeader>,
    pub content_type: &'static str,
    pub body: Bytes,
}

impl HttpReply {
    pub fn json(status: u16, body: impl Into<Bytes>) -> HttpReply {
        HttpReply {
            status,
            headers: Vec::new(),
            content_type: "application/json",
            body: body.into(),
        }
    }

    /// An error in OpenAI's shape.
    pub fn error(status: u16, message: &str, code: impl Into<Value>) -> HttpReply {
        HttpReply::json(
            status,
            error_body(status, message, Value::Null, code.into()),
        )
    }

    /// A 400 that names the field at fault.
    pub fn bad_field(param: &str, message: &str, code: impl Into<Value>) -> HttpReply {
        HttpReply::json(400, error_body(400, message, param.into(), code.into()))
    }

    /// The first header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_ref())
    }

    pub(crate) fn with(
        mut self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<Cow<'static, str>>,
    ) -> HttpReply {
        self.headers.push((name.into(), value.into()));
        self
    }
}

impl MockResponse {
    /// The response that is sent, wholly or in part.
    pub fn reply(&self) -> Option<&HttpReply> {
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

    pub(crate) fn reply_mut(&mut self) -> Option<&mut HttpReply> {
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
