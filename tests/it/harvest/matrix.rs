//! Row F of the test matrix: every fault of a teacher, once, twice and always, at one row among good rows.

use std::time::Duration;

use std::collections::BTreeSet;

use distill::config::Config;
use distill::mock::script::Script;
use distill::mock::script::fault_kind::FaultKind;

use super::nights::Night;
use super::{Run, end};

/// Effect of a permanent fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Always {
    /// The answer is kept with its fault.
    Kept,
    /// The answer is quarantined.
    Quarantined,
    /// The row fails with this class after this number of attempts.
    Fails(&'static str, u64),
    /// The run stops if nothing was answered before. Between answers, the row fails with this class, or is tried a few
    /// times more before the run exits as resumable.
    Stops(Amid),
    /// The row fails once it is the last one, after several waits.
    Throttled,
    /// The run waits as requested, and exits as resumable when no other row is left.
    Waits,
}

/// Effect between answers of a claim that no request can succeed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amid {
    Fails(&'static str),
    Waits,
}

use Always::{Fails, Kept, Quarantined, Stops, Throttled, Waits};

/// Name of each fault in the script, and its effect.
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
    ("kind = \"http 429\"\nretry_after = \"far_date\"", Waits),
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
    ("kind = \"insufficient_quota\"", Stops(Amid::Waits)),
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
    ("kind = \"http 401\"", Stops(Amid::Waits)),
    ("kind = \"http 402\"", Stops(Amid::Waits)),
    ("kind = \"http 403\"", Stops(Amid::Fails("http 403"))),
    ("kind = \"http 404\"", Stops(Amid::Fails("http 404"))),
    ("kind = \"http 413\"", Fails("http 413", 1)),
    ("kind = \"http 422\"", Fails("http 422", 1)),
    ("kind = \"redirect\"", Stops(Amid::Waits)),
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

fn night(fault: &str, when: &str) -> Night {
    let script =
        format!("[answers]\nlatency_s = 1.0\n[[faults]]\nmatching = \"number 1\"\n{fault}\n{when}");
    Night::new(&script, 4, |config: &mut Config| {
        config.limits.concurrency = 2;
        config.sampling.top_logprobs = 5;
        config.teacher.timeout = Duration::from_secs_f64(60.0);
    })
}

#[tokio::test(start_paused = true)]
async fn fault_matrix_transient_costs_attempts_permanent_costs_rows() {
    for (fault, always) in FAULTS {
        for (times, when) in [(1, "first = 1"), (2, "first = 2")] {
            let night = night(fault, when);
            let summary = night.harvest().await;
            let context = format!("{times} x {fault}: {summary:?}");
            match always {
                Stops(Amid::Fails(_)) | Fails(_, 1) => {
                    assert_eq!((summary.ok, summary.failed), (3, 1), "{context}");
                }
                Kept | Quarantined => assert_eq!(summary.requests, 4, "{context}"),
                Stops(..) | Fails(..) | Throttled | Waits => {
                    assert_eq!((summary.ok, end(&summary).0), (4, 0), "{context}");
                    assert_eq!(summary.requests, 4 + times, "{context}");
                }
            }
        }

        let night = night(fault, "");
        let summary = night.harvest().await;
        let (code, _) = end(&summary);
        let context = format!("always {fault}: {summary:?}");
        match always {
            Kept => assert_eq!((summary.ok, code), (4, 0), "{context}"),
            Quarantined => assert_eq!((summary.ok, summary.quarantined), (3, 1), "{context}"),
            Fails(class, attempts) => {
                assert_eq!((summary.ok, summary.failed, code), (3, 1, 3), "{context}");
                assert_eq!(summary.failures.get(class), Some(&1), "{context}");
                assert_eq!(summary.requests, 3 + attempts, "{context}");
            }
            Stops(Amid::Fails(class)) => {
                assert_eq!((summary.ok, summary.failed, code), (3, 1, 3), "{context}");
                assert_eq!(summary.failures.get(class), Some(&1), "{context}");
                assert_eq!(summary.requests, 4, "{context}");
            }
            Stops(Amid::Waits) => {
                assert_eq!((summary.ok, summary.pending, code), (3, 1, 4), "{context}");
                // Up to two more attempts for each answer in between.
                assert!((8..=11).contains(&summary.requests), "{context}");
            }
            Throttled => {
                assert_eq!((summary.ok, summary.failed, code), (3, 1, 3), "{context}");
                assert_eq!(summary.failures.get("throttled"), Some(&1), "{context}");
                assert!((11..=14).contains(&summary.requests), "{context}");
            }
            Waits => {
                assert_eq!((summary.ok, summary.pending, code), (3, 1, 4), "{context}");
                assert!(summary.requests < 200, "{context}");
            }
        }
        let stats = night.mock.stats();
        assert!(
            stats.bodies_by_times_billed.keys().all(|times| *times <= 6),
            "{context}"
        );
    }
}

/// Faults of the mock that are not in the table have tests of their own.
#[test]
fn fault_matrix_covers_every_fault() {
    let elsewhere = [
        "huge body",
        "logprobs fewer",
        "logprobs inf",
        "logprobs duplicates",
        "logprobs without chosen",
    ];
    let known: BTreeSet<String> = FAULTS
        .iter()
        .map(|(fault, _)| fault.split('"').nth(1).unwrap().to_string())
        .chain(elsewhere.map(String::from))
        .collect();
    for kind in FaultKind::all() {
        let name = serde_json::to_value(kind).unwrap();
        let name = name.as_str().unwrap().to_string();
        assert!(known.contains(&name), "{name} is in no test");
    }
}

/// Below HTTP, over real TCP: each of these costs one attempt.
#[tokio::test(flavor = "multi_thread")]
async fn fault_matrix_over_tcp_matches_simulation() {
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
            // An answer of 64 MiB is not requested again.
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
    for (kind, without) in [
        ("logprobs null", 1),
        ("logprobs fewer", 1),
        ("logprobs nan", 0),
        ("logprobs inf", 0),
        ("logprobs sentinel", 0),
        ("logprobs duplicates", 0),
        ("logprobs without chosen", 0),
    ] {
        let night = night(&format!("kind = \"{kind}\""), "");
        let summary = night.harvest().await;
        assert_eq!(
            (summary.ok, summary.without_logprobs),
            (4, without),
            "{kind}: {:?}",
            summary.without_logprobs_because
        );
        for record in night.run.records() {
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

/// Truncated and refused answers have been paid for and are not bought again.
#[tokio::test(start_paused = true)]
async fn answered_rows_are_not_requested_again() {
    for kind in ["length", "refusal", "content_filter", "null content"] {
        let night = night(&format!("kind = \"{kind}\""), "");
        night.harvest().await;
        let again = night.harvest().await;
        assert_eq!((again.requests, again.cached), (0, 4), "{kind}");
        assert_eq!(night.mock.stats().billed.answers, 4, "{kind}");
    }
}
