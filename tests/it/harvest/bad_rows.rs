//! Rows whose every attempt fails must not block the answers of other rows, in this run or the next one.

use std::ops::Range;
use std::time::Duration;

use serde_json::json;

use super::{Run, end, outcome};
use crate::fault_server::{FaultServer, Reaction, answer, error, reply, reply_with};

/// Replies that an endpoint may give to one row every time.
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

/// [`reactions`], and replies that stop a run immediately before its first answer.
fn all_reactions() -> Vec<Reaction> {
    let mut all = reactions();
    all.push(reply(401, error("no access", "")));
    all
}

/// A server at which the prompts `p{number}` of these numbers always get `reaction`, and others an answer
/// after `takes`.
async fn teacher_of(bad: Range<usize>, reaction: Reaction, takes: Duration) -> FaultServer {
    FaultServer::start(move |seen| {
        let number: usize = seen.prompt()[1..].parse().unwrap();
        if bad.contains(&number) {
            reaction.clone()
        } else {
            Reaction::After(takes, Box::new(answer(seen)))
        }
    })
    .await
}

/// As [`teacher_of`], of the first rows.
async fn teacher(bad: usize, reaction: Reaction) -> FaultServer {
    teacher_of(0..bad, reaction, Duration::ZERO).await
}

fn two_at_once(server: &FaultServer) -> Run {
    let mut run = Run::new(server, &[]);
    run.config.limits.concurrency = 2;
    run.config.sampling.top_logprobs = 0;
    run
}

fn prompts(run: &Run, count: usize) {
    let lines: String = (0..count).map(|number| format!("p{number}\n")).collect();
    run.write("prompts.txt", &lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn pending_row_of_earlier_run_does_not_block_new_rows() {
    for reaction in all_reactions() {
        let context = format!("{reaction:?}");
        let server = teacher(1, reaction).await;
        let run = two_at_once(&server);
        // The bad row is sent between answered rows and stays pending.
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
        let run = two_at_once(&server);
        prompts(&run, 12);
        for _ in 0..2 {
            run.harvest().await;
        }
        assert_eq!(run.records().len(), 8, "{context}");
        let rest = run.harvest().await;
        // Three rows without credit stop the run.
        let expected = if end(&rest).1.contains("credit") {
            (1, 0)
        } else {
            (3, 4)
        };
        assert_eq!((end(&rest).0, rest.failed), expected, "{context}: {rest:?}");
        // Up to six attempts at each bad row in each run.
        assert!(server.count() < 100, "{context}: {}", server.count());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forbidden_first_row_stops_one_run_after_one_request() {
    let server = teacher(1, reply(401, error("no access", ""))).await;
    let run = two_at_once(&server);
    prompts(&run, 6);
    let first = run.harvest().await;
    assert_eq!((end(&first).0, server.count()), (1, 1));
    run.harvest().await;
    assert_eq!(run.records().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_setting_costs_few_requests_per_run() {
    let wrong = reply(
        404,
        error("The model `m` does not exist", "model_not_found"),
    );
    let server = FaultServer::start(move |_| wrong.clone()).await;
    let run = Run::new(&server, &[]);
    prompts(&run, 50);
    for most in [1, 4, 7] {
        let summary = run.harvest().await;
        assert_eq!((end(&summary).0, summary.pending), (1, 50));
        assert!(server.count() <= most, "{}", server.count());
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
        let mut run = Run::new(&server, &[]);
        run.config.limits.concurrency = 3;
        run.config.retry.max_outage = Duration::from_secs_f64(60.0);
        prompts(&run, 12);
        let summary = run.harvest().await;
        let context = format!("{status} {header}: {summary:?}");
        assert_eq!((summary.ok, summary.failed), (11, 1), "{context}");
        assert_eq!(end(&summary).0, 3, "{context}");
        assert!(server.count() < 40, "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adjacent_failing_rows_do_not_affect_other_rows() {
    for reaction in all_reactions() {
        for concurrency in [1, 8] {
            let context = format!("{reaction:?} {concurrency}");
            let server = teacher_of(5..12, reaction.clone(), Duration::from_millis(40)).await;
            let mut run = Run::new(&server, &[]);
            run.config.sampling.top_logprobs = 0;
            run.config.limits.concurrency = concurrency;
            prompts(&run, 40);
            let summary = run.harvest().await;
            assert_eq!(summary.ok, 33, "{context}: {summary:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_failing_last_rows_end_as_failed() {
    let server = teacher_of(10..45, reply(500, error("boom", "")), Duration::ZERO).await;
    let mut run = Run::new(&server, &[]);
    run.config.sampling.top_logprobs = 0;
    run.config.limits.concurrency = 1;
    run.config.retry.max_attempts = 2;
    run.config.retry.max = Duration::from_secs_f64(5.0);
    run.config.retry.max_outage = Duration::from_secs_f64(20.0);
    prompts(&run, 60);
    let summary = run.harvest().await;
    assert_eq!(outcome(&summary), (25, 35, 3), "{summary:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_of_a_day_on_server_error_is_ignored() {
    for (status, header, value) in [(500, "retry-after", "86400"), (504, "retry-after", "1e9")] {
        let reaction = reply_with(status, header, value, error("x", ""));
        let server = teacher(1, reaction).await;
        let run = two_at_once(&server);
        prompts(&run, 6);
        let summary = run.harvest().await;
        assert_eq!(outcome(&summary), (5, 1, 3), "{summary:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_failed_in_earlier_run_are_sent_last() {
    for status in [403, 404] {
        let reaction = reply(status, error("not this one", ""));
        let server = teacher_of(10..40, reaction, Duration::ZERO).await;
        let run = two_at_once(&server);
        prompts(&run, 60);
        let first = run.harvest().await;
        assert_eq!((first.ok, first.failed), (30, 30), "{status}: {first:?}");
        for _ in 0..2 {
            let again = run.harvest().await;
            let context = format!("{status}: {again:?}");
            assert_eq!((again.failed, again.requests), (30, 30), "{context}");
            assert_eq!(end(&again).0, 3, "{context}");
        }
        prompts(&run, 70);
        let more = run.harvest().await;
        assert_eq!((more.ok, more.requests), (10, 40), "{status}: {more:?}");
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
        let mut run = two_at_once(&server);
        run.config.limits.concurrency = 32;
        prompts(&run, 6);
        for _ in 0..3 {
            run.harvest().await;
        }
        let last = run.harvest().await;
        let context = format!("{status}: {last:?}");
        assert_eq!((last.failed, end(&last).0), (2, 3), "{context}");
        assert!(server.count() < 60, "{}: {context}", server.count());
    }
}
