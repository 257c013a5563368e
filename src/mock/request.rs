//! TODO

use crate::mock::response::{Reaction, Reply};

/// A request as it arrived.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    pub method: &'a str,
    /// With its query, if it has one.
    pub path: &'a str,
    pub authorization: Option<&'a str>,
    pub content_type: Option<&'a str>,
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// A request for an answer.
    pub fn chat(body: &'a [u8]) -> Request<'a> {
        Request {
            method: "POST",
            path: CHAT,
            content_type: Some("application/json"),
            body,
            ..Request::default()
        }
    }
}

pub(crate) fn wrong_method(path: &str, method: &str) -> Reaction {
    let message = format!("{path} does not take {method}");
    Reaction::Reply(Reply::error(405, &message, "method_not_allowed"))
}

pub(crate) const CHAT: &str = "/v1/chat/completions";
