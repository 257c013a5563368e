//! Selects the fault of a request and creates its response. Pure: time and random numbers are arguments.

use std::time::{Duration, SystemTime};

use crate::mock::corrupt::{blank_lines, corrupt_body};
use crate::mock::headers::{wait_sentence, with_retry_after};
use crate::mock::response::{MockReply, MockResponse};
use crate::mock::script::Script;
use crate::mock::script::fault::ScriptedFault;
use crate::mock::script::fault_kind::FaultKind;
use crate::mock::script::limits::RetryAfter;

/// Redirect target on a host that does not exist.
const OTHER_HOST: &str = "https://elsewhere.invalid/v1/chat/completions";

/// The properties of a request that the conditions of a fault test.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestFacts<'a> {
    /// Path without the query.
    pub path: &'a str,
    /// True for a chat completion request.
    pub is_chat: bool,
    /// Text of the last message.
    pub prompt: &'a str,
    /// Number of earlier attempts with the same body.
    pub attempt: u32,
    /// Time since the start of the mock.
    pub elapsed: Duration,
}

/// Returns the first fault of the script whose conditions hold. A random number is drawn for every fault, so that the
/// numbers do not depend on the conditions of other faults.
pub(crate) fn select<'a>(
    script: &'a Script,
    facts: RequestFacts,
    rng: &mut fastrand::Rng,
) -> Option<&'a ScriptedFault> {
    let mut selected = None;
    for fault in &script.faults {
        let random = rng.f64();
        if selected.is_none() && fault.matches(facts, random) {
            selected = Some(fault);
        }
    }
    selected
}

impl ScriptedFault {
    fn matches(&self, facts: RequestFacts, random: f64) -> bool {
        let elapsed_s = facts.elapsed.as_secs_f64();
        let path_matches = match &self.path {
            None => facts.is_chat,
            Some(text) => facts.path.contains(text.as_str()),
        };
        path_matches
            && self.first.is_none_or(|first| facts.attempt < first)
            && self.share.is_none_or(|share| random < share)
            && self.from_s.is_none_or(|from_s| elapsed_s >= from_s)
            && self.to_s.is_none_or(|to_s| elapsed_s < to_s)
            && self
                .matching
                .as_ref()
                .is_none_or(|text| facts.prompt.contains(text.as_str()))
    }

    /// Returns true if the request is billed.
    pub fn is_billed(&self) -> bool {
        self.billed.unwrap_or(self.kind.corrupts_answer())
    }

    /// Sets the body and the headers of the reply that the script overrides.
    fn apply_overrides(&self, mut reply: MockReply) -> MockReply {
        if let Some(body) = &self.body {
            reply.body = body.clone().into();
        }
        for (name, value) in &self.headers {
            let name = name.to_ascii_lowercase();
            reply.headers.retain(|(other_name, _)| *other_name != name);
            reply = reply.with_header(name, value.clone());
        }
        reply
    }
}

/// Returns the response of a fault that replaces the answer by an error, or None for a stall, which has no response.
///
/// `now` is used only for a `Retry-After` that is a date.
pub(crate) fn error_response(fault: &ScriptedFault, now: SystemTime) -> Option<MockResponse> {
    let reply = match fault.kind {
        FaultKind::Stall => return None,
        FaultKind::Reset => return Some(MockResponse::Reset),
        FaultKind::Refused => return Some(MockResponse::Refused),
        FaultKind::Html(status) => MockReply {
            content_type: "text/html",
            ..MockReply::json(status, html_page(status))
        },
        FaultKind::InsufficientQuota => MockReply::error(
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
        ),
        FaultKind::Redirect => MockReply::json(307, "").with_header("location", OTHER_HOST),
        // Routers such as OpenRouter send the status of the upstream as the error code.
        FaultKind::ErrorIn200 => {
            let reply = MockReply::error(502, "The upstream provider failed.", 502);
            MockReply {
                status: 200,
                ..reply
            }
        }
        FaultKind::Http(status) => status_error(status, &error_message(fault, status)),
        _ => MockReply::error(
            500,
            "This fault needs an answer to corrupt.",
            "server_error",
        ),
    };
    let format = fault.retry_after.unwrap_or(RetryAfter::None);
    let reply = with_retry_after(reply, format, wait_time(fault), now);
    Some(MockResponse::Complete(fault.apply_overrides(reply)))
}

/// Returns the response of a fault that changes a valid answer.
pub(crate) fn corrupt(fault: &ScriptedFault, mut answer: MockReply) -> MockResponse {
    let interval = duration_from_s(fault.interval_s.unwrap_or(1.0));
    let body = std::mem::take(&mut answer.body);
    answer.body = corrupt_body(fault.kind, body.into(), fault.size);
    let reply = fault.apply_overrides(answer);
    match fault.kind {
        FaultKind::ResetInBody => MockResponse::ResetInBody(reply),
        FaultKind::ShortBody => MockResponse::ShortBody(reply),
        FaultKind::UnfinishedChunks => MockResponse::UnfinishedChunks(reply),
        FaultKind::StallInBody => MockResponse::StallInBody(reply),
        FaultKind::Drip => MockResponse::Drip {
            slow: reply.body.len(),
            reply,
            interval,
        },
        FaultKind::BlankLines if fault.interval_s.is_some() => MockResponse::Drip {
            slow: blank_lines(fault.size),
            reply,
            interval,
        },
        _ => MockResponse::Complete(reply),
    }
}

fn status_error(status: u16, message: &str) -> MockReply {
    let code = match status {
        400 => "invalid_request",
        401 => "invalid_api_key",
        402 => "payment_required",
        403 => "forbidden",
        404 => "not_found",
        408 => "request_timeout",
        409 => "conflict",
        413 => "request_too_large",
        422 => "unprocessable_entity",
        429 => "rate_limit_exceeded",
        503 | 529 => "overloaded",
        _ => "server_error",
    };
    MockReply::error(status, message, code)
}

fn error_message(fault: &ScriptedFault, status: u16) -> String {
    let format = fault.retry_after.unwrap_or(RetryAfter::None);
    format!(
        "The script answers with status {status}.{}",
        wait_sentence(format, wait_time(fault))
    )
}

fn wait_time(fault: &ScriptedFault) -> Duration {
    duration_from_s(fault.retry_after_s.unwrap_or(1.0))
}

fn html_page(status: u16) -> String {
    format!(
        "<html>\r\n<head><title>{status}</title></head>\r\n<body>\r\n<center><h1>{status}</h1>\
         </center>\r\n<hr><center>cloudfront</center>\r\n</body>\r\n</html>\r\n"
    )
}

/// Converts seconds of the script. Invalid values, which [`Script::load`] refuses, become zero.
pub(crate) fn duration_from_s(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
