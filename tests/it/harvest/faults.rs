//! Faults of a teacher over real TCP: retries, failed rows and stopped runs.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Run, at_first, end};
use crate::fault_server::{FaultServer, Reaction, answer, completion, error, reply, reply_with};

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_pauses_all_rows_without_an_attempt() {
    let server = FaultServer::start(|seen| match seen.number {
        0 => reply_with(
            429,
            "retry-after-ms",
            "300",
            error("slow down", "rate_limit"),
        ),
        _ => answer(seen),
    })
    .await;
    let mut run = Run::new(&server, &["a", "b", "c"]);
    run.config.limits.concurrency = 1;
    run.config.retry.max_attempts = 1;
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.requests), (3, 4));
    let seen = server.requests();
    let wait = seen[1].at - seen[0].at;
    assert!(
        wait >= Duration::from_millis(300),
        "the next request came after {wait:?}"
    );
    assert!(
        run.records()
            .iter()
            .all(|record| record.timing.attempts == 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn transient_failures_are_retried_and_counted() {
    let good = completion("A", 20).to_string();
    let cut = good.as_bytes()[..good.find("finish_reason").unwrap()].to_vec();
    let faults = [
        reply(500, json!("oops")),
        Reaction::Reply(502, Vec::new(), b"<html>bad gateway</html>".to_vec()),
        reply(408, json!({})),
        reply(503, json!({})),
        Reaction::Reset,
        Reaction::ResetInBody(good.clone().into_bytes()),
        Reaction::ShortBody(good.clone().into_bytes()),
        Reaction::UnfinishedChunks(cut.clone()),
        Reaction::Stall,
        Reaction::Reply(200, Vec::new(), cut),
        Reaction::Reply(200, Vec::new(), b"".to_vec()),
        Reaction::Reply(200, Vec::new(), vec![0xff; 10]),
        reply(200, json!({"choices": []})),
        reply(200, json!({"error": {"code": 502, "message": "upstream"}})),
    ];
    for fault in faults {
        let name = format!("{fault:?}");
        let server = FaultServer::start(at_first(2, fault)).await;
        let mut run = Run::new(&server, &["a"]);
        run.config.teacher.timeout = Duration::from_secs(1);
        run.config.retry.max_outage = Duration::from_secs(60);
        let summary = run.harvest().await;
        assert_eq!(
            (summary.ok, summary.requests),
            (1, 3),
            "{name}: {summary:?}"
        );
        assert_eq!(run.records()[0].timing.attempts, 3, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn body_cut_off_after_the_answer_is_requested_once() {
    let good = completion("A", 20).to_string();
    let cut = good.as_bytes()[..good.find("usage").unwrap()].to_vec();
    for fault in [
        Reaction::UnfinishedChunks(cut.clone()),
        Reaction::Reply(200, Vec::new(), cut),
    ] {
        let server = FaultServer::start(at_first(1, fault)).await;
        let run = Run::new(&server, &["a"]);
        let summary = run.harvest().await;
        assert_eq!((summary.ok, summary.requests), (1, 1), "{summary:?}");
        assert_eq!(run.texts(), ["A"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_row_uses_its_attempts_and_others_continue() {
    let server = FaultServer::start(|seen| match seen.prompt() {
        "bad" => reply(500, json!({})),
        _ => answer(seen),
    })
    .await;
    let run = Run::new(&server, &["bad", "a", "b"]);
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.failed, summary.requests), (2, 1, 8));
    assert_eq!(summary.failures["http 500"], 1);
    assert_eq!(end(&summary).0, 3);
    assert_eq!(run.failures()[0]["attempts"], 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_row_fails_and_others_finish() {
    let server = FaultServer::start(|seen| match seen.prompt() {
        "bad" => reply(400, error("too long \u{1b}[31m", "context_length")),
        _ => answer(seen),
    })
    .await;
    let run = Run::new(&server, &["bad", "a", "b"]);
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.failed, summary.requests), (2, 1, 3));
    let (code, message) = end(&summary);
    assert_eq!(code, 3);
    assert!(
        message.contains("1 of 3") && message.contains("failures.jsonl"),
        "{message}"
    );
    let failure = &run.failures()[0];
    assert_eq!(failure["class"], "http 400");
    assert_eq!(failure["message"], "400: too long \\u{1b}[31m");

    // The file lists the failures of the last run only.
    run.write("prompts.txt", "a\nb");
    assert_eq!(end(&run.harvest().await).0, 0);
    assert!(run.failures().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn fatal_replies_stop_run_immediately() {
    let quota = error("You exceeded your current quota", "insufficient_quota");
    let cases = [
        (
            reply(401, error("bad key", "invalid_api_key")),
            "requires a key (401: bad key)",
        ),
        (reply(403, error("no", "")), "forbids the request (403: no)"),
        (reply(402, error("pay", "")), "no credit left"),
        (reply(429, quota), "no credit left"),
        (
            reply(404, error("no such", "model_not_found")),
            "`teacher.model` = \"m\"",
        ),
        (
            reply(404, error("The model `m` does not exist", "")),
            "`teacher.model` = \"m\"",
        ),
    ];
    for (fault, expected) in cases {
        let server = FaultServer::start(at_first(usize::MAX, fault)).await;
        let mut run = Run::new(&server, &["a", "b", "c", "d"]);
        run.config.limits.concurrency = 1;
        let summary = run.harvest().await;
        let (code, message) = end(&summary);
        assert_eq!(
            (code, summary.requests, summary.pending),
            (1, 1, 4),
            "{message}"
        );
        assert!(
            message.contains(expected),
            "{expected} is not in: {message}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn identical_refusals_stop_run_after_few_rows() {
    let refusal = reply(400, error("unknown parameter: top_logprobs", ""));
    let server = FaultServer::start(at_first(usize::MAX, refusal)).await;
    let prompts: Vec<_> = (0..50).map(|number| format!("p{number}")).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::new(&server, &prompts);
    run.config.limits.concurrency = 2;
    let summary = run.harvest().await;
    let (code, message) = end(&summary);
    assert!(
        code == 1 && message.contains("unknown parameter: top_logprobs"),
        "{message}"
    );
    assert!(summary.requests < 10, "{}", summary.requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_body_is_cut_off_and_quarantined() {
    let huge = Reaction::Reply(200, Vec::new(), vec![b' '; 65 << 20]);
    let server = FaultServer::start(at_first(usize::MAX, huge)).await;
    let run = Run::new(&server, &["a"]);
    let summary = run.harvest().await;
    assert_eq!(
        (summary.quarantines["unreadable"], summary.requests),
        (1, 1)
    );
    // The answer may have been paid for, and a retry would return it again.
    assert_eq!(run.harvest().await.requests, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_is_reported_and_not_followed() {
    let other = FaultServer::start(answer).await;
    let target = format!("{}/chat/completions", other.base_url);
    let server = {
        let target = target.clone();
        FaultServer::start(move |_| reply_with(307, "location", &target, json!({}))).await
    };
    let summary = Run::new(&server, &["a"]).harvest().await;
    let (code, message) = end(&summary);
    assert_eq!(code, 1);
    assert!(
        message.contains(&target) && message.contains("`teacher.base_url`"),
        "{message}"
    );
    assert_eq!(other.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_address_is_given_up_after_few_attempts() {
    let server = FaultServer::start(answer).await;
    // More rows than the concurrency: the failures must not be treated as an outage to wait out.
    let prompts: Vec<_> = (0..50).map(|number| format!("p{number}")).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::new(&server, &prompts);
    // Bound and dropped, so that no other process listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    run.config.teacher.base_url = format!("http://{}/v1", free.local_addr().unwrap());
    drop(free);
    run.config.retry.max_outage = Duration::from_secs_f64(600.0);
    run.config.retry.max = Duration::from_secs_f64(60.0);
    let summary = run.harvest().await;
    let (code, message) = end(&summary);
    assert_eq!((code, summary.pending), (1, 50));
    assert!(
        message.contains(&run.config.teacher.base_url) && message.contains("refused"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn outage_fails_no_row_and_exits_resumable() {
    let server = FaultServer::start(|seen| match seen.number {
        0 => answer(seen),
        _ => reply(503, json!({})),
    })
    .await;
    let prompts: Vec<_> = (0..120).map(|number| format!("p{number}")).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::new(&server, &prompts);
    run.config.limits.concurrency = 3;
    run.config.retry.max_attempts = 2;
    let summary = run.harvest().await;
    let (code, message) = end(&summary);
    assert_eq!(
        (code, summary.ok, summary.pending),
        (4, 1, 119),
        "{message}"
    );
    assert!(
        message.contains("503") && message.contains("rerun the command"),
        "{message}"
    );
    assert!(
        summary.requests < 100,
        "{} requests is no probing",
        summary.requests
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_survive_a_temporary_outage() {
    let server = FaultServer::start(|seen| match seen.number {
        3..60 => reply(500, json!({})),
        _ => answer(seen),
    })
    .await;
    let prompts: Vec<_> = (0..120).map(|number| format!("p{number}")).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::new(&server, &prompts);
    run.config.limits.concurrency = 3;
    run.config.retry.max = Duration::from_secs_f64(0.01);
    run.config.retry.max_outage = Duration::from_secs_f64(20.0);
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.failed), (120, 0), "{summary:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_answers_are_recorded_with_their_fields() {
    let server = FaultServer::start(|seen| {
        let mut body = completion("X", 20);
        let choice = &mut body["choices"][0];
        match seen.prompt() {
            "finish" => choice["finish_reason"] = "model_length".into(),
            "filtered" => choice["finish_reason"] = "content_filter".into(),
            "logprobs" => choice["logprobs"] = json!({"content": [{"token": 5}]}),
            "none" => choice["logprobs"] = Value::Null,
            "refusal" => choice["message"] = json!({"content": null, "refusal": "no"}),
            "thinking" => {
                choice["message"] = json!({"content": "", "reasoning_content": "hm"});
                choice["finish_reason"] = "length".into();
            }
            _ => body["usage"] = Value::Null,
        }
        body["service_tier"] = "on_demand".into();
        body["created"] = json!(1.5);
        reply(200, body)
    })
    .await;
    let prompts = [
        "finish", "filtered", "logprobs", "none", "refusal", "thinking", "usage",
    ];
    let run = Run::new(&server, &prompts);
    let summary = run.harvest().await;
    assert_eq!(
        (summary.ok, summary.quarantined, summary.requests),
        (5, 2, 7)
    );
    assert_eq!(summary.without_logprobs, 2);
    assert_eq!(summary.quarantines["refusal"], 1);
    assert_eq!(summary.quarantines["empty: length"], 1);
    assert_eq!(end(&summary).0, 0);

    let of = |prompt: &str| {
        let found = run
            .records()
            .into_iter()
            .find(|record| record.request["messages"][0]["content"] == prompt);
        found.unwrap()
    };
    assert_eq!(of("finish").answer.finish_reason, "model_length");
    assert_eq!(of("finish").extra["service_tier"], "on_demand");
    assert!(of("logprobs").extra.contains_key("logprobs_dropped"));
    assert_eq!(of("refusal").answer.refusal, "no");
    assert_eq!(of("thinking").answer.reasoning, "hm");
    assert_eq!(of("usage").usage, None);

    assert_eq!(
        run.harvest().await.requests,
        0,
        "none of them is bought again"
    );
}
