//! Parses rate-limit headers in all dialects. Pure.
//!
//! One grammar covers all dialects: a header name begins with the prefix of a family (`x-ratelimit-`,
//! `anthropic-ratelimit-`, `x-tokenlimit-`, the IETF's `ratelimit-`). Then it names, in any order, a value (`limit`,
//! `remaining`, `reset`), and optionally a resource (`requests`, `tokens`, `input-tokens`, `tokens-generated`, ...) and
//! a period (`minute`, `day`).

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderMap;

/// Resource that a limit counts.
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

    /// Returns the name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Resource::Requests => "requests",
            Resource::Tokens => "tokens",
            Resource::InputTokens => "input tokens",
            Resource::OutputTokens => "output tokens",
        }
    }
}

/// Values of one limit in the headers of one reply.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LimitReport {
    pub resource: Resource,
    pub limit: Option<f64>,
    pub remaining: Option<f64>,
    /// Time until the full limit is available again.
    pub reset: Option<Duration>,
    /// Length of the window in which the limit counts, if the server reports it.
    pub window: Option<Duration>,
    /// Period of the limit, if the dialect or the header name fixes it.
    period: Option<Duration>,
    /// True if the header names have neither a resource nor a period.
    is_bare: bool,
    /// True if the reset time is the end of a window, as in the IETF's dialect.
    is_window: bool,
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

/// How a limit refills, as far as one reply shows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Refill {
    /// At a constant rate, which refills the full limit in this time. [`LimitReport::reset`] is the time until the
    /// bucket is full.
    Constant(Duration),
    /// To the full limit at the end of a window. [`LimitReport::reset`] is the time until that end.
    AtReset,
    /// The reply does not show it, for example because nothing has been used yet.
    Unknown,
}

/// Number of separate limits of one resource: one for each period in a header name, and one for names without a period.
pub(crate) const LIMITS_PER_RESOURCE: usize = 5;

impl LimitReport {
    /// Returns the index of this limit among the limits of its resource, below [`LIMITS_PER_RESOURCE`].
    pub(crate) fn index_in_resource(&self) -> usize {
        let named_period = self.period.filter(|_| !self.is_bare);
        let periods = [SECOND, MINUTE, HOUR, DAY];
        let position = periods
            .iter()
            .position(|period| named_period == Some(*period));
        position.map_or(0, |position| position + 1)
    }

    /// Determines how the limit refills, and its period, from the reset time.
    ///
    /// The same header name means a limit per minute at one endpoint and per day at another (requests at Groq). A
    /// bucket with a constant refill rate is full again after `period * used / limit`, so the reset time determines
    /// the period if some amount is used. If no usual period fits, the reset time is the end of a window. A period of
    /// one second with less than a tenth remaining is `Unknown`: it probably is a limit per minute whose bucket holds
    /// only the amount of one second.
    pub(crate) fn refill(&self) -> Refill {
        if let Some(period) = self.period {
            return Refill::Constant(period);
        }
        if self.is_window && self.reset.is_some() {
            return Refill::AtReset;
        }
        let (Some(limit), Some(remaining), Some(reset)) = (self.limit, self.remaining, self.reset)
        else {
            return Refill::Unknown;
        };
        let (used, reset) = (limit - remaining, reset.as_secs_f64());
        if used <= 0.0 || reset <= 0.0 {
            return Refill::Unknown;
        }
        let period_s = reset * limit / used;
        // A tolerance of 20 %, because reset times are rounded.
        let fits = |candidate: &Duration| {
            let ratio = period_s / candidate.as_secs_f64();
            (1.0 / 1.2..1.2).contains(&ratio)
        };
        match [SECOND, MINUTE, HOUR, DAY].into_iter().find(fits) {
            Some(SECOND) if remaining < limit / 10.0 => Refill::Unknown,
            Some(period) => Refill::Constant(period),
            None => Refill::AtReset,
        }
    }
}

/// Reset time above which a limit cannot be per second.
const MIN_RESET_OF_LONGER_PERIOD: Duration = Duration::from_secs(5);

/// Parses all limits in the headers. Returns at most one report per resource and period.
pub(crate) fn parse(headers: &HeaderMap, now: SystemTime) -> Vec<LimitReport> {
    let mut reports: Vec<LimitReport> = Vec::new();
    for (name, value) in headers {
        let Some(field) = Field::parse(name.as_str()) else {
            continue;
        };
        let Ok(value) = value.to_str() else { continue };
        let report = find_or_insert(&mut reports, field.resource, field.period);
        match field.value_kind {
            ValueKind::Limit => report.limit = amount(value),
            ValueKind::Remaining => report.remaining = amount(value),
            ValueKind::Reset => report.reset = crate::rate_limit::wait::until(value, now),
        }
        report.is_bare |= field.is_bare;
        report.is_window |= name.as_str().starts_with("ratelimit-");
    }
    for report in &mut reports {
        // A bare name means a limit per day at OpenRouter, and per second at Together.
        if report.is_bare
            && report
                .reset
                .is_some_and(|reset| reset > MIN_RESET_OF_LONGER_PERIOD)
        {
            report.period = None;
        }
    }
    parse_structured(headers, now, &mut reports);
    reports.retain(|report| report.limit.is_some() || report.remaining.is_some());
    reports
}

/// Returns the report of a resource and period; adds an empty one if there is none.
fn find_or_insert(
    reports: &mut Vec<LimitReport>,
    resource: Resource,
    period: Option<Duration>,
) -> &mut LimitReport {
    let existing = reports
        .iter()
        .position(|report| report.resource == resource && report.period == period);
    let index = existing.unwrap_or_else(|| {
        reports.push(LimitReport {
            resource,
            limit: None,
            remaining: None,
            reset: None,
            window: None,
            period,
            is_bare: false,
            is_window: false,
        });
        reports.len() - 1
    });
    &mut reports[index]
}

/// Parses the IETF's structured fields (draft-ietf-httpapi-ratelimit-headers): `RateLimit: "default";r=50;t=30`
/// with `RateLimit-Policy: "default";q=100;w=60`, and the older `RateLimit: limit=100, remaining=50, reset=30`.
fn parse_structured(headers: &HeaderMap, now: SystemTime, reports: &mut Vec<LimitReport>) {
    let line = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let state = line("ratelimit").into_iter().flat_map(parameters);
    let policy = line("ratelimit-policy").into_iter().flat_map(parameters);
    let mut limit = None;
    let mut remaining = None;
    let mut reset = None;
    let mut window = None;
    for (name, value) in policy.chain(state) {
        match name {
            "q" | "limit" => limit = amount(value),
            "r" | "remaining" => remaining = amount(value),
            "w" => window = amount(value),
            "t" | "reset" => reset = crate::rate_limit::wait::until(value, now),
            _ => {}
        }
    }
    if remaining.is_none() {
        return;
    }
    let report = find_or_insert(reports, Resource::Requests, None);
    report.is_window = true;
    let window = window.and_then(crate::rate_limit::wait::wait_from_s);
    report.window = window.filter(|window| !window.is_zero());
    report.limit = report.limit.or(limit);
    report.remaining = report.remaining.or(remaining);
    report.reset = report.reset.or(reset);
}

/// Returns the `name=value` pairs of a structured field.
fn parameters(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let parts = line.split([',', ';']);
    parts.filter_map(|part| {
        let (name, value) = part.split_once('=')?;
        Some((name.trim(), value.trim().trim_matches('"')))
    })
}

/// Kind of value that a header contains.
#[derive(Debug, Clone, Copy)]
enum ValueKind {
    Limit,
    Remaining,
    Reset,
}

/// The parts of a header name.
struct Field {
    value_kind: ValueKind,
    resource: Resource,
    period: Option<Duration>,
    /// True if the name has neither a resource nor a period.
    is_bare: bool,
}

/// Families of header names: the prefix, true if the family counts tokens, and true if its bare names mean a limit per
/// second. A bare name has neither a resource nor a period.
const FAMILIES: [(&str, bool, bool); 7] = [
    ("x-tokenlimit-", true, true),
    ("x-ratelimitbysize-", true, false),
    ("ratelimitbysize-", true, false),
    ("anthropic-ratelimit-", false, true),
    ("x-ratelimit-", false, true),
    ("x-rate-limit-", false, false),
    ("ratelimit-", false, false),
];

impl Field {
    fn parse(name: &str) -> Option<Field> {
        let (words, counts_tokens, is_bare_per_second) =
            FAMILIES
                .iter()
                .find_map(|(prefix, counts_tokens, is_bare_per_second)| {
                    let words = name.strip_prefix(prefix)?;
                    Some((words, *counts_tokens, *is_bare_per_second))
                })?;
        let mut value_kind = None;
        let mut period = None;
        let (mut requests, mut tokens, mut input, mut output) =
            (false, counts_tokens, false, false);
        for word in words.split('-') {
            match word {
                "limit" => value_kind = Some(ValueKind::Limit),
                "remaining" => value_kind = Some(ValueKind::Remaining),
                "reset" => value_kind = Some(ValueKind::Reset),
                "requests" | "request" | "req" => requests = true,
                "tokens" | "token" => tokens = true,
                "input" | "prompt" => input = true,
                "output" | "generated" => output = true,
                "second" => period = Some(SECOND),
                "minute" | "min" => period = Some(MINUTE),
                "hour" => period = Some(HOUR),
                "day" => period = Some(DAY),
                // A limit of another resource, such as images or audio.
                _ => return None,
            }
        }
        let resource = match (requests, tokens, input, output) {
            (_, _, true, _) => Resource::InputTokens,
            (_, _, _, true) => Resource::OutputTokens,
            (_, true, ..) => Resource::Tokens,
            _ => Resource::Requests,
        };
        let names_resource = requests || input || output || (tokens && !counts_tokens);
        let is_bare = !names_resource && period.is_none();
        if is_bare && is_bare_per_second {
            period = Some(SECOND);
        }
        Some(Field {
            value_kind: value_kind?,
            resource,
            period,
            is_bare,
        })
    }
}

/// Parses the first number of a value such as `100, 100;w=60`.
fn amount(value: &str) -> Option<f64> {
    let first = value.split([',', ';']).next()?;
    let amount: f64 = first.trim().parse().ok()?;
    (amount.is_finite() && amount >= 0.0).then_some(amount)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn reports(headers: &[(&'static str, &str)]) -> Vec<LimitReport> {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        let mut reports = parse(&headers, SystemTime::UNIX_EPOCH + NOW);
        reports.sort_by_key(|report| report.resource);
        reports
    }

    /// Formats the reports as `resource remaining/limit per period`, with `?` for unknown values.
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
    fn rate_limit_headers_of_all_dialects_are_parsed() {
        let cases: [(&[(&str, &str)], &str); 14] = [
            // OpenAI: a bucket that refills in a minute.
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
            // Azure: neither limits nor reset times.
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
            // Together: limits per second.
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
            // Fireworks: prompt and generated tokens are counted separately.
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
            // A fixed window: its end does not depend on usage.
            (
                &[
                    ("x-ratelimit-limit-requests", "100"),
                    ("x-ratelimit-remaining-requests", "99"),
                    ("x-ratelimit-reset-requests", "59"),
                ],
                "requests 99/100 at reset",
            ),
            // OpenRouter: bare names, and a reset hours away.
            (
                &[
                    ("x-ratelimit-limit", "50"),
                    ("x-ratelimit-remaining", "0"),
                    ("x-ratelimit-reset", "1800036000000"),
                ],
                "requests 0/50 at reset",
            ),
            // Mistral.
            (
                &[
                    ("x-ratelimit-limit-req-minute", "60"),
                    ("x-ratelimit-remaining-req-minute", "0"),
                    ("x-ratelimit-limit-tokens-minute", "500000"),
                    ("x-ratelimit-remaining-tokens-minute", "499000"),
                    ("x-ratelimit-tokens-query-cost", "30"),
                ],
                "requests 0/60 per 60, tokens 499000/500000 per 60",
            ),
            // The IETF's drafts, the older and the newer one.
            (
                &[
                    ("ratelimit-limit", "3, 3;w=5"),
                    ("ratelimit-remaining", "1"),
                    ("ratelimit-reset", "4"),
                ],
                "requests 1/3 at reset",
            ),
            (
                &[
                    ("ratelimit", "\"api\";r=0;t=55"),
                    ("ratelimit-policy", "\"fixed window\";\"api\";q=500;w=300"),
                ],
                "requests 0/500 at reset",
            ),
            (
                &[("ratelimit", "limit=100, remaining=50, reset=17")],
                "requests 50/100 at reset",
            ),
            // Invalid values are ignored.
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
}
