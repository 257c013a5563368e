//! What a reply means for its request and for the run. Pure.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};

use super::api_error::ApiError;
use super::teacher::{Fault, Reply};
use super::wire::{self, Completion, NoAnswer};
use crate::config;
use crate::terminal::sanitise;

/// An endpoint that asks for more is asked again after this long.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Characters of an endpoint's message that are shown and kept.
const MESSAGE_LENGTH: usize = 300;

/// What follows from an attempt that brought no answer.
#[derive(Debug)]
pub enum Trouble {
    /// No request can succeed: the run stops.
    Stop(Reason, String),
    /// This request cannot succeed; others can.
    Refused(Failure),
    /// The endpoint asks everybody to wait, so long if it says how long. Costs no attempt.
    Throttled {
        wait: Option<Duration>,
        message: String,
    },
    /// May pass. `wait` is the least time to leave before the next attempt.
    Transient { failure: Failure, wait: Duration },
}

/// Why no request can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Key,
    Forbidden,
    Credit,
    Model,
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
}

impl Failure {
    /// The server's limit can never let the request in: which limit, and how large the request is.
    pub fn over_limit(which: &str, amount: f64, message: &str) -> Self {
        let message =
            format!("a request of about {amount} tokens never fits into {which} ({message})");
        Self::new("over the limit", &message)
    }

    pub fn new(class: impl Into<String>, message: &str) -> Self {
        Self {
            class: class.into(),
            message: shorten(message),
            unreachable: false,
            may_be_billed: false,
        }
    }
}

/// Sorts one attempt. An answer has been paid for and is to be recorded, whatever its finish reason.
/// `now` is only compared with an HTTP date in `Retry-After`.
pub fn classify(result: Result<Reply, Fault>, now: SystemTime) -> Result<Box<Completion>, Trouble> {
    classify_by(result, now, wire::parse)
}

/// As [`classify`], of replies whose bodies `read` reads.
pub fn classify_by(
    result: Result<Reply, Fault>,
    now: SystemTime,
    read: impl FnOnce(&[u8]) -> Result<Completion, NoAnswer>,
) -> Result<Box<Completion>, Trouble> {
    let reply = check(result, now)?;
    read(&reply.body)
        .map(Box::new)
        .map_err(|no_answer| match no_answer {
            NoAnswer::Malformed(problem) => lost("malformed", &problem),
            // The code is the status that the endpoint would have sent, had it not begun to answer.
            NoAnswer::Error(error) => {
                let mut trouble =
                    classify_error(error.status.unwrap_or(500), &reply.headers, &error, now);
                if let Trouble::Transient { failure, .. } | Trouble::Refused(failure) = &mut trouble
                {
                    // Generation had begun.
                    failure.may_be_billed = true;
                }
                trouble
            }
        })
}

/// Lets replies with a good status pass, whatever they hold.
pub fn check(result: Result<Reply, Fault>, now: SystemTime) -> Result<Reply, Trouble> {
    let reply = result.map_err(classify_fault)?;
    if (200..300).contains(&reply.status) {
        return Ok(reply);
    }
    let error = ApiError::parse(&reply.body);
    Err(classify_error(reply.status, &reply.headers, &error, now))
}

/// An attempt that brought no reply.
pub fn classify_fault(fault: Fault) -> Trouble {
    match fault {
        Fault::Unreachable(message) => Trouble::Transient {
            failure: Failure {
                unreachable: true,
                ..Failure::new("unreachable", &message)
            },
            wait: Duration::ZERO,
        },
        Fault::Timeout => lost("timeout", "no complete answer in time"),
        Fault::Broken(message) => lost("connection lost", &message),
        Fault::TooLarge(message) => Trouble::Refused(Failure {
            may_be_billed: true,
            ..Failure::new("too large", &message)
        }),
    }
}

fn classify_error(status: u16, headers: &HeaderMap, error: &ApiError, now: SystemTime) -> Trouble {
    let message = match error.message.as_str() {
        "" => format!("{status}, without a message"),
        message => shorten(&format!("{status}: {message}")),
    };
    let wait = retry_after(headers, &error.message, now);
    if let Some(reason) = stops_all(error) {
        return Trouble::Stop(reason, message);
    }
    if status == 404 && names_no_model(error) {
        return Trouble::Stop(Reason::Model, message);
    }
    match status {
        401 => Trouble::Stop(Reason::Key, message),
        402 => Trouble::Stop(Reason::Credit, message),
        403 => Trouble::Stop(Reason::Forbidden, message),
        300..=399 => {
            let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.unwrap_or("an address that it does not name");
            Trouble::Stop(
                Reason::Redirect,
                shorten(&format!("{status} to {location}")),
            )
        }
        429 => Trouble::Throttled { wait, message },
        503 | 529 if wait.is_some() => Trouble::Throttled { wait, message },
        408 | 409 | 425 | 500.. => Trouble::Transient {
            failure: Failure {
                // A gateway gave up waiting; what is behind it may have gone on.
                may_be_billed: matches!(status, 408 | 504 | 524),
                ..Failure::new(format!("http {status}"), &message)
            },
            wait: wait.unwrap_or_default(),
        },
        _ => Trouble::Refused(Failure::new(format!("http {status}"), &message)),
    }
}

/// An answer may have been on its way.
pub fn lost(class: &str, message: &str) -> Trouble {
    Trouble::Transient {
        failure: Failure {
            may_be_billed: true,
            ..Failure::new(class, message)
        },
        wait: Duration::ZERO,
    }
}

/// Why an error is one for every request, by its code.
pub fn stops_all(error: &ApiError) -> Option<Reason> {
    if is_out_of_credit(error) {
        return Some(Reason::Credit);
    }
    (error.code == "model_not_found").then_some(Reason::Model)
}

/// Waiting does not bring money back.
fn is_out_of_credit(error: &ApiError) -> bool {
    [
        "insufficient_quota",
        "billing_hard_limit_reached",
        "insufficient_credits",
    ]
    .iter()
    .any(|code| error.code == *code || error.kind == *code)
        || error.message.contains("credit balance is too low")
        || error.message.contains("exceeded your current quota")
}

/// A 404 for the model, as endpoints without a code for it word it.
fn names_no_model(error: &ApiError) -> bool {
    let message = error.message.to_lowercase();
    message.contains("model") && (message.contains("not found") || message.contains("not exist"))
}

/// For how long the endpoint asks us to wait: `retry-after-ms`, `Retry-After` in seconds or as an
/// HTTP date, or "try again in 1.2s" in its message. None if it does not say, or makes no sense.
fn retry_after(headers: &HeaderMap, message: &str, now: SystemTime) -> Option<Duration> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let seconds = |text: &str| text.trim().parse::<f64>().ok();
    let wait = header("retry-after-ms")
        .and_then(seconds)
        .map(|milliseconds| milliseconds / 1000.0)
        .or_else(|| {
            let value = header(RETRY_AFTER.as_str())?;
            seconds(value).or_else(|| {
                let date = httpdate::parse_http_date(value.trim()).ok()?;
                // A date that has passed means now.
                Some(date.duration_since(now).unwrap_or_default().as_secs_f64())
            })
        })
        .or_else(|| wait_in_words(message))?;
    if wait.is_nan() || wait < 0.0 {
        return None;
    }
    let wait = Duration::try_from_secs_f64(wait).unwrap_or(LONGEST_WAIT);
    Some(wait.min(LONGEST_WAIT))
}

/// The seconds of "Please try again in 120ms" or "... in 1.5s".
fn wait_in_words(message: &str) -> Option<f64> {
    let (_, rest) = message.split_once("try again in ")?;
    let digits = rest
        .find(|char: char| !char.is_ascii_digit() && char != '.')
        .unwrap_or(rest.len());
    let number: f64 = rest[..digits].parse().ok()?;
    match rest[digits..].trim_start() {
        unit if unit.starts_with("ms") => Some(number / 1000.0),
        unit if unit.starts_with('s') => Some(number),
        _ => None,
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
fn shorten(message: &str) -> String {
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
        Ok(Reply {
            status,
            headers,
            body: body.to_string().into(),
        })
    }

    /// The outcome in a word, and the wait in milliseconds where there is one.
    fn sort(result: Result<Reply, Fault>) -> String {
        let trouble = match classify(result, SystemTime::UNIX_EPOCH + NOW) {
            Ok(_) => return "answer".into(),
            Err(trouble) => trouble,
        };
        match trouble {
            Trouble::Stop(reason, _) => format!("stop: {reason:?}"),
            Trouble::Refused(failure) => format!("refused: {}", failure.class),
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
            (302, "", "stop: Redirect"),
            (400, "", "refused: http 400"),
            (
                400,
                r#"{"error":{"message":"Your credit balance is too low"}}"#,
                "stop: Credit",
            ),
            (401, "", "stop: Key"),
            (402, "", "stop: Credit"),
            (403, "", "stop: Forbidden"),
            (404, "", "refused: http 404"),
            (
                404,
                r#"{"error":{"message":"x","code":"model_not_found"}}"#,
                "stop: Model",
            ),
            (
                404,
                r#"{"error":{"message":"The model `x` does not exist."}}"#,
                "stop: Model",
            ),
            (408, "", "transient: http 408 0"),
            (409, "", "transient: http 409 0"),
            (413, "", "refused: http 413"),
            (422, "", "refused: http 422"),
            (425, "", "transient: http 425 0"),
            (429, "<html>", "throttled: None"),
            (429, quota, "stop: Credit"),
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
        assert_eq!(sort(Err(Fault::TooLarge("x".into()))), "refused: too large");
    }

    #[test]
    fn every_form_of_retry_after_is_read() {
        let soon = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + NOW + Duration::from_secs(90));
        let past = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + NOW - Duration::from_secs(90));
        let cases: [(&[(&'static str, &str)], &str); 11] = [
            (&[("retry-after", "7")], "Some(7000)"),
            (&[("retry-after", "0.25")], "Some(250)"),
            (&[("retry-after", &soon)], "Some(90000)"),
            (&[("retry-after", &past)], "Some(0)"),
            (&[("retry-after", "86400")], "Some(3600000)"),
            (&[("retry-after", "1e300")], "Some(3600000)"),
            (&[("retry-after", "-1")], "None"),
            (&[("retry-after", "NaN")], "None"),
            (&[("retry-after", "soon")], "None"),
            (
                &[("retry-after-ms", "120"), ("retry-after", "1")],
                "Some(120)",
            ),
            (&[], "None"),
        ];
        for (headers, expected) in cases {
            assert_eq!(
                sort(reply(429, headers, "")),
                format!("throttled: {expected}"),
                "{headers:?}"
            );
        }
        let words = [
            ("Please try again in 120ms.", "Some(120)"),
            ("Please try again in 1.5s.", "Some(1500)"),
            ("try again in a while", "None"),
        ];
        for (message, expected) in words {
            assert_eq!(
                sort(reply(429, &[], message)),
                format!("throttled: {expected}")
            );
        }
        assert_eq!(
            sort(reply(503, &[("retry-after", "2")], "")),
            "throttled: Some(2000)"
        );
        assert_eq!(
            sort(reply(500, &[("retry-after", "2")], "")),
            "transient: http 500 2000"
        );
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
