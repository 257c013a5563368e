//! Classifies a teacher's reply: an answer, or what kind of trouble. Pure.
//!
//! One reply is classified by its status, code and words alone. What follows from it for the row and for
//! the run depends also on what has been answered before; that is decided in `lane`.

use std::time::{Duration, SystemTime};

pub use super::refusal::claims_the_end;
use super::refusal::classify_error;
use super::reply::error::ApiError;
use super::reply::{self, Completion, NoAnswer};
use super::secrets::Secrets;
use super::teacher::{End, Fault, Reply};
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
    classify_by(result, now, reply::parse)
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
pub(super) fn shorten(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut short: String = sanitise(&line).chars().take(MESSAGE_LENGTH).collect();
    if short.len() < line.len() {
        short.push_str(" ...");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn reply(status: u16, headers: &[(&'static str, &str)], body: &str) -> Result<Reply, Fault> {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        Ok(Reply::whole(status, headers, body.to_string().into()))
    }

    /// The outcome in a word, and the wait in milliseconds where there is one.
    fn sort(result: Result<Reply, Fault>) -> String {
        let trouble = match classify(result, SystemTime::UNIX_EPOCH + NOW) {
            Ok(_) => return "answer".into(),
            Err(trouble) => trouble,
        };
        match trouble {
            Trouble::Claim(claim) => format!("claim: {:?}", claim.reason),
            Trouble::Refused(failure) => format!("refused: {}", failure.class),
            Trouble::Filtered(failure) => format!("filtered: {}", failure.class),
            Trouble::Unreadable { problem, .. } => format!("unreadable: {problem}"),
            Trouble::KeyRenewed => "key renewed".into(),
            Trouble::Throttled { wait, .. } => {
                format!("throttled: {:?}", wait.map(|w| w.as_millis()))
            }
            Trouble::Transient { failure, wait } => {
                format!("transient: {} {}", failure.class, wait.as_millis())
            }
        }
    }

    #[test]
    fn every_status_has_its_class() {
        let quota = r#"{"error":{"message":"m","code":"insufficient_quota"}}"#;
        let cases = [
            (
                200,
                r#"{"choices":[{"message":{"content":"x"}}]}"#,
                "answer",
            ),
            (
                200,
                r#"{"error":{"code":429,"message":"slow"}}"#,
                "throttled: None",
            ),
            (
                200,
                r#"{"error":{"code":"x","message":"broke"}}"#,
                "transient: http 500 0",
            ),
            (200, r#"{"choices":["#, "transient: malformed 0"),
            (204, "", "transient: malformed 0"),
            (302, "", "claim: Redirect"),
            (400, "", "refused: http 400"),
            (
                400,
                r#"{"error":{"message":"Your credit balance is too low"}}"#,
                "claim: Credit",
            ),
            (401, "", "claim: Key"),
            (402, "", "claim: Credit"),
            (403, "", "claim: Forbidden"),
            (404, "", "claim: Address"),
            (405, r#"{"detail":"Method Not Allowed"}"#, "claim: Address"),
            (
                404,
                r#"{"error":{"message":"x","code":"model_not_found"}}"#,
                "claim: Model",
            ),
            (
                404,
                r#"{"error":{"message":"The model `x` does not exist."}}"#,
                "claim: Model",
            ),
            (
                400,
                r#"{"error":{"message":"The model `x` has been decommissioned and is no longer supported.","code":"y"}}"#,
                "claim: Model",
            ),
            (
                400,
                r#"{"error":{"message":"x is not a valid model ID"}}"#,
                "claim: Model",
            ),
            (
                410,
                r#"{"error":{"message":"The model m was retired"}}"#,
                "claim: Model",
            ),
            (
                400,
                r#"{"error":{"message":"`logit_bias` is no longer supported with this model."}}"#,
                "refused: http 400",
            ),
            (
                400,
                r#"[{"error":{"code":400,"message":"API key expired.","status":"INVALID_ARGUMENT","details":[{"reason":"API_KEY_INVALID"}]}}]"#,
                "claim: Key",
            ),
            (
                400,
                r#"{"error":{"message":"API key not valid. Please pass a valid API key."}}"#,
                "claim: Key",
            ),
            (
                400,
                r#"{"code":"Throttling.RateQuota","message":"Requests rate limit exceeded"}"#,
                "throttled: None",
            ),
            (
                420,
                r#"{"error":"calm down, try again in 2s"}"#,
                "throttled: Some(2000)",
            ),
            (424, "", "transient: http 424 0"),
            (498, "", "transient: http 498 0"),
            (
                400,
                r#"{"error":{"message":"m","code":"content_filter"}}"#,
                "filtered: content_filter",
            ),
            (
                403,
                r#"{"error":{"code":403,"message":"Input was flagged by moderation"}}"#,
                "filtered: content_filter",
            ),
            (
                403,
                "<html><title>Attention Required!</title>",
                "claim: Forbidden",
            ),
            (
                403,
                r#"{"error":{"message":"API rate limit exceeded"}}"#,
                "throttled: None",
            ),
            (
                400,
                r#"{"error":{"message":"Access denied","code":"Arrearage"}}"#,
                "claim: Credit",
            ),
            (
                429,
                r#"{"error":{"message":"You exceeded your current quota"}}"#,
                "claim: Credit",
            ),
            (
                429,
                r#"[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"You exceeded your current quota, please check your plan and billing details. Please retry in 1.5s."}}]"#,
                "throttled: Some(1500)",
            ),
            (
                200,
                r#"{"choices":null,"base_resp":{"status_code":1002,"status_msg":"rate limit"}}"#,
                "throttled: None",
            ),
            (
                200,
                r#"{"choices":null,"base_resp":{"status_code":1008,"status_msg":"no balance"}}"#,
                "claim: Credit",
            ),
            (
                200,
                r#"{"error":{"code":"content_filter","message":"m"}}"#,
                "filtered: content_filter",
            ),
            (
                200,
                r#"{"choices": 'x'}"#,
                "unreadable: not JSON: at byte 12: 'x'}",
            ),
            (
                400,
                r#"{"error":{"code":"content_filter","message":"m"},"choices":[{"message":{"content":"The first half of"}}]}"#,
                "answer",
            ),
            (408, "", "transient: http 408 0"),
            (409, "", "transient: http 409 0"),
            (413, "", "refused: http 413"),
            (422, "", "refused: http 422"),
            (425, "", "transient: http 425 0"),
            (429, "<html>", "throttled: None"),
            (429, quota, "claim: Credit"),
            (500, "", "transient: http 500 0"),
            (503, "", "transient: http 503 0"),
            (520, "<html>", "transient: http 520 0"),
            (529, "", "transient: http 529 0"),
        ];
        for (status, body, expected) in cases {
            assert_eq!(sort(reply(status, &[], body)), expected, "{status} {body}");
        }
    }

    #[test]
    fn faults_of_the_connection_may_pass() {
        assert_eq!(sort(Err(Fault::Timeout)), "transient: timeout 0");
        assert_eq!(
            sort(Err(Fault::Unreachable("x".into()))),
            "transient: unreachable 0"
        );
        assert_eq!(
            sort(Err(Fault::Broken("x".into()))),
            "transient: connection lost 0"
        );
    }

    #[test]
    fn an_answer_that_had_come_whole_before_the_connection_broke_is_an_answer() {
        let cut = |body: &str| {
            let mut reply = reply(200, &[], body).unwrap();
            reply.end = End::Cut(Fault::Broken("reset".into()));
            sort(Ok(reply))
        };
        let whole = r#"{"choices":[{"message":{"content":"x"}}]}"#;
        assert_eq!(cut(whole), "answer");
        assert_eq!(
            cut(&whole[..whole.len() - 1]),
            "transient: connection lost 0"
        );
        assert_eq!(
            cut("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n"),
            "transient: connection lost 0"
        );
        let mut reply = reply(200, &[], whole).unwrap();
        reply.end = End::Unreadable {
            problem: "too large".into(),
            raw: bytes::Bytes::new(),
        };
        assert_eq!(sort(Ok(reply)), "unreadable: too large");
    }

    #[test]
    fn a_wait_that_is_asked_for_is_obeyed_by_the_class_of_the_reply() {
        let far =
            httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + NOW + Duration::from_secs(36_000));
        type Headers<'a> = &'a [(&'static str, &'a str)];
        let used_up: Headers = &[
            ("x-ratelimit-limit", "50"),
            ("x-ratelimit-remaining", "0"),
            ("x-ratelimit-reset", "1800036000000"),
        ];
        let cases: [(u16, Headers, &str); 6] = [
            (429, &[("retry-after", "7")], "throttled: Some(7000)"),
            (429, &[("retry-after", &far)], "throttled: Some(36000000)"),
            (429, used_up, "throttled: Some(36000000)"),
            (503, &[("retry-after", "2")], "throttled: Some(2000)"),
            (500, &[("retry-after", "2")], "transient: http 500 2000"),
            (403, &[("retry-after", "2")], "throttled: Some(2000)"),
        ];
        for (status, headers, expected) in cases {
            assert_eq!(
                sort(reply(status, headers, "")),
                expected,
                "{status} {headers:?}"
            );
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let retry = config::Retry {
            base_s: 0.5,
            max_s: 60.0,
            ..config::Retry::default()
        };
        let ceilings =
            [1, 2, 3, 7, 8, 1000].map(|attempt| backoff(attempt, &retry, 1.0).as_secs_f64());
        assert_eq!(ceilings, [0.5, 1.0, 2.0, 32.0, 60.0, 60.0]);
        assert_eq!(backoff(5, &retry, 0.0), Duration::ZERO);
    }

    #[test]
    fn messages_are_one_harmless_line() {
        let message = format!("a\n\n\u{1b}[31m{}", "x".repeat(1000));
        let short = shorten(&message);
        assert!(
            short.starts_with("a \\u{1b}[31mxxx") && short.ends_with("x ..."),
            "{short}"
        );
        assert!(short.len() < 320);
    }
}
