//! TODO

use crate::client::secrets::Secrets;
use crate::terminal::sanitise;
use std::time::Duration;

/// An attempt that brought no answer.
#[derive(Debug)]
pub(crate) enum AttemptError {
    /// The reply says that no request can succeed.
    Claim(RefusalClaim),
    /// This request cannot succeed; others can.
    Refused(RowFailure),
    /// A filter refuses what this request asks about; others can succeed.
    Filtered(RowFailure),
    /// The endpoint asks everybody to wait, for `wait` if it says how long. Costs no attempt.
    Throttled {
        wait: Option<Duration>,
        message: String,
    },
    /// May pass. `wait` is the least time to leave before the next attempt.
    Transient { failure: RowFailure, wait: Duration },
    /// An answer that was paid for, and that cannot be read.
    Unreadable { problem: String, body: bytes::Bytes },
    /// The key had expired, and there is a new one.
    KeyRenewed,
}

impl AttemptError {
    pub(crate) fn message(&self) -> &str {
        match self {
            AttemptError::Claim(RefusalClaim { failure, .. })
            | AttemptError::Refused(failure)
            | AttemptError::Filtered(failure)
            | AttemptError::Transient { failure, .. } => &failure.message,
            AttemptError::Throttled { message, .. } => message,
            AttemptError::Unreadable { problem, .. } => problem,
            AttemptError::KeyRenewed => "the key had expired",
        }
    }

    /// Takes keys out of its message, which may have been put together from pieces.
    pub(crate) fn clean(&mut self, secrets: &Secrets) {
        let message = match self {
            AttemptError::Claim(RefusalClaim { failure, .. })
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

/// Why no request can succeed, as one reply has it.
#[derive(Debug)]
pub(crate) struct RefusalClaim {
    pub reason: RefusalReason,
    /// Of the row, should it be the row after all.
    pub failure: RowFailure,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RefusalReason {
    Key,
    Forbidden,
    Credit,
    Model,
    /// Nothing is served under this path.
    Address,
    Redirect,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFailure {
    /// Counted and shown under this name: `http 500`, `timeout`, `malformed`, ...
    pub class: String,
    pub message: String,
    /// Nothing accepted the connection.
    pub unreachable: bool,
    /// The endpoint may have done the work and sent the bill.
    pub may_be_billed: bool,
    /// A refusal without a body, as a gateway sends it when it is out of order.
    pub is_bodyless: bool,
}

impl RowFailure {
    /// The server's limit can never let the request in: which limit, and how large the request is.
    pub fn over_limit(which: &str, amount: f64, message: &str) -> Self {
        let message =
            format!("a request of about {amount} tokens never fits into {which} ({message})");
        Self::new("over the limit", &message)
    }

    /// Returns true if the request may be the reason, and not only that something is missing or overloaded
    /// on the way.
    pub fn may_be_row_specific(&self) -> bool {
        let is_of_the_way = ["http 502", "http 503", "http 529"].contains(&self.class.as_str());
        !self.unreachable && !is_of_the_way
    }

    pub fn new(class: impl Into<String>, message: &str) -> Self {
        Self {
            class: class.into(),
            message: shorten(message),
            unreachable: false,
            may_be_billed: false,
            is_bodyless: false,
        }
    }
}

/// An endpoint's message in one short and harmless line.
pub(crate) fn shorten(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut short: String = sanitise(&line).chars().take(MESSAGE_LENGTH).collect();
    if short.len() < line.len() {
        short.push_str(" ...");
    }
    short
}

/// Characters of an endpoint's message that are shown and kept.
const MESSAGE_LENGTH: usize = 300;

/// A failure that may have cost an answer on its way.
pub(crate) fn connection_lost(class: &str, message: &str) -> AttemptError {
    AttemptError::Transient {
        failure: RowFailure {
            may_be_billed: true,
            ..RowFailure::new(class, message)
        },
        wait: Duration::ZERO,
    }
}
