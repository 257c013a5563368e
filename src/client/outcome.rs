//! Classifies a teacher's reply: an answer, or what kind of trouble. Pure.
//!
//! One reply is classified by its status, code and words alone. What follows from it for the row and for
//! the run depends also on what has been answered before; that is decided in `lane`.

use std::time::{Duration, SystemTime};

pub use crate::client::error_class::claims_the_end;
use crate::client::error_class::classify_error;
use crate::client::http::{End, Fault, Reply};
use crate::client::response;
use crate::client::response::error::ApiError;
use crate::client::response::{Completion, NoAnswer};
use crate::client::secrets::Secrets;
use crate::config;
use crate::terminal::sanitise;

/// Characters of an endpoint's message that are shown and kept.
const MESSAGE_LENGTH: usize = 300;

/// An attempt that brought no answer.
#[derive(Debug)]
pub enum Trouble {
    /// The reply says that no request can succeed.
    Claim(Claim),
    /// This request cannot succeed; others can.
    Refused(Failure),
    /// A filter refuses what this request asks about; others can succeed.
    Filtered(Failure),
    /// The endpoint asks everybody to wait, for `wait` if it says how long. Costs no attempt.
    Throttled {
        wait: Option<Duration>,
        message: String,
    },
    /// May pass. `wait` is the least time to leave before the next attempt.
    Transient { failure: Failure, wait: Duration },
    /// An answer that was paid for, and that cannot be read.
    Unreadable { problem: String, body: bytes::Bytes },
    /// The key had expired, and there is a new one.
    KeyRenewed,
}

/// Why no request can succeed, as one reply has it.
#[derive(Debug)]
pub struct Claim {
    pub reason: Reason,
    /// Of the row, should it be the row after all.
    pub failure: Failure,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Key,
    Forbidden,
    Credit,
    Model,
    /// Nothing is served under this path.
    Address,
    Redirect,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
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

impl Failure {
    /// The server's limit can never let the request in: which limit, and how large the request is.
    pub fn over_limit(which: &str, amount: f64, message: &str) -> Self {
        let message =
            format!("a request of about {amount} tokens never fits into {which} ({message})");
        Self::new("over the limit", &message)
    }

    /// Returns true if the request may be the reason, and not only that something is missing or overloaded
    /// on the way.
    pub fn may_be_the_row(&self) -> bool {
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

/// Classifies one attempt. An answer has been paid for and is to be recorded, whatever its finish reason.
/// `now` is only compared with dates in headers and messages.
pub fn classify(result: Result<Reply, Fault>, now: SystemTime) -> Result<Box<Completion>, Trouble> {
    classify_by(result, now, response::parse)
}

/// As [`classify`], of replies whose bodies `read` reads.
pub fn classify_by(
    result: Result<Reply, Fault>,
    now: SystemTime,
    read: impl FnOnce(&[u8]) -> Result<Completion, NoAnswer>,
) -> Result<Box<Completion>, Trouble> {
    let reply = result.map_err(classify_fault)?;
    if !(200..300).contains(&reply.status) {
        // Some filters refuse with the first half of an answer, which has been paid for.
        if memchr::memmem::find(&reply.body, b"\"choices\"").is_some()
            && let Ok(completion) = read(&reply.body)
            && !completion.answer.text.is_empty()
        {
            return Ok(Box::new(completion));
        }
        return Err(classify_refusal(&reply, now));
    }
    let cut = match reply.end {
        End::Whole => None,
        End::Cut(fault) => Some(fault),
        End::Unreadable { problem, raw } if raw.is_empty() => {
            return Err(Trouble::Unreadable {
                problem,
                body: reply.body,
            });
        }
        // What could be decoded may be a whole answer.
        End::Unreadable { problem, raw } => {
            let unreadable = |_| Trouble::Unreadable { problem, body: raw };
            return read(&reply.body).map(Box::new).map_err(unreadable);
        }
    };
    match (read(&reply.body), cut) {
        (Ok(completion), Some(fault)) if completion.is_piece => Err(classify_fault(fault)),
        // All of the answer had come.
        (Ok(completion), _) => Ok(Box::new(completion)),
        (Err(_), Some(fault)) => Err(classify_fault(fault)),
        (Err(NoAnswer::Malformed(problem)), None) => Err(lost("malformed", &problem)),
        (Err(NoAnswer::Unreadable(problem)), None) => Err(Trouble::Unreadable {
            problem,
            body: reply.body,
        }),
        // The code is the status that the endpoint would have sent, had it not begun to answer.
        (Err(NoAnswer::Error(error)), None) => {
            let usual = if error.is_of_the_content() { 400 } else { 500 };
            let status = error.status.unwrap_or(usual);
            let mut trouble = classify_error(status, &reply.headers, &error, now);
            if let Trouble::Transient { failure, .. }
            | Trouble::Refused(failure)
            | Trouble::Filtered(failure) = &mut trouble
            {
                // Generation had begun.
                failure.may_be_billed = true;
            }
            Err(trouble)
        }
    }
}

impl Trouble {
    pub fn message(&self) -> &str {
        match self {
            Trouble::Claim(Claim { failure, .. })
            | Trouble::Refused(failure)
            | Trouble::Filtered(failure)
            | Trouble::Transient { failure, .. } => &failure.message,
            Trouble::Throttled { message, .. } => message,
            Trouble::Unreadable { problem, .. } => problem,
            Trouble::KeyRenewed => "the key had expired",
        }
    }

    /// Takes keys out of its message, which may have been put together from pieces.
    pub fn clean(&mut self, secrets: &Secrets) {
        let message = match self {
            Trouble::Claim(Claim { failure, .. })
            | Trouble::Refused(failure)
            | Trouble::Filtered(failure)
            | Trouble::Transient { failure, .. } => &mut failure.message,
            Trouble::Throttled { message, .. } => message,
            Trouble::Unreadable { problem, .. } => problem,
            Trouble::KeyRenewed => return,
        };
        secrets.clean_text(message);
    }
}

/// Lets replies with a good status pass, whatever they hold.
pub fn check(result: Result<Reply, Fault>, now: SystemTime) -> Result<Reply, Trouble> {
    let reply = result.map_err(classify_fault)?;
    match reply.end {
        _ if !(200..300).contains(&reply.status) => Err(classify_refusal(&reply, now)),
        End::Whole => Ok(reply),
        End::Cut(fault) => Err(classify_fault(fault)),
        End::Unreadable { problem, .. } => Err(lost("malformed", &problem)),
    }
}

fn classify_refusal(reply: &Reply, now: SystemTime) -> Trouble {
    let error = ApiError::parse(&reply.body);
    classify_error(reply.status, &reply.headers, &error, now)
}

/// Classifies an attempt that brought no reply.
pub fn classify_fault(fault: Fault) -> Trouble {
    match fault {
        Fault::Unreachable(message) => Trouble::Transient {
            failure: Failure {
                unreachable: true,
                ..Failure::new("unreachable", &message)
            },
            wait: Duration::ZERO,
        },
        Fault::KeyRenewed => Trouble::KeyRenewed,
        // The connections that are open go on; fewer at once are enough.
        Fault::NoDescriptor(message) => Trouble::Throttled {
            wait: None,
            message: format!("{message}; lower `limits.concurrency` or raise `ulimit -n`"),
        },
        Fault::Timeout => lost("timeout", "no complete answer in time"),
        Fault::Broken(message) => lost("connection lost", &message),
    }
}

/// A failure that may have cost an answer on its way.
pub fn lost(class: &str, message: &str) -> Trouble {
    Trouble::Transient {
        failure: Failure {
            may_be_billed: true,
            ..Failure::new(class, message)
        },
        wait: Duration::ZERO,
    }
}

/// The pause after the `attempt`-th failure (from 1), with full jitter: uniform between nothing and
/// `base_s * 2^(attempt - 1)`, at most `max_s`. `random` is uniform in [0, 1).
///
/// See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
pub fn backoff(attempt: u32, retry: &config::Retry, random: f64) -> Duration {
    let doublings = attempt.saturating_sub(1).min(32);
    let ceiling = retry.base_s * 2f64.powi(doublings as i32);
    Duration::try_from_secs_f64(ceiling.min(retry.max_s) * random).unwrap_or_default()
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

#[cfg(test)]
mod tests;
