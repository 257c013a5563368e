//! Batch mode against a scripted teacher with a batch API, on the paused clock.

mod ends;
mod failed;
mod kills;
mod money;
mod moved_teacher;
mod tcp;
mod waits;

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

use super::nights::{SimulatedRun, SimulatedTeacher, for_each_seed, http_reply};

/// A transport that replaces the network by a scripted teacher with a batch API.
struct SimulatedBatchTeacher {
    chat: SimulatedTeacher,
    /// Maximum latency of each call, in each direction.
    latency: Duration,
    /// Remaining number of downloads that end normally after half of their file.
    halved_downloads: AtomicU32,
    /// Whether the connection of each download breaks after half of the file.
    breaks_downloads: bool,
    /// Changes the content of downloaded files.
    change_file: fn(Bytes) -> Bytes,
    /// Changes batch objects in replies.
    change_object: fn(Value) -> Value,
    /// Changes pages of the list of batches.
    change_page: fn(Value) -> Value,
    /// Remaining number of calls for batch objects and files that are refused with 403.
    forbidden_calls: AtomicU32,
    /// Time of each download request.
    downloads: Arc<Mutex<Vec<Instant>>>,
}

impl Transport for SimulatedBatchTeacher {
    fn complete<'a>(&'a self, body: &'a Value) -> BoxFuture<'a, Result<HttpReply, TransportError>> {
        self.chat.complete(body)
    }

    fn batches(&self) -> Option<&dyn BatchApi> {
        Some(self)
    }
}

impl SimulatedBatchTeacher {
    fn new(simulated: &SimulatedRun) -> SimulatedBatchTeacher {
        SimulatedBatchTeacher {
            chat: simulated.teacher(),
            latency: Duration::ZERO,
            halved_downloads: AtomicU32::new(0),
            breaks_downloads: false,
            change_file: |content| content,
            change_object: |object| object,
            change_page: |page| page,
            forbidden_calls: AtomicU32::new(0),
            downloads: Arc::default(),
        }
    }

    /// Decrements `forbidden_calls` and returns a reply with status 403; None if it is already zero.
    fn forbid(&self) -> Option<HttpReply> {
        let body = json!({"error": {"message": "not now"}}).to_string();
        take_one(&self.forbidden_calls)
            .then(|| HttpReply::complete(403, HeaderMap::new(), body.into()))
    }

    async fn wait_for_latency(&self) {
        sleep(self.latency.mul_f64(fastrand::f64())).await;
    }

    async fn respond(&self, method: &str, path: &str, body: &[u8]) -> MockResponse {
        self.wait_for_latency().await;
        let request = batch_request(method, path, body);
        let response = self.chat.mock.respond(request).await;
        self.wait_for_latency().await;
        response
    }

    async fn call(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Result<HttpReply, TransportError> {
        match self.respond(method, path, body).await {
            MockResponse::Complete(reply) => Ok(http_reply(reply)),
            MockResponse::Refused => Err(TransportError::Unreachable("connection refused".into())),
            _ => Err(TransportError::Broken("reset".into())),
        }
    }
}

impl BatchApi for SimulatedBatchTeacher {
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
            let mut reply = self.call("GET", &path, b"").await?;
            if let Ok(page) = serde_json::from_slice(&reply.body) {
                reply.body = (self.change_page)(page).to_string().into();
            }
            Ok(reply)
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
            let (reply, is_broken) = match self.respond("GET", &path, b"").await {
                MockResponse::Complete(reply) => (reply, self.breaks_downloads),
                MockResponse::ResetInBody(reply) => (reply, true),
                _ => return Err(TransportError::Broken("reset".into())),
            };
            if reply.status != 200 {
                return Ok(FileDownload::Refused(http_reply(reply)));
            }
            let content = (self.change_file)(reply.body);
            let length = if is_broken || take_one(&self.halved_downloads) {
                content.len() / 2
            } else {
                content.len()
            };
            let body = content.slice(..length);
            let mut pieces: Vec<Result<Bytes, TransportError>> = (0..length)
                .step_by(PIECE_LENGTH)
                .map(|start| Ok(body.slice(start..length.min(start + PIECE_LENGTH))))
                .collect();
            if is_broken {
                pieces.push(Err(TransportError::Broken("reset".into())));
            }
            Ok(FileDownload::Content(stream::iter(pieces).boxed()))
        }
        .boxed()
    }
}

/// Length in bytes of the pieces of a download. Pieces end inside lines and characters.
const PIECE_LENGTH: usize = 777;

/// Decrements a counter. Returns false if it is already zero.
fn take_one(counter: &AtomicU32) -> bool {
    counter
        .fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1))
        .is_ok()
}

/// Creates a simulated run in batch mode.
fn simulated_run(script: &str, prompts: usize, change: impl FnOnce(&mut Config)) -> SimulatedRun {
    SimulatedRun::new(script, prompts, |config| {
        config.schedule.mode = RequestMode::Batch;
        change(config);
    })
}

/// Runs a harvest to its end, or kills it after `kill_after`. Returns None if it was killed.
async fn harvest_with(
    simulated: &SimulatedRun,
    latency: Duration,
    kill_after: Option<Duration>,
    signals: UnboundedReceiver<u8>,
) -> anyhow::Result<Option<HarvestSummary>> {
    let teacher = SimulatedBatchTeacher {
        latency,
        ..SimulatedBatchTeacher::new(simulated)
    };
    simulated.harvest_over(teacher, kill_after, signals).await
}

async fn harvest(simulated: &SimulatedRun) -> HarvestSummary {
    let (_sender, receiver) = unbounded_channel();
    let summary = harvest_with(simulated, Duration::from_millis(200), None, receiver).await;
    summary.unwrap().unwrap()
}

/// Returns the number of batches by status.
fn batches_by_status(summary: &HarvestSummary) -> Vec<(&str, u64)> {
    let parts = &summary.batches.as_ref().unwrap().parts;
    parts
        .iter()
        .map(|(status, count)| (status.as_str(), *count))
        .collect()
}

/// Returns the records by key, without the fields that differ between the modes: times, costs and additional fields.
fn comparable(records: Vec<Record>) -> BTreeMap<String, Record> {
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
    let batched = simulated_run(script, 60, change);
    let summary = harvest(&batched).await;
    assert!(summary.error.is_none(), "{summary:?}");
    assert_eq!(
        (summary.ok, summary.pending, summary.requests),
        (120, 0, 120)
    );
    assert_eq!(batches_by_status(&summary), [("completed", 3)]);

    let real_time = SimulatedRun::new(script, 60, change);
    let real_time_summary = real_time.harvest().await;
    assert_eq!(
        comparable(batched.run.records()),
        comparable(real_time.run.records())
    );
    let batch_usd = summary.cost_usd.unwrap();
    let real_time_usd = real_time_summary.cost_usd.unwrap();
    assert!(
        (batch_usd - real_time_usd / 2.0).abs() < 1e-12,
        "${batch_usd} and ${real_time_usd}"
    );
    let records = batched.run.records();
    let costs: f64 = records.iter().filter_map(|record| record.cost_usd).sum();
    assert!((costs - batch_usd).abs() < 1e-12);

    // Cached rows are not requested again in either mode.
    let requests = batched.mock.stats().requests;
    for mode in [RequestMode::Realtime, RequestMode::Batch] {
        let mut rerun = SimulatedRun::new(script, 60, change);
        rerun.run.config.run_dir = batched.run.config.run_dir.clone();
        rerun.run.config.schedule.mode = mode;
        rerun.mock = Arc::clone(&batched.mock);
        let summary = harvest(&rerun).await;
        assert_eq!((summary.cached, summary.requests), (120, 0));
    }
    assert_eq!(batched.mock.stats().requests, requests);
    assert_eq!(batched.bought_twice(&batched.mock.stats()), 0);
    // The files of the batches are removed; only their journal remains.
    let batch_files = batched.run.config.run_dir.join("batches");
    assert_eq!(batch_files.read_dir().unwrap().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn batch_rows_outside_a_limited_run_are_cached_for_later_runs() {
    let mut simulated = simulated_run("", 30, |_| {});
    let (_sender, receiver) = unbounded_channel();
    let killed = harvest_with(
        &simulated,
        Duration::ZERO,
        Some(Duration::from_secs(100)),
        receiver,
    );
    assert!(killed.await.unwrap().is_none());
    simulated.run.config.prompts.limit = Some(10);
    let summary = harvest(&simulated).await;
    assert_eq!((summary.total, summary.ok), (10, 10));
    assert_eq!(summary.batches.unwrap().unplanned_answers, 20);
    simulated.run.config.prompts.limit = None;
    let summary = harvest(&simulated).await;
    assert_eq!((summary.cached, summary.requests), (30, 0));
}

#[tokio::test(start_paused = true)]
async fn signal_leaves_batches_for_next_run_to_collect() {
    let mut simulated = simulated_run("", 20, |_| {});
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        sleep(Duration::from_secs(100)).await;
        sender.send(15).unwrap();
        std::future::pending::<()>().await;
    });
    let summary = harvest_with(&simulated, Duration::ZERO, None, receiver).await;
    let summary = summary.unwrap().unwrap();
    let (code, message) = super::exit_of(&summary);
    assert_eq!(code, 143);
    assert!(message.contains("1 batch continues"), "{message}");
    assert_eq!(
        (summary.pending, batches_by_status(&summary)),
        (20, vec![("in_progress", 1)])
    );

    // Real-time requests are refused, because they would buy the answers twice.
    simulated.run.config.schedule.mode = RequestMode::Realtime;
    let (_sender, receiver) = unbounded_channel();
    let error = harvest_with(&simulated, Duration::ZERO, None, receiver).await;
    let error = error.unwrap_err();
    assert!(error.to_string().contains("bought twice"), "{error:#}");
    assert_eq!(distill::exit::Exit::code_of(&error), 2);

    simulated.run.config.schedule.mode = RequestMode::Batch;
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, summary.requests), (20, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}
