//! Parses waiting times in headers and error messages. Pure.

use std::time::Duration;
use std::time::SystemTime;

/// Smallest number that is parsed as a Unix time in milliseconds.
const MIN_UNIX_MS: f64 = 1e11;

/// Smallest number that is parsed as a Unix time in seconds. It is more than three years as a waiting time.
pub(crate) const MIN_UNIX_S: f64 = 1e8;

/// Parses the waiting time in a header value.
///
/// The value is a number of seconds, a Unix time in seconds or milliseconds, a date in the format of HTTP or RFC 3339,
/// or a duration such as `2m59.56s`. A proxy may join two headers to a list. The result is then the longest time in the
/// list. It is zero for a time in the past.
pub(crate) fn until(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim().trim_matches('"').trim();
    if let Some(number) = amount(text) {
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        return wait_from_s(match number {
            number if number >= MIN_UNIX_MS => number / 1e3 - since_epoch.as_secs_f64(),
            number if number >= MIN_UNIX_S => number - since_epoch.as_secs_f64(),
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

/// Parses a date in the format of RFC 3339 (in UTC if it has no zone) or of HTTP (also with `UTC`, `Z` or `+0000`
/// instead of `GMT`).
pub(crate) fn date(text: &str) -> Option<SystemTime> {
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
    let zones = ["UTC", "+0000", "Z"].into_iter();
    let date = zones.filter_map(|zone| text.strip_suffix(zone)).next()?;
    httpdate::parse_http_date(&format!("{} GMT", date.trim_end())).ok()
}

/// Parses a duration such as `1h2m3.5s`, `17ms`, `2 minutes` or `PT1M30S`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_prefix("pt").unwrap_or(&lower);
    let (total, remaining) = leading(lower)?;
    remaining.trim().is_empty().then_some(total)
}

/// Parses the duration at the beginning of a text in lower case. Returns it with the text that follows.
pub(crate) fn leading(text: &str) -> Option<(Duration, &str)> {
    let mut remaining = text;
    let mut total_s = 0.0;
    let mut has_number = false;
    loop {
        let start = remaining.trim_start_matches([' ', ',', ':']);
        let start = match start.strip_prefix("and ") {
            Some(next) if has_number => next.trim_start(),
            _ => start,
        };
        let digits = start
            .find(|char: char| !char.is_ascii_digit() && char != '.')
            .unwrap_or(start.len());
        // A full stop after the number is the end of the sentence.
        let number: f64 = match start[..digits].trim_end_matches('.').parse() {
            Ok(number) => number,
            Err(_) => break,
        };
        let unit_start = start[digits..].trim_start();
        let letters = unit_start
            .find(|char: char| !char.is_alphabetic())
            .unwrap_or(unit_start.len());
        let Some(unit) = unit(&unit_start[..letters]) else {
            break;
        };
        total_s += number * unit;
        has_number = true;
        remaining = &unit_start[letters..];
    }
    let total = wait_from_s(total_s).filter(|_| has_number)?;
    Some((total, remaining))
}

/// Returns the length of a time unit in seconds.
pub(crate) fn unit(name: &str) -> Option<f64> {
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

/// Parses a number that is not negative.
pub(crate) fn amount(text: &str) -> Option<f64> {
    let amount: f64 = text.trim().parse().ok()?;
    (!amount.is_nan() && amount >= 0.0).then_some(amount)
}

/// Converts seconds to a duration from 0 to [`MAX_WAIT_S`]. Returns None for NaN.
pub(crate) fn wait_from_s(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds.clamp(0.0, MAX_WAIT_S)).ok()
}

/// Maximum waiting time in seconds.
pub(crate) const MAX_WAIT_S: f64 = 10.0 * 366.0 * 86_400.0;
