//! Rate limits that several harvests share through Redis.

mod script;
mod secrets;
mod server;
mod silence;

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

use super::{Run, assert_adds_up, quietly};
use crate::fault_server::completion;
use server::Redis;

/// A teacher that answers after `latency`, and records the time and tokens of each request.
struct Noting {
    asked: Mutex<Vec<(Instant, u64)>>,
    latency: Duration,
}

impl Noting {
    fn new(milliseconds: u64) -> Arc<Noting> {
        Arc::new(Noting {
            asked: Mutex::default(),
            latency: Duration::from_millis(milliseconds),
        })
    }

    fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    /// Waits until it has received the given number of requests.
    async fn until(&self, count: usize) {
        while self.count() < count {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Transport for Noting {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let max_tokens = body["max_completion_tokens"].as_u64().unwrap();
            let tokens = (body.to_string().len() as u64).div_ceil(4) + max_tokens;
            self.asked.lock().unwrap().push((Instant::now(), tokens));
            tokio::time::sleep(self.latency).await;
            let body = completion("x", 0).to_string();
            Ok(HttpReply::complete(200, HeaderMap::new(), body.into()))
        }
        .boxed()
    }
}

/// A run of `rows` prompts under these limits, shared through `redis`.
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

async fn harvest(run: &Run, teacher: &Arc<Noting>) -> anyhow::Result<HarvestSummary> {
    let (_sender, receiver) = unbounded_channel();
    harvest_until(run, teacher, receiver).await
}

async fn harvest_until(
    run: &Run,
    teacher: &Arc<Noting>,
    signals: UnboundedReceiver<u8>,
) -> anyhow::Result<HarvestSummary> {
    let teacher: Arc<dyn Transport> = Arc::clone(teacher) as _;
    let world = Environment {
        transports: vec![teacher],
        clock: WallClock::system(),
        storage: distill::cache::plain_storage(),
    };
    let signals = Signals::from_channel(signals);
    let harvest = harvest::run_in(world, &run.config, quietly(), signals);
    let summary = tokio::time::timeout(Duration::from_secs(20), harvest)
        .await
        .expect("the run hangs")?;
    assert_adds_up(&summary);
    Ok(summary)
}

/// Runs several harvests concurrently, and returns the send times of all requests.
async fn together(runs: &[Run]) -> Vec<(Instant, u64)> {
    let teacher = Noting::new(5);
    let summaries = join_all(runs.iter().map(|run| harvest(run, &teacher))).await;
    for summary in summaries {
        let summary = summary.unwrap();
        assert_eq!((summary.ok, summary.total), (summary.total, summary.ok));
        assert!(summary.error.is_none(), "{summary:?}");
    }
    for run in runs {
        assert_eq!(run.records().len(), run.texts().len());
    }
    std::mem::take(&mut teacher.asked.lock().unwrap())
}

/// Checks that no interval has more requests than its rate and burst allow, and how much of that is used.
/// A request may be sent up to a quarter of a second after its permit.
#[track_caller]
fn assert_kept(departures: &[(Instant, u64)], per_second: f64, burst: f64, largest: f64) {
    for (first, (start, _)) in departures.iter().enumerate() {
        let mut sum = 0;
        for (end, amount) in &departures[first..] {
            sum += amount;
            let seconds = (*end - *start).as_secs_f64() + 0.25;
            let most = burst + per_second * seconds;
            assert!(sum as f64 <= most, "{sum} in {seconds} s");
        }
    }
    let all: u64 = departures.iter().map(|departure| departure.1).sum();
    let seconds = (departures[departures.len() - 1].0 - departures[0].0).as_secs_f64();
    let used = all as f64 / (burst - largest + per_second * seconds);
    assert!(seconds > 0.5 && used >= 0.9, "{used} used in {seconds} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_harvests_share_one_request_limit() {
    for processes in [2, 4] {
        let redis = Redis::start();
        let runs: Vec<_> = (0..processes)
            .map(|_| run(&redis, 160 / processes, per_minute(6_000)))
            .collect();
        let departures: Vec<_> = together(&runs).await.iter().map(|d| (d.0, 1)).collect();
        assert_eq!(departures.len(), 160);
        assert_kept(&departures, 100.0, 75.0, 1.0);
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
    let departures = together(&runs).await;
    assert_eq!(departures.len(), 120);
    let largest = departures
        .iter()
        .map(|departure| departure.1)
        .max()
        .unwrap();
    assert_kept(&departures, 4_000.0, 3_000.0, largest as f64);
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
    let teacher = Noting::new(0);
    let summary = harvest(&run, &teacher).await.unwrap();
    assert_eq!(summary.ok, 3_000);
    let asked = teacher.asked.lock().unwrap();
    let seconds = (asked[2_999].0 - asked[0].0).as_secs_f64();
    println!("{:.0} admissions a second", 3_000.0 / seconds);
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
    let teacher = Noting::new(0);
    let shared = harvest(&run, &teacher).await.unwrap_err();
    run.config.limits.shared = None;
    let own = harvest(&run, &teacher).await.unwrap_err();
    assert_eq!(shared.to_string(), own.to_string());
    assert!(own.to_string().contains("`limits.tokens_per_minute` = 10"));
    assert_eq!((Exit::code_of(&shared), teacher.count()), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_daily_limit_blocks_further_requests() {
    let redis = Redis::start();
    let limits = LimitsConfig {
        requests_per_day: Some(50),
        ..LimitsConfig::default()
    };
    let runs = [40, 40].map(|rows| run(&redis, rows, limits.clone()));
    let teacher = Noting::new(1);
    let (stop, signals): (Vec<_>, Vec<_>) = (0..2).map(|_| unbounded_channel()).unzip();
    let harvests = runs
        .iter()
        .zip(signals)
        .map(|(run, signals)| harvest_until(run, &teacher, signals));
    let stopping = async {
        teacher.until(40).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        for stop in &stop {
            // One harvest may have finished.
            let _ = stop.send(2);
        }
    };
    let (summaries, ()) = tokio::join!(join_all(harvests), stopping);
    let ok = summaries.iter().map(|summary| summary.as_ref().unwrap().ok);
    let left = teacher.count();
    assert_eq!(ok.sum::<u64>(), left as u64);
    // A delayed permit is lost.
    assert!((45..=50).contains(&left), "{left}");
    // A third harvest finds the daily limit used up.
    let late = run(&redis, 1, limits);
    let (_sender, signals) = unbounded_channel();
    let begun = tokio::time::timeout(
        Duration::from_millis(200),
        harvest_until(&late, &teacher, signals),
    );
    assert!(begun.await.is_err() && teacher.count() == left);
}
