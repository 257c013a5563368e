//! Handles chat completion requests: admission, latency, fault, billing.

use std::time::Duration;

use tokio::time::Instant;

use crate::mock::Mock;
use crate::mock::answer::{MockAnswer, MockUsage};
use crate::mock::chat::ParsedChat;
use crate::mock::faults;
use crate::mock::faults::RequestFacts;
use crate::mock::headers;
use crate::mock::limits::{AdmissionTicket, LimitKind, LimitRefusal, LimitStatus, TokenCost};
use crate::mock::response::{MockReply, MockResponse};
use crate::mock::script::fault::ScriptedFault;
use crate::mock::script::limits::RetryAfter;
use crate::mock::stats;
use crate::mock::stats::BodyHash;

impl Mock {
    pub(crate) async fn respond_chat(&self, path: &str, body: &[u8]) -> MockResponse {
        let chat = match ParsedChat::parse(body, &self.script) {
            Ok(chat) => chat,
            Err(reply) => return MockResponse::Complete(reply),
        };
        let hash = stats::body_hash(body);
        let (guard, attempt, elapsed) = match self.admit(hash, chat.cost()) {
            Ok(admitted) => admitted,
            Err(reply) => return MockResponse::Complete(reply),
        };
        let mut rng = self.rng(hash, attempt);
        let facts = RequestFacts {
            path,
            is_chat: true,
            prompt: &chat.prompt,
            attempt,
            elapsed,
        };
        let fault = faults::select(&self.script, facts, &mut rng);
        match fault {
            Some(fault) if !fault.kind.corrupts_answer() => {
                self.respond_fault(guard, fault, &chat).await
            }
            _ => self.respond_answer(guard, fault, &chat, rng.f64()).await,
        }
    }

    /// Checks the limits. Returns the request's guard, the number of earlier attempts with the same
    /// body, and the time since the start.
    ///
    /// # Errors
    /// The reply that rejects the request.
    fn admit(
        &self,
        hash: BodyHash,
        cost: TokenCost,
    ) -> Result<(RequestGuard<'_>, u32, Duration), MockReply> {
        let mut locked = self.state();
        let state = &mut *locked;
        // The clock is read under the lock, so that the limiter's time does not decrease.
        let now = Instant::now();
        let elapsed = now.duration_since(self.started);
        state.stats.record_chat_request(elapsed, cost.total());
        match state.limiter.admit(now, cost) {
            Ok(ticket) => {
                let in_flight = state.limiter.in_flight();
                let attempt = state.stats.record_admission(hash, in_flight);
                let guard = RequestGuard {
                    mock: self,
                    hash,
                    ticket: Some(ticket),
                    billed_if_dropped: None,
                    load_factor: self.load_factor(in_flight),
                };
                Ok((guard, attempt, elapsed))
            }
            Err(refusal) => {
                state.stats.record_throttled();
                let limit_status = state.limiter.status(now);
                drop(locked);
                Err(self.reject(&refusal, &limit_status))
            }
        }
    }

    /// Returns the reply to a request that exceeds a limit.
    fn reject(&self, refusal: &LimitRefusal, limit_status: &LimitStatus) -> MockReply {
        let limits = &self.script.limits;
        let format = match refusal.wait {
            Some(_) => limits.retry_after,
            None => RetryAfter::None,
        };
        let wait = refusal.wait.unwrap_or_default();
        let limit = refusal.limit.name();
        let message = match (refusal.is_too_large, refusal.limit) {
            (true, _) => format!("Request too large for {limit}: it exceeds the limit itself."),
            (false, LimitKind::Concurrency) => format!("Too many {limit}."),
            (false, _) => format!(
                "Rate limit reached for {limit}.{}",
                headers::wait_sentence(format, wait)
            ),
        };
        let reply = MockReply::error(limits.status, &message, "rate_limit_exceeded");
        let mut reply = headers::with_retry_after(reply, format, wait, self.wall_now());
        headers::push_limits(
            &mut reply.headers,
            limits.headers,
            limit_status,
            self.wall_now(),
        );
        reply
    }

    async fn respond_fault(
        &self,
        guard: RequestGuard<'_>,
        fault: &ScriptedFault,
        chat: &ParsedChat<'_>,
    ) -> MockResponse {
        self.state().stats.record_fault(fault.kind.to_string());
        pause(faults::duration_from_s(fault.after_s.unwrap_or(0.0))).await;
        let usage = MockUsage {
            prompt_tokens: chat.prompt_tokens,
            ..MockUsage::default()
        };
        let billed = fault.is_billed().then_some(usage);
        let response = match faults::error_response(fault, self.wall_now()) {
            Some(response) => response,
            None => {
                // The next line never ends, so this request is billed here and not below.
                guard.bill(billed);
                std::future::pending().await
            }
        };
        guard.bill(billed);
        let limit_status = guard.finish(None);
        self.with_limits(response, &limit_status)
    }

    async fn respond_answer(
        &self,
        mut guard: RequestGuard<'_>,
        fault: Option<&ScriptedFault>,
        chat: &ParsedChat<'_>,
        random: f64,
    ) -> MockResponse {
        let answers = &self.script.answers;
        let MockAnswer { body, usage } = self.write_answer(chat, guard.hash);
        let scripted_s =
            answers.latency_s.sample(random) + answers.token_s * usage.completion_tokens as f64;
        let latency_s = match fault.and_then(|fault| fault.after_s) {
            Some(after_s) => after_s,
            None => scripted_s * guard.load_factor,
        };
        let is_billed = fault.is_none_or(ScriptedFault::is_billed);
        guard.billed_if_dropped = (answers.bill_abandoned && is_billed).then_some(usage);
        pause(faults::duration_from_s(latency_s)).await;
        let reply = MockReply::json(200, body);
        let response = match fault {
            None => MockResponse::Complete(reply),
            Some(fault) => faults::corrupt(fault, reply),
        };
        {
            let mut state = self.state();
            match fault {
                None => state.stats.record_answer(),
                Some(fault) => state.stats.record_fault(fault.kind.to_string()),
            }
        }
        guard.bill(is_billed.then_some(usage));
        let limit_status = guard.finish(Some(usage));
        self.with_limits(response, &limit_status)
    }

    /// Adds the rate-limit headers to the reply.
    fn with_limits(&self, mut response: MockResponse, limit_status: &LimitStatus) -> MockResponse {
        if let Some(reply) = response.reply_mut() {
            let dialect = self.script.limits.headers;
            headers::push_limits(&mut reply.headers, dialect, limit_status, self.wall_now());
        }
        response
    }

    /// Returns the factor by which `in_flight` concurrent requests increase the latency.
    fn load_factor(&self, in_flight: u64) -> f64 {
        let capacity = self.script.limits.load_capacity;
        capacity.map_or(1.0, |capacity| {
            (in_flight as f64 / capacity as f64).max(1.0)
        })
    }
}

/// An admitted request. [`RequestGuard::finish`] releases it; so does a drop, which means that the client has
/// disconnected.
struct RequestGuard<'a> {
    mock: &'a Mock,
    hash: BodyHash,
    ticket: Option<AdmissionTicket>,
    /// Usage to bill if the client disconnects.
    billed_if_dropped: Option<MockUsage>,
    load_factor: f64,
}

impl RequestGuard<'_> {
    /// Bills the usage, if there is one.
    fn bill(&self, usage: Option<MockUsage>) {
        if let Some(usage) = usage {
            let elapsed = self.mock.started.elapsed();
            self.mock
                .state()
                .stats
                .record_billed(elapsed, self.hash, &usage);
        }
    }

    /// Ends the request. `used` is the usage of its answer, if it has one.
    fn finish(mut self, used: Option<MockUsage>) -> LimitStatus {
        self.release(used)
    }

    fn release(&mut self, used: Option<MockUsage>) -> LimitStatus {
        let mut state = self.mock.state();
        let now = Instant::now();
        if let Some(ticket) = self.ticket.take() {
            let used = used.map(|usage| TokenCost {
                prompt_tokens: usage.prompt_tokens,
                output_tokens: usage.completion_tokens,
            });
            state.limiter.release(now, ticket, used);
        }
        state.limiter.status(now)
    }
}

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        if self.ticket.is_some() {
            self.mock.state().stats.record_abandoned();
            self.bill(self.billed_if_dropped);
            self.release(self.billed_if_dropped);
        }
    }
}

/// Sleeps for `time`; returns at once if it is zero.
pub(crate) async fn pause(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}
