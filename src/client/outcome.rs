//! Classifies a teacher's reply as an answer or a kind of error. Pure.
//!
//! A reply is classified without knowledge of earlier replies. `harvest` combines the classes of several replies, and
//! decides whether a request is retried and whether the run stops.

use std::time::{Duration, SystemTime};

use crate::client::attempt_error::{AttemptError, RefusalReason, RowFailure, possibly_billed};
use crate::client::refusal_reason::classify_error;
use crate::client::response;
use crate::client::response::completion::{Completion, NoAnswer};
use crate::client::response::error::ApiError;
use crate::client::transport::{BodyEnd, HttpReply, TransportError};

/// Classifies one attempt. An answer is paid for, so it is returned whatever its finish reason. If the reply requests
/// a wait until a date, the wait is counted from `now`.
pub(crate) fn classify(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<Box<Completion>, AttemptError> {
    classify_with(result, now, response::parse)
}

/// As [`classify`], with another parser of the body.
pub(crate) fn classify_with(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
    parse: impl FnOnce(&[u8]) -> Result<Completion, NoAnswer>,
) -> Result<Box<Completion>, AttemptError> {
    let reply = result.map_err(classify_transport_error)?;
    if !(200..300).contains(&reply.status) {
        // Some content filters return the paid first part of an answer with an error status.
        if memchr::memmem::find(&reply.body, b"\"choices\"").is_some()
            && let Ok(completion) = parse(&reply.body)
            && !completion.answer.text.is_empty()
        {
            return Ok(Box::new(completion));
        }
        return Err(classify_error_reply(&reply, now));
    }
    let connection_error = match reply.end {
        BodyEnd::Complete => None,
        BodyEnd::Truncated(error) => Some(error),
        BodyEnd::Unreadable { problem, raw } if raw.is_empty() => {
            return Err(AttemptError::Unreadable {
                problem,
                body: reply.body,
            });
        }
        // The decoded part may contain a complete answer.
        BodyEnd::Unreadable { problem, raw } => {
            let unreadable = |_| AttemptError::Unreadable { problem, body: raw };
            return parse(&reply.body).map(Box::new).map_err(unreadable);
        }
    };
    match (parse(&reply.body), connection_error) {
        (Ok(completion), Some(error)) if completion.is_stream_delta => {
            Err(classify_transport_error(error))
        }
        // The answer is complete, even if the connection broke after it.
        (Ok(completion), _) => Ok(Box::new(completion)),
        (Err(_), Some(error)) => Err(classify_transport_error(error)),
        (Err(NoAnswer::Malformed(problem)), None) => Err(possibly_billed("malformed", &problem)),
        (Err(NoAnswer::Unreadable(problem)), None) => Err(AttemptError::Unreadable {
            problem,
            body: reply.body,
        }),
        // An error in a reply with a success status. Its body may contain the real status.
        (Err(NoAnswer::Error(error)), None) => {
            let assumed_status = if error.is_content_filter() { 400 } else { 500 };
            let status = error.status.unwrap_or(assumed_status);
            let mut attempt_error = classify_error(status, &reply.headers, &error, now);
            match &mut attempt_error {
                // Generation may have started.
                AttemptError::Transient { failure, .. }
                | AttemptError::Refused(failure)
                | AttemptError::Filtered(failure) => failure.may_be_billed = true,
                // A wrong key, model or address is detected before generation.
                AttemptError::EndpointRefused(refusal) => {
                    let reasons = [RefusalReason::Credit, RefusalReason::Forbidden];
                    refusal.failure.may_be_billed = reasons.contains(&refusal.reason);
                }
                _ => {}
            }
            Err(attempt_error)
        }
    }
}

/// Returns the reply if it is complete and has a success status; its body is not parsed. Otherwise classifies the
/// failure.
pub(crate) fn check(
    result: Result<HttpReply, TransportError>,
    now: SystemTime,
) -> Result<HttpReply, AttemptError> {
    let reply = result.map_err(classify_transport_error)?;
    match reply.end {
        _ if !(200..300).contains(&reply.status) => Err(classify_error_reply(&reply, now)),
        BodyEnd::Complete => Ok(reply),
        BodyEnd::Truncated(error) => Err(classify_transport_error(error)),
        BodyEnd::Unreadable { problem, .. } => Err(possibly_billed("malformed", &problem)),
    }
}

fn classify_error_reply(reply: &HttpReply, now: SystemTime) -> AttemptError {
    let error = ApiError::parse(&reply.body);
    classify_error(reply.status, &reply.headers, &error, now)
}

/// Classifies an attempt that got no usable reply.
pub(crate) fn classify_transport_error(error: TransportError) -> AttemptError {
    match error {
        TransportError::Unreachable(message) => AttemptError::Transient {
            failure: RowFailure {
                is_unreachable: true,
                ..RowFailure::new("unreachable", &message)
            },
            wait: Duration::ZERO,
        },
        TransportError::KeyRenewed => AttemptError::KeyRenewed,
        // The process cannot open another connection. The open connections keep working, so the run continues with
        // fewer requests in flight.
        TransportError::NoDescriptor(message) => AttemptError::Throttled {
            wait: None,
            message: format!("{message}; lower `limits.concurrency` or raise `ulimit -n`"),
        },
        TransportError::Timeout => {
            possibly_billed("timeout", "no complete answer within the timeout")
        }
        TransportError::Broken(message) => possibly_billed("connection lost", &message),
    }
}

#[cfg(test)]
mod tests;
