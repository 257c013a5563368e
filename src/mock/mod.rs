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
pub mod ledger;
pub(crate) mod limits;
pub(crate) mod logprobs;
pub(crate) mod other_routes;
pub(crate) mod parse;
pub(crate) mod quota;
pub mod request;
pub mod response;
pub mod script;
pub mod server;

use crate::mock::request::Request;
use crate::mock::request::wrong_method;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::time::Instant;

pub use crate::mock::ledger::{Billed, Stats};
pub use crate::mock::response::{Header, Reaction, Reply};
pub use crate::mock::script::Script;
pub use crate::mock::server::{MockServer, start};

use crate::mock::answer::{Answer, Circumstances};
use crate::mock::batch::Desk;
use crate::mock::chat::Chat;
use crate::mock::ledger::{BodyHash, Ledger};
use crate::mock::limits::Limiter;
use crate::mock::logprobs::Pieces;

/// A scripted teacher. One serves any number of clients at once.
#[derive(Debug)]
pub struct Mock {
    script: Script,
    pieces: Pieces,
    started: Instant,
    /// The wall clock of the start; it goes on at the pace of tokio's clock.
    wall: SystemTime,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    limiter: Limiter,
    ledger: Ledger,
    desk: Desk,
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
            pieces: Pieces::new(script.answers.top_logprobs, 1.0),
            state: Mutex::new(State {
                limiter: Limiter::new(&script.limits, started),
                ledger: Ledger::default(),
                desk: Desk::default(),
            }),
            started,
            wall,
            script,
        }
    }

    pub fn script(&self) -> &Script {
        &self.script
    }

    pub fn stats(&self) -> Stats {
        let mut state = self.state();
        let context = self.context();
        self.settle(&mut state, &context);
        let in_flight = state.limiter.in_flight();
        state.ledger.stats(context.at, in_flight)
    }

    /// How often an answer to this very body was billed.
    pub fn times_billed(&self, body: &[u8]) -> u32 {
        let mut state = self.state();
        self.settle(&mut state, &self.context());
        state.ledger.times_billed(ledger::hash(body))
    }

    /// What becomes of a request. It takes as long as the script says: for ever, if the script says
    /// so. To drop the future is to hang up.
    pub async fn respond(&self, request: Request<'_>) -> Reaction {
        let path = request.path.split('?').next().unwrap_or_default();
        if (request.method, path) == ("GET", "/mock/stats") {
            let stats = serde_json::to_vec(&self.stats()).unwrap_or_default();
            return Reaction::Reply(Reply::json(200, stats));
        }
        self.state().ledger.requested();
        let reaction = match self.check_key(request.authorization) {
            Err(reply) => Reaction::Reply(reply),
            Ok(()) if path.ends_with("/chat/completions") => match request.method {
                "POST" => self.chat(path, request.body).await,
                method => wrong_method(path, method),
            },
            Ok(()) => self.elsewhere(&request, path).await,
        };
        if let Some(reply) = reaction.reply() {
            self.state().ledger.replied(reply.status);
        }
        reaction
    }

    /// The same body has the same answer, however often it is asked.
    fn write_answer(&self, chat: &Chat, hash: BodyHash) -> Answer {
        let with = Circumstances {
            script: &self.script,
            pieces: &self.pieces,
            id: hash,
            created: unix(self.wall_now()),
        };
        answer::write(chat, &with, &mut self.draw(hash, u32::MAX))
    }

    /// Chance for one attempt; the same whenever it comes. Answers draw from an attempt of their
    /// own, so that their lengths have nothing to do with faults.
    fn draw(&self, hash: BodyHash, attempt: u32) -> fastrand::Rng {
        let attempt = u64::from(attempt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        fastrand::Rng::with_seed(self.script.seed ^ hash as u64 ^ attempt)
    }

    fn check_key(&self, authorization: Option<&str>) -> Result<(), Reply> {
        let Some(key) = &self.script.key else {
            return Ok(());
        };
        let given = authorization.and_then(|value| value.strip_prefix("Bearer "));
        if given == Some(key) {
            return Ok(());
        }
        let message = "Incorrect API key provided.";
        Err(Reply::error(401, message, "invalid_api_key"))
    }

    fn wall_now(&self) -> SystemTime {
        self.wall + self.started.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters are as good after a panic as before it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In seconds.
fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}
