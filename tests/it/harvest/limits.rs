//! Rate limits, measured on the requests as sent, on the paused clock.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use distill::client::transport::{HttpReply, Transport, TransportError};
use distill::clock::WallClock;
use distill::config::{Durability, TeacherConfig};
use distill::exit::Exit;
use distill::harvest::{self, Environment};
use distill::report::summary::HarvestSummary;
use distill::signal::Signals;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use proptest::prelude::*;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::{Instant, sleep};

use super::nights::{SimulatedRun, paused_runtime};
use super::{Run, quiet_options};
use crate::fault_server::completion;

/// Send time of a request, and its tokens as the limits count them.
#[derive(Debug, Clone, Copy)]
struct SentRequest {
    at: Instant,
    tokens: u64,
}

/// A teacher that records its requests and answers after `latency`. It refuses each request whose number is a multiple
/// of `refuse_every`, with a `Retry-After`.
struct RecordingTeacher {
    sent: Mutex<Vec<SentRequest>>,
    /// Start and end of the wait that each `Retry-After` demands.
    waits: Mutex<Vec<(Instant, Instant)>>,
    latency: Duration,
    refuse_every: usize,
    retry_after: Duration,
}

impl Transport for RecordingTeacher {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let at = Instant::now();
            let number = {
                let mut sent = self.sent.lock().unwrap();
                let max_tokens = body["max_completion_tokens"].as_u64().unwrap();
                sent.push(SentRequest {
                    at,
                    tokens: (body.to_string().len() as u64).div_ceil(4) + max_tokens,
                });
                sent.len()
            };
            sleep(self.latency).await;
            let reply = |status, headers, body: Value| {
                Ok(HttpReply::complete(
                    status,
                    headers,
                    body.to_string().into(),
                ))
            };
            if number.is_multiple_of(self.refuse_every) {
                let now = Instant::now();
                let wait = (now, now + self.retry_after);
                self.waits.lock().unwrap().push(wait);
                let mut headers = HeaderMap::new();
                let milliseconds = self.retry_after.as_millis().to_string();
                headers.insert("retry-after-ms", milliseconds.parse().unwrap());
                return reply(429, headers, json!({"error": {"message": "slow down"}}));
            }
            reply(200, HeaderMap::new(), completion("x", 0))
        }
        .boxed()
    }
}

async fn harvest(run: &Run, transports: Vec<Arc<dyn Transport>>) -> anyhow::Result<HarvestSummary> {
    let (_sender, receiver) = unbounded_channel();
    let signals = Signals::from_channel(receiver);
    let environment = Environment {
        transports,
        clock: WallClock::system(),
        storage: distill::cache::plain_storage(),
    };
    harvest::run_in(environment, &run.config, quiet_options(), signals).await
}

/// Returns the largest sum of `weight` over the requests of any minute.
fn busiest_minute(sent: &[SentRequest], weight: impl Fn(&SentRequest) -> u64) -> u64 {
    let (mut first, mut sum, mut largest_sum) = (0, 0, 0);
    for request in sent {
        sum += weight(request);
        while request.at - sent[first].at >= Duration::from_secs(60) {
            sum -= weight(&sent[first]);
            first += 1;
        }
        largest_sum = largest_sum.max(sum);
    }
    largest_sum
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn minute_limits_and_waits_are_respected(
        requests_per_minute in proptest::option::of(1u32..2_000),
        tokens_per_minute in proptest::option::of(200u32..200_000),
        concurrency in 1usize..100,
        latency in 0u64..20_000,
        refuse_every in 2usize..40,
        retry_after in 1u64..90_000,
        rows in 1usize..200,
        lengths in 1usize..200,
    ) {
        let prompts: Vec<_> = (0..rows)
            .map(|row| format!("{row} {}", "x".repeat(row * 37 % lengths)))
            .collect();
        let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
        let mut run = Run::at("http://localhost:1/v1", &prompts);
        run.config.cache.durability = Durability::None;
        run.config.sampling.max_tokens = 20;
        run.config.limits.requests_per_minute = requests_per_minute;
        run.config.limits.tokens_per_minute = tokens_per_minute;
        run.config.limits.concurrency = concurrency;
        run.config.retry.max_outage = Duration::from_secs_f64(1e6);
        let teacher = Arc::new(RecordingTeacher {
            sent: Mutex::default(),
            waits: Mutex::default(),
            latency: Duration::from_millis(latency),
            refuse_every,
            retry_after: Duration::from_millis(retry_after),
        });
        let summary = paused_runtime().block_on(harvest(&run, vec![teacher.clone()])).unwrap();
        prop_assert_eq!(summary.ok, rows as u64);
        let sent = teacher.sent.lock().unwrap();
        let largest = sent.iter().map(|request| request.tokens).max().unwrap();
        // A limit allows a burst of one second, or of one request if that is larger.
        if let Some(limit) = requests_per_minute.map(u64::from) {
            let requests = busiest_minute(&sent, |_| 1);
            prop_assert!(requests <= limit + (limit / 60).max(1), "{} of {}", requests, limit);
        }
        if let Some(limit) = tokens_per_minute.map(u64::from) {
            let tokens = busiest_minute(&sent, |request| request.tokens);
            prop_assert!(tokens <= limit + (limit / 60).max(largest), "{} of {}", tokens, limit);
        }
        for (start, end) in teacher.waits.lock().unwrap().iter() {
            let early = sent.iter().filter(|request| request.at > *start && request.at < *end);
            prop_assert_eq!(early.count(), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn rate_limit_is_fully_used() {
    for (requests, tokens) in [(3_000, None), (3_000, Some(100_000)), (60, None)] {
        let simulated = SimulatedRun::new(
            "[answers]\nlatency_s = 2.0",
            requests as usize * 10,
            |config| {
                config.limits.requests_per_minute = Some(requests);
                config.limits.tokens_per_minute = tokens;
                config.limits.concurrency = 256;
                config.sampling.max_tokens = 16;
            },
        );
        let summary = simulated.harvest().await;
        assert_eq!(summary.ok, u64::from(requests) * 10);
        let share = summary.used[0].share().unwrap();
        assert!(
            (0.98..1.02).contains(&share),
            "{requests} {tokens:?}: {share}"
        );
    }
}

/// Limits that the config does not set are read from the server's headers, and their changes are followed.
#[tokio::test(start_paused = true)]
async fn rate_limit_headers_prevent_refusals() {
    for dialect in ["openai", "groq", "anthropic", "together", "fireworks"] {
        let script = format!(
            r#"
            [answers]
            latency_s = [0.5, 2.0]
            [limits]
            requests_per_minute = 600
            headers = "{dialect}"
            changes = [{{ at_s = 300.0, factor = 0.5 }}, {{ at_s = 600.0, factor = 1.0 }}]
            "#
        );
        let simulated = SimulatedRun::new(&script, 8_000, |config| config.limits.concurrency = 200);
        let summary = simulated.harvest().await;
        assert_eq!(summary.ok, 8_000, "{dialect}");
        let stats = simulated.mock.stats();
        let refused = stats.throttled as f64 / stats.requests as f64;
        // When a limit halves, the requests in flight exceed it.
        assert!(refused < 0.02, "{dialect}: {refused} {stats:?}");
        // A full bucket has 600 requests. Then 600 requests per minute are admitted, and half of that for five minutes.
        let min_seconds = (8_000.0 - 600.0 + 1_500.0) / 600.0 * 60.0;
        assert!(
            stats.seconds < 1.15 * min_seconds + 60.0,
            "{dialect}: {} s, at least {min_seconds} s are needed",
            stats.seconds
        );
    }
}

#[tokio::test(start_paused = true)]
async fn server_limits_without_headers_are_adapted_to() {
    let limits = [
        "window = \"fixed_minute\"\nrequests_per_minute = 300",
        "window = \"sliding_minute\"\nrequests_per_minute = 300",
        "window = \"bucket\"\nrequests_per_minute = 300\nburst_s = 1.0",
        "concurrency = 8",
        "load_capacity = 8",
        "requests_per_minute = 300\nchanges = [{ at_s = 60.0, factor = 0.5 }, { at_s = 120.0, factor = 2.0 }]",
    ];
    for limit in limits {
        for retry_after in ["none", "seconds", "date", "words", "garbage"] {
            let script = format!(
                "[answers]\nlatency_s = [0.5, 1.5]\n[limits]\nheaders = \"none\"\n\
                 retry_after = \"{retry_after}\"\n{limit}"
            );
            let simulated =
                SimulatedRun::new(&script, 2_000, |config| config.limits.concurrency = 64);
            let summary = simulated.harvest().await;
            assert_eq!(summary.ok, 2_000, "{script}");
            let stats = simulated.mock.stats();
            assert_eq!(simulated.bought_twice(&stats), 0, "{script}");
            let refused = stats.throttled as f64 / stats.requests as f64;
            assert!(refused < 0.35, "{script}: {refused} {stats:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn daily_limit_holds_over_restarts() {
    let simulated = SimulatedRun::new("[answers]\nlatency_s = 1.0", 1_000, |config| {
        config.limits.requests_per_day = Some(300);
        config.limits.concurrency = 10;
    });
    let mut kills = 0;
    let started = Instant::now();
    let summary = loop {
        let kill_after = (kills < 20).then_some(Duration::from_secs(5));
        if let Some(summary) = simulated.harvest_until_kill(kill_after).await {
            break summary;
        }
        kills += 1;
        let days = started.elapsed().as_secs() / 86_400 + 1;
        assert!(simulated.mock.stats().requests <= 300 * days);
    };
    // Waits for the daily limit do not count as time in which requests could be sent.
    assert!(summary.seconds > 100_000.0 && summary.used[0].open_s < 10_000.0);
    let stats = simulated.mock.stats();
    let days = stats.seconds / 86_400.0;
    assert!((2.9..3.6).contains(&days), "{days} days");
    assert_eq!(simulated.run.records().len(), 1_000);
}

#[tokio::test(start_paused = true)]
async fn request_over_server_limit_fails_with_reason() {
    let script = r#"
        [limits]
        tokens_per_minute = 2000
    "#;
    let simulated = SimulatedRun::new(script, 20, |config| {
        config.sampling.max_tokens = 100;
        config.limits.concurrency = 2;
    });
    let long = "word ".repeat(4_000);
    let prompts = format!("short\n{long}\nanother");
    std::fs::write(&simulated.run.config.prompts.source, prompts).unwrap();
    let summary = simulated.harvest().await;
    assert_eq!((summary.ok, summary.failed), (2, 1), "{summary:?}");
    assert_eq!(summary.failures["over the limit"], 1);
    let message = simulated.run.failures()[0]["message"]
        .as_str()
        .unwrap()
        .to_string();
    assert!(message.contains("2000"), "{message}");
    assert_eq!(Exit::code_of(summary.error.as_ref().unwrap()), 3);
}

/// Without the feature `redis`, a config that was not validated does not lead to unlimited requests.
#[cfg(not(feature = "redis"))]
#[tokio::test(start_paused = true)]
async fn shared_limits_without_redis_feature_are_an_error() {
    let simulated = SimulatedRun::new("", 3, |config| {
        config.limits.requests_per_minute = Some(60);
        config.limits.shared = Some("redis://localhost".into());
    });
    let teacher: Arc<dyn Transport> = Arc::new(simulated.teacher());
    let error = harvest(&simulated.run, vec![teacher]).await.unwrap_err();
    assert!(error.to_string().contains("--features redis"), "{error}");
    assert_eq!(
        (Exit::code_of(&error), simulated.mock.stats().requests),
        (2, 0)
    );
}

#[test]
fn teachers_have_separate_limits() {
    let prompts: Vec<_> = (0..400).map(|number| number.to_string()).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::at("http://localhost:1/v1", &prompts);
    let teacher = |name: &str, rate| TeacherConfig {
        name: name.into(),
        model: name.into(),
        base_url: format!("http://localhost:1/{name}"),
        limits: Some(distill::config::LimitsConfig {
            requests_per_minute: Some(rate),
            ..distill::config::LimitsConfig::default()
        }),
        ..TeacherConfig::default()
    };
    run.config.teachers = vec![teacher("slow", 60), teacher("fast", 6_000)];
    run.config.prompts.teachers = distill::config::Assignment::All;
    run.config.cache.durability = Durability::None;
    let recording_teacher = || {
        Arc::new(RecordingTeacher {
            sent: Mutex::default(),
            waits: Mutex::default(),
            latency: Duration::from_secs(1),
            refuse_every: usize::MAX,
            retry_after: Duration::from_secs(1),
        })
    };
    let (slow, fast) = (recording_teacher(), recording_teacher());
    let summary = paused_runtime()
        .block_on(harvest(&run, vec![slow.clone(), fast.clone()]))
        .unwrap();
    assert_eq!((summary.total, summary.ok), (800, 800));
    let seconds = |teacher: &RecordingTeacher| {
        let sent = teacher.sent.lock().unwrap();
        assert_eq!(sent.len(), 400);
        (sent[399].at - sent[0].at).as_secs_f64()
    };
    let (slow, fast) = (seconds(&slow), seconds(&fast));
    assert!((395.0..405.0).contains(&slow), "{slow} s");
    // 32 requests at a time, of a second each.
    assert!(fast < 14.0, "{fast} s");
    let mut models: Vec<_> = run
        .records()
        .iter()
        .map(|record| record.request["model"].as_str().unwrap().to_string())
        .collect();
    models.sort();
    models.dedup();
    assert_eq!(models, ["fast", "slow"]);
}
