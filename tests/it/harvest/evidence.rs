//! Replies that end the run, fail their row or are retried, depending on the answers to other requests.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Run, exit_of, outcome};
use crate::fault_server::{
    FaultServer, Reaction, RecordedRequest, answer, error, reply, reply_with,
};

/// Creates a run with the prompts `p0`, `p1`, ... and without logprobs.
fn run_of(server: &FaultServer, prompts: usize) -> Run {
    let mut run = Run::with_numbered_prompts(server, prompts);
    run.config.sampling.top_logprobs = 0;
    run
}

/// Starts a server that answers each request, except the first `times` requests of `p5`, which get `reaction`.
async fn teacher_with_one_bad_row(times: usize, reaction: Reaction) -> FaultServer {
    FaultServer::start(move |seen| match seen.prompt() {
        "p5" if seen.repeat < times => reaction.clone(),
        _ => answer(seen),
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn first_request_is_sent_alone() {
    let mistakes = [
        reply(401, error("Incorrect API key provided", "invalid_api_key")),
        reply(
            404,
            error("The model `m` does not exist", "model_not_found"),
        ),
        reply(404, json!({"detail": "Not Found"})),
        reply(
            403,
            error(
                "Country, region, or territory not supported",
                "unsupported_country",
            ),
        ),
        reply(402, error("Payment required", "")),
        reply_with(307, "location", "https://elsewhere.example/v1", json!({})),
        Reaction::After(Duration::from_millis(200), Box::new(reply(401, json!({})))),
    ];
    for mistake in mistakes {
        let context = format!("{mistake:?}");
        let server = FaultServer::start(move |_| mistake.clone()).await;
        let summary = run_of(&server, 50).harvest().await;
        assert_eq!((exit_of(&summary).0, summary.pending), (1, 50), "{context}");
        assert_eq!(server.count(), 1, "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_base_url_path_is_reported() {
    let server = FaultServer::start(|seen| match seen.path.as_str() {
        "/v1/chat/completions" => answer(seen),
        _ => reply(404, json!({"detail": "Not Found"})),
    })
    .await;
    let mut run = run_of(&server, 3);
    run.config.teacher.base_url = server.base_url.replace("/v1", "");
    let (code, message) = exit_of(&run.harvest().await);
    assert_eq!(code, 1);
    let requested_url = format!("{}/chat/completions", run.config.teacher.base_url);
    assert!(
        message.contains(&requested_url) && message.contains("/v1"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn single_refusal_between_answers_is_retried() {
    let refusals = [
        reply(401, error("Incorrect API key provided", "invalid_api_key")),
        reply(
            404,
            error("The model `m` does not exist", "model_not_found"),
        ),
        reply(
            429,
            error("You exceeded your current quota", "insufficient_quota"),
        ),
        reply(402, error("Payment required", "")),
        reply(
            424,
            json!({"error": "Request failed during generation", "error_type": "generation"}),
        ),
        reply(
            498,
            error("Flex tier capacity exceeded", "capacity_exceeded"),
        ),
        Reaction::Reply(404, Vec::new(), Vec::new()),
        Reaction::Reply(400, Vec::new(), b"\n".to_vec()),
        Reaction::Reply(403, Vec::new(), Vec::new()),
        reply_with(302, "location", "/login", json!({})),
    ];
    for reaction in refusals {
        let context = format!("{reaction:?}");
        let server = teacher_with_one_bad_row(1, reaction).await;
        let summary = run_of(&server, 10).harvest().await;
        assert_eq!(
            (summary.ok, exit_of(&summary).0),
            (10, 0),
            "{context}: {summary:?}"
        );
        assert_eq!(summary.requests, 11, "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn always_forbidden_row_fails_alone() {
    let page = b"<!DOCTYPE html><title>Attention Required!</title>".to_vec();
    for reaction in [
        Reaction::Reply(403, Vec::new(), page),
        reply(403, error("not for you", "")),
        reply(404, json!({"detail": "Not Found"})),
    ] {
        let server = teacher_with_one_bad_row(usize::MAX, reaction).await;
        let run = run_of(&server, 10);
        let summary = run.harvest().await;
        assert_eq!(outcome(&summary), (9, 1, 3), "{summary:?}");
        assert_eq!(run.failures().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contradicted_endpoint_refusal_fails_only_its_row() {
    let server = teacher_with_one_bad_row(usize::MAX, reply(401, json!({}))).await;
    let mut run = run_of(&server, 60);
    run.config.limits.concurrency = 2;
    let summary = run.harvest().await;
    assert_eq!(outcome(&summary), (59, 1, 3), "{summary:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_or_locked_account_exits_resumable() {
    for reaction in [
        reply(
            400,
            error(
                "Access denied, please make sure your account is in good standing.",
                "Arrearage",
            ),
        ),
        reply(
            401,
            error("Request had invalid authentication credentials", ""),
        ),
        reply(403, error("Your account has been suspended", "")),
        reply(
            429,
            error("You exceeded your current quota", "insufficient_quota"),
        ),
    ] {
        let context = format!("{reaction:?}");
        let server = FaultServer::start(move |seen| match seen.number {
            0..10 => answer(seen),
            // The delay lets the answers in flight arrive first.
            _ => Reaction::After(Duration::from_millis(50), Box::new(reaction.clone())),
        })
        .await;
        let mut run = run_of(&server, 60);
        run.config.limits.concurrency = 4;
        let summary = run.harvest().await;
        let (code, message) = exit_of(&summary);
        assert_eq!((code, summary.ok), (4, 10), "{context}: {message}");
        // Five rounds of refusals, or five forbidden rows, stop the run. On a busy machine, each of up to three late
        // answers may reset the count.
        assert!(
            summary.failed <= 20 && summary.requests < 60,
            "{context}: {summary:?}"
        );
        assert!(message.contains("rerun the command"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn content_filter_refusals_are_recorded_and_not_retried() {
    let filtered = error(
        "The response was filtered due to the prompt triggering the content management policy.",
        "content_filter",
    );
    for (status, body) in [
        (400, filtered),
        (
            403,
            json!({"error": {"code": 403, "message": "Input was flagged by moderation", "metadata": {"reasons": ["violence"]}}}),
        ),
        (400, error("Content Exists Risk", "invalid_request_error")),
        (
            200,
            json!({"error": {"code": "content_filter", "message": "filtered"}}),
        ),
    ] {
        // One request at a time, so that the eight refusals come before the first answer.
        let server = FaultServer::start(move |seen| {
            let number: usize = seen.prompt()[1..].parse().unwrap();
            if number < 8 {
                reply(status, body.clone())
            } else {
                answer(seen)
            }
        })
        .await;
        let mut run = run_of(&server, 20);
        run.config.limits.concurrency = 1;
        let summary = run.harvest().await;
        assert_eq!(
            (
                summary.ok,
                summary.quarantines["content_filter"],
                exit_of(&summary).0
            ),
            (12, 8, 0),
            "{summary:?}"
        );
        assert_eq!(run.records().len(), 12);
        assert_eq!(
            (run.failures().len(), &run.failures()[0]["class"]),
            (8, &json!("content_filter"))
        );
        let second = run.harvest().await;
        assert_eq!((second.requests, second.cached), (0, 20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn burst_of_refusals_waits_for_requests_in_flight() {
    let server = FaultServer::start(|seen| {
        let number: usize = seen.prompt()[1..].parse().unwrap();
        match number {
            0 => answer(seen),
            1..9 => reply(400, error("too odd", "odd")),
            _ => Reaction::After(Duration::from_millis(200), Box::new(answer(seen))),
        }
    })
    .await;
    let summary = run_of(&server, 32).harvest().await;
    assert_eq!((summary.ok, summary.failed), (24, 8), "{summary:?}");
}

/// Sends `reaction` for the first request of a run. Returns the duration of the run in seconds.
async fn seconds_with_first_reaction(reaction: Reaction) -> f64 {
    let server = FaultServer::start(move |seen: &RecordedRequest| match seen.number {
        0 => reaction.clone(),
        _ => answer(seen),
    })
    .await;
    let started = Instant::now();
    let summary = run_of(&server, 5).harvest().await;
    assert_eq!((summary.ok, exit_of(&summary).0), (5, 0), "{summary:?}");
    started.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_formats_are_respected() {
    let message = "You exceeded your current quota, please check your plan and billing details. Quota exceeded for metric: generate_requests_per_minute, limit: 15\nPlease retry in 0.6s.";
    let gemini =
        json!([{"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED"}}]);
    let details = json!([{"error": {"code": 429, "message": "Resource has been exhausted.", "status": "RESOURCE_EXHAUSTED",
        "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.6s"}]}}]);
    let reactions = [
        reply(429, gemini),
        reply(429, details),
        reply(
            429,
            error(
                "Rate limit reached. Please try again in 0m0.6s.",
                "rate_limit_exceeded",
            ),
        ),
        reply_with(429, "retry-after", "0.6s", json!({})),
        reply_with(429, "retry-after", "0.6, 0.6", json!({})),
        reply_with(503, "retry-after-ms", "600", json!({})),
    ];
    for reaction in reactions {
        let context = format!("{reaction:?}");
        let seconds = seconds_with_first_reaction(reaction).await;
        assert!((0.6..3.0).contains(&seconds), "{context}: {seconds} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn zero_retry_after_uses_backoff() {
    for value in ["0", "Wed, 21 Oct 2015 07:28:00 GMT", "-1"] {
        let server =
            FaultServer::start(move |_| reply_with(429, "retry-after", value, json!({}))).await;
        let mut run = run_of(&server, 10);
        run.config.retry.base = Duration::from_secs_f64(0.05);
        run.config.retry.max = Duration::from_secs_f64(0.2);
        run.config.retry.max_outage = Duration::from_secs_f64(2.0);
        let summary = run.harvest().await;
        assert_eq!((exit_of(&summary).0, summary.pending), (4, 10), "{value}");
        assert!(
            summary.requests < 30,
            "{value}: {} requests in 2 s",
            summary.requests
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reset_hours_away_stops_run_with_time() {
    let in_ten_hours_ms = jiff::Timestamp::now().as_millisecond() + 36_000_000;
    let daily_limit = {
        let headers = vec![
            ("x-ratelimit-limit", "50".to_owned()),
            ("x-ratelimit-remaining", "0".to_owned()),
            ("x-ratelimit-reset", in_ten_hours_ms.to_string()),
        ];
        let body = error("Rate limit exceeded: free-models-per-day", "429");
        Reaction::Reply(429, headers, body.to_string().into_bytes())
    };
    let reactions = [
        daily_limit,
        reply_with(429, "retry-after", "36000", json!({})),
        reply(
            429,
            error(
                "Limit 100, Used 100. Please try again in 10h0m0s.",
                "rate_limit_exceeded",
            ),
        ),
    ];
    for reaction in reactions {
        let context = format!("{reaction:?}");
        for answered in [0, 3] {
            let reaction = reaction.clone();
            let server = FaultServer::start(move |seen| {
                if seen.number < answered {
                    answer(seen)
                } else {
                    reaction.clone()
                }
            })
            .await;
            let mut run = run_of(&server, 10);
            run.config.limits.concurrency = 1;
            run.config.schedule.timezone = Some("UTC".parse().unwrap());
            let summary = run.harvest().await;
            let (code, message) = exit_of(&summary);
            assert_eq!(
                (code, summary.ok),
                (4, answered as u64),
                "{context}: {message}"
            );
            assert!(
                message.contains("wait until") && message.contains("h "),
                "{message}"
            );
            assert!(
                summary.requests <= answered as u64 + 3,
                "{context}: {summary:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn single_absurd_wait_before_the_first_answer_is_ignored() {
    let reaction = reply_with(429, "retry-after", "99999999", json!({}));
    let seconds = seconds_with_first_reaction(reaction).await;
    assert!(seconds < 2.0, "{seconds} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn last_failing_rows_end_within_seconds() {
    let script = |seen: &RecordedRequest| match seen.prompt()[1..].parse::<usize>().unwrap() {
        20.. => reply(500, error("boom", "")),
        _ => answer(seen),
    };
    let server = FaultServer::start(script).await;
    let mut run = run_of(&server, 25);
    run.config.retry.max_attempts = 3;
    run.config.retry.max_outage = Duration::from_secs_f64(600.0);
    for round in 0..2 {
        let started = Instant::now();
        let summary = run.harvest().await;
        let context = format!("round {round}: {summary:?}");
        assert_eq!(
            (exit_of(&summary).0, summary.failed, summary.pending),
            (3, 5, 0),
            "{context}"
        );
        assert!(started.elapsed() < Duration::from_secs(10), "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_first_rows_do_not_block_other_rows() {
    for concurrency in [1, 3, 4, 32] {
        let script = |seen: &RecordedRequest| match seen.prompt()[1..].parse::<usize>().unwrap() {
            0..4 => reply(502, error("boom", "")),
            _ => answer(seen),
        };
        let server = FaultServer::start(script).await;
        let mut run = run_of(&server, 40);
        run.config.limits.concurrency = concurrency;
        run.config.retry.max_outage = Duration::from_secs_f64(600.0);
        let summary = run.harvest().await;
        assert_eq!(
            (summary.ok, summary.failed),
            (36, 4),
            "{concurrency}: {summary:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn identical_server_errors_stop_run() {
    let reaction = reply(500, error("response_format is not supported", ""));
    let server = FaultServer::start(move |_| reaction.clone()).await;
    let mut run = run_of(&server, 50);
    run.config.retry.max_outage = Duration::from_secs_f64(600.0);
    let summary = run.harvest().await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.failed), (1, 0), "{message}");
    assert!(
        message.contains("response_format is not supported"),
        "{message}"
    );
    assert!(server.count() < 12, "{}", server.count());
}

#[tokio::test(flavor = "multi_thread")]
async fn error_message_with_status_200_is_shown() {
    for (body, message) in [
        (
            json!({"choices": null, "base_resp": {"status_code": 1000, "status_msg": "unknown error, please retry"}}),
            "unknown error",
        ),
        (
            json!({"object": "error", "message": "The model is overloaded", "code": 50001}),
            "The model is overloaded",
        ),
        (
            json!({"success": false, "errors": [{"code": 7003, "message": "No route"}], "result": null}),
            "No route",
        ),
        (json!({"status": "maintenance"}), "maintenance"),
    ] {
        let server = FaultServer::start(move |_| reply(200, body.clone())).await;
        let mut run = run_of(&server, 2);
        run.config.retry.max_attempts = 2;
        let summary = run.harvest().await;
        let output = format!("{} {:?}", exit_of(&summary).1, run.failures());
        assert!(output.contains(message), "{message} is not in: {output}");
    }
}
