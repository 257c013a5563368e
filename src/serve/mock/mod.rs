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

mod answer;
mod chat;
mod faults;
mod gauge;
mod headers;
pub mod http;
mod ledger;
mod limits;
mod logprobs;
mod parse;
mod reaction;
pub mod script;
mod server;
mod twist;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::time::Instant;

pub use ledger::{Billed, Stats};
pub use reaction::{Header, Reaction, Reply};
pub use script::Script;
pub use server::{MockServer, start};

use answer::{Answer, Circumstances, Usage};
use chat::Chat;
use faults::Seen;
use ledger::{BodyHash, Ledger};
use limits::{Cost, Limit, Limiter, Readings, Refusal, Ticket};
use logprobs::Pieces;
use script::{Fault, RetryAfter};

/// A request as it arrived.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    pub method: &'a str,
    /// With its query, if it has one.
    pub path: &'a str,
    pub authorization: Option<&'a str>,
    pub content_type: Option<&'a str>,
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// A request for an answer.
    pub fn chat(body: &'a [u8]) -> Request<'a> {
        Request {
            method: "POST",
            path: "/v1/chat/completions",
            content_type: Some("application/json"),
            body,
            ..Request::default()
        }
    }
}

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
struct State {
    limiter: Limiter,
    ledger: Ledger,
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
        let state = self.state();
        let in_flight = state.limiter.in_flight();
        state.ledger.stats(self.started.elapsed(), in_flight)
    }

    /// How often an answer to this very body was billed.
    pub fn times_billed(&self, body: &[u8]) -> u32 {
        self.state().ledger.times_billed(ledger::hash(body))
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
                "POST" => self.chat(request.body).await,
                method => wrong_method(path, method),
            },
            Ok(()) => self.rest(request.method, path),
        };
        if let Some(reply) = reaction.reply() {
            self.state().ledger.replied(reply.status);
        }
        reaction
    }

    fn rest(&self, method: &str, path: &str) -> Reaction {
        let model = self.script.model_name();
        let card = || json!({"id": model, "object": "model", "owned_by": "distill"});
        let found = match path.strip_prefix("/v1/models") {
            Some("") => json!({"object": "list", "data": [card()]}),
            Some(name) if name.strip_prefix('/') == Some(model) => card(),
            _ => {
                let message = format!("there is no {method} {path}");
                return Reaction::Reply(Reply::error(404, &message, "not_found"));
            }
        };
        match method {
            "GET" => Reaction::Reply(Reply::json(200, found.to_string())),
            _ => wrong_method(path, method),
        }
    }

    async fn chat(&self, body: &[u8]) -> Reaction {
        let chat = match Chat::parse(body, &self.script) {
            Ok(chat) => chat,
            Err(reply) => return Reaction::Reply(reply),
        };
        let hash = ledger::hash(body);
        let (flight, attempt, at) = match self.admit(hash, chat.cost()) {
            Ok(admitted) => admitted,
            Err(reply) => return Reaction::Reply(reply),
        };
        let mut draw = self.draw(hash, attempt);
        let seen = Seen {
            prompt: &chat.prompt,
            attempt,
            at,
        };
        let fault = faults::choose(&self.script, seen, &mut draw);
        match fault {
            Some(fault) if !fault.kind.is_of_an_answer() => self.fail(flight, fault, &chat).await,
            _ => self.answer(flight, fault, &chat, draw.f64()).await,
        }
    }

    /// Lets a request in, and says how often its body came before and when it came, or why not.
    fn admit(&self, hash: BodyHash, cost: Cost) -> Result<(Flight<'_>, u32, Duration), Reply> {
        let mut guard = self.state();
        let state = &mut *guard;
        // Under the lock, so that the limiter's time never goes back.
        let now = Instant::now();
        let at = now.duration_since(self.started);
        state
            .ledger
            .asked(at, cost.prompt_tokens + cost.output_tokens);
        match state.limiter.admit(now, cost) {
            Ok(ticket) => {
                let in_flight = state.limiter.in_flight();
                let attempt = state.ledger.admitted(hash, in_flight);
                let flight = Flight {
                    mock: self,
                    hash,
                    ticket: Some(ticket),
                    owed: None,
                    load: self.load(in_flight),
                };
                Ok((flight, attempt, at))
            }
            Err(refusal) => {
                state.ledger.throttled();
                let readings = state.limiter.read(now);
                drop(guard);
                Err(self.refuse(&refusal, &readings))
            }
        }
    }

    fn refuse(&self, refusal: &Refusal, readings: &Readings) -> Reply {
        let limits = &self.script.limits;
        let form = match refusal.wait {
            Some(_) => limits.retry_after,
            // Nobody knows how long.
            None => RetryAfter::None,
        };
        let wait = refusal.wait.unwrap_or_default();
        let what = refusal.limit.name();
        let message = match (refusal.too_large, refusal.limit) {
            (true, _) => format!("Request too large for {what}: it will never fit."),
            (false, Limit::Concurrency) => format!("Too many {what}."),
            (false, _) => format!(
                "Rate limit reached for {what}.{}",
                headers::words(form, wait)
            ),
        };
        let reply = Reply::error(limits.status, &message, "rate_limit_exceeded");
        let mut reply = headers::with_retry_after(reply, form, wait, self.wall_now());
        headers::push_limits(
            &mut reply.headers,
            limits.headers,
            readings,
            self.wall_now(),
        );
        reply
    }

    async fn fail(&self, flight: Flight<'_>, fault: &Fault, chat: &Chat<'_>) -> Reaction {
        self.state().ledger.failed(fault.kind.to_string());
        pause(faults::seconds(fault.after_s.unwrap_or(0.0))).await;
        let usage = Usage {
            prompt_tokens: chat.prompt_tokens,
            ..Usage::default()
        };
        let billed = fault.is_billed().then_some(usage);
        let reaction = match faults::error(fault, self.wall_now()) {
            Some(reaction) => reaction,
            None => {
                // Its client will leave in the end, and that changes nothing.
                flight.bill(billed);
                std::future::pending().await
            }
        };
        flight.bill(billed);
        let readings = flight.land(None);
        self.with_limits(reaction, &readings)
    }

    async fn answer(
        &self,
        mut flight: Flight<'_>,
        fault: Option<&Fault>,
        chat: &Chat<'_>,
        random: f64,
    ) -> Reaction {
        let answers = &self.script.answers;
        let with = Circumstances {
            script: &self.script,
            pieces: &self.pieces,
            id: flight.hash,
            created: self.created(),
        };
        // The same body has the same answer, however often it is asked.
        let Answer { body, usage } = answer::write(chat, &with, &mut self.draw(flight.hash, 0));
        let natural =
            answers.latency_s.at(random) + answers.token_s * usage.completion_tokens as f64;
        let latency = match fault.and_then(|fault| fault.after_s) {
            Some(after) => after,
            None => natural * flight.load,
        };
        let billed = fault.is_none_or(Fault::is_billed);
        flight.owed = (answers.bill_abandoned && billed).then_some(usage);
        pause(faults::seconds(latency)).await;
        let reply = Reply::json(200, body);
        let reaction = match fault {
            None => Reaction::Reply(reply),
            Some(fault) => faults::spoil(fault, reply),
        };
        {
            let mut state = self.state();
            match fault {
                None => state.ledger.answered(),
                Some(fault) => state.ledger.failed(fault.kind.to_string()),
            }
        }
        flight.bill(billed.then_some(usage));
        let readings = flight.land(Some(usage));
        self.with_limits(reaction, &readings)
    }

    fn with_limits(&self, mut reaction: Reaction, readings: &Readings) -> Reaction {
        if let Some(reply) = reaction.reply_mut() {
            let dialect = self.script.limits.headers;
            headers::push_limits(&mut reply.headers, dialect, readings, self.wall_now());
        }
        reaction
    }

    /// How many times slower answers are with so many requests at once.
    fn load(&self, in_flight: u64) -> f64 {
        let capacity = self.script.limits.load_capacity;
        capacity.map_or(1.0, |capacity| {
            (in_flight as f64 / capacity as f64).max(1.0)
        })
    }

    /// Chance for one attempt; the same whenever it comes.
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

    fn created(&self) -> i64 {
        let since = self.wall_now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs().cast_signed())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters are as good after a panic as before it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that was let in. It leaves when it lands, or when it is dropped because its client
/// hung up.
struct Flight<'a> {
    mock: &'a Mock,
    hash: BodyHash,
    ticket: Option<Ticket>,
    /// To be billed if the client hangs up.
    owed: Option<Usage>,
    load: f64,
}

impl Flight<'_> {
    fn bill(&self, usage: Option<Usage>) {
        if let Some(usage) = usage {
            let at = self.mock.started.elapsed();
            self.mock.state().ledger.billed(at, self.hash, &usage);
        }
    }

    fn land(mut self, used: Option<Usage>) -> Readings {
        self.leave(used)
    }

    fn leave(&mut self, used: Option<Usage>) -> Readings {
        let mut state = self.mock.state();
        let now = Instant::now();
        if let Some(ticket) = self.ticket.take() {
            let used = used.map(|usage| Cost {
                prompt_tokens: usage.prompt_tokens,
                output_tokens: usage.completion_tokens,
            });
            state.limiter.leave(now, ticket, used);
        }
        state.limiter.read(now)
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if self.ticket.is_some() {
            self.mock.state().ledger.abandoned();
            self.bill(self.owed);
            self.leave(self.owed);
        }
    }
}

/// Zero is no turn of the timer wheel.
async fn pause(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

fn wrong_method(path: &str, method: &str) -> Reaction {
    let message = format!("{path} does not take {method}");
    Reaction::Reply(Reply::error(405, &message, "method_not_allowed"))
}
