//! Classifies a teacher's reply: an answer, or what kind of trouble. Pure.
//!
//! One reply is classified by its status, code and words alone. What follows from it for the row and for
//! the run depends also on what has been answered before; that is decided in `endpoint`.

use crate::client::attempt_error::AttemptError;
use crate::client::attempt_error::RowFailure;
use crate::client::attempt_error::connection_lost;
use std::time::{Duration, SystemTime};

use crate::client::refusal_reason::classify_error;
use crate::client::response;
use crate::client::response::completion::{Completion, NoAnswer};
use crate::client::response::error::ApiError;
use crate::client::transport::{BodyEnd, HttpReply, TransportError};
use crate::config;

/// Classifies one attempt. An answer has been paid for and is to be recorded, whatever its finish reason.
/// `now` is only compared with dates in headers and messages.
pub(crate) fn classify(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<Box<Completion>, AttemptError> {
    classify_by(result, now, response::parse)
}

/// As [`classify`], of replies whose bodies `read` reads.
pub(crate) fn classify_by(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
    read: impl FnOnce(&[u8]) -> Result<Completion, NoAnswer>,
) -> Result<Box<Completion>, AttemptError> {
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
        BodyEnd::Whole => None,
        BodyEnd::Cut(fault) => Some(fault),
        BodyEnd::Unreadable { problem, raw } if raw.is_empty() => {
            return Err(AttemptError::Unreadable {
                problem,
                body: reply.body,
            });
        }
        // What could be decoded may be a whole answer.
        BodyEnd::Unreadable { problem, raw } => {
            let unreadable = |_| AttemptError::Unreadable { problem, body: raw };
            return read(&reply.body).map(Box::new).map_err(unreadable);
        }
    };
    match (read(&reply.body), cut) {
        (Ok(completion), Some(fault)) if completion.is_piece => Err(classify_fault(fault)),
        // All of the answer had come.
        (Ok(completion), _) => Ok(Box::new(completion)),
        (Err(_), Some(fault)) => Err(classify_fault(fault)),
        (Err(NoAnswer::Malformed(problem)), None) => Err(connection_lost("malformed", &problem)),
        (Err(NoAnswer::Unreadable(problem)), None) => Err(AttemptError::Unreadable {
            problem,
            body: reply.body,
        }),
        // The code is the status that the endpoint would have sent, had it not begun to answer.
        (Err(NoAnswer::Error(error)), None) => {
            let usual = if error.is_content_filter() { 400 } else { 500 };
            let status = error.status.unwrap_or(usual);
            let mut trouble = classify_error(status, &reply.headers, &error, now);
            if let AttemptError::Transient { failure, .. }
            | AttemptError::Refused(failure)
            | AttemptError::Filtered(failure) = &mut trouble
            {
                // Generation had begun.
                failure.may_be_billed = true;
            }
            Err(trouble)
        }
    }
}

/// Lets replies with a good status pass, whatever they hold.
pub(crate) fn check(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<HttpReply, AttemptError> {
    let reply = result.map_err(classify_fault)?;
    match reply.end {
        _ if !(200..300).contains(&reply.status) => Err(classify_refusal(&reply, now)),
        BodyEnd::Whole => Ok(reply),
        BodyEnd::Cut(fault) => Err(classify_fault(fault)),
        BodyEnd::Unreadable { problem, .. } => Err(connection_lost("malformed", &problem)),
    }
}

fn classify_refusal(reply: &HttpReply, now: SystemTime) -> AttemptError {
    let error = ApiError::parse(&reply.body);
    classify_error(reply.status, &reply.headers, &error, now)
}

/// Classifies an attempt that brought no reply.
pub(crate) fn classify_fault(fault: TransportError) -> AttemptError {
    match fault {
        TransportError::Unreachable(message) => AttemptError::Transient {
            failure: RowFailure {
                unreachable: true,
                ..RowFailure::new("unreachable", &message)
            },
            wait: Duration::ZERO,
        },
        TransportError::KeyRenewed => AttemptError::KeyRenewed,
        // The connections that are open go on; fewer at once are enough.
        TransportError::NoDescriptor(message) => AttemptError::Throttled {
            wait: None,
            message: format!("{message}; lower `limits.concurrency` or raise `ulimit -n`"),
        },
        TransportError::Timeout => connection_lost("timeout", "no complete answer in time"),
        TransportError::Broken(message) => connection_lost("connection lost", &message),
    }
}

/// The pause after the `attempt`-th failure (from 1), with full jitter: uniform between nothing and
/// `base_s * 2^(attempt - 1)`, at most `max_s`. `random` is uniform in [0, 1).
///
/// See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
pub(crate) fn backoff(attempt: u32, retry: &config::RetryConfig, random: f64) -> Duration {
    let doublings = attempt.saturating_sub(1).min(32);
    let ceiling = retry.base_s * 2f64.powi(doublings as i32);
    Duration::try_from_secs_f64(ceiling.min(retry.max_s) * random).unwrap_or_default()
}

#[cfg(test)]
mod tests;
