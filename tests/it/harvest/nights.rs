//! Simulated runs of a night against a scripted teacher, on the paused clock, with faults and kills. All invariants
//! must hold at the end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use distill::client::transport::{HttpReply, Transport, TransportError};
use distill::clock::WallClock;
use distill::config::{Config, Durability};
use distill::harvest::{self, Environment};
use distill::mock::Mock;
use distill::mock::request::MockRequest;
use distill::mock::response::MockResponse;
use distill::mock::script::Script;
use distill::mock::stats::MockStats;
use distill::report::summary::HarvestSummary;
use distill::signal::Signals;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use reqwest::header::HeaderMap;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep};

use super::{Run, assert_adds_up, quietly};

/// A scripted teacher that replaces the network.
pub struct Simulated {
    pub mock: Arc<Mock>,
    pub timeout: Duration,
}

impl Transport for Simulated {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let body = body.to_string();
            let answer = async {
                match self.mock.respond(MockRequest::chat(body.as_bytes())).await {
                    MockResponse::Complete(reply) => Ok(whole(reply)),
                    MockResponse::Refused => {
                        Err(TransportError::Unreachable("connection refused".into()))
                    }
                    MockResponse::StallInBody(_) => std::future::pending().await,
                    MockResponse::Drip {
                        reply,
                        slow,
                        interval,
                    } => {
                        sleep(interval * slow as u32).await;
                        Ok(whole(reply))
                    }
                    MockResponse::Reset
                    | MockResponse::ResetInBody(_)
                    | MockResponse::ShortBody(_)
                    | MockResponse::UnfinishedChunks(_) => {
                        Err(TransportError::Broken("reset".into()))
                    }
                }
            };
            let reply = tokio::time::timeout(self.timeout, answer).await;
            reply.unwrap_or(Err(TransportError::Timeout))
        }
        .boxed()
    }
}

pub fn whole(reply: distill::mock::response::MockReply) -> HttpReply {
    let mut headers = HeaderMap::new();
    for (name, value) in &reply.headers {
        let name: reqwest::header::HeaderName = name.parse().unwrap();
        headers.insert(name, value.parse().unwrap());
    }
    HttpReply::complete(reply.status, headers, reply.body)
}

/// A simulated night: the run folder, the teacher, and a wall clock that follows tokio's clock.
pub struct Night {
    pub run: Run,
    pub mock: Arc<Mock>,
    pub clock: WallClock,
}

pub const EVENING: &str = "2026-11-22T20:00:00Z";

impl Night {
    pub fn new(script: &str, prompts: usize, change: impl FnOnce(&mut Config)) -> Night {
        let script = Script::parse("night.toml".as_ref(), script).unwrap();
        let prompts: Vec<_> = (0..prompts)
            .map(|number| format!("prompt number {number}"))
            .collect();
        let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
        let mut run = Run::at("http://localhost:1/v1", &prompts);
        run.config.teacher.model = "mock".into();
        run.config.retry = distill::config::RetryConfig::default();
        run.config.cache.durability = Durability::None;
        run.config.sampling.top_logprobs = 0;
        run.config.schedule.timezone = Some("UTC".parse().unwrap());
        change(&mut run.config);
        let (start, evening) = (Instant::now(), EVENING.parse::<jiff::Timestamp>().unwrap());
        let clock = WallClock::from_fn(move || {
            let elapsed = jiff::SignedDuration::try_from(start.elapsed()).unwrap();
            evening.checked_add(elapsed).unwrap()
        });
        Night {
            run,
            mock: Arc::new(Mock::with_wall_start(script, SystemTime::from(evening))),
            clock,
        }
    }

    /// Runs until the harvest ends, or drops it after `life`, like `kill -9`. Returns None if it was killed.
    pub async fn harvest_for(&self, life: Option<Duration>) -> Option<HarvestSummary> {
        let (_sender, receiver) = unbounded_channel();
        self.harvest_over(self.teacher(), life, receiver)
            .await
            .unwrap()
    }

    /// Runs like [`Night::harvest_for`], with another transport.
    pub async fn harvest_over(
        &self,
        transport: impl Transport + 'static,
        life: Option<Duration>,
        signals: UnboundedReceiver<u8>,
    ) -> anyhow::Result<Option<HarvestSummary>> {
        let world = Environment {
            transports: vec![Arc::new(transport)],
            clock: self.clock.clone(),
            storage: distill::cache::plain_storage(),
        };
        let signals = Signals::from_channel(signals);
        let run = harvest::run_in(world, &self.run.config, quietly(), signals);
        let summary = match life {
            None => run.await?,
            Some(life) => match tokio::time::timeout(life, run).await {
                Ok(summary) => summary?,
                Err(_) => return Ok(None),
            },
        };
        assert_adds_up(&summary);
        Ok(Some(summary))
    }

    pub fn teacher(&self) -> Simulated {
        Simulated {
            mock: Arc::clone(&self.mock),
            timeout: self.run.config.teacher.timeout,
        }
    }

    pub async fn harvest(&self) -> HarvestSummary {
        self.harvest_for(None).await.unwrap()
    }

    /// Number of answers billed in excess of one per row.
    pub fn bought_twice(&self, stats: &MockStats) -> u64 {
        stats.billed.answers - self.run.records().len() as u64
    }
}

/// Totals of a night, over all its processes.
#[derive(Debug, Default)]
struct Totals {
    requests: u64,
    turns: u64,
    lost: u64,
    kills: u64,
    lives: u64,
}

async fn night(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let prompts = 20_000;
    let requests_per_minute = 100 + random.u32(0..400);
    let outage = random.u32(600..6_000);
    let script = format!(
        r#"
        seed = {seed}
        [answers]
        tokens = [5, 60]
        latency_s = [0.5, {latency}]
        [limits]
        requests_per_minute = {requests_per_minute}
        headers = "{headers}"
        retry_after = "{retry_after}"
        changes = [{{ at_s = 2000.0, factor = 0.5 }}, {{ at_s = 3000.0, factor = 1.0 }}]
        [[faults]]
        kind = "{outage_kind}"
        from_s = {outage}.0
        to_s = {outage_end}.0
        [[faults]]
        kind = "http 500"
        share = {share}
        [[faults]]
        kind = "reset in body"
        share = {share}
        [[faults]]
        kind = "stall"
        share = 0.001
        [[faults]]
        kind = "truncated"
        share = {share}
        [[faults]]
        kind = "no usage"
        share = 0.01
        "#,
        latency = 1 + random.u32(0..20),
        headers = random.choice(["openai", "none", "groq"]).unwrap(),
        retry_after = random.choice(["seconds", "none", "ms"]).unwrap(),
        outage_kind = random.choice(["http 503", "refused", "stall"]).unwrap(),
        outage_end = outage + 1_800,
        share = random.f64() * 0.02,
    );
    let night = Night::new(&script, prompts, |config| {
        config.limits.concurrency = 16 + random.usize(0..64);
        config.limits.requests_per_minute = random.bool().then_some(requests_per_minute);
        config.teacher.timeout = Duration::from_secs_f64(120.0);
        config.retry.max_outage = Duration::from_secs_f64(7_200.0);
        config.price.input = Some(1.0);
        config.price.output = Some(4.0);
        config.price.as_of = Some("2026-11-22".parse().unwrap());
        config.budget.usd = Some(50.0);
    });
    let concurrency = night.run.config.limits.concurrency as u64;
    let mut totals = Totals::default();
    let last = loop {
        totals.lives += 1;
        let life = random
            .bool()
            .then(|| Duration::from_secs(random.u64(60..4_000)));
        let Some(summary) = night.harvest_for(life).await else {
            totals.kills += 1;
            continue;
        };
        totals.requests += summary.requests;
        totals.turns += summary.turns;
        totals.lost += summary.attempts_lost;
        // In some nights one row meets six faults: rerun the command for it.
        if summary.pending + summary.failed == 0 || totals.lives > 200 {
            break summary;
        }
    };
    let stats = night.mock.stats();
    let context = format!("seed {seed}: {totals:?} {last:?} {stats:?}");

    // Every row has exactly one answer.
    let records = night.run.records();
    let mut ids: Vec<_> = records.iter().map(|record| &record.prompt_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!((ids.len(), records.len()), (prompts, prompts), "{context}");
    // Only answers in flight at a kill, or lost by the network, are bought twice.
    let twice = night.bought_twice(&stats);
    assert!(
        twice <= totals.kills * concurrency + stats.faults.values().sum::<u64>(),
        "{context}"
    );
    // The bill is within the budget and within the reported cost.
    let bill =
        (stats.billed.prompt_tokens as f64 + 4.0 * stats.billed.completion_tokens as f64) / 1e6;
    let said = last.run_folder_usd.unwrap();
    assert!(
        bill <= said + 1e-9 && said <= 50.0,
        "{bill} {said} {context}"
    );
    // The configured limit holds, retries included, and limits reported by the server are followed.
    let is_paced = night.run.config.limits.requests_per_minute.is_some();
    if is_paced {
        let burst = u64::from(requests_per_minute.div_ceil(60)) + totals.lives;
        assert!(
            stats.most_requests_in_a_minute <= u64::from(requests_per_minute) + burst,
            "{context}"
        );
    }
    let wasted = stats.requests - records.len() as u64;
    assert!(wasted * 5 <= stats.requests, "{wasted} retries: {context}");
    // No busy loop: the dispatcher iterates once per request, reply or second.
    assert!(
        totals.turns <= 4 * totals.requests + 2 * 24 * 3_600,
        "{context}"
    );
    println!(
        "seed {seed}: {} rows, 0 lost, {twice} bought twice over {} kills, {:.1} % retries, \
         ${bill:.4} billed of ${said:.4} said",
        records.len(),
        totals.kills,
        100.0 * wasted as f64 / stats.requests as f64,
    );
}

/// `DISTILL_NIGHTS=2000 cargo test nights` simulates more nights.
#[test]
fn simulated_nights_keep_all_invariants() {
    on_paused_clocks(5, night);
}

/// Simulates one night per seed: `DISTILL_NIGHTS` seeds, or `usually` if it is unset.
pub fn on_paused_clocks(usually: u64, night: impl AsyncFn(u64)) {
    let nights = std::env::var("DISTILL_NIGHTS");
    for seed in 0..nights.map_or(usually, |nights| nights.parse().unwrap()) {
        paused().block_on(night(seed));
    }
}

pub fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn requests_stay_in_window_and_deadline_ends_run() {
    let night = Night::new("[answers]\nlatency_s = 1.0", 10_000, |config| {
        config.limits.requests_per_minute = Some(10);
        config.schedule.window = Some("22:00-02:00".parse().unwrap());
        config.schedule.deadline = Some("2026-11-24 23:00".parse().unwrap());
    });
    let summary = night.harvest().await;
    let error = summary.error.as_ref().unwrap();
    assert_eq!(distill::exit::Exit::code_of(error), 4, "{error:#}");
    // Four hours in each of two nights, and one hour of the third.
    assert!((5_390..=5_410).contains(&summary.ok), "{summary:?}");
    for record in night.run.records() {
        let hour: u32 = record.timing.sent_at[11..13].parse().unwrap();
        assert!([22, 23, 0, 1].contains(&hour), "{}", record.timing.sent_at);
    }
    assert!((51..=52).contains(&summary.hours.len()));
    assert!(
        summary.hours[0].closed_s > 3_590.0,
        "{:?}",
        summary.hours[0]
    );
    let share = summary.used[0].share().unwrap();
    assert!(share > 0.99, "{share}");
}

#[tokio::test(start_paused = true)]
async fn wall_clock_jumps_of_a_day_are_survived() {
    for jump in [-86_400, 86_400] {
        let mut night = Night::new("[answers]\nlatency_s = 1.0", 3_000, |config| {
            config.limits.requests_per_minute = Some(20);
            config.schedule.window = Some("22:00-02:00".parse().unwrap());
        });
        let clock = night.clock.clone();
        let start = Instant::now();
        night.clock = WallClock::from_fn(move || {
            let jumped = start.elapsed() > Duration::from_secs(10_000);
            let jump = jiff::SignedDuration::from_secs(if jumped { jump } else { 0 });
            clock.now().checked_add(jump).unwrap()
        });
        let summary = night.harvest().await;
        assert_eq!((summary.ok, summary.pending), (3_000, 0));
        assert!(
            start.elapsed() < Duration::from_secs(20_000),
            "it waited for a day that never was"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn budget_is_never_exceeded_under_faults() {
    let script = r#"
        [answers]
        tokens = 100
        latency_s = [0.5, 5.0]
        [[faults]]
        kind = "reset in body"
        share = 0.1
        [[faults]]
        kind = "no usage"
        share = 0.1
    "#;
    let night = Night::new(script, 5_000, |config| {
        config.sampling.max_tokens = 100;
        config.price.input = Some(1.0);
        config.price.output = Some(10.0);
        config.budget.usd = Some(0.5);
    });
    let mut lives = 0;
    let last = loop {
        lives += 1;
        assert!(lives < 100);
        if let Some(summary) = night
            .harvest_for((lives < 8).then_some(Duration::from_secs(7)))
            .await
        {
            break summary;
        }
        let stats = night.mock.stats();
        let bill = stats.billed.prompt_tokens as f64 + 10.0 * stats.billed.completion_tokens as f64;
        assert!(bill / 1e6 <= 0.5, "{stats:?}");
    };
    let stats = night.mock.stats();
    let bill =
        (stats.billed.prompt_tokens as f64 + 10.0 * stats.billed.completion_tokens as f64) / 1e6;
    let error = last.error.as_ref().unwrap();
    assert_eq!(distill::exit::Exit::code_of(error), 4);
    assert!(error.to_string().contains("budget"), "{error}");
    assert!(last.pending > 1_000);
    let said = last.run_folder_usd.unwrap();
    assert!(bill <= said && said <= 0.5, "{bill} {said}");
    assert!(bill > 0.3, "the budget is used: {bill}");
}
