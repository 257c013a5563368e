//! The fault matrix: every fault of a teacher, once, twice and always, at one row among good rows.

use std::time::Duration;

use std::collections::BTreeSet;

use distill::config::Config;
use distill::mock::script::Script;
use distill::mock::script::fault_kind::FaultKind;

use super::nights::SimulatedRun;
use super::{Run, exit_of};

/// Effect of a fault that hits every attempt of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Always {
    /// The answer is kept with its fault.
    Kept,
    /// The answer is quarantined.
    Quarantined,
    /// The row fails with this class after this number of attempts.
    Fails(&'static str, u64),
    /// The run stops if nothing was answered before. Otherwise the fault has the given effect.
    Stops(BetweenAnswers),
    /// The row fails when it is the last one, after several waits.
    Throttled,
    /// The requested wait is longer than an hour. Two such replies without an answer in between end the run, which can
    /// be resumed.
    Exits,
}

/// Effect of an endpoint refusal (no request can succeed) if other requests are answered before and after it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BetweenAnswers {
    /// The row fails with this class.
    Fails(&'static str),
    /// The row is requested a few times more, then the run exits as resumable.
    Exits,
}

use Always::{Exits, Fails, Kept, Quarantined, Stops, Throttled};

/// Lines of a fault in the script, and its effect.
pub const FAULTS: [(&str, Always); 56] = [
    ("kind = \"http 429\"\nretry_after = \"none\"", Throttled),
    (
        "kind = \"http 429\"\nretry_after = \"seconds\"\nretry_after_s = 2.0",
        Throttled,
    ),
    (
        "kind = \"http 429\"\nretry_after = \"float\"\nretry_after_s = 1.5",
        Throttled,
    ),
    (
        "kind = \"http 429\"\nretry_after = \"past_date\"",
        Throttled,
    ),
    ("kind = \"http 429\"\nretry_after = \"far_date\"", Exits),
    (
        "kind = \"http 429\"\nretry_after = \"date\"\nretry_after_s = 5.0",
        Throttled,
    ),
    (
        "kind = \"http 429\"\nretry_after = \"ms\"\nretry_after_s = 0.25",
        Throttled,
    ),
    (
        "kind = \"http 429\"\nretry_after = \"words\"\nretry_after_s = 1.0",
        Throttled,
    ),
    ("kind = \"http 429\"\nretry_after = \"garbage\"", Throttled),
    (
        "kind = \"http 503\"\nretry_after = \"seconds\"\nretry_after_s = 3.0",
        Throttled,
    ),
    (
        "kind = \"http 529\"\nretry_after = \"seconds\"\nretry_after_s = 3.0",
        Throttled,
    ),
    ("kind = \"html 429\"", Throttled),
    (
        "kind = \"insufficient_quota\"",
        Stops(BetweenAnswers::Exits),
    ),
    ("kind = \"html 502\"", Fails("http 502", 6)),
    ("kind = \"http 500\"", Fails("http 500", 6)),
    ("kind = \"http 503\"", Fails("http 503", 6)),
    ("kind = \"http 504\"", Fails("http 504", 6)),
    ("kind = \"http 529\"", Fails("http 529", 6)),
    ("kind = \"http 520\"", Fails("http 520", 6)),
    ("kind = \"http 408\"", Fails("http 408", 6)),
    ("kind = \"http 409\"", Fails("http 409", 6)),
    ("kind = \"http 425\"", Fails("http 425", 6)),
    ("kind = \"http 400\"", Fails("http 400", 1)),
    ("kind = \"http 401\"", Stops(BetweenAnswers::Exits)),
    ("kind = \"http 402\"", Stops(BetweenAnswers::Exits)),
    (
        "kind = \"http 403\"",
        Stops(BetweenAnswers::Fails("http 403")),
    ),
    (
        "kind = \"http 404\"",
        Stops(BetweenAnswers::Fails("http 404")),
    ),
    ("kind = \"http 413\"", Fails("http 413", 1)),
    ("kind = \"http 422\"", Fails("http 422", 1)),
    ("kind = \"redirect\"", Stops(BetweenAnswers::Exits)),
    ("kind = \"refused\"", Fails("unreachable", 6)),
    ("kind = \"reset\"", Fails("connection lost", 6)),
    ("kind = \"stall\"", Fails("timeout", 6)),
    ("kind = \"reset in body\"", Fails("connection lost", 6)),
    ("kind = \"short body\"", Fails("connection lost", 6)),
    ("kind = \"unfinished chunks\"", Fails("connection lost", 6)),
    ("kind = \"stall in body\"", Fails("timeout", 6)),
    ("kind = \"drip\"\ninterval_s = 0.001", Kept),
    ("kind = \"blank lines\"\ninterval_s = 0.001", Kept),
    ("kind = \"empty\"", Fails("malformed", 6)),
    ("kind = \"truncated\"", Fails("malformed", 6)),
    ("kind = \"error in 200\"", Fails("http 502", 6)),
    ("kind = \"bad utf-8\"", Kept),
    ("kind = \"no choices\"", Quarantined),
    ("kind = \"deep json\"", Fails("malformed", 6)),
    ("kind = \"null content\"", Quarantined),
    ("kind = \"unknown finish_reason\"", Kept),
    ("kind = \"float created\"", Kept),
    ("kind = \"other model\"", Kept),
    ("kind = \"no usage\"", Kept),
    ("kind = \"refusal\"", Quarantined),
    ("kind = \"content_filter\"", Quarantined),
    ("kind = \"length\"", Kept),
    ("kind = \"logprobs null\"", Kept),
    ("kind = \"logprobs nan\"", Kept),
    ("kind = \"logprobs sentinel\"", Kept),
];

/// Creates a run of four prompts, of which the second one gets `fault` under the condition `when`.
fn simulated_run(fault: &str, when: &str) -> SimulatedRun {
    let script =
        format!("[answers]\nlatency_s = 1.0\n[[faults]]\nmatching = \"number 1\"\n{fault}\n{when}");
    SimulatedRun::new(&script, 4, |config: &mut Config| {
        config.limits.concurrency = 2;
        config.sampling.top_logprobs = 5;
        config.teacher.timeout = Duration::from_secs_f64(60.0);
    })
}

#[tokio::test(start_paused = true)]
async fn fault_matrix_transient_costs_attempts_permanent_costs_rows() {
    for (fault, always) in FAULTS {
        for (times, when) in [(1, "first = 1"), (2, "first = 2")] {
            let simulated = simulated_run(fault, when);
            let summary = simulated.harvest().await;
            let context = format!("{times} x {fault}: {summary:?}");
            match always {
                Stops(BetweenAnswers::Fails(_)) | Fails(_, 1) => {
                    assert_eq!((summary.ok, summary.failed), (3, 1), "{context}");
                }
                Kept | Quarantined => assert_eq!(summary.requests, 4, "{context}"),
                Stops(..) | Fails(..) | Throttled | Exits => {
                    assert_eq!((summary.ok, exit_of(&summary).0), (4, 0), "{context}");
                    assert_eq!(summary.requests, 4 + times, "{context}");
                }
            }
        }

        let simulated = simulated_run(fault, "");
        let summary = simulated.harvest().await;
        let (code, _) = exit_of(&summary);
        let context = format!("always {fault}: {summary:?}");
        match always {
            Kept => assert_eq!((summary.ok, code), (4, 0), "{context}"),
            Quarantined => assert_eq!((summary.ok, summary.quarantined), (3, 1), "{context}"),
            Fails(class, attempts) => {
                assert_eq!((summary.ok, summary.failed, code), (3, 1, 3), "{context}");
                assert_eq!(summary.failures.get(class), Some(&1), "{context}");
                assert_eq!(summary.requests, 3 + attempts, "{context}");
            }
            Stops(BetweenAnswers::Fails(class)) => {
                assert_eq!((summary.ok, summary.failed, code), (3, 1, 3), "{context}");
                assert_eq!(summary.failures.get(class), Some(&1), "{context}");
                assert_eq!(summary.requests, 4, "{context}");
            }
            Stops(BetweenAnswers::Exits) => {
                assert_eq!((summary.ok, summary.pending, code), (3, 1, 4), "{context}");
                // Three answers, and five to eight attempts at the row: an answer in between allows further attempts.
                assert!((8..=11).contains(&summary.requests), "{context}");
            }
            Throttled => {
                assert_eq!((summary.ok, summary.failed, code), (3, 1, 3), "{context}");
                assert_eq!(summary.failures.get("throttled"), Some(&1), "{context}");
                assert!((11..=14).contains(&summary.requests), "{context}");
            }
            Exits => {
                assert_eq!((summary.ok, summary.pending, code), (3, 1, 4), "{context}");
                assert!(summary.requests < 200, "{context}");
            }
        }
        let stats = simulated.mock.stats();
        assert!(
            stats.bodies_by_times_billed.keys().all(|times| *times <= 6),
            "{context}"
        );
    }
}

/// Every kind of fault is in the table or has a test of its own.
#[test]
fn fault_matrix_covers_every_fault() {
    let tested_separately = [
        "huge body",
        "logprobs fewer",
        "logprobs inf",
        "logprobs duplicates",
        "logprobs without chosen",
    ];
    let kinds = FAULTS.map(|(fault, _)| fault.split('"').nth(1).unwrap());
    let tested: BTreeSet<&str> = kinds.into_iter().chain(tested_separately).collect();
    for kind in FaultKind::all() {
        let name = serde_json::to_value(kind).unwrap();
        let name = name.as_str().unwrap();
        assert!(tested.contains(name), "{name} is in no test");
    }
}

/// Faults of the connection or the body over real TCP, each at one attempt.
#[tokio::test(flavor = "multi_thread")]
async fn single_faults_over_tcp_cost_at_most_one_attempt() {
    let faults = [
        "reset",
        "stall",
        "reset in body",
        "short body",
        "unfinished chunks",
        "stall in body",
        "truncated",
        "deep json",
        "huge body",
    ];
    for kind in faults {
        let size = if kind == "huge body" {
            "size = 70000000"
        } else {
            ""
        };
        let script = format!("[[faults]]\nkind = \"{kind}\"\nfirst = 1\nmatching = \"b\"\n{size}");
        let script = Script::parse("fault.toml".as_ref(), &script).unwrap();
        let server = distill::mock::server::start(script, [127, 0, 0, 1].into(), 0).unwrap();
        let mut run = Run::at(&server.base_url(), &["a", "b", "c"]);
        run.config.teacher.model = "mock".into();
        // Long enough for an answer on a busy machine.
        run.config.teacher.timeout = Duration::from_secs(3);
        run.config.retry.max_outage = Duration::from_secs(60);
        let summary = run.harvest().await;
        let context = format!("{kind}: {summary:?}");
        match kind {
            // The answer may have been billed, so it is not requested again.
            "huge body" => assert_eq!((summary.ok, summary.quarantined), (2, 1), "{context}"),
            // The answer is complete.
            "unfinished chunks" => assert_eq!((summary.ok, summary.requests), (3, 3), "{context}"),
            _ => assert_eq!((summary.ok, summary.requests), (3, 4), "{context}"),
        }
        let stats = server.stop();
        assert_eq!(stats.faults.values().sum::<u64>(), 1, "{context}");
    }
}

#[tokio::test(start_paused = true)]
async fn broken_logprobs_are_counted_and_answer_is_kept() {
    for (kind, without_logprobs) in [
        ("logprobs null", 1),
        ("logprobs fewer", 1),
        ("logprobs nan", 0),
        ("logprobs inf", 0),
        ("logprobs sentinel", 0),
        ("logprobs duplicates", 0),
        ("logprobs without chosen", 0),
    ] {
        let simulated = simulated_run(&format!("kind = \"{kind}\""), "");
        let summary = simulated.harvest().await;
        assert_eq!(
            (summary.ok, summary.without_logprobs),
            (4, without_logprobs),
            "{kind}: {:?}",
            summary.without_logprobs_because
        );
        for record in simulated.run.records() {
            let Some(logprobs) = record.logprobs else {
                continue;
            };
            let values = logprobs
                .logprob
                .iter()
                .chain(logprobs.top_logprob.iter().flatten());
            for value in values.flatten() {
                assert!(value.is_finite() && *value > -9999.0, "{kind}: {value}");
            }
        }
    }
}

/// Truncated, refused and empty answers are billed, so they are not bought again.
#[tokio::test(start_paused = true)]
async fn unusual_answers_are_not_requested_again() {
    for kind in ["length", "refusal", "content_filter", "null content"] {
        let simulated = simulated_run(&format!("kind = \"{kind}\""), "");
        simulated.harvest().await;
        let second = simulated.harvest().await;
        assert_eq!((second.requests, second.cached), (0, 4), "{kind}");
        assert_eq!(simulated.mock.stats().billed.answers, 4, "{kind}");
    }
}
