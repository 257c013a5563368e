//! Batch mode against the files and batches of a scripted teacher, on the paused clock.

mod ends;
mod failed;
mod kills;
mod money;
mod tcp;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use distill::cache::record::Record;
use distill::client::transport::{BatchApi, FileDownload};
use distill::client::transport::{HttpReply, Transport, TransportError};
use distill::config::{Config, RequestMode};
use distill::mock::response::MockResponse;
use distill::report::summary::HarvestSummary;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep};

use crate::mock::batch::batch_request;

use super::nights::{Night, Simulated, on_paused_clocks, whole};

/// A scripted teacher with a batch API that replaces the network.
struct Provider {
    chat: Simulated,
    /// Maximum latency of each call, in each direction.
    latency: Duration,
    /// Number of downloads that end normally after half of their file.
    halved: AtomicU32,
    /// Downloads break off.
    breaks_files: bool,
    /// Changes the content of files and batch objects in transit.
    change_file: fn(Bytes) -> Bytes,
    change_object: fn(Value) -> Value,
    /// Calls for batch objects and files that are refused with 403.
    forbidden: AtomicU32,
    /// Time of each download request.
    downloads: Arc<Mutex<Vec<Instant>>>,
}

impl Transport for Provider {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        self.chat.complete(body)
    }

    fn batches(&self) -> Option<&dyn BatchApi> {
        Some(self)
    }
}

impl Provider {
    fn new(night: &Night) -> Provider {
        Provider {
            chat: night.teacher(),
            latency: Duration::ZERO,
            halved: AtomicU32::new(0),
            breaks_files: false,
            change_file: |content| content,
            change_object: |object| object,
            forbidden: AtomicU32::new(0),
            downloads: Arc::default(),
        }
    }

    /// Returns the refusal of this call, if any.
    fn forbid(&self) -> Option<HttpReply> {
        let take = |left: u32| left.checked_sub(1);
        let is_forbidden = self.forbidden.fetch_update(Relaxed, Relaxed, take).is_ok();
        let body = json!({"error": {"message": "not now"}}).to_string();
        is_forbidden.then(|| HttpReply::complete(403, HeaderMap::new(), body.into()))
    }

    async fn travel(&self) {
        sleep(self.latency.mul_f64(fastrand::f64())).await;
    }

    async fn react(&self, method: &str, path: &str, body: &[u8]) -> MockResponse {
        self.travel().await;
        let request = batch_request(method, path, body);
        let reaction = self.chat.mock.respond(request).await;
        self.travel().await;
        reaction
    }

    async fn call(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Result<HttpReply, TransportError> {
        match self.react(method, path, body).await {
            MockResponse::Complete(reply) => Ok(whole(reply)),
            MockResponse::Refused => Err(TransportError::Unreachable("connection refused".into())),
            _ => Err(TransportError::Broken("reset".into())),
        }
    }
}

impl BatchApi for Provider {
    fn upload<'a>(&'a self, file: &'a Path) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let content = std::fs::read_to_string(file).unwrap();
            let form = format!(
                "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
                 --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n\
                 {content}\r\n--b--\r\n"
            );
            self.call("POST", "/v1/files", form.as_bytes()).await
        }
        .boxed()
    }

    fn create<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let body = body.to_string();
            self.call("POST", "/v1/batches", body.as_bytes()).await
        }
        .boxed()
    }

    fn retrieve<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            if let Some(refusal) = self.forbid() {
                return Ok(refusal);
            }
            let path = format!("/v1/batches/{batch}");
            let mut reply = self.call("GET", &path, b"").await?;
            if let Ok(object) = serde_json::from_slice(&reply.body) {
                reply.body = (self.change_object)(object).to_string().into();
            }
            Ok(reply)
        }
        .boxed()
    }

    fn list<'a>(
        &'a self,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        let after = after.map_or(String::new(), |after| format!("&after={after}"));
        async move {
            // Small pages, so that the list has several.
            let path = format!("/v1/batches?limit=2{after}");
            self.call("GET", &path, b"").await
        }
        .boxed()
    }

    fn cancel<'a>(&'a self, batch: &'a str) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        async move {
            let path = format!("/v1/batches/{batch}/cancel");
            self.call("POST", &path, b"").await
        }
        .boxed()
    }

    fn content<'a>(&'a self, file: &'a str) -> BoxFuture<'a, Result<FileDownload, TransportError>> {
        async move {
            self.downloads.lock().unwrap().push(Instant::now());
            if let Some(refusal) = self.forbid() {
                return Ok(FileDownload::Refused(refusal));
            }
            let path = format!("/v1/files/{file}/content");
            let (reply, breaks) = match self.react("GET", &path, b"").await {
                MockResponse::Complete(reply) => (reply, self.breaks_files),
                MockResponse::ResetInBody(reply) => (reply, true),
                _ => return Err(TransportError::Broken("reset".into())),
            };
            if reply.status != 200 {
                return Ok(FileDownload::Refused(whole(reply)));
            }
            let content = (self.change_file)(reply.body);
            let take = |left: u32| left.checked_sub(1);
            let is_halved = self.halved.fetch_update(Relaxed, Relaxed, take).is_ok();
            let length = if breaks || is_halved {
                content.len() / 2
            } else {
                content.len()
            };
            let body = content.slice(..length);
            let mut pieces: Vec<Result<Bytes, TransportError>> = (0..length)
                .step_by(777)
                .map(|at| Ok(body.slice(at..length.min(at + 777))))
                .collect();
            if breaks {
                pieces.push(Err(TransportError::Broken("reset".into())));
            }
            Ok(FileDownload::Content(stream::iter(pieces).boxed()))
        }
        .boxed()
    }
}

/// A simulated night in batch mode.
fn night(script: &str, prompts: usize, change: impl FnOnce(&mut Config)) -> Night {
    Night::new(script, prompts, |config| {
        config.schedule.mode = RequestMode::Batch;
        change(config);
    })
}

/// Runs until the harvest ends, or until it is killed after `life`.
async fn harvest_with(
    night: &Night,
    latency: Duration,
    life: Option<Duration>,
    signals: UnboundedReceiver<u8>,
) -> anyhow::Result<Option<HarvestSummary>> {
    let provider = Provider {
        latency,
        ..Provider::new(night)
    };
    night.harvest_over(provider, life, signals).await
}

async fn harvest(night: &Night) -> HarvestSummary {
    let (_sender, receiver) = unbounded_channel();
    let summary = harvest_with(night, Duration::from_millis(200), None, receiver).await;
    summary.unwrap().unwrap()
}

/// Number of batches by status.
fn parts(summary: &HarvestSummary) -> Vec<(&str, u64)> {
    let parts = &summary.batches.as_ref().unwrap().parts;
    parts
        .iter()
        .map(|(status, count)| (status.as_str(), *count))
        .collect()
}

/// Records by key, without times and costs, which differ between the modes.
fn timeless(records: Vec<Record>) -> BTreeMap<String, Record> {
    let records = records.into_iter().map(|mut record| {
        record.timing = Default::default();
        record.cost_usd = None;
        record.extra.clear();
        (record.key.clone(), record)
    });
    records.collect()
}

fn priced(config: &mut Config) {
    config.price.input = Some(1.0);
    config.price.output = Some(4.0);
    config.price.as_of = Some("2026-11-22".parse().unwrap());
}

#[tokio::test(start_paused = true)]
async fn batch_records_match_real_time_at_half_price() {
    let script = "[answers]\ntokens = [5, 30]\n[batch]\nmax_rows = 40";
    let change = |config: &mut Config| {
        config.sampling.top_logprobs = 5;
        config.prompts.samples = 2;
        config.batch.max_requests = 40;
        priced(config);
    };
    let batched = night(script, 60, change);
    let summary = harvest(&batched).await;
    assert!(summary.error.is_none(), "{summary:?}");
    assert_eq!(
        (summary.ok, summary.pending, summary.requests),
        (120, 0, 120)
    );
    assert_eq!(parts(&summary), [("completed", 3)]);

    let direct = Night::new(script, 60, change);
    let expected = direct.harvest().await;
    assert_eq!(
        timeless(batched.run.records()),
        timeless(direct.run.records())
    );
    let (half, full) = (summary.cost_usd.unwrap(), expected.cost_usd.unwrap());
    assert!((half - full / 2.0).abs() < 1e-12, "{half} {full}");
    let costs = batched.run.records();
    let costs: f64 = costs.iter().filter_map(|record| record.cost_usd).sum();
    assert!((costs - half).abs() < 1e-12);

    // Cached rows are not requested again in either mode.
    let seen = batched.mock.stats().requests;
    for mode in [RequestMode::Realtime, RequestMode::Batch] {
        let mut again = Night::new(script, 60, change);
        again.run.config.run_dir = batched.run.config.run_dir.clone();
        again.run.config.schedule.mode = mode;
        let again = harvest(&Night {
            mock: Arc::clone(&batched.mock),
            ..again
        })
        .await;
        assert_eq!((again.cached, again.requests), (120, 0));
    }
    assert_eq!(batched.mock.stats().requests, seen);
    assert_eq!(batched.bought_twice(&batched.mock.stats()), 0);
    // Only the journal remains.
    let left = batched.run.config.run_dir.join("batches");
    assert_eq!(left.read_dir().unwrap().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn batch_rows_of_smaller_run_count_for_larger_run() {
    let mut night = night("", 30, |_| {});
    let (_sender, receiver) = unbounded_channel();
    let killed = harvest_with(
        &night,
        Duration::ZERO,
        Some(Duration::from_secs(100)),
        receiver,
    );
    assert!(killed.await.unwrap().is_none());
    night.run.config.prompts.limit = Some(10);
    let summary = harvest(&night).await;
    assert_eq!((summary.total, summary.ok), (10, 10));
    assert_eq!(summary.batches.unwrap().unplanned_answers, 20);
    night.run.config.prompts.limit = None;
    let summary = harvest(&night).await;
    assert_eq!((summary.cached, summary.requests), (30, 0));
}

#[tokio::test(start_paused = true)]
async fn signal_leaves_batches_for_next_run_to_collect() {
    let mut night = night("", 20, |_| {});
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        sleep(Duration::from_secs(100)).await;
        sender.send(15).unwrap();
        std::future::pending::<()>().await;
    });
    let summary = harvest_with(&night, Duration::ZERO, None, receiver).await;
    let summary = summary.unwrap().unwrap();
    let (code, message) = super::end(&summary);
    assert_eq!(code, 143);
    assert!(message.contains("1 batches continue"), "{message}");
    assert_eq!(
        (summary.pending, parts(&summary)),
        (20, vec![("in_progress", 1)])
    );

    // Real-time requests would buy the answers twice.
    night.run.config.schedule.mode = RequestMode::Realtime;
    let (_sender, receiver) = unbounded_channel();
    let error = harvest_with(&night, Duration::ZERO, None, receiver).await;
    let error = error.unwrap_err();
    assert!(error.to_string().contains("bought twice"), "{error:#}");
    assert_eq!(distill::exit::Exit::code_of(&error), 2);

    night.run.config.schedule.mode = RequestMode::Batch;
    let summary = harvest(&night).await;
    assert_eq!((summary.ok, summary.requests), (20, 0));
    assert_eq!(night.mock.stats().billed.answers, 20);
}
