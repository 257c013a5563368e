//! Rows that fail at every attempt do not block other rows, in the same run or in later ones.

use std::ops::Range;
use std::time::Duration;

use serde_json::json;

use super::{Run, exit_of, outcome};
use crate::fault_server::{FaultServer, Reaction, answer, error, reply, reply_with};

/// Returns replies that an endpoint may always give to one row.
fn reactions() -> Vec<Reaction> {
    let credit = error("your document says \"insufficient credits\"", "invalid");
    vec![
        reply(403, error("forbidden", "")),
        reply(402, error("payment required", "")),
        reply(
            404,
            error("The model `x` does not exist", "model_not_found"),
        ),
        reply(400, credit),
        reply(400, error("unsupported input", "invalid")),
        reply(500, error("internal error", "")),
        reply_with(302, "location", "https://elsewhere.example/", json!({})),
    ]
}

/// Returns [`reactions`], and a reply that stops a run if it precedes the first answer.
fn all_reactions() -> Vec<Reaction> {
    let mut all = reactions();
    all.push(reply(401, error("no access", "")));
    all
}

/// Starts a server that sends `reaction` to the prompts whose number is in `bad`, and answers the others after
/// `latency`.
async fn teacher_with_bad_rows(
    bad: Range<usize>,
    reaction: Reaction,
    latency: Duration,
) -> FaultServer {
    FaultServer::start(move |seen| {
        let number: usize = seen.prompt()[1..].parse().unwrap();
        if bad.contains(&number) {
            reaction.clone()
        } else {
            Reaction::After(latency, Box::new(answer(seen)))
        }
    })
    .await
}

/// As [`teacher_with_bad_rows`], for the first `bad` prompts and without latency.
async fn teacher(bad: usize, reaction: Reaction) -> FaultServer {
    teacher_with_bad_rows(0..bad, reaction, Duration::ZERO).await
}

/// Creates a run with a concurrency of two and the prompts `p0`, `p1`, ...
fn run_with_two_requests_in_flight(server: &FaultServer, prompts: usize) -> Run {
    let mut run = Run::with_numbered_prompts(server, prompts);
    run.config.limits.concurrency = 2;
    run.config.sampling.top_logprobs = 0;
    run
}

#[tokio::test(flavor = "multi_thread")]
async fn pending_row_of_earlier_run_does_not_block_new_rows() {
    for reaction in all_reactions() {
        let context = format!("{reaction:?}");
        let server = teacher(1, reaction).await;
        let run = run_with_two_requests_in_flight(&server, 0);
        // The bad row is sent between answered rows and is not answered.
        run.write("prompts.txt", "p1\np2\np0\np3");
        run.harvest().await;
        assert_eq!(run.records().len(), 3, "{context}");
        run.write("prompts.txt", "p0\np1\np2\np3\np4\np5\np6");
        run.harvest().await;
        assert_eq!(run.records().len(), 6, "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_first_rows_do_not_stop_every_run() {
    for reaction in reactions() {
        let context = format!("{reaction:?}");
        let server = teacher(4, reaction).await;
        let run = run_with_two_requests_in_flight(&server, 12);
        for _ in 0..2 {
            run.harvest().await;
        }
        assert_eq!(run.records().len(), 8, "{context}");
        let third = run.harvest().await;
        let (code, message) = exit_of(&third);
        // Three rows without credit stop the run.
        let expected = if message.contains("credit") {
            (1, 0)
        } else {
            (3, 4)
        };
        assert_eq!((code, third.failed), expected, "{context}: {third:?}");
        // Up to six attempts at each bad row in each run.
        assert!(server.count() < 100, "{context}: {}", server.count());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthorized_first_row_stops_one_run_after_one_request() {
    let server = teacher(1, reply(401, error("no access", ""))).await;
    let run = run_with_two_requests_in_flight(&server, 6);
    let first = run.harvest().await;
    assert_eq!((exit_of(&first).0, server.count()), (1, 1));
    run.harvest().await;
    assert_eq!(run.records().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_setting_costs_few_requests_per_run() {
    let unknown_model = reply(
        404,
        error("The model `m` does not exist", "model_not_found"),
    );
    let server = FaultServer::start(move |_| unknown_model.clone()).await;
    let run = Run::with_numbered_prompts(&server, 50);
    for max_requests in [1, 4, 7] {
        let summary = run.harvest().await;
        assert_eq!((exit_of(&summary).0, summary.pending), (1, 50));
        assert!(server.count() <= max_requests, "{}", server.count());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn always_throttled_last_row_fails() {
    for (status, header) in [(429, ""), (429, "0.02"), (503, "0.02")] {
        let reaction = if header.is_empty() {
            reply(status, error("slow down", ""))
        } else {
            reply_with(status, "retry-after", header, error("slow down", ""))
        };
        let server = teacher(1, reaction).await;
        let mut run = Run::with_numbered_prompts(&server, 12);
        run.config.limits.concurrency = 3;
        run.config.retry.max_outage = Duration::from_secs_f64(60.0);
        let summary = run.harvest().await;
        let context = format!("{status} {header}: {summary:?}");
        assert_eq!((summary.ok, summary.failed), (11, 1), "{context}");
        assert_eq!(exit_of(&summary).0, 3, "{context}");
        assert!(server.count() < 40, "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adjacent_failing_rows_do_not_affect_other_rows() {
    for reaction in all_reactions() {
        for concurrency in [1, 8] {
            let context = format!("{reaction:?} {concurrency}");
            let latency = Duration::from_millis(40);
            let server = teacher_with_bad_rows(5..12, reaction.clone(), latency).await;
            let mut run = Run::with_numbered_prompts(&server, 40);
            run.config.sampling.top_logprobs = 0;
            run.config.limits.concurrency = concurrency;
            let summary = run.harvest().await;
            assert_eq!(summary.ok, 33, "{context}: {summary:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_failing_last_rows_end_as_failed() {
    let server_error = reply(500, error("boom", ""));
    let server = teacher_with_bad_rows(10..45, server_error, Duration::ZERO).await;
    let mut run = Run::with_numbered_prompts(&server, 60);
    run.config.sampling.top_logprobs = 0;
    run.config.limits.concurrency = 1;
    run.config.retry.max_attempts = 2;
    run.config.retry.max = Duration::from_secs_f64(5.0);
    run.config.retry.max_outage = Duration::from_secs_f64(20.0);
    let summary = run.harvest().await;
    assert_eq!(outcome(&summary), (25, 35, 3), "{summary:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_of_a_day_on_server_error_is_ignored() {
    for (status, header, value) in [(500, "retry-after", "86400"), (504, "retry-after", "1e9")] {
        let reaction = reply_with(status, header, value, error("x", ""));
        let server = teacher(1, reaction).await;
        let run = run_with_two_requests_in_flight(&server, 6);
        let summary = run.harvest().await;
        assert_eq!(outcome(&summary), (5, 1, 3), "{summary:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_failed_in_earlier_run_are_sent_last() {
    for status in [403, 404] {
        let reaction = reply(status, error("not this one", ""));
        let server = teacher_with_bad_rows(10..40, reaction, Duration::ZERO).await;
        let mut run = run_with_two_requests_in_flight(&server, 60);
        // One request at a time: with two, the number of consecutive refusals would depend on the timing.
        run.config.limits.concurrency = 1;
        let first = run.harvest().await;
        assert_eq!((first.ok, first.failed), (30, 30), "{status}: {first:?}");
        for _ in 0..2 {
            let rerun = run.harvest().await;
            let context = format!("{status}: {rerun:?}");
            assert_eq!((rerun.failed, rerun.requests), (30, 30), "{context}");
            assert_eq!(exit_of(&rerun).0, 3, "{context}");
        }
        run.write_numbered_prompts(70);
        let extended = run.harvest().await;
        assert_eq!(
            (extended.ok, extended.requests),
            (10, 40),
            "{status}: {extended:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_failing_rows_end_with_few_requests() {
    for status in [401, 402, 403, 404] {
        let server = FaultServer::start(move |seen| match seen.prompt() {
            "p3" => reply(status, error("not this one", "")),
            "p4" => reply(500, error("boom", "")),
            _ => answer(seen),
        })
        .await;
        let mut run = Run::with_numbered_prompts(&server, 6);
        run.config.sampling.top_logprobs = 0;
        run.config.limits.concurrency = 32;
        for _ in 0..3 {
            run.harvest().await;
        }
        let last = run.harvest().await;
        let context = format!("{status}: {last:?}");
        assert_eq!((last.failed, exit_of(&last).0), (2, 3), "{context}");
        assert!(server.count() < 60, "{}: {context}", server.count());
    }
}
