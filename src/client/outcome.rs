//! Classifies a teacher's reply: an answer, or a kind of error; and computes backoff pauses. Pure.
//!
//! Only the status, error code and message of the one reply count. The consequences for the request and for the
//! run also depend on earlier replies, and are decided in `harvest`.

use std::time::{Duration, SystemTime};

use crate::client::attempt_error::{AttemptError, RowFailure, connection_lost};
use crate::client::refusal_reason::classify_error;
use crate::client::response;
use crate::client::response::completion::{Completion, NoAnswer};
use crate::client::response::error::ApiError;
use crate::client::transport::{BodyEnd, HttpReply, TransportError};
use crate::config;

/// Classifies one attempt. An answer is paid for, so it is returned whatever its finish reason. `now` is only
/// compared with dates in headers and messages.
pub(crate) fn classify(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<Box<Completion>, AttemptError> {
    classify_by(result, now, response::parse)
}

/// As [`classify`], with `read` as the parser of bodies.
pub(crate) fn classify_by(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
    read: impl FnOnce(&[u8]) -> Result<Completion, NoAnswer>,
) -> Result<Box<Completion>, AttemptError> {
    let reply = result.map_err(classify_transport_error)?;
    if !(200..300).contains(&reply.status) {
        // Some content filters return the paid first part of an answer with an error status.
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
        BodyEnd::Cut(error) => Some(error),
        BodyEnd::Unreadable { problem, raw } if raw.is_empty() => {
            return Err(AttemptError::Unreadable {
                problem,
                body: reply.body,
            });
        }
        // The decoded part may contain a complete answer.
        BodyEnd::Unreadable { problem, raw } => {
            let unreadable = |_| AttemptError::Unreadable { problem, body: raw };
            return read(&reply.body).map(Box::new).map_err(unreadable);
        }
    };
    match (read(&reply.body), cut) {
        (Ok(completion), Some(error)) if completion.is_stream_delta => {
            Err(classify_transport_error(error))
        }
        // The answer arrived completely before the connection broke.
        (Ok(completion), _) => Ok(Box::new(completion)),
        (Err(_), Some(error)) => Err(classify_transport_error(error)),
        (Err(NoAnswer::Malformed(problem)), None) => Err(connection_lost("malformed", &problem)),
        (Err(NoAnswer::Unreadable(problem)), None) => Err(AttemptError::Unreadable {
            problem,
            body: reply.body,
        }),
        // The endpoint had sent status 200 before generation failed; the error code names the intended status.
        (Err(NoAnswer::Error(error)), None) => {
            let default = if error.is_content_filter() { 400 } else { 500 };
            let status = error.status.unwrap_or(default);
            let mut attempt_error = classify_error(status, &reply.headers, &error, now);
            if let AttemptError::Transient { failure, .. }
            | AttemptError::Refused(failure)
            | AttemptError::Filtered(failure) = &mut attempt_error
            {
                // Generation had started.
                failure.may_be_billed = true;
            }
            Err(attempt_error)
        }
    }
}

/// Returns replies with a success status, whatever their body, and classifies all others.
pub(crate) fn check(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<HttpReply, AttemptError> {
    let reply = result.map_err(classify_transport_error)?;
    match reply.end {
        _ if !(200..300).contains(&reply.status) => Err(classify_refusal(&reply, now)),
        BodyEnd::Whole => Ok(reply),
        BodyEnd::Cut(error) => Err(classify_transport_error(error)),
        BodyEnd::Unreadable { problem, .. } => Err(connection_lost("malformed", &problem)),
    }
}

fn classify_refusal(reply: &HttpReply, now: SystemTime) -> AttemptError {
    let error = ApiError::parse(&reply.body);
    classify_error(reply.status, &reply.headers, &error, now)
}

/// Classifies an attempt without a reply.
pub(crate) fn classify_transport_error(error: TransportError) -> AttemptError {
    match error {
        TransportError::Unreachable(message) => AttemptError::Transient {
            failure: RowFailure {
                unreachable: true,
                ..RowFailure::new("unreachable", &message)
            },
            wait: Duration::ZERO,
        },
        TransportError::KeyRenewed => AttemptError::KeyRenewed,
        // Open connections keep working, so a lower concurrency is enough.
        TransportError::NoDescriptor(message) => AttemptError::Throttled {
            wait: None,
            message: format!("{message}; lower `limits.concurrency` or raise `ulimit -n`"),
        },
        TransportError::Timeout => {
            connection_lost("timeout", "no complete answer within the timeout")
        }
        TransportError::Broken(message) => connection_lost("connection lost", &message),
    }
}

/// Returns the pause after the `attempt`-th failure (from 1) with full jitter: uniform between 0 and
/// `min(base * 2^(attempt - 1), max)`. `random` is uniform in [0, 1).
///
/// See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
pub(crate) fn backoff(attempt: u32, retry: &config::RetryConfig, random: f64) -> Duration {
    let doublings = attempt.saturating_sub(1).min(32);
    let ceiling = retry.base.as_secs_f64() * 2f64.powi(doublings as i32);
    Duration::from_secs_f64(ceiling.min(retry.max.as_secs_f64()) * random)
}

#[cfg(test)]
mod tests;
