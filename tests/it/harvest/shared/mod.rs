//! Rate limits that several harvests share through Redis.

mod outage;
mod scoring;
mod script;
mod secrets;
mod server;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use distill::client::transport::{HttpReply, Transport, TransportError};
use distill::clock::WallClock;
use distill::config::{Durability, LimitsConfig};
use distill::exit::Exit;
use distill::harvest::{self, Environment};
use distill::report::summary::HarvestSummary;
use distill::signal::Signals;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use reqwest::header::HeaderMap;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{Run, assert_adds_up, quiet_options};
use crate::fault_server::completion;
use server::Redis;

/// Send time of a request, and the amount of the limited quantity: its tokens, or 1 for a limit of requests.
type SentRequest = (Instant, u64);

/// A teacher that answers after `latency`, and records the time and tokens of each request.
struct RecordingTeacher {
    sent: Mutex<Vec<SentRequest>>,
    latency: Duration,
}

impl RecordingTeacher {
    fn new(latency_ms: u64) -> Arc<RecordingTeacher> {
        Arc::new(RecordingTeacher {
            sent: Mutex::default(),
            latency: Duration::from_millis(latency_ms),
        })
    }

    fn count(&self) -> usize {
        self.sent.lock().unwrap().len()
    }

    /// Waits until the teacher has received the given number of requests.
    async fn wait_for_requests(&self, count: usize) {
        while self.count() < count {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Transport for RecordingTeacher {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let max_tokens = body["max_completion_tokens"].as_u64().unwrap();
            let tokens = (body.to_string().len() as u64).div_ceil(4) + max_tokens;
            self.sent.lock().unwrap().push((Instant::now(), tokens));
            tokio::time::sleep(self.latency).await;
            let body = completion("x", 0).to_string();
            Ok(HttpReply::complete(200, HeaderMap::new(), body.into()))
        }
        .boxed()
    }
}

/// Creates a run of `rows` prompts under these limits, shared through `redis`.
fn run(redis: &Redis, rows: usize, limits: LimitsConfig) -> Run {
    run_at(&redis.url(), rows, limits)
}

fn run_at(url: &str, rows: usize, limits: LimitsConfig) -> Run {
    let prompts: Vec<_> = (0..rows).map(|row| format!("prompt {row:05}")).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::at("http://localhost:1/v1", &prompts);
    run.config.cache.durability = Durability::None;
    run.config.sampling.top_logprobs = 0;
    run.config.limits = LimitsConfig {
        shared: Some(url.into()),
        ..limits
    };
    run
}

fn per_minute(requests: u32) -> LimitsConfig {
    LimitsConfig {
        requests_per_minute: Some(requests),
        ..LimitsConfig::default()
    }
}

async fn harvest(run: &Run, teacher: &Arc<RecordingTeacher>) -> anyhow::Result<HarvestSummary> {
    let (_sender, receiver) = unbounded_channel();
    harvest_until(run, teacher, receiver).await
}

async fn harvest_until(
    run: &Run,
    teacher: &Arc<RecordingTeacher>,
    signals: UnboundedReceiver<u8>,
) -> anyhow::Result<HarvestSummary> {
    let teacher: Arc<dyn Transport> = Arc::clone(teacher) as _;
    let environment = Environment {
        transports: vec![teacher],
        clock: WallClock::system(),
        storage: distill::cache::plain_storage(),
    };
    let signals = Signals::from_channel(signals);
    let harvest = harvest::run_in(environment, &run.config, quiet_options(), signals);
    let summary = tokio::time::timeout(Duration::from_secs(20), harvest)
        .await
        .expect("the run hangs")?;
    assert_adds_up(&summary);
    Ok(summary)
}

/// Runs several harvests concurrently. Returns the requests of all of them.
async fn harvest_concurrently(runs: &[Run]) -> Vec<SentRequest> {
    let teacher = RecordingTeacher::new(5);
    let summaries = join_all(runs.iter().map(|run| harvest(run, &teacher))).await;
    for summary in summaries {
        let summary = summary.unwrap();
        assert_eq!(summary.ok, summary.total);
        assert!(summary.error.is_none(), "{summary:?}");
    }
    std::mem::take(&mut teacher.sent.lock().unwrap())
}

/// Checks that no interval exceeds its rate and burst, and that at least 90 % of the limit is used. `largest` is the
/// largest amount of a request. A request may be sent up to a quarter of a second after its permit.
#[track_caller]
fn assert_limit_is_kept_and_used(sent: &[SentRequest], per_second: f64, burst: f64, largest: f64) {
    for (first, (start, _)) in sent.iter().enumerate() {
        let mut sum = 0;
        for (end, amount) in &sent[first..] {
            sum += amount;
            let seconds = (*end - *start).as_secs_f64() + 0.25;
            let allowed = burst + per_second * seconds;
            assert!(sum as f64 <= allowed, "{sum} in {seconds} s");
        }
    }
    let total: u64 = sent.iter().map(|(_, amount)| amount).sum();
    let seconds = (sent[sent.len() - 1].0 - sent[0].0).as_secs_f64();
    let used = total as f64 / (burst - largest + per_second * seconds);
    assert!(seconds > 0.5 && used >= 0.9, "{used} used in {seconds} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_harvests_share_one_request_limit() {
    for processes in [2, 4] {
        let redis = Redis::start();
        let runs: Vec<_> = (0..processes)
            .map(|_| run(&redis, 160 / processes, per_minute(6_000)))
            .collect();
        let sent = harvest_concurrently(&runs).await;
        let sent: Vec<_> = sent.iter().map(|(at, _)| (*at, 1)).collect();
        assert_eq!(sent.len(), 160);
        assert_limit_is_kept_and_used(&sent, 100.0, 75.0, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_harvests_share_one_token_limit() {
    let redis = Redis::start();
    let limits = LimitsConfig {
        tokens_per_minute: Some(240_000),
        ..per_minute(60_000)
    };
    let mut runs: Vec<_> = (0..2).map(|_| run(&redis, 60, limits.clone())).collect();
    // One harvest has larger requests than the other.
    runs[1].config.sampling.max_tokens = 48;
    let sent = harvest_concurrently(&runs).await;
    assert_eq!(sent.len(), 120);
    let largest = sent.iter().map(|(_, tokens)| *tokens).max().unwrap();
    assert_limit_is_kept_and_used(&sent, 4_000.0, 3_000.0, largest as f64);
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_limits_admit_a_thousand_requests_per_second() {
    let redis = Redis::start();
    let limits = LimitsConfig {
        concurrency: 256,
        tokens_per_minute: Some(u32::MAX),
        ..per_minute(6_000_000)
    };
    let run = run(&redis, 3_000, limits);
    let teacher = RecordingTeacher::new(0);
    let summary = harvest(&run, &teacher).await.unwrap();
    assert_eq!(summary.ok, 3_000);
    let sent = teacher.sent.lock().unwrap();
    let seconds = (sent[2_999].0 - sent[0].0).as_secs_f64();
    println!("{:.0} admissions per second", 3_000.0 / seconds);
    assert!(seconds < 3.0, "{seconds} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn request_over_shared_limit_is_an_error() {
    let redis = Redis::start();
    let limits = LimitsConfig {
        tokens_per_minute: Some(10),
        ..LimitsConfig::default()
    };
    let mut run = run(&redis, 1, limits);
    let teacher = RecordingTeacher::new(0);
    let shared_error = harvest(&run, &teacher).await.unwrap_err();
    run.config.limits.shared = None;
    let local_error = harvest(&run, &teacher).await.unwrap_err().to_string();
    assert_eq!(shared_error.to_string(), local_error);
    assert!(local_error.contains("`limits.tokens_per_minute` = 10"));
    assert_eq!((Exit::code_of(&shared_error), teacher.count()), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_daily_limit_blocks_further_requests() {
    let redis = Redis::start();
    let limits = LimitsConfig {
        requests_per_day: Some(50),
        ..LimitsConfig::default()
    };
    let runs = [40, 40].map(|rows| run(&redis, rows, limits.clone()));
    let teacher = RecordingTeacher::new(1);
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..2).map(|_| unbounded_channel()).unzip();
    let harvests = runs
        .iter()
        .zip(receivers)
        .map(|(run, receiver)| harvest_until(run, &teacher, receiver));
    let stop = async {
        teacher.wait_for_requests(40).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        for sender in &senders {
            // One harvest may have finished.
            let _ = sender.send(2);
        }
    };
    let (summaries, ()) = tokio::join!(join_all(harvests), stop);
    let ok = summaries.iter().map(|summary| summary.as_ref().unwrap().ok);
    let sent = teacher.count();
    assert_eq!(ok.sum::<u64>(), sent as u64);
    // A permit that arrives after the stop is lost.
    assert!((45..=50).contains(&sent), "{sent}");
    // A third harvest waits, because the daily limit is used up.
    let third = run(&redis, 1, limits);
    let (_sender, receiver) = unbounded_channel();
    let harvest = tokio::time::timeout(
        Duration::from_millis(200),
        harvest_until(&third, &teacher, receiver),
    );
    assert!(harvest.await.is_err() && teacher.count() == sent);
}
