//! Rate-limit headers in the dialects of the providers. Pure: times are arguments.
//!
//! Sources: the "Rate limits" pages of OpenAI, Groq, Together, Fireworks and Anthropic.

use std::time::{Duration, SystemTime};

use crate::mock::limits::LimitStatus;
use crate::mock::quota::QuotaStatus;
use crate::mock::response::{MockReply, ReplyHeader};
use crate::mock::script::limits::{HeaderDialect, RetryAfter};

const TEN_YEARS: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Adds the rate-limit headers of a provider.
pub(crate) fn push_limits(
    headers: &mut Vec<ReplyHeader>,
    dialect: HeaderDialect,
    limits: &LimitStatus,
    now: SystemTime,
) {
    // A header that the script sets stays as it is.
    let mut push = |name: String, value: String| {
        if headers.iter().all(|(other_name, _)| *other_name != name) {
            headers.push((name.into(), value.into()));
        }
    };
    let per_minute = [("requests", limits.requests), ("tokens", limits.tokens)];
    match dialect {
        HeaderDialect::None => {}
        HeaderDialect::Openai | HeaderDialect::Groq => {
            // Groq reports the daily limit of requests, not the one per minute.
            let requests = match dialect {
                HeaderDialect::Groq => limits.day.or(limits.requests),
                _ => limits.requests,
            };
            for (resource, quota) in present(&[("requests", requests), ("tokens", limits.tokens)]) {
                for (name, value) in limit_and_remaining(resource, &quota) {
                    push(name, value);
                }
                push(
                    format!("x-ratelimit-reset-{resource}"),
                    go_duration(quota.reset),
                );
            }
        }
        HeaderDialect::Azure => {
            for (resource, quota) in present(&per_minute) {
                push(
                    format!("x-ratelimit-remaining-{resource}"),
                    format_floor(quota.remaining),
                );
            }
        }
        HeaderDialect::Anthropic => {
            let output = limits.output_tokens;
            // Without a limit of output tokens, `limits.tokens` counts prompt and output tokens.
            let input = output.and(limits.tokens);
            let all_tokens = limits.tokens.filter(|_| output.is_none());
            for (resource, quota) in present(&[
                ("requests", limits.requests),
                ("tokens", all_tokens),
                ("input-tokens", input),
                ("output-tokens", output),
            ]) {
                let name = |part| format!("anthropic-ratelimit-{resource}-{part}");
                push(name("limit"), format_floor(quota.limit));
                push(name("remaining"), format_floor(quota.remaining));
                push(name("reset"), rfc_3339(now + quota.reset));
            }
        }
        // Together's limits are per second.
        HeaderDialect::Together => {
            for (resource, quota) in present(&[
                ("ratelimit", limits.requests),
                ("tokenlimit", limits.tokens),
            ]) {
                push(
                    format!("x-{resource}-limit"),
                    format_floor(quota.limit / 60.0),
                );
                push(
                    format!("x-{resource}-remaining"),
                    format_floor(quota.remaining.min(quota.limit / 60.0)),
                );
                push(
                    format!("x-{resource}-reset"),
                    format!("{}", quota.reset.as_secs_f64().ceil()),
                );
            }
        }
        HeaderDialect::Fireworks => {
            let kinds = [
                ("requests", limits.requests),
                ("tokens-prompt", limits.tokens),
                ("tokens-generated", limits.output_tokens),
            ];
            for (resource, quota) in present(&kinds) {
                for (name, value) in limit_and_remaining(resource, &quota) {
                    push(name, value);
                }
            }
            let is_over_limit = present(&kinds).any(|(_, quota)| quota.remaining < 1.0);
            let value = if is_over_limit { "yes" } else { "no" };
            push("x-ratelimit-over-limit".into(), value.into());
        }
    }
}

fn limit_and_remaining(resource: &str, quota: &QuotaStatus) -> [(String, String); 2] {
    [
        (
            format!("x-ratelimit-limit-{resource}"),
            format_floor(quota.limit),
        ),
        (
            format!("x-ratelimit-remaining-{resource}"),
            format_floor(quota.remaining),
        ),
    ]
}

/// Returns the quotas that the script sets.
fn present<'a>(
    quotas: &'a [(&'static str, Option<QuotaStatus>)],
) -> impl Iterator<Item = (&'static str, QuotaStatus)> + 'a {
    quotas
        .iter()
        .filter_map(|(resource, quota)| Some((*resource, (*quota)?)))
}

/// Returns the sentence of an error message that states how long to wait; empty unless `format` is
/// [`RetryAfter::Words`].
pub(crate) fn wait_sentence(format: RetryAfter, wait: Duration) -> String {
    match format {
        RetryAfter::Words if wait < Duration::from_secs(1) => {
            format!(" Please try again in {}ms.", ceil_ms(wait))
        }
        RetryAfter::Words => {
            format!(" Please try again in {}s.", ceil_ms(wait) as f64 / 1000.0)
        }
        _ => String::new(),
    }
}

/// Adds the header that states how long to wait, if `format` is a header.
pub(crate) fn with_retry_after(
    reply: MockReply,
    format: RetryAfter,
    wait: Duration,
    now: SystemTime,
) -> MockReply {
    let date = |time| httpdate::fmt_http_date(time);
    let value = match format {
        RetryAfter::None | RetryAfter::Words => return reply,
        RetryAfter::Ms => return reply.with_header("retry-after-ms", ceil_ms(wait).to_string()),
        RetryAfter::Seconds => ceil_ms(wait).div_ceil(1000).to_string(),
        RetryAfter::Float => format!("{}", ceil_ms(wait) as f64 / 1000.0),
        // Rounded up to whole seconds, so that a client that waits until then does not retry too early.
        RetryAfter::Date => date(now + wait + Duration::from_millis(999)),
        RetryAfter::PastDate => date(now - Duration::from_secs(3600)),
        RetryAfter::FarDate => date(now + TEN_YEARS),
        RetryAfter::Garbage => "in a while; ask -1 more times".into(),
    };
    reply.with_header("retry-after", value)
}

fn ceil_ms(wait: Duration) -> u64 {
    u64::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

fn format_floor(amount: f64) -> String {
    // A bucket that was refilled in steps may hold 2999.9999999 instead of 3000.
    format!("{}", (amount + 1e-6).floor())
}

fn rfc_3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(
        |_| String::new(),
        |time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    )
}

/// Formats a duration as Go's `time.Duration` does, truncated to milliseconds: `17ms`, `8.64s`, `6m0s`, `1h2m3s`.
fn go_duration(duration: Duration) -> String {
    // Rounded to microseconds first, so that 359.9999999 s is 6m0s and not 5m59.999s.
    let ms = (duration + Duration::from_nanos(500)).as_micros() / 1000;
    if ms < 1000 {
        return if ms == 0 {
            "0s".into()
        } else {
            format!("{ms}ms")
        };
    }
    let hours = ms / 3_600_000;
    let minutes = ms / 60_000 % 60;
    let seconds = (ms % 60_000) as f64 / 1000.0;
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_formatted_as_in_go() {
        for (micros, expected) in [
            (0, "0s"),
            (17_142, "17ms"),
            (8_640_000, "8.64s"),
            (360_000_000, "6m0s"),
            (179_560_000, "2m59.56s"),
            (3_723_000_000, "1h2m3s"),
        ] {
            assert_eq!(go_duration(Duration::from_micros(micros)), expected);
        }
        assert_eq!(go_duration(Duration::from_nanos(359_999_999_999)), "6m0s");
    }
}
