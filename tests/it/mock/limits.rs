//! The rate limits of the mock, on the paused clock.

use std::time::{Duration, SystemTime};

use distill::mock::Mock;
use distill::mock::response::MockReply;
use serde_json::json;
use tokio::time::{Instant, advance};

use super::{ask, ask_with, json_of, mock, script, statuses};

const SECOND: Duration = Duration::from_secs(1);

/// Sends bursts of requests, given as (second, number of requests). Returns the number of admitted requests of each
/// burst.
async fn admitted_counts(limits: &str, bursts: &[(u64, usize)]) -> Vec<usize> {
    let mock = mock(limits);
    let start = Instant::now();
    let mut admitted = Vec::new();
    for &(second, count) in bursts {
        advance(start + SECOND * second as u32 - Instant::now()).await;
        let statuses = statuses(&mock, count).await;
        admitted.push(statuses.iter().filter(|status| **status == 200).count());
    }
    admitted
}

#[tokio::test(start_paused = true)]
async fn each_window_counts_a_minute() {
    let windows = [
        // Full at the start, then two requests per second.
        ("bucket", [120, 0, 2, 118]),
        // Windows from 0 s and from 60 s.
        ("fixed_minute", [120, 0, 0, 120]),
        // The requests at 0 s leave the window at 60 s.
        ("sliding_minute", [120, 0, 0, 120]),
    ];
    for (window, expected) in windows {
        let limits = format!("[limits]\nwindow = \"{window}\"\nrequests_per_minute = 120");
        let bursts = [(0, 121), (0, 1), (1, 3), (60, 200)];
        assert_eq!(
            admitted_counts(&limits, &bursts).await,
            expected,
            "{window}"
        );
    }
    // A fixed minute admits twice the limit within two seconds.
    for (window, expected) in [("fixed_minute", [3, 3]), ("sliding_minute", [3, 0])] {
        let limits = format!("[limits]\nwindow = \"{window}\"\nrequests_per_minute = 3");
        assert_eq!(
            admitted_counts(&limits, &[(59, 9), (60, 9)]).await,
            expected,
            "{window}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn huge_max_tokens_is_counted_without_overflow() {
    let huge = json!({"max_tokens": u64::MAX});
    let unlimited = mock("");
    for _ in 0..2 {
        assert_eq!(ask_with(&unlimited, "hi", huge.clone()).await.status, 200);
    }
    let stats = unlimited.stats();
    assert_eq!(stats.most_tokens_asked_in_a_minute, u64::MAX);
    let limited = mock("[limits]\ntokens_per_minute = 100");
    assert_eq!(ask_with(&limited, "hi", huge.clone()).await.status, 429);
    let with_context = mock("[answers]\ncontext_tokens = 100");
    assert_eq!(ask_with(&with_context, "hi", huge).await.status, 400);
}

#[tokio::test(start_paused = true)]
async fn small_bucket_limits_bursts_within_a_minute() {
    let limits = "[limits]\nrequests_per_minute = 60\nburst_s = 1";
    assert_eq!(
        admitted_counts(limits, &[(0, 9), (1, 9), (9, 9)]).await,
        [1, 1, 1]
    );
}

#[tokio::test(start_paused = true)]
async fn daily_limit_resets_after_24_hours() {
    let limits = "[limits]\nrequests_per_day = 2";
    let bursts = [(0, 3), (3600, 1), (86_399, 1), (86_400, 3)];
    assert_eq!(admitted_counts(limits, &bursts).await, [2, 0, 0, 2]);
}

#[tokio::test(start_paused = true)]
async fn rejected_requests_count_if_scripted() {
    for (count_refused, expected) in [(false, [1, 1]), (true, [1, 0])] {
        let limits = format!(
            "[limits]\nrequests_per_minute = 60\nburst_s = 1\ncount_refused = {count_refused}"
        );
        assert_eq!(admitted_counts(&limits, &[(0, 3), (1, 1)]).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn limit_changes_apply_at_their_time() {
    let limits = "[limits]\nwindow = \"fixed_minute\"\nrequests_per_minute = 8\n\
                  changes = [{at_s = 60, factor = 0.5}, {at_s = 120, factor = 2}]";
    let bursts = [(0, 99), (60, 99), (120, 99), (180, 99)];
    assert_eq!(admitted_counts(limits, &bursts).await, [8, 4, 16, 16]);
    // A full bucket is cut to its new capacity.
    let limits = "[limits]\nrequests_per_minute = 8\nchanges = [{at_s = 60, factor = 0.5}]";
    assert_eq!(admitted_counts(limits, &[(60, 99), (75, 99)]).await, [4, 1]);
}

#[tokio::test(start_paused = true)]
async fn concurrency_limit_rejects_excess_requests() {
    let mock = mock("[answers]\nlatency_s = 1\n[limits]\nconcurrency = 2");
    let (a, b, c) = tokio::join!(ask(&mock, "a"), ask(&mock, "b"), ask(&mock, "c"));
    assert_eq!([a.status, b.status, c.status], [200, 200, 429]);
    assert_eq!(c.header("retry-after"), None, "the wait is unknown");
    assert_eq!(ask(&mock, "c").await.status, 200);
    let stats = mock.stats();
    assert_eq!(
        (stats.max_in_flight, stats.in_flight, stats.throttled),
        (2, 0, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn load_above_capacity_increases_latency() {
    let mock = mock("[answers]\nlatency_s = 1\n[limits]\nload_capacity = 2");
    let timed = async |content| {
        let start = Instant::now();
        assert_eq!(ask(&mock, content).await.status, 200);
        start.elapsed().as_secs_f64().round()
    };
    assert_eq!(timed("alone").await, 1.0);
    let (_, _, _, fourth) = tokio::join!(timed("a"), timed("b"), timed("c"), timed("d"));
    assert_eq!(fourth, 2.0);
}

#[tokio::test(start_paused = true)]
async fn tokens_are_charged_by_estimate_or_usage() {
    // "hi" is a prompt of 5 tokens, and an answer of 1. By estimate, each request is charged 5 + 50 tokens. By usage,
    // it is charged 6, so 114, 108, ... tokens remain, until fewer than the estimate remain.
    for (counts, expected) in [("estimate", 2), ("actual", (120 - 55) / 6 + 1)] {
        let limits = format!("[limits]\ntokens_per_minute = 120\ncounts = \"{counts}\"");
        let mock = mock(&limits);
        let ask = async || ask_with(&mock, "hi", json!({"max_tokens": 50})).await;
        let mut admitted = 0;
        while ask().await.status == 200 {
            admitted += 1;
        }
        assert_eq!(admitted, expected, "{counts}");
    }
}

#[tokio::test(start_paused = true)]
async fn output_tokens_have_a_separate_limit() {
    let mock = mock("[limits]\ntokens_per_minute = 1000\noutput_tokens_per_minute = 100");
    let ask = async || ask_with(&mock, "hi", json!({"max_tokens": 50})).await;
    assert_eq!([ask().await.status, ask().await.status], [200, 200]);
    let rejected = ask().await;
    assert_eq!(rejected.status, 429);
    assert_eq!(rejected.header("retry-after"), Some("30"));
    // Two prompts of five tokens.
    assert_eq!(rejected.header("x-ratelimit-remaining-tokens"), Some("990"));
}

#[tokio::test(start_paused = true)]
async fn request_above_the_limit_itself_is_reported_as_too_large() {
    let mock = mock("[limits]\ntokens_per_minute = 100");
    let rejected = ask_with(&mock, "hi", json!({"max_tokens": 1000})).await;
    assert_eq!(rejected.status, 429);
    assert_eq!(rejected.header("retry-after"), None);
    let error = json_of(&rejected)["error"]["message"].to_string();
    assert!(error.contains("too large"), "{error}");
}

/// Sends two requests, of which the second one comes 600 ms too early. Returns its reply and the message in it.
async fn rejected_request(retry_after: &str) -> (MockReply, String) {
    let limits =
        format!("[limits]\nrequests_per_minute = 60\nburst_s = 1\nretry_after = \"{retry_after}\"");
    // The start has a fraction of a second, so that a date must be rounded up.
    let wall_start = SystemTime::UNIX_EPOCH + SECOND * 1_800_000_000 + SECOND / 4;
    let mock = Mock::with_wall_start(script(&limits), wall_start);
    assert_eq!(ask(&mock, "hi").await.status, 200);
    advance(Duration::from_millis(400)).await;
    let reply = ask(&mock, "hi").await;
    assert_eq!(reply.status, 429);
    let message = json_of(&reply)["error"]["message"]
        .as_str()
        .unwrap()
        .to_string();
    (reply, message)
}

#[tokio::test(start_paused = true)]
async fn rejection_states_the_wait_in_each_format() {
    for (format, name, value) in [
        ("seconds", "retry-after", "1"),
        ("float", "retry-after", "0.6"),
        // 1,800,000,001.25, rounded up.
        ("date", "retry-after", "Fri, 15 Jan 2027 08:00:02 GMT"),
        ("past_date", "retry-after", "Fri, 15 Jan 2027 07:00:00 GMT"),
        ("far_date", "retry-after", "Mon, 12 Jan 2037 08:00:00 GMT"),
        ("ms", "retry-after-ms", "600"),
    ] {
        let (reply, message) = rejected_request(format).await;
        assert_eq!(reply.header(name), Some(value), "{format}");
        assert!(!message.contains("try again"), "{format}: {message}");
    }
    let (reply, _) = rejected_request("garbage").await;
    assert!(reply.header("retry-after").unwrap().parse::<f64>().is_err());
    let (reply, message) = rejected_request("words").await;
    assert_eq!(reply.header("retry-after"), None);
    assert!(message.contains("try again in 600ms."), "{message}");
    let (reply, message) = rejected_request("none").await;
    assert_eq!(reply.header("retry-after"), None);
    assert!(!message.contains("try again"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn rate_limit_headers_match_each_provider() {
    let limits = "requests_per_minute = 3000\nrequests_per_day = 14400\ntokens_per_minute = 6000";
    // After one request of 5 + 16 tokens, the quotas are full again in 20 ms and 210 ms.
    for (dialect, expected) in [
        (
            "openai",
            &[
                ("x-ratelimit-limit-requests", "3000"),
                ("x-ratelimit-remaining-requests", "2999"),
                ("x-ratelimit-reset-requests", "20ms"),
                ("x-ratelimit-limit-tokens", "6000"),
                ("x-ratelimit-remaining-tokens", "5979"),
                ("x-ratelimit-reset-tokens", "210ms"),
            ][..],
        ),
        (
            "azure",
            &[
                ("x-ratelimit-remaining-requests", "2999"),
                ("x-ratelimit-remaining-tokens", "5979"),
            ],
        ),
        (
            "groq",
            &[
                ("x-ratelimit-limit-requests", "14400"),
                ("x-ratelimit-remaining-requests", "14399"),
                ("x-ratelimit-reset-requests", "24h0m0s"),
                ("x-ratelimit-limit-tokens", "6000"),
                ("x-ratelimit-remaining-tokens", "5979"),
                ("x-ratelimit-reset-tokens", "210ms"),
            ],
        ),
        (
            "anthropic",
            &[
                ("anthropic-ratelimit-requests-limit", "3000"),
                ("anthropic-ratelimit-requests-remaining", "2999"),
                ("anthropic-ratelimit-requests-reset", "2027-01-15T08:00:00Z"),
                ("anthropic-ratelimit-tokens-limit", "6000"),
                ("anthropic-ratelimit-tokens-remaining", "5979"),
                ("anthropic-ratelimit-tokens-reset", "2027-01-15T08:00:00Z"),
            ],
        ),
        (
            "together",
            &[
                ("x-ratelimit-limit", "50"),
                ("x-ratelimit-remaining", "50"),
                ("x-ratelimit-reset", "1"),
                ("x-tokenlimit-limit", "100"),
                ("x-tokenlimit-remaining", "100"),
                ("x-tokenlimit-reset", "1"),
            ],
        ),
        (
            "fireworks",
            &[
                ("x-ratelimit-limit-requests", "3000"),
                ("x-ratelimit-remaining-requests", "2999"),
                ("x-ratelimit-limit-tokens-prompt", "6000"),
                ("x-ratelimit-remaining-tokens-prompt", "5979"),
                ("x-ratelimit-over-limit", "no"),
            ],
        ),
        ("none", &[]),
    ] {
        let wall_start = SystemTime::UNIX_EPOCH + SECOND * 1_800_000_000;
        let mock = Mock::with_wall_start(
            script(&format!("[limits]\n{limits}\nheaders = \"{dialect}\"")),
            wall_start,
        );
        let reply = ask(&mock, "hi").await;
        let headers: Vec<(&str, &str)> = reply
            .headers
            .iter()
            .map(|(name, value)| (name.as_ref(), value.as_ref()))
            .collect();
        assert_eq!(headers, expected, "{dialect}");
    }
}

#[tokio::test(start_paused = true)]
async fn stats_report_the_busiest_minute() {
    let mock = mock("[limits]\nwindow = \"fixed_minute\"\nrequests_per_minute = 3");
    advance(SECOND * 59).await;
    statuses(&mock, 4).await;
    advance(SECOND).await;
    statuses(&mock, 3).await;
    advance(SECOND * 600).await;
    statuses(&mock, 1).await;
    let stats = mock.stats();
    assert_eq!(stats.most_requests_in_a_minute, 7);
    // Each request is charged 5 + 16 tokens. Six answers within a minute use 5 + 1 tokens each.
    assert_eq!(stats.most_tokens_asked_in_a_minute, 7 * 21);
    assert_eq!(stats.most_tokens_billed_in_a_minute, 6 * 6);
    assert_eq!((stats.answered, stats.throttled), (7, 1));
}
