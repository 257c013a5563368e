//! A teacher that is a script: it answers at once or late, holds its clients to limits, fails on
//! purpose, and counts what it would have billed.
//!
//! It exists to rehearse a night before the night costs money, and to test that nothing is lost or
//! bought twice when everything goes wrong. Three layers:
//!
//! - [`Mock`] is the teacher itself. It knows neither sockets nor wall clocks: it waits on tokio's
//!   clock, so a test that has paused it lives through a night in a second.
//! - [`http`] puts a [`Mock`] on a raw TCP socket, since the faults that matter (a reset in the
//!   middle of a body, a length that lies) are those that a proper server refuses to make.
//! - [`start`] runs that on threads of its own, for `distill serve --mock`.
//!
//! ```no_run
//! # async fn simulate() -> anyhow::Result<()> {
//! use distill::serve::mock::{Mock, Reaction, Request, Script};
//!
//! let mock = Mock::new(Script::load("night.toml".as_ref())?);
//! let body = br#"{"model": "mock", "messages": [{"role": "user", "content": "hi"}]}"#;
//! if let Reaction::Reply(reply) = mock.respond(Request::chat(body)).await {
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

use crate::mock::request::MockRequest;
use crate::mock::request::method_not_allowed;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::time::Instant;

pub use crate::mock::response::{HttpReply, MockResponse, ReplyHeader};
pub use crate::mock::script::Script;
pub use crate::mock::server::{MockServer, start};
pub use crate::mock::stats::{BillingTotals, MockStats};

use crate::mock::answer::{AnswerInputs, MockAnswer};
use crate::mock::batch::BatchStore;
use crate::mock::chat::ParsedChat;
use crate::mock::limits::MockLimiter;
use crate::mock::logprobs::LogprobTemplates;
use crate::mock::stats::{BodyHash, StatsCollector};

/// A scripted teacher. One serves any number of clients at once.
#[derive(Debug)]
pub struct Mock {
    script: Script,
    templates: LogprobTemplates,
    started: Instant,
    /// The wall clock of the start; it goes on at the pace of tokio's clock.
    wall: SystemTime,
    state: Mutex<MockState>,
}

#[derive(Debug)]
pub(crate) struct MockState {
    limiter: MockLimiter,
    stats: StatsCollector,
    batches: BatchStore,
}

impl Mock {
    /// One whose times begin now. It must be called where tokio's clock is that it shall wait on.
    pub fn new(script: Script) -> Mock {
        Mock::at(script, SystemTime::now())
    }

    /// As [`Mock::new`], for whom it is `wall` now: what `created` and dates in headers go by.
    pub fn at(script: Script, wall: SystemTime) -> Mock {
        let started = Instant::now();
        Mock {
            templates: LogprobTemplates::new(script.answers.top_logprobs, 1.0),
            state: Mutex::new(MockState {
                limiter: MockLimiter::new(&script.limits, started),
                stats: StatsCollector::default(),
                batches: BatchStore::default(),
            }),
            started,
            wall,
            script,
        }
    }

    pub fn script(&self) -> &Script {
        &self.script
    }

    pub fn stats(&self) -> MockStats {
        let mut state = self.state();
        let context = self.context();
        self.settle_batches(&mut state, &context);
        let in_flight = state.limiter.in_flight();
        state.stats.snapshot(context.at, in_flight)
    }

    /// How often an answer to this very body was billed.
    pub fn times_billed(&self, body: &[u8]) -> u32 {
        let mut state = self.state();
        self.settle_batches(&mut state, &self.context());
        state.stats.times_billed(stats::body_hash(body))
    }

    /// What becomes of a request. It takes as long as the script says: for ever, if the script says
    /// so. To drop the future is to hang up.
    pub async fn respond(&self, request: MockRequest<'_>) -> MockResponse {
        let path = request.path.split('?').next().unwrap_or_default();
        if (request.method, path) == ("GET", "/mock/stats") {
            let stats = serde_json::to_vec(&self.stats()).unwrap_or_default();
            return MockResponse::Complete(HttpReply::json(200, stats));
        }
        self.state().stats.record_request();
        let response = match self.check_key(request.authorization) {
            Err(reply) => MockResponse::Complete(reply),
            Ok(()) if path.ends_with("/chat/completions") => match request.method {
                "POST" => self.chat(path, request.body).await,
                method => method_not_allowed(path, method),
            },
            Ok(()) => self.respond_other_route(&request, path).await,
        };
        if let Some(reply) = response.reply() {
            self.state().stats.record_status(reply.status);
        }
        response
    }

    /// The same body has the same answer, however often it is asked.
    fn write_answer(&self, chat: &ParsedChat, hash: BodyHash) -> MockAnswer {
        let inputs = AnswerInputs {
            script: &self.script,
            templates: &self.templates,
            id: hash,
            created: unix(self.wall_now()),
        };
        answer::write(chat, &inputs, &mut self.rng(hash, u32::MAX))
    }

    /// Chance for one attempt; the same whenever it comes. Answers draw from an attempt of their
    /// own, so that their lengths have nothing to do with faults.
    fn rng(&self, hash: BodyHash, attempt: u32) -> fastrand::Rng {
        let attempt = u64::from(attempt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        fastrand::Rng::with_seed(self.script.seed ^ hash as u64 ^ attempt)
    }

    fn check_key(&self, authorization: Option<&str>) -> Result<(), HttpReply> {
        let Some(key) = &self.script.key else {
            return Ok(());
        };
        let given = authorization.and_then(|value| value.strip_prefix("Bearer "));
        if given == Some(key) {
            return Ok(());
        }
        let message = "Incorrect API key provided.";
        Err(HttpReply::error(401, message, "invalid_api_key"))
    }

    fn wall_now(&self) -> SystemTime {
        self.wall + self.started.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, MockState> {
        // Counters are as good after a panic as before it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In seconds.
fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}
