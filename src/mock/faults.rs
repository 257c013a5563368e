//! Which fault hits a request, and what it makes of it. Pure: time and chance are arguments.

use std::time::{Duration, SystemTime};

use crate::mock::corrupt::{blank_lines, corrupt_body};
use crate::mock::headers::{with_retry_after, words};
use crate::mock::response::{HttpReply, MockResponse};
use crate::mock::script::Script;
use crate::mock::script::fault::ScriptedFault;
use crate::mock::script::fault_kind::FaultKind;
use crate::mock::script::limits::RetryAfter;

/// Another host than any that a test serves.
const OTHER_HOST: &str = "https://elsewhere.invalid/v1/chat/completions";

/// A request, as far as a fault's conditions look at it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestFacts<'a> {
    /// Without a query.
    pub path: &'a str,
    /// Whether it is for an answer.
    pub is_chat: bool,
    /// The last message.
    pub prompt: &'a str,
    /// How often the same body came before.
    pub attempt: u32,
    /// Since the start.
    pub at: Duration,
}

/// The first fault of the script whose conditions hold. Each one draws, so that the draws of one
/// do not depend on the conditions of another.
pub(crate) fn select<'a>(
    script: &'a Script,
    facts: RequestFacts,
    rng: &mut fastrand::Rng,
) -> Option<&'a ScriptedFault> {
    let mut chosen = None;
    for fault in &script.faults {
        let random = rng.f64();
        if chosen.is_none() && fault.matches(facts, random) {
            chosen = Some(fault);
        }
    }
    chosen
}

impl ScriptedFault {
    fn matches(&self, facts: RequestFacts, random: f64) -> bool {
        let at = facts.at.as_secs_f64();
        let path_matches = match &self.path {
            None => facts.is_chat,
            Some(part) => facts.path.contains(part.as_str()),
        };
        path_matches
            && self.first.is_none_or(|first| facts.attempt < first)
            && self.share.is_none_or(|share| random < share)
            && self.from_s.is_none_or(|from| at >= from)
            && self.to_s.is_none_or(|to| at < to)
            && self
                .matching
                .as_ref()
                .is_none_or(|part| facts.prompt.contains(part.as_str()))
    }

    /// Whether the request is billed.
    pub fn is_billed(&self) -> bool {
        self.billed.unwrap_or(self.kind.corrupts_answer())
    }

    /// Puts the script's own body and headers in place of the kind's.
    fn apply_overrides(&self, mut reply: HttpReply) -> HttpReply {
        if let Some(body) = &self.body {
            reply.body = body.clone().into();
        }
        for (name, value) in &self.headers {
            let name = name.to_ascii_lowercase();
            reply.headers.retain(|(other, _)| *other != name);
            reply = reply.with(name, value.clone());
        }
        reply
    }
}

/// What a fault that leaves no answer makes of a request. None: nothing ever comes.
///
/// `now` is only for a `Retry-After` that is a date.
pub(crate) fn error(fault: &ScriptedFault, now: SystemTime) -> Option<MockResponse> {
    let reply = match fault.kind {
        FaultKind::Stall => return None,
        FaultKind::Reset => return Some(MockResponse::Reset),
        FaultKind::Refused => return Some(MockResponse::Refused),
        FaultKind::Html(status) => HttpReply {
            content_type: "text/html",
            ..HttpReply::json(status, page(status))
        },
        FaultKind::InsufficientQuota => HttpReply::error(
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
        ),
        FaultKind::Redirect => HttpReply::json(307, "").with("location", OTHER_HOST),
        // With the status as its code, as routers send it.
        FaultKind::ErrorIn200 => {
            let reply = HttpReply::error(502, "The upstream provider failed.", 502);
            HttpReply {
                status: 200,
                ..reply
            }
        }
        FaultKind::Http(status) => of_status(status, &message(fault, status)),
        _ => HttpReply::error(500, "This fault has no answer to spoil.", "server_error"),
    };
    let form = fault.retry_after.unwrap_or(RetryAfter::None);
    let reply = with_retry_after(reply, form, wait(fault), now);
    Some(MockResponse::Complete(fault.apply_overrides(reply)))
}

/// What any other fault makes of a good answer.
pub(crate) fn corrupt(fault: &ScriptedFault, mut answer: HttpReply) -> MockResponse {
    let interval = seconds(fault.interval_s.unwrap_or(1.0));
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

fn of_status(status: u16, message: &str) -> HttpReply {
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
    HttpReply::error(status, message, code)
}

fn message(fault: &ScriptedFault, status: u16) -> String {
    let form = fault.retry_after.unwrap_or(RetryAfter::None);
    format!(
        "The mock was told to answer {status}.{}",
        words(form, wait(fault))
    )
}

fn wait(fault: &ScriptedFault) -> Duration {
    seconds(fault.retry_after_s.unwrap_or(1.0))
}

fn page(status: u16) -> String {
    format!(
        "<html>\r\n<head><title>{status}</title></head>\r\n<body>\r\n<center><h1>{status}</h1>\
         </center>\r\n<hr><center>cloudfront</center>\r\n</body>\r\n</html>\r\n"
    )
}

/// A time of the script. What does not fit is none: [`Script::load`] has refused it by then.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
