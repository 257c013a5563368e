//! Reads the wait that an error reply requests, from headers, body fields or the message. Pure.

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderMap;

use crate::client::response::error::ApiError;
use crate::rate_limit::wait::{MIN_UNIX_S, amount, duration, leading, until, wait_from_s};

/// Phrases before a wait in an error message, in lower case.
const WAIT_PHRASES: [&str; 15] = [
    "try again in",
    "try again after",
    "retry in",
    "retry your request in",
    "retry after",
    "retryafter:",
    "retry-after:",
    "available again in",
    "available in",
    "resets in",
    "reset in",
    "reset after",
    "please wait for",
    "please wait",
    "wait",
];

/// Words that may stand between a phrase of [`WAIT_PHRASES`] and the wait.
const FILLERS: [&str; 6] = [
    "about ",
    "approximately ",
    "at least ",
    "another ",
    "for ",
    "a further ",
];

/// Headers that contain a wait in seconds, as a duration or as a date.
const SECONDS_HEADERS: [&str; 3] = ["retry-after", "x-retry-after", "x-ratelimit-reset-after"];

/// Headers that contain a wait in milliseconds.
const MILLISECONDS_HEADERS: [&str; 2] = ["retry-after-ms", "x-ms-retry-after-ms"];

/// Headers with the reset time of a limit. They count as a requested wait only if no header reports the remaining
/// amount of a limit.
const RESET_HEADERS: [&str; 4] = [
    "x-ratelimit-reset",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "ratelimit-reset",
];

/// Phrases before a point in time in an error message, in lower case.
const DATE_PHRASES: [&str; 5] = [
    "try again at",
    "resets at",
    "reset at",
    "available again at",
    "until",
];

/// Returns the wait that an error reply requests. The sources in order of preference: the first of
/// [`MILLISECONDS_HEADERS`] that is present, [`SECONDS_HEADERS`], a field of the body, the message, and the longest of
/// [`RESET_HEADERS`]. A wait of 0 in the first two counts only if neither the body nor the message contains a wait.
/// None if the reply requests no wait.
pub(crate) fn requested_wait(
    headers: &HeaderMap,
    error: &ApiError,
    now: SystemTime,
) -> Option<Duration> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let milliseconds = MILLISECONDS_HEADERS
        .into_iter()
        .find_map(header)
        .and_then(amount);
    let milliseconds = milliseconds.and_then(|milliseconds| wait_from_s(milliseconds / 1e3));
    let is_positive = |wait: &Duration| !wait.is_zero();
    let in_seconds = SECONDS_HEADERS.into_iter().filter_map(header);
    let by_header = milliseconds.or_else(|| in_seconds.filter_map(|text| until(text, now)).next());
    by_header
        .filter(is_positive)
        .or(error.retry_delay)
        .or_else(|| until(&error.reset, now).filter(is_positive))
        .or_else(|| wait_in_message(&error.message, now))
        .or(by_header)
        .or_else(|| {
            let mut names = headers.keys().map(|name| name.as_str());
            let has_remaining = names.any(|name| name.contains("remaining"));
            let resets = RESET_HEADERS.into_iter().filter_map(header);
            let longest = resets.filter_map(|text| until(text, now)).max();
            longest.filter(|wait| !has_remaining && is_positive(wait))
        })
}

/// Finds the wait in a message: "Please try again in 7m12s", "retry after 5 seconds", "resets at
/// 2026-11-29T00:00:00Z".
fn wait_in_message(message: &str, now: SystemTime) -> Option<Duration> {
    let lower = message.to_ascii_lowercase();
    let ends_of = |phrase: &'static str| {
        let matches = lower.match_indices(phrase);
        matches.map(move |(start, _)| start + phrase.len())
    };
    let by_duration = WAIT_PHRASES.into_iter().flat_map(ends_of).find_map(|end| {
        let after = lower[end..].trim_start_matches([' ', ':', '~']);
        let after = without_fillers(after);
        if let Some(wait) = leading_clock_time(after) {
            return Some(wait);
        }
        leading(after).map(|(wait, _)| wait).or_else(|| {
            // A number without a unit is seconds if it ends the sentence.
            let word = after.split_whitespace().next()?;
            let is_last = after.len() == word.len() || word.ends_with(['.', ',']);
            wait_from_s(amount(word.trim_end_matches(['.', ',']))?).filter(|_| is_last)
        })
    });
    by_duration.or_else(|| {
        DATE_PHRASES.into_iter().flat_map(ends_of).find_map(|end| {
            let after = message[end..].trim_start_matches([' ', ':']);
            let word = after.split_whitespace().next()?;
            let word = word.trim_end_matches(['.', ',', ')']);
            // A small number is a count, not a Unix time.
            let is_time = amount(word).is_none_or(|number| number >= MIN_UNIX_S);
            until(word, now).filter(|_| is_time && duration(word).is_none())
        })
    })
}

fn without_fillers(text: &str) -> &str {
    let filler = FILLERS
        .into_iter()
        .find_map(|filler| text.strip_prefix(filler));
    filler.map_or(text, without_fillers)
}

/// Parses a leading `hh:mm:ss`, such as `00:00:02`.
fn leading_clock_time(text: &str) -> Option<Duration> {
    let word = text.split_whitespace().next()?.trim_end_matches(['.', ',']);
    let parts: Vec<f64> = word
        .split(':')
        .map(|part| amount(part).filter(|_| part.len() >= 2))
        .collect::<Option<_>>()?;
    match parts[..] {
        [hours, minutes, secs] => wait_from_s(hours * 3_600.0 + minutes * 60.0 + secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + NOW
    }

    #[track_caller]
    fn assert_wait(found: Option<Duration>, expected: Option<f64>, text: &str) {
        let found = found.map(|wait| wait.as_secs_f64());
        match (found, expected) {
            (Some(found), Some(expected)) => {
                assert!((found - expected).abs() < 1e-6, "{text}: {found}");
            }
            _ => assert_eq!(found, expected, "{text}"),
        }
    }

    #[test]
    fn durations_and_dates_are_parsed_in_every_notation() {
        let soon = httpdate::fmt_http_date(now() + Duration::from_secs(90));
        let past = httpdate::fmt_http_date(now() - Duration::from_secs(90));
        let cases = [
            ("17ms", Some(0.017)),
            ("6m0s", Some(360.0)),
            ("2m59.56s", Some(179.56)),
            ("1h0m1s", Some(3601.0)),
            ("3s", Some(3.0)),
            ("3 s", Some(3.0)),
            ("2 minutes", Some(120.0)),
            ("PT1M30S", Some(90.0)),
            ("0.5", Some(0.5)),
            ("12", Some(12.0)),
            ("3, 3", Some(3.0)),
            ("3, 5s", Some(5.0)),
            ("1800000030", Some(30.0)),
            ("1800000030000", Some(30.0)),
            ("1700000000", Some(0.0)),
            ("\"12\"", Some(12.0)),
            ("2027-01-15T08:00:12", Some(12.0)),
            ("Fri, 15 Jan 2027 08:00:12 UTC", Some(12.0)),
            ("Fri, 15 Jan 2027 08:00:12 +0000", Some(12.0)),
            ("2027-01-15T08:00:12Z", Some(12.0)),
            ("2020-01-01T00:00:00Z", Some(0.0)),
            (&soon, Some(90.0)),
            (&past, Some(0.0)),
            ("1e300", Some(0.0)),
            ("-1", None),
            ("NaN", None),
            ("5 parsecs", None),
            ("", None),
            ("s", None),
            ("soon", None),
        ];
        for (text, expected) in cases {
            if text == "1e300" {
                // A Unix time in the far future.
                assert!(until(text, now()).unwrap() > Duration::from_secs(86_400));
                continue;
            }
            assert_wait(until(text, now()), expected, text);
        }
    }

    #[test]
    fn waits_are_found_in_messages() {
        let cases = [
            ("Please try again in 120ms.", Some(0.12)),
            ("Rate limit reached. Please try again in 4.5s.", Some(4.5)),
            ("... Used 100. Please try again in 0m4.5s.", Some(4.5)),
            ("Please try again in 7m12s", Some(432.0)),
            ("try again in 1h2m", Some(3720.0)),
            ("limit: 15\nPlease retry in 3s.", Some(3.0)),
            ("Please retry in 34.074824224s.", Some(34.074824224)),
            ("Please retry after 5 seconds", Some(5.0)),
            ("Please wait 30 seconds before the next request", Some(30.0)),
            ("please wait for 2 minutes and 5 seconds.", Some(125.0)),
            ("Too many requests, retry after 30", Some(30.0)),
            ("Retry after 30.", Some(30.0)),
            ("quota resets at 2027-01-15T08:00:30Z.", Some(30.0)),
            ("Rate limit resets in about 2 hours", Some(7200.0)),
            ("Please retry your request in 2 seconds.", Some(2.0)),
            ("Please wait at least another 2 seconds", Some(2.0)),
            ("Try again in approximately 2 seconds", Some(2.0)),
            ("The model is available in 2 seconds", Some(2.0)),
            ("Try again in 00:01:02.", Some(62.0)),
            ("throttled, RetryAfter: 2 seconds", Some(2.0)),
            ("blocked until 1800000002", Some(2.0)),
            ("wait until 5 requests are done", None),
            ("try again in a moment", None),
            ("please wait while the model loads", None),
            ("retry after 3 attempts failed", None),
            ("await 3 things", None),
        ];
        for (message, expected) in cases {
            assert_wait(wait_in_message(message, now()), expected, message);
        }
    }

    #[test]
    fn wait_from_headers_precedes_body_field_and_message() {
        let wait = |headers: &[(&'static str, &str)], body: &str| {
            let headers = headers
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect();
            requested_wait(&headers, &ApiError::parse(body.as_bytes()), now())
        };
        let words = r#"{"error":{"message":"try again in 4s"}}"#;
        let field = r#"{"error":{"message":"try again in 4s","details":[{"retryDelay":"2s"}]}}"#;
        let reset = r#"{"error":{"message":"m","metadata":{"headers":{"X-RateLimit-Reset":"1800000050000"}}}}"#;
        type Headers<'a> = &'a [(&'static str, &'a str)];
        let cases: [(Headers, &str, Option<f64>); 13] = [
            (
                &[("retry-after-ms", "120"), ("retry-after", "1")],
                words,
                Some(0.12),
            ),
            (&[("retry-after", "7")], field, Some(7.0)),
            (&[("retry-after", "0.25")], "", Some(0.25)),
            (&[("retry-after", "0")], words, Some(4.0)),
            (&[("retry-after", "0")], "", Some(0.0)),
            (&[("retry-after", "soon")], words, Some(4.0)),
            (&[], field, Some(2.0)),
            (&[], reset, Some(50.0)),
            (&[], "", None),
            (&[("x-ms-retry-after-ms", "2000")], words, Some(2.0)),
            (&[("x-ratelimit-reset-after", "2")], "", Some(2.0)),
            (&[("x-ratelimit-reset", "1800000003")], "", Some(3.0)),
            // With a remaining amount, the reset belongs to a limit that the rate limiter tracks.
            (
                &[("x-ratelimit-reset", "3"), ("x-ratelimit-remaining", "5")],
                "",
                None,
            ),
        ];
        for (headers, body, expected) in cases {
            assert_wait(
                wait(headers, body),
                expected,
                &format!("{headers:?} {body}"),
            );
        }
    }
}
