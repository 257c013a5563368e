//! How long an endpoint asks to wait, in every form in which endpoints say it. Pure.

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderMap;

use crate::client::response::error::ApiError;

/// Longer waits than this are as good as for ever.
const LONGEST: f64 = 10.0 * 366.0 * 86_400.0;

/// Words in front of a wait in an error message, in lower case.
const WORDS: [&str; 15] = [
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

/// Words between those and the wait.
const FILLERS: [&str; 6] = [
    "about ",
    "approximately ",
    "at least ",
    "another ",
    "for ",
    "a further ",
];

/// Headers of a refusal that hold a wait in seconds, as a duration or as a date.
const SECONDS: [&str; 3] = ["retry-after", "x-retry-after", "x-ratelimit-reset-after"];
const MILLISECONDS: [&str; 2] = ["retry-after-ms", "x-ms-retry-after-ms"];

/// Headers whose reset time is that of the refusal, where none says what remains.
const RESETS: [&str; 4] = [
    "x-ratelimit-reset",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "ratelimit-reset",
];

/// Words in front of a point in time.
const TIMES: [&str; 5] = [
    "try again at",
    "resets at",
    "reset at",
    "available again at",
    "until",
];

/// The wait that a refusal asks for: `retry-after-ms`, `Retry-After`, a field of its body, or the words of
/// its message. None where it asks for none, or for one that makes no sense.
pub fn asked_for(headers: &HeaderMap, error: &ApiError, now: SystemTime) -> Option<Duration> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let milliseconds = MILLISECONDS.into_iter().find_map(header).and_then(amount);
    let milliseconds = milliseconds.and_then(|milliseconds| seconds(milliseconds / 1e3));
    let is_positive = |wait: &Duration| !wait.is_zero();
    let in_seconds = SECONDS.into_iter().filter_map(header);
    let by_header = milliseconds.or_else(|| in_seconds.filter_map(|text| until(text, now)).next());
    by_header
        .filter(is_positive)
        .or(error.retry_delay)
        .or_else(|| until(&error.reset, now).filter(is_positive))
        .or_else(|| in_words(&error.message, now))
        .or(by_header)
        .or_else(|| {
            let mut names = headers.keys().map(|name| name.as_str());
            let is_told = names.any(|name| name.contains("remaining"));
            let resets = RESETS.into_iter().filter_map(header);
            let longest = resets.filter_map(|text| until(text, now)).max();
            longest.filter(|wait| !is_told && is_positive(wait))
        })
}

/// The time to a point that is given as seconds from now, a Unix time in seconds or milliseconds, a date
/// of HTTP or RFC 3339, or a duration (`2m59.56s`). Of a list, as a proxy makes it of two headers, the
/// longest. A point that has passed is now.
pub fn until(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim().trim_matches('"').trim();
    if let Some(number) = amount(text) {
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        return seconds(match number {
            number if number >= 1e11 => number / 1e3 - since_epoch.as_secs_f64(),
            number if number >= 1e8 => number - since_epoch.as_secs_f64(),
            number => number,
        });
    }
    if let Some(date) = date(text) {
        return Some(date.duration_since(now).unwrap_or_default());
    }
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 1 {
        return parts.into_iter().filter_map(|part| until(part, now)).max();
    }
    duration(text)
}

/// A date of RFC 3339, in UTC where it names no zone, or of HTTP, also where that has another name for GMT.
fn date(text: &str) -> Option<SystemTime> {
    if let Ok(date) = text.parse::<jiff::Timestamp>() {
        return Some(date.into());
    }
    let begins_with_year = text.len() > 10 && text.as_bytes()[..4].iter().all(u8::is_ascii_digit);
    if begins_with_year && let Ok(date) = text.parse::<jiff::civil::DateTime>() {
        let date = date.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
        return Some(date.timestamp().into());
    }
    if let Ok(date) = httpdate::parse_http_date(text) {
        return Some(date);
    }
    let others = ["UTC", "+0000", "Z"].into_iter();
    let date = others.filter_map(|zone| text.strip_suffix(zone)).next()?;
    httpdate::parse_http_date(&format!("{} GMT", date.trim_end())).ok()
}

/// `1h2m3.5s`, `17ms`, `2 minutes`, `PT1M30S`: numbers and units, one after the other.
pub fn duration(text: &str) -> Option<Duration> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_prefix("pt").unwrap_or(&lower);
    let (total, rest) = leading(lower)?;
    rest.trim().is_empty().then_some(total)
}

/// The duration that a text in lower case begins with, and what follows it.
fn leading(text: &str) -> Option<(Duration, &str)> {
    let (mut rest, mut total, mut is_any) = (text, 0.0, false);
    loop {
        let start = rest.trim_start_matches([' ', ',', ':']);
        let start = match start.strip_prefix("and ") {
            Some(after) if is_any => after.trim_start(),
            _ => start,
        };
        let digits = start
            .find(|char: char| !char.is_ascii_digit() && char != '.')
            .unwrap_or(start.len());
        // The full stop of a sentence is no part of a number.
        let number: f64 = match start[..digits].trim_end_matches('.').parse() {
            Ok(number) => number,
            Err(_) => break,
        };
        let behind = &start[digits..];
        let unit_start = behind.trim_start();
        let letters = unit_start
            .find(|char: char| !char.is_alphabetic())
            .unwrap_or(unit_start.len());
        let Some(unit) = unit(&unit_start[..letters]) else {
            break;
        };
        total += number * unit;
        is_any = true;
        rest = &unit_start[letters..];
    }
    let total = seconds(total).filter(|_| is_any)?;
    Some((total, rest))
}

/// Seconds of a unit.
fn unit(name: &str) -> Option<f64> {
    Some(match name {
        "d" | "day" | "days" => 86_400.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3_600.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "ms" | "msec" | "millisecond" | "milliseconds" => 1e-3,
        "us" | "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    })
}

/// The wait in a message: "Please try again in 7m12s", "retry after 5 seconds", "resets at 2026-11-29T00:00:00Z".
fn in_words(message: &str, now: SystemTime) -> Option<Duration> {
    let lower = message.to_ascii_lowercase();
    let behind = |words: &'static str| {
        let places = lower.match_indices(words);
        places.map(move |(at, _)| at + words.len())
    };
    let by_duration = WORDS.into_iter().flat_map(behind).find_map(|at| {
        let rest = lower[at..].trim_start_matches([' ', ':', '~']);
        let rest = without_fillers(rest);
        if let Some(wait) = clock(rest) {
            return Some(wait);
        }
        leading(rest).map(|(wait, _)| wait).or_else(|| {
            // Without a unit, where it can only be seconds.
            let word = rest.split_whitespace().next()?;
            let is_last = rest.len() == word.len() || word.ends_with(['.', ',']);
            seconds(amount(word.trim_end_matches(['.', ',']))?).filter(|_| is_last)
        })
    });
    by_duration.or_else(|| {
        TIMES.into_iter().flat_map(behind).find_map(|at| {
            let rest = message[at..].trim_start_matches([' ', ':']);
            let word = rest.split_whitespace().next()?;
            let word = word.trim_end_matches(['.', ',', ')']);
            // A number of seconds is no point in time.
            let is_point = amount(word).is_none_or(|number| number >= 1e8);
            until(word, now).filter(|_| is_point && duration(word).is_none())
        })
    })
}

fn without_fillers(text: &str) -> &str {
    let filler = FILLERS
        .into_iter()
        .find_map(|filler| text.strip_prefix(filler));
    filler.map_or(text, without_fillers)
}

/// `00:00:02`, with which a text may begin.
fn clock(text: &str) -> Option<Duration> {
    let word = text.split_whitespace().next()?.trim_end_matches(['.', ',']);
    let parts: Vec<f64> = word
        .split(':')
        .map(|part| amount(part).filter(|_| part.len() >= 2))
        .collect::<Option<_>>()?;
    match parts[..] {
        [hours, minutes, rest] => seconds(hours * 3_600.0 + minutes * 60.0 + rest),
        _ => None,
    }
}

fn amount(text: &str) -> Option<f64> {
    let amount: f64 = text.trim().parse().ok()?;
    (!amount.is_nan() && amount >= 0.0).then_some(amount)
}

/// Less than nothing is now.
fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds.clamp(0.0, LONGEST)).ok()
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
    fn points_in_time_are_read_in_every_notation() {
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
                // A Unix time that never comes.
                assert!(until(text, now()).unwrap() > Duration::from_secs(86_400));
                continue;
            }
            assert_wait(until(text, now()), expected, text);
        }
    }

    #[test]
    fn waits_are_found_in_words() {
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
            assert_wait(in_words(message, now()), expected, message);
        }
    }

    #[test]
    fn a_header_counts_before_the_body_and_a_field_before_words() {
        let of = |headers: &[(&'static str, &str)], body: &str| {
            let headers = headers
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect();
            asked_for(&headers, &ApiError::parse(body.as_bytes()), now())
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
            // That is a limit's, which is kept to as such.
            (
                &[("x-ratelimit-reset", "3"), ("x-ratelimit-remaining", "5")],
                "",
                None,
            ),
        ];
        for (headers, body, expected) in cases {
            assert_wait(of(headers, body), expected, &format!("{headers:?} {body}"));
        }
    }
}
