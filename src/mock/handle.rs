//! A request for an answer, from its arrival to its reply.

use std::time::Duration;

use tokio::time::Instant;

use crate::mock::Mock;
use crate::mock::answer::{Answer, Usage};
use crate::mock::chat::Chat;
use crate::mock::faults;
use crate::mock::faults::Seen;
use crate::mock::headers;
use crate::mock::ledger;
use crate::mock::ledger::BodyHash;
use crate::mock::limits::{Cost, Limit, Readings, Refusal, Ticket};
use crate::mock::response::{Reaction, Reply};
use crate::mock::script::fault::Fault;
use crate::mock::script::limits::RetryAfter;

impl Mock {
    pub(crate) async fn chat(&self, path: &str, body: &[u8]) -> Reaction {
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
            path,
            is_chat: true,
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
        let Answer { body, usage } = self.write_answer(chat, flight.hash);
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
pub(crate) async fn pause(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}
