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

use super::nights::{Night, paused};
use super::{Run, quietly};
use crate::fault_server::completion;

/// Times and sizes of the requests sent.
#[derive(Debug, Clone, Copy)]
struct Departure {
    at: Instant,
    tokens: u64,
}

/// A teacher that records its requests, answers after `latency`, and refuses every `refuse`-th request with a
/// `Retry-After`.
struct Watching {
    departures: Mutex<Vec<Departure>>,
    /// Time at which each `Retry-After` allows the next request.
    closed: Mutex<Vec<(Instant, Instant)>>,
    latency: Duration,
    refuse: usize,
    retry_after: Duration,
}

impl Transport for Watching {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let at = Instant::now();
            let number = {
                let mut departures = self.departures.lock().unwrap();
                let max_tokens = body["max_completion_tokens"].as_u64().unwrap();
                departures.push(Departure {
                    at,
                    tokens: (body.to_string().len() as u64).div_ceil(4) + max_tokens,
                });
                departures.len()
            };
            sleep(self.latency).await;
            let reply = |status, headers, body: Value| {
                Ok(HttpReply::complete(
                    status,
                    headers,
                    body.to_string().into(),
                ))
            };
            if number.is_multiple_of(self.refuse) {
                let now = Instant::now();
                self.closed
                    .lock()
                    .unwrap()
                    .push((now, now + self.retry_after));
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
    let world = Environment {
        transports,
        clock: WallClock::system(),
        storage: distill::cache::plain_storage(),
    };
    harvest::run_in(world, &run.config, quietly(), signals).await
}

/// Largest amount sent in any minute.
fn busiest_minute(departures: &[Departure], weight: impl Fn(&Departure) -> u64) -> u64 {
    let (mut first, mut sum, mut most) = (0, 0, 0);
    for departure in departures {
        sum += weight(departure);
        while departure.at - departures[first].at >= Duration::from_secs(60) {
            sum -= weight(&departures[first]);
            first += 1;
        }
        most = most.max(sum);
    }
    most
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Row L1 of the test matrix.
    #[test]
    fn minute_limits_and_waits_are_respected(
        requests_per_minute in proptest::option::of(1u32..2_000),
        tokens_per_minute in proptest::option::of(200u32..200_000),
        concurrency in 1usize..100,
        latency in 0u64..20_000,
        refuse in 2usize..40,
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
        let teacher = Arc::new(Watching {
            departures: Mutex::default(),
            closed: Mutex::default(),
            latency: Duration::from_millis(latency),
            refuse,
            retry_after: Duration::from_millis(retry_after),
        });
        let summary = paused().block_on(harvest(&run, vec![teacher.clone()])).unwrap();
        prop_assert_eq!(summary.ok, rows as u64);
        let departures = teacher.departures.lock().unwrap();
        let largest = departures.iter().map(|departure| departure.tokens).max().unwrap();
        if let Some(limit) = requests_per_minute.map(u64::from) {
            let most = busiest_minute(&departures, |_| 1);
            prop_assert!(most <= limit + (limit / 60).max(1), "{} of {}", most, limit);
        }
        if let Some(limit) = tokens_per_minute.map(u64::from) {
            let most = busiest_minute(&departures, |departure| departure.tokens);
            prop_assert!(most <= limit + (limit / 60).max(largest), "{} of {}", most, limit);
        }
        for (refused_at, until) in teacher.closed.lock().unwrap().iter() {
            let early = departures
                .iter()
                .filter(|departure| departure.at > *refused_at && departure.at < *until);
            prop_assert_eq!(early.count(), 0);
        }
    }
}

/// Row L2: the limits are fully used.
#[tokio::test(start_paused = true)]
async fn rate_limit_is_fully_used() {
    for (requests, tokens) in [(3_000, None), (3_000, Some(100_000)), (60, None)] {
        let night = Night::new(
            "[answers]\nlatency_s = 2.0",
            requests as usize * 10,
            |config| {
                config.limits.requests_per_minute = Some(requests);
                config.limits.tokens_per_minute = tokens;
                config.limits.concurrency = 256;
                config.sampling.max_tokens = 16;
            },
        );
        let summary = night.harvest().await;
        assert_eq!(summary.ok, u64::from(requests) * 10);
        let share = summary.used[0].share().unwrap();
        assert!(
            (0.98..1.02).contains(&share),
            "{requests} {tokens:?}: {share}"
        );
    }
}

/// Limits that are not in the config are learned from the headers of the server and followed when they change.
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
        let night = Night::new(&script, 8_000, |config| config.limits.concurrency = 200);
        let summary = night.harvest().await;
        assert_eq!(summary.ok, 8_000, "{dialect}");
        let stats = night.mock.stats();
        let refused = stats.throttled as f64 / stats.requests as f64;
        // When a limit halves, the requests in flight exceed it.
        assert!(refused < 0.02, "{dialect}: {refused} {stats:?}");
        // 600 in the bucket, 600 per minute except for five minutes.
        let least = (8_000.0 - 600.0 + 1_500.0) / 600.0 * 60.0;
        assert!(
            stats.seconds < 1.15 * least + 60.0,
            "{dialect}: {} s, {least}",
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
            let night = Night::new(&script, 2_000, |config| config.limits.concurrency = 64);
            let summary = night.harvest().await;
            assert_eq!(summary.ok, 2_000, "{script}");
            let stats = night.mock.stats();
            assert_eq!(night.bought_twice(&stats), 0, "{script}");
            let wasted = stats.throttled as f64 / stats.requests as f64;
            assert!(wasted < 0.35, "{script}: {wasted} {stats:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn daily_limit_holds_over_restarts() {
    let night = Night::new("[answers]\nlatency_s = 1.0", 1_000, |config| {
        config.limits.requests_per_day = Some(300);
        config.limits.concurrency = 10;
    });
    let mut kills = 0;
    let begun = Instant::now();
    let summary = loop {
        let time = (kills < 20).then_some(Duration::from_secs(5));
        if let Some(summary) = night.harvest_for(time).await {
            break summary;
        }
        kills += 1;
        let day = (Instant::now() - begun).as_secs() / 86_400 + 1;
        assert!(night.mock.stats().requests <= 300 * day);
    };
    // Waits for the daily limit do not lower the concurrency.
    assert!(summary.seconds > 100_000.0 && summary.used[0].open_s < 10_000.0);
    let stats = night.mock.stats();
    let days = stats.seconds / 86_400.0;
    assert!((2.9..3.6).contains(&days), "{days} days");
    assert_eq!(night.run.records().len(), 1_000);
}

#[tokio::test(start_paused = true)]
async fn request_over_server_limit_fails_with_reason() {
    let script = r#"
        [limits]
        tokens_per_minute = 2000
    "#;
    let night = Night::new(script, 20, |config| {
        config.sampling.max_tokens = 100;
        config.limits.concurrency = 2;
    });
    let long = "word ".repeat(4_000);
    let prompts = format!("short\n{long}\nanother");
    std::fs::write(&night.run.config.prompts.source, prompts).unwrap();
    let summary = night.harvest().await;
    assert_eq!((summary.ok, summary.failed), (2, 1), "{summary:?}");
    assert_eq!(summary.failures["over the limit"], 1);
    let message = night.run.failures()[0]["message"]
        .as_str()
        .unwrap()
        .to_string();
    assert!(message.contains("2000"), "{message}");
    assert_eq!(Exit::code_of(summary.error.as_ref().unwrap()), 3);
}

/// A config that was not validated sends no unlimited requests.
#[cfg(not(feature = "redis"))]
#[tokio::test(start_paused = true)]
async fn shared_limits_without_redis_feature_are_an_error() {
    let night = Night::new("", 3, |config| {
        config.limits.requests_per_minute = Some(60);
        config.limits.shared = Some("redis://localhost".into());
    });
    let teacher: Arc<dyn Transport> = Arc::new(night.teacher());
    let error = harvest(&night.run, vec![teacher]).await.unwrap_err();
    assert!(error.to_string().contains("--features redis"), "{error}");
    assert_eq!((Exit::code_of(&error), night.mock.stats().requests), (2, 0));
}

#[test]
fn teachers_have_separate_limits_and_stop_separately() {
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
    let watching = |refuse| {
        Arc::new(Watching {
            departures: Mutex::default(),
            closed: Mutex::default(),
            latency: Duration::from_secs(1),
            refuse,
            retry_after: Duration::from_secs(1),
        })
    };
    let (slow, fast) = (watching(usize::MAX), watching(usize::MAX));
    let summary = paused()
        .block_on(harvest(&run, vec![slow.clone(), fast.clone()]))
        .unwrap();
    assert_eq!((summary.total, summary.ok), (800, 800));
    let seconds = |teacher: &Watching| {
        let departures = teacher.departures.lock().unwrap();
        assert_eq!(departures.len(), 400);
        (departures[399].at - departures[0].at).as_secs_f64()
    };
    assert!(
        (395.0..405.0).contains(&seconds(&slow)),
        "{}",
        seconds(&slow)
    );
    // 32 at a time, a second each.
    assert!(seconds(&fast) < 14.0, "{}", seconds(&fast));
    let mut models: Vec<_> = run
        .records()
        .iter()
        .map(|record| record.request["model"].as_str().unwrap().to_string())
        .collect();
    models.sort();
    models.dedup();
    assert_eq!(models, ["fast", "slow"]);
}
