//! Errors of one attempt, grouped by their consequence for the request and for the run.

use std::time::Duration;

use crate::client::secrets::Secrets;
use crate::terminal::sanitise;

/// Failure of one attempt.
#[derive(Debug)]
pub(crate) enum AttemptError {
    /// The endpoint refuses every request, according to the reply. Other requests may still succeed.
    EndpointRefused(EndpointRefusal),
    /// This request cannot succeed; other requests can.
    Refused(RowFailure),
    /// A content filter refused this request; other requests can succeed.
    Filtered(RowFailure),
    /// Rate limit, or no free file descriptor: all requests must wait, for `wait` if the endpoint reports it. Not
    /// counted as an attempt.
    Throttled {
        wait: Option<Duration>,
        message: String,
    },
    /// Temporary failure. `wait` is the minimum pause before the next attempt.
    Transient { failure: RowFailure, wait: Duration },
    /// An answer that was paid for but cannot be parsed.
    Unreadable { problem: String, body: bytes::Bytes },
    /// The endpoint rejected the key, and a new key is in place.
    KeyRenewed,
}

impl AttemptError {
    /// Returns the error message.
    pub(crate) fn message(&self) -> &str {
        match self {
            AttemptError::EndpointRefused(EndpointRefusal { failure, .. })
            | AttemptError::Refused(failure)
            | AttemptError::Filtered(failure)
            | AttemptError::Transient { failure, .. } => &failure.message,
            AttemptError::Throttled { message, .. } => message,
            AttemptError::Unreadable { problem, .. } => problem,
            AttemptError::KeyRenewed => "the key had expired",
        }
    }

    /// Removes keys from the message. The joined message may contain a key that was split between parts of the reply.
    pub(crate) fn clean(&mut self, secrets: &Secrets) {
        let message = match self {
            AttemptError::EndpointRefused(EndpointRefusal { failure, .. })
            | AttemptError::Refused(failure)
            | AttemptError::Filtered(failure)
            | AttemptError::Transient { failure, .. } => &mut failure.message,
            AttemptError::Throttled { message, .. } => message,
            AttemptError::Unreadable { problem, .. } => problem,
            AttemptError::KeyRenewed => return,
        };
        secrets.clean_text(message);
    }
}

/// Refusal of every request: wrong key, address or model, no credit, no access.
#[derive(Debug)]
pub(crate) struct EndpointRefusal {
    pub reason: RefusalReason,
    /// Failure to record for this request if other requests still succeed.
    pub failure: RowFailure,
}

/// Reason why an endpoint refuses every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RefusalReason {
    /// The key is missing or rejected.
    Key,
    /// The account may not send the request.
    Forbidden,
    /// The account has no credit left.
    Credit,
    /// The model does not exist or was retired.
    Model,
    /// The path of the URL does not exist.
    Address,
    /// The endpoint redirects to another address; redirects are not followed.
    Redirect,
}

/// Failure of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFailure {
    /// Name under which failures are counted and shown: `http 500`, `timeout`, `malformed`, ...
    pub class: String,
    pub message: String,
    /// The connection could not be opened.
    pub is_unreachable: bool,
    /// The endpoint may bill the request although no answer arrived.
    pub may_be_billed: bool,
    /// The error reply had an empty body, which is typical of a broken gateway.
    pub is_bodyless: bool,
}

impl RowFailure {
    /// Returns the failure of a request of about `tokens` tokens that exceeds the limit named `limit`.
    pub fn over_limit(limit: &str, tokens: f64, message: &str) -> Self {
        let message =
            format!("a request of about {tokens} tokens never fits into {limit} ({message})");
        Self::new("over the limit", &message)
    }

    /// Returns true if the request itself may have caused the failure, and false if the server was unreachable or
    /// overloaded.
    pub fn may_be_row_specific(&self) -> bool {
        let is_server_down = ["http 502", "http 503", "http 529"].contains(&self.class.as_str());
        !self.is_unreachable && !is_server_down
    }

    /// Returns a failure of this class, with the message shortened to one line.
    pub fn new(class: impl Into<String>, message: &str) -> Self {
        Self {
            class: class.into(),
            message: shorten(message),
            is_unreachable: false,
            may_be_billed: false,
            is_bodyless: false,
        }
    }
}

/// Shortens an endpoint's message to one sanitised line: at most [`MESSAGE_LENGTH`] characters, then ` ...` if the
/// message is longer.
pub(crate) fn shorten(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = sanitise(&line);
    let mut short: String = line.chars().take(MESSAGE_LENGTH).collect();
    if short.len() < line.len() {
        short.push_str(" ...");
    }
    short
}

/// Maximum length of a message that is shown and stored, in characters.
const MESSAGE_LENGTH: usize = 300;

/// Returns a temporary failure of a request that may have been answered and billed.
pub(crate) fn possibly_billed(class: &str, message: &str) -> AttemptError {
    AttemptError::Transient {
        failure: RowFailure {
            may_be_billed: true,
            ..RowFailure::new(class, message)
        },
        wait: Duration::ZERO,
    }
}
