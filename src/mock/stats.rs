//! Counts of the requests that the mock received, answered and billed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::mock::answer::MockUsage;

/// Counts since the start. `GET /mock/stats` returns them as JSON.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MockStats {
    /// Seconds since the start of the mock.
    pub seconds: f64,
    /// Number of TCP connections.
    pub connections: u64,
    /// Number of requests, except those to `/mock/stats`.
    pub requests: u64,
    /// Number of replies by status, including incomplete ones.
    pub by_status: BTreeMap<u16, u64>,
    /// Number of answers without a fault, except those of batches.
    pub answered: u64,
    /// Number of requests rejected by a limit.
    pub throttled: u64,
    /// Number of requests whose client disconnected before the reply.
    pub abandoned: u64,
    /// Number of faults by kind.
    pub faults: BTreeMap<String, u64>,
    pub in_flight: u64,
    pub max_in_flight: u64,
    /// Maximum number of valid chat requests within 60 seconds, including those rejected by a limit.
    pub most_requests_in_a_minute: u64,
    /// Maximum number of tokens (prompt and `max_tokens`) requested within 60 seconds.
    pub most_tokens_asked_in_a_minute: u64,
    /// Maximum number of tokens billed within 60 seconds, except those of batches.
    pub most_tokens_billed_in_a_minute: u64,
    pub billed: BillingTotals,
    /// Number of distinct bodies of admitted chat requests and batch rows.
    pub bodies: u64,
    /// Number of bodies, by the number of times that an answer to them was billed.
    pub bodies_by_times_billed: BTreeMap<u32, u64>,
}

/// Totals of all billed answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BillingTotals {
    /// All answers, including those of batches.
    pub answers: u64,
    pub batch_answers: u64,
    pub prompt_tokens: u64,
    /// Included in `prompt_tokens`.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// Included in `completion_tokens`.
    pub reasoning_tokens: u64,
}

/// Hash of a request body.
pub(crate) type BodyHash = u128;

/// Returns the first 128 bits of the body's BLAKE3 hash.
pub(crate) fn body_hash(body: &[u8]) -> BodyHash {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&blake3::hash(body).as_bytes()[..16]);
    u128::from_le_bytes(bytes)
}

/// Collects the counts of [`MockStats`].
#[derive(Debug, Default)]
pub(crate) struct StatsCollector {
    stats: MockStats,
    bodies: HashMap<BodyHash, BodyCounts>,
    /// Number of attempts of each request to a route other than chat completions.
    other_route_attempts: HashMap<BodyHash, u32>,
    requests: BusiestMinute,
    requested_tokens: BusiestMinute,
    billed_tokens: BusiestMinute,
}

#[derive(Debug, Clone, Copy, Default)]
struct BodyCounts {
    attempts: u32,
    billed: u32,
}

impl StatsCollector {
    pub(crate) fn record_connection(&mut self) {
        self.stats.connections += 1;
    }

    pub(crate) fn record_request(&mut self) {
        self.stats.requests += 1;
    }

    /// Records a valid chat request with its tokens (prompt and `max_tokens`).
    pub(crate) fn record_chat_request(&mut self, elapsed: Duration, tokens: u64) {
        self.requests.add(elapsed, 1);
        self.requested_tokens.add(elapsed, tokens);
    }

    /// Records an admitted request. Returns the number of earlier attempts with the same body.
    pub(crate) fn record_admission(&mut self, hash: BodyHash, in_flight: u64) -> u32 {
        self.stats.max_in_flight = self.stats.max_in_flight.max(in_flight);
        self.record_attempt(hash)
    }

    /// Like [`StatsCollector::record_admission`], for a batch row, to which no rate limit applies.
    pub(crate) fn record_attempt(&mut self, hash: BodyHash) -> u32 {
        let counts = self.bodies.entry(hash).or_default();
        counts.attempts += 1;
        counts.attempts - 1
    }

    /// Returns the number of earlier attempts of this request to a route other than chat completions.
    pub(crate) fn next_other_route_attempt(&mut self, hash: BodyHash) -> u32 {
        let attempts = self.other_route_attempts.entry(hash).or_default();
        *attempts += 1;
        *attempts - 1
    }

    pub(crate) fn record_status(&mut self, status: u16) {
        *self.stats.by_status.entry(status).or_default() += 1;
    }

    pub(crate) fn record_answer(&mut self) {
        self.stats.answered += 1;
    }

    pub(crate) fn record_throttled(&mut self) {
        self.stats.throttled += 1;
    }

    pub(crate) fn record_abandoned(&mut self) {
        self.stats.abandoned += 1;
    }

    pub(crate) fn record_fault(&mut self, kind: String) {
        *self.stats.faults.entry(kind).or_default() += 1;
    }

    pub(crate) fn record_billed(&mut self, elapsed: Duration, hash: BodyHash, usage: &MockUsage) {
        self.bill(hash, usage);
        self.billed_tokens
            .add(elapsed, usage.prompt_tokens + usage.completion_tokens);
    }

    /// Like [`StatsCollector::record_billed`], for a batch row.
    pub(crate) fn record_billed_in_batch(&mut self, hash: BodyHash, usage: &MockUsage) {
        self.bill(hash, usage);
        self.stats.billed.batch_answers += 1;
    }

    fn bill(&mut self, hash: BodyHash, usage: &MockUsage) {
        let billed = &mut self.stats.billed;
        billed.answers += 1;
        billed.prompt_tokens += usage.prompt_tokens;
        billed.cached_tokens += usage.cached_tokens;
        billed.completion_tokens += usage.completion_tokens;
        billed.reasoning_tokens += usage.reasoning_tokens;
        self.bodies.entry(hash).or_default().billed += 1;
    }

    pub(crate) fn times_billed(&self, hash: BodyHash) -> u32 {
        self.bodies.get(&hash).map_or(0, |body| body.billed)
    }

    pub(crate) fn snapshot(&self, elapsed: Duration, in_flight: u64) -> MockStats {
        let mut bodies_by_times_billed = BTreeMap::new();
        for body in self.bodies.values() {
            *bodies_by_times_billed.entry(body.billed).or_default() += 1;
        }
        MockStats {
            seconds: elapsed.as_secs_f64(),
            in_flight,
            most_requests_in_a_minute: self.requests.max_sum,
            most_tokens_asked_in_a_minute: self.requested_tokens.max_sum,
            most_tokens_billed_in_a_minute: self.billed_tokens.max_sum,
            bodies: self.bodies.len() as u64,
            bodies_by_times_billed,
            ..self.stats.clone()
        }
    }
}

/// The maximum sum within any 60 seconds. Amounts of the same millisecond share one entry, which
/// bounds the memory.
#[derive(Debug, Default)]
struct BusiestMinute {
    /// Milliseconds since the start, and the amount of that millisecond.
    entries: VecDeque<(u64, u128)>,
    /// Sum of `entries`. Wide, because a client may send any `max_tokens`.
    sum: u128,
    max_sum: u64,
}

impl BusiestMinute {
    fn add(&mut self, elapsed: Duration, amount: u64) {
        let ms = elapsed.as_millis() as u64;
        let amount = u128::from(amount);
        while let Some(&(oldest_ms, oldest)) = self.entries.front()
            && oldest_ms + 60_000 <= ms
        {
            self.sum -= oldest;
            self.entries.pop_front();
        }
        match self.entries.back_mut() {
            Some((last_ms, last)) if *last_ms == ms => *last += amount,
            _ => self.entries.push_back((ms, amount)),
        }
        self.sum += amount;
        let sum = u64::try_from(self.sum).unwrap_or(u64::MAX);
        self.max_sum = self.max_sum.max(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busiest_minute_excludes_its_end() {
        let mut minute = BusiestMinute::default();
        for (ms, max_sum) in [(0, 1), (30_000, 2), (59_999, 3), (60_000, 3), (61_000, 4)] {
            minute.add(Duration::from_millis(ms), 1);
            assert_eq!(minute.max_sum, max_sum, "at {ms} ms");
        }
    }
}
