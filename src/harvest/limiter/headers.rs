//! What a server says about its limits, in any dialect. Pure.
//!
//! One grammar reads them all: a family of names (`x-ratelimit-`, `anthropic-ratelimit-`,
//! `x-tokenlimit-`), and in the rest of the name, in any order, a figure (`limit`, `remaining`,
//! `reset`), what is counted (`requests`, `tokens`, `input-tokens`, `tokens-generated`, ...) and at
//! times a period (`minute`, `day`).

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderMap;

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Requests,
    /// Prompt and completion together.
    Tokens,
    InputTokens,
    OutputTokens,
}

impl Resource {
    pub const ALL: [Resource; 4] = [
        Resource::Requests,
        Resource::Tokens,
        Resource::InputTokens,
        Resource::OutputTokens,
    ];

    /// As messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Resource::Requests => "requests",
            Resource::Tokens => "tokens",
            Resource::InputTokens => "input tokens",
            Resource::OutputTokens => "output tokens",
        }
    }
}

/// What one reply says about one limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    pub resource: Resource,
    pub limit: Option<f64>,
    pub remaining: Option<f64>,
    /// Until the limit is whole again.
    pub reset: Option<Duration>,
    /// The period of the limit, where the dialect or the name fixes it.
    period: Option<Duration>,
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

/// How a limit comes back, as far as one reply tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Refill {
    /// At a constant rate, all of it in this time: `reset` is when the bucket is full.
    Constant(Duration),
    /// All at once, when the window ends after `reset`.
    AtReset,
    /// Too little is said, or nothing is used yet.
    Unknown,
}

impl Report {
    /// Tells a bucket from a fixed window, and a minute from a day, by the reset time.
    ///
    /// The same names mean a minute at one endpoint and a day at another (Groq's requests). But a
    /// bucket that refills at a constant rate needs `period * used / limit` to be full again, so
    /// the reset time gives the period away once something is used; where no usual period fits, it
    /// is the end of a window. An empty bucket that is full in a second is more likely to hold a
    /// second's worth of a limit a minute than to be 60 times as generous.
    pub fn refill(&self) -> Refill {
        if let Some(period) = self.period {
            return Refill::Constant(period);
        }
        let (Some(limit), Some(remaining), Some(reset)) = (self.limit, self.remaining, self.reset)
        else {
            return Refill::Unknown;
        };
        let (used, reset) = (limit - remaining, reset.as_secs_f64());
        if used <= 0.0 || reset <= 0.0 {
            return Refill::Unknown;
        }
        let period = reset * limit / used;
        let fits = |candidate: &Duration| {
            let ratio = period / candidate.as_secs_f64();
            (1.0 / 1.2..1.2).contains(&ratio)
        };
        match [SECOND, MINUTE, HOUR, DAY].into_iter().find(fits) {
            Some(SECOND) if remaining < limit / 10.0 => Refill::Unknown,
            Some(period) => Refill::Constant(period),
            None => Refill::AtReset,
        }
    }
}

/// Every limit that these headers speak of, at most one report for each resource and period.
pub fn parse(headers: &HeaderMap, now: SystemTime) -> Vec<Report> {
    let mut reports: Vec<Report> = Vec::new();
    for (name, value) in headers {
        let Some(field) = Field::parse(name.as_str()) else {
            continue;
        };
        let Ok(value) = value.to_str() else { continue };
        let found = reports
            .iter()
            .position(|report| report.resource == field.resource && report.period == field.period);
        let index = found.unwrap_or_else(|| {
            reports.push(Report {
                resource: field.resource,
                limit: None,
                remaining: None,
                reset: None,
                period: field.period,
            });
            reports.len() - 1
        });
        let report = &mut reports[index];
        match field.figure {
            Figure::Limit => report.limit = amount(value),
            Figure::Remaining => report.remaining = amount(value),
            Figure::Reset => report.reset = parse_reset(value, now),
        }
    }
    reports.retain(|report| report.limit.is_some() || report.remaining.is_some());
    reports
}

#[derive(Debug, Clone, Copy)]
enum Figure {
    Limit,
    Remaining,
    Reset,
}

struct Field {
    figure: Figure,
    resource: Resource,
    period: Option<Duration>,
}

impl Field {
    fn parse(name: &str) -> Option<Field> {
        let (rest, of_tokens) = if let Some(rest) = name.strip_prefix("x-tokenlimit-") {
            (rest, true)
        } else {
            let rest = name
                .strip_prefix("x-ratelimit-")
                .or_else(|| name.strip_prefix("anthropic-ratelimit-"))?;
            (rest, false)
        };
        let mut figure = None;
        let mut period = None;
        let (mut requests, mut tokens, mut input, mut output) = (false, of_tokens, false, false);
        for word in rest.split('-') {
            match word {
                "limit" => figure = Some(Figure::Limit),
                "remaining" => figure = Some(Figure::Remaining),
                "reset" => figure = Some(Figure::Reset),
                "requests" => requests = true,
                "tokens" => tokens = true,
                "input" | "prompt" => input = true,
                "output" | "generated" => output = true,
                "second" => period = Some(SECOND),
                "minute" => period = Some(MINUTE),
                "hour" => period = Some(HOUR),
                "day" => period = Some(DAY),
                // Limits of something that we do not use, images or audio, say.
                _ => return None,
            }
        }
        let resource = match (requests, tokens, input, output) {
            (_, _, true, _) => Resource::InputTokens,
            (_, _, _, true) => Resource::OutputTokens,
            (_, true, ..) => Resource::Tokens,
            _ => Resource::Requests,
        };
        if !requests && (!tokens || of_tokens) {
            // Together's bare names count by the second.
            period = period.or(Some(SECOND));
        }
        Some(Field {
            figure: figure?,
            resource,
            period,
        })
    }
}

fn amount(value: &str) -> Option<f64> {
    let amount: f64 = value.trim().parse().ok()?;
    (amount.is_finite() && amount >= 0.0).then_some(amount)
}

/// A duration as Go writes it (`17ms`, `6m0s`, `2m59.56s`), seconds, a date (RFC 3339), or a Unix
/// time in seconds or milliseconds.
fn parse_reset(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Some(number) = amount(value) {
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let seconds = match number {
            number if number >= 1e11 => number / 1e3 - since_epoch.as_secs_f64(),
            number if number >= 1e8 => number - since_epoch.as_secs_f64(),
            number => number,
        };
        return Duration::try_from_secs_f64(seconds.max(0.0)).ok();
    }
    if let Ok(date) = value.parse::<jiff::Timestamp>() {
        return Some(
            SystemTime::from(date)
                .duration_since(now)
                .unwrap_or_default(),
        );
    }
    parse_go_duration(value)
}

/// `1h2m3.5s`, `17ms`, `120us`: numbers and units, one after the other.
fn parse_go_duration(value: &str) -> Option<Duration> {
    let mut rest = value.trim();
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|char: char| !char.is_ascii_digit() && char != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest
            .find(|char: char| char.is_ascii_digit() || char == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "d" => 86_400.0,
            "h" => 3_600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number * unit;
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn reports(headers: &[(&'static str, &str)]) -> Vec<Report> {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        let mut reports = parse(&headers, SystemTime::UNIX_EPOCH + NOW);
        reports.sort_by_key(|report| report.resource);
        reports
    }

    /// `resource remaining/limit per period`, with `?` for what is unknown.
    fn summary(headers: &[(&'static str, &str)]) -> String {
        let show = |value: Option<f64>| value.map_or("?".into(), |value| value.to_string());
        reports(headers)
            .iter()
            .map(|report| {
                let refill = match report.refill() {
                    Refill::Constant(period) => format!("per {}", period.as_secs()),
                    Refill::AtReset => "at reset".into(),
                    Refill::Unknown => "?".into(),
                };
                format!(
                    "{} {}/{} {refill}",
                    report.resource.name(),
                    show(report.remaining),
                    show(report.limit),
                )
            })
            .collect::<Vec<_>>()
            .join(", ")
    }

    #[test]
    fn every_dialect_is_read() {
        let cases: [(&[(&str, &str)], &str); 9] = [
            // OpenAI: the reset time is that of a bucket filled in a minute.
            (
                &[
                    ("x-ratelimit-limit-requests", "3500"),
                    ("x-ratelimit-remaining-requests", "3499"),
                    ("x-ratelimit-reset-requests", "17ms"),
                    ("x-ratelimit-limit-tokens", "90000"),
                    ("x-ratelimit-remaining-tokens", "45000"),
                    ("x-ratelimit-reset-tokens", "30s"),
                ],
                "requests 3499/3500 per 60, tokens 45000/90000 per 60",
            ),
            // Groq: the same names, but requests are per day.
            (
                &[
                    ("x-ratelimit-limit-requests", "14400"),
                    ("x-ratelimit-remaining-requests", "14370"),
                    ("x-ratelimit-reset-requests", "2m59.56s"),
                    ("x-ratelimit-limit-tokens", "18000"),
                    ("x-ratelimit-remaining-tokens", "17997"),
                    ("x-ratelimit-reset-tokens", "9.99ms"),
                ],
                "requests 14370/14400 per 86400, tokens 17997/18000 per 60",
            ),
            // Azure: no limits, no reset.
            (
                &[
                    ("x-ratelimit-remaining-requests", "9"),
                    ("x-ratelimit-remaining-tokens", "900"),
                ],
                "requests 9/? ?, tokens 900/? ?",
            ),
            (
                &[
                    ("anthropic-ratelimit-requests-limit", "50"),
                    ("anthropic-ratelimit-requests-remaining", "25"),
                    ("anthropic-ratelimit-requests-reset", "2027-01-15T08:00:30Z"),
                    ("anthropic-ratelimit-input-tokens-limit", "1000"),
                    ("anthropic-ratelimit-input-tokens-remaining", "1000"),
                    ("anthropic-ratelimit-output-tokens-remaining", "8000"),
                ],
                "requests 25/50 per 60, input tokens 1000/1000 ?, output tokens 8000/? ?",
            ),
            // Together: by the second.
            (
                &[
                    ("x-ratelimit-limit", "10"),
                    ("x-ratelimit-remaining", "9"),
                    ("x-ratelimit-reset", "1"),
                    ("x-tokenlimit-limit", "3000"),
                    ("x-tokenlimit-remaining", "2000"),
                ],
                "requests 9/10 per 1, tokens 2000/3000 per 1",
            ),
            // Fireworks: prompt and generated tokens apart.
            (
                &[
                    ("x-ratelimit-limit-requests", "600"),
                    ("x-ratelimit-limit-tokens-prompt", "60000"),
                    ("x-ratelimit-remaining-tokens-generated", "5"),
                    ("x-ratelimit-over-limit", "no"),
                ],
                "requests ?/600 ?, input tokens ?/60000 ?, output tokens 5/? ?",
            ),
            // The period in the name.
            (
                &[
                    ("x-ratelimit-limit-requests-day", "14400"),
                    ("x-ratelimit-limit-tokens-minute", "60000"),
                ],
                "requests ?/14400 per 86400, tokens ?/60000 per 60",
            ),
            // A fixed window ends in 59 s, whatever is used.
            (
                &[
                    ("x-ratelimit-limit-requests", "100"),
                    ("x-ratelimit-remaining-requests", "99"),
                    ("x-ratelimit-reset-requests", "59"),
                ],
                "requests 99/100 at reset",
            ),
            // Nonsense is nothing.
            (
                &[
                    ("x-ratelimit-limit-requests", "many"),
                    ("x-ratelimit-remaining-tokens", "-1"),
                    ("x-ratelimit-reset-tokens", "soon"),
                    ("x-request-id", "1"),
                ],
                "",
            ),
        ];
        for (headers, expected) in cases {
            assert_eq!(summary(headers), expected);
        }
    }

    #[test]
    fn reset_times_are_read_in_every_notation() {
        let now = SystemTime::UNIX_EPOCH + NOW;
        let cases = [
            ("17ms", Some(0.017)),
            ("6m0s", Some(360.0)),
            ("2m59.56s", Some(179.56)),
            ("1h0m1s", Some(3601.0)),
            ("0.5", Some(0.5)),
            ("12", Some(12.0)),
            ("1800000030", Some(30.0)),
            ("1800000030000", Some(30.0)),
            ("1700000000", Some(0.0)),
            ("2027-01-15T08:00:12Z", Some(12.0)),
            ("2020-01-01T00:00:00Z", Some(0.0)),
            ("5 parsecs", None),
            ("", None),
            ("s", None),
            ("1e400", None),
        ];
        for (text, expected) in cases {
            let found = parse_reset(text, now).map(|reset| reset.as_secs_f64());
            match (found, expected) {
                (Some(found), Some(expected)) => {
                    assert!((found - expected).abs() < 1e-6, "{text}: {found}");
                }
                _ => assert_eq!(found, expected, "{text}"),
            }
        }
    }
}
