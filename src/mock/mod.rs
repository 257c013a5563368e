//! A scripted teacher: it answers with a scripted latency, enforces rate limits, fails on purpose and counts the tokens
//! that it would bill. Users rehearse a harvest with it before it costs money; tests check with it that a harvest
//! neither loses an answer nor pays for it twice.
//!
//! | file | content |
//! |---|---|
//! | `mod`, `stats` | [`Mock`], the teacher itself; its counts |
//! | `request`, `response` | requests and responses, independent of TCP |
//! | `handle`, `other_routes` | the handlers of chat completions and of all other routes |
//! | `chat`, `answer`, `logprobs` | parsed chat requests; generated answers and their logprobs |
//! | `faults`, `corrupt` | selection of a request's fault; corruption of a body |
//! | `limits`, `quota`, `headers` | rate limits and their headers |
//! | `batch/`, `script/` | the batch API; the TOML script |
//! | `http`, `parse`, `server` | TCP, HTTP/1.1 requests, a server thread for `distill serve --mock` |
//!
//! # Invariants
//!
//! 1. [`Mock`] uses tokio's clock and no socket, so a test with a paused clock simulates a night within a second.
//! 2. Random numbers depend only on the seed, the body and the number of earlier attempts with that body, not on the
//!    order of the requests. The plan of a batch depends on the seed and its number.
//! 3. `http` writes to a raw socket, because no HTTP library sends a wrong length or resets a connection within a body.
//!
//! ```no_run
//! # async fn simulate() -> anyhow::Result<()> {
//! use distill::mock::Mock;
//! use distill::mock::request::MockRequest;
//! use distill::mock::response::MockResponse;
//! use distill::mock::script::Script;
//!
//! let mock = Mock::new(Script::load("night.toml".as_ref())?);
//! let body = br#"{"model": "mock", "messages": [{"role": "user", "content": "hi"}]}"#;
//! if let MockResponse::Complete(reply) = mock.respond(MockRequest::chat(body)).await {
//!     assert_eq!(reply.status, 200);
//! }
//! assert_eq!(mock.stats().billed.answers, 1);
//! # Ok(())
//! # }
//! ```

pub(crate) mod answer;
pub(crate) mod batch;
pub(crate) mod chat;
pub(crate) mod corrupt;
pub(crate) mod faults;
pub(crate) mod handle;
pub(crate) mod headers;
pub mod http;
pub(crate) mod limits;
pub(crate) mod logprobs;
pub(crate) mod other_routes;
pub(crate) mod parse;
pub(crate) mod quota;
pub mod request;
pub mod response;
pub mod script;
pub mod server;
pub mod stats;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::time::Instant;

use crate::mock::answer::{AnswerInputs, MockAnswer};
use crate::mock::batch::BatchStore;
use crate::mock::chat::ParsedChat;
use crate::mock::limits::MockLimiter;
use crate::mock::logprobs::LogprobTemplates;
use crate::mock::request::{MockRequest, method_not_allowed};
use crate::mock::response::{MockReply, MockResponse};
use crate::mock::script::Script;
use crate::mock::stats::{BodyHash, MockStats, StatsCollector};

/// A scripted teacher for any number of concurrent clients.
#[derive(Debug)]
pub struct Mock {
    script: Script,
    templates: LogprobTemplates,
    started: Instant,
    /// Wall-clock time at `started`. Later times are computed from tokio's clock.
    wall_start: SystemTime,
    state: Mutex<MockState>,
}

/// The state that requests change, behind one lock.
#[derive(Debug)]
pub(crate) struct MockState {
    limiter: MockLimiter,
    stats: StatsCollector,
    batches: BatchStore,
}

impl Mock {
    /// Creates a mock that starts now. Call it within the tokio runtime whose clock it must use.
    pub fn new(script: Script) -> Mock {
        Mock::with_wall_start(script, SystemTime::now())
    }

    /// Like [`Mock::new`], with `wall_start` as the current wall-clock time, which `created` and dates in headers use.
    pub fn with_wall_start(script: Script, wall_start: SystemTime) -> Mock {
        let started = Instant::now();
        Mock {
            templates: LogprobTemplates::new(script.answers.top_logprobs, 1.0),
            state: Mutex::new(MockState {
                limiter: MockLimiter::new(&script.limits, started),
                stats: StatsCollector::default(),
                batches: BatchStore::default(),
            }),
            started,
            wall_start,
            script,
        }
    }

    pub fn script(&self) -> &Script {
        &self.script
    }

    /// Bills the batches that have ended. Then returns the counts so far.
    pub fn stats(&self) -> MockStats {
        let mut state = self.state();
        let context = self.batch_context();
        self.settle_batches(&mut state, &context);
        let in_flight = state.limiter.in_flight();
        state.stats.snapshot(context.elapsed, in_flight)
    }

    /// Returns how often an answer to this body was billed.
    pub fn times_billed(&self, body: &[u8]) -> u32 {
        let mut state = self.state();
        self.settle_batches(&mut state, &self.batch_context());
        state.stats.times_billed(stats::body_hash(body))
    }

    /// Handles a request with the script's latency. The future of a stalled request stays pending. Dropping the future
    /// has the effect of a client that disconnects.
    pub async fn respond(&self, request: MockRequest<'_>) -> MockResponse {
        let path = request.path.split('?').next().unwrap_or_default();
        if (request.method, path) == ("GET", "/mock/stats") {
            let stats = serde_json::to_vec(&self.stats()).unwrap_or_default();
            return MockResponse::Complete(MockReply::json(200, stats));
        }
        self.state().stats.record_request();
        let mut response = match self.check_key(request.authorization) {
            Err(reply) => MockResponse::Complete(reply),
            Ok(()) if path.ends_with("/chat/completions") => match request.method {
                "POST" => self.respond_chat(path, request.body).await,
                method => method_not_allowed(path, method),
            },
            Ok(()) => self.respond_other_route(&request, path).await,
        };
        if let Some(reply) = response.reply_mut() {
            self.state().stats.record_status(reply.status);
        }
        response
    }

    /// Writes the answer. The same body always gets the same answer.
    fn write_answer(&self, chat: &ParsedChat, hash: BodyHash) -> MockAnswer {
        let inputs = AnswerInputs {
            script: &self.script,
            templates: &self.templates,
            id: hash,
            created: unix_seconds(self.wall_now()),
        };
        answer::write(chat, &inputs, &mut self.rng(hash, u32::MAX))
    }

    /// Returns the random number generator of an attempt, seeded by the script's seed, the body and the attempt number.
    /// Answers use the attempt number `u32::MAX`, so that every attempt gets the same answer.
    fn rng(&self, hash: BodyHash, attempt: u32) -> fastrand::Rng {
        // 2^64 divided by the golden ratio spreads small numbers over all bits.
        let attempt = u64::from(attempt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        fastrand::Rng::with_seed(self.script.seed ^ hash as u64 ^ attempt)
    }

    /// Checks the bearer key.
    fn check_key(&self, authorization: Option<&str>) -> Result<(), MockReply> {
        let Some(key) = &self.script.key else {
            return Ok(());
        };
        let sent_key = authorization.and_then(|value| value.strip_prefix("Bearer "));
        if sent_key == Some(key) {
            return Ok(());
        }
        let message = "Incorrect API key provided.";
        Err(MockReply::error(401, message, "invalid_api_key"))
    }

    fn wall_now(&self) -> SystemTime {
        self.wall_start + self.started.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, MockState> {
        // After a panic of another thread the counts are still usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Converts a time to Unix time in seconds.
fn unix_seconds(time: SystemTime) -> i64 {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH);
    since_epoch.map_or(0, |duration| duration.as_secs().cast_signed())
}
