//! What a mock has seen, answered and billed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::mock::answer::MockUsage;

/// Everything since the start. `GET /mock/stats` returns it as JSON.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MockStats {
    pub seconds: f64,
    /// Over TCP.
    pub connections: u64,
    /// All but those for these numbers.
    pub requests: u64,
    /// Replies by their status, those that were cut short among them.
    pub by_status: BTreeMap<u16, u64>,
    /// Good answers, sent whole.
    pub answered: u64,
    /// Refused by a limit.
    pub throttled: u64,
    /// Requests whose client left before they had a reply.
    pub abandoned: u64,
    /// By kind.
    pub faults: BTreeMap<String, u64>,
    pub in_flight: u64,
    pub max_in_flight: u64,
    /// Requests for answers, refused ones among them, in the fullest 60 seconds.
    pub most_requests_in_a_minute: u64,
    /// Prompts and longest answers that they asked for, in the fullest 60 seconds.
    pub most_tokens_asked_in_a_minute: u64,
    /// In the fullest 60 seconds, without those of batches.
    pub most_tokens_billed_in_a_minute: u64,
    pub billed: BillingTotals,
    /// Different bodies that asked for an answer.
    pub bodies: u64,
    /// How many bodies were billed so many times.
    pub bodies_by_times_billed: BTreeMap<u32, u64>,
}

/// What the answers add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BillingTotals {
    /// Those of batches among them.
    pub answers: u64,
    pub batch_answers: u64,
    pub prompt_tokens: u64,
    /// Of the prompt tokens.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// Of the completion tokens.
    pub reasoning_tokens: u64,
}

/// A body's hash.
pub type BodyHash = u128;

pub fn body_hash(body: &[u8]) -> BodyHash {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(body).as_bytes()[..16]);
    u128::from_le_bytes(short)
}

#[derive(Debug, Default)]
pub struct StatsCollector {
    stats: MockStats,
    bodies: HashMap<BodyHash, BodyCounts>,
    /// How often each request for anything but an answer came.
    others: HashMap<BodyHash, u32>,
    requests: BusiestMinute,
    asked: BusiestMinute,
    billed: BusiestMinute,
}

#[derive(Debug, Clone, Copy, Default)]
struct BodyCounts {
    attempts: u32,
    billed: u32,
}

impl StatsCollector {
    pub fn record_connection(&mut self) {
        self.stats.connections += 1;
    }

    pub fn record_request(&mut self) {
        self.stats.requests += 1;
    }

    /// A request for an answer came in, `at` after the start.
    pub fn record_chat_request(&mut self, at: Duration, tokens: u64) {
        self.requests.add(at, 1);
        self.asked.add(at, tokens);
    }

    /// A request was let in, as one of so many at once. Returns how often its body came before.
    pub fn record_admission(&mut self, hash: BodyHash, in_flight: u64) -> u32 {
        self.stats.max_in_flight = self.stats.max_in_flight.max(in_flight);
        self.next_attempt(hash)
    }

    /// As [`StatsCollector::admitted`], for a row of a batch, which no limit counts.
    pub fn next_attempt(&mut self, hash: BodyHash) -> u32 {
        let body = self.bodies.entry(hash).or_default();
        body.attempts += 1;
        body.attempts - 1
    }

    /// How often this request for anything but an answer came before.
    pub fn next_other_attempt(&mut self, hash: BodyHash) -> u32 {
        let attempts = self.others.entry(hash).or_default();
        *attempts += 1;
        *attempts - 1
    }

    pub fn record_status(&mut self, status: u16) {
        *self.stats.by_status.entry(status).or_default() += 1;
    }

    pub fn record_answer(&mut self) {
        self.stats.answered += 1;
    }

    pub fn record_throttled(&mut self) {
        self.stats.throttled += 1;
    }

    pub fn record_abandoned(&mut self) {
        self.stats.abandoned += 1;
    }

    pub fn record_fault(&mut self, kind: String) {
        *self.stats.faults.entry(kind).or_default() += 1;
    }

    pub fn record_billed(&mut self, at: Duration, hash: BodyHash, usage: &MockUsage) {
        self.bill(hash, usage);
        self.billed
            .add(at, usage.prompt_tokens + usage.completion_tokens);
    }

    /// As [`StatsCollector::billed`], for a row of a batch.
    pub fn record_billed_in_batch(&mut self, hash: BodyHash, usage: &MockUsage) {
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

    pub fn times_billed(&self, hash: BodyHash) -> u32 {
        self.bodies.get(&hash).map_or(0, |body| body.billed)
    }

    pub fn snapshot(&self, at: Duration, in_flight: u64) -> MockStats {
        let mut by_times = BTreeMap::new();
        for body in self.bodies.values() {
            *by_times.entry(body.billed).or_default() += 1;
        }
        MockStats {
            seconds: at.as_secs_f64(),
            in_flight,
            most_requests_in_a_minute: self.requests.most,
            most_tokens_asked_in_a_minute: self.asked.most,
            most_tokens_billed_in_a_minute: self.billed.most,
            bodies: self.bodies.len() as u64,
            bodies_by_times_billed: by_times,
            ..self.stats.clone()
        }
    }
}

/// The most in any 60 seconds, to the millisecond: what comes within one is kept as one entry, so
/// that a minute of heavy load stays small.
#[derive(Debug, Default)]
struct BusiestMinute {
    entries: VecDeque<(u64, u64)>,
    sum: u64,
    most: u64,
}

impl BusiestMinute {
    fn add(&mut self, at: Duration, amount: u64) {
        let ms = at.as_millis() as u64;
        while let Some(&(old, gone)) = self.entries.front()
            && old + 60_000 <= ms
        {
            self.sum -= gone;
            self.entries.pop_front();
        }
        match self.entries.back_mut() {
            Some((same, sum)) if *same == ms => *sum += amount,
            _ => self.entries.push_back((ms, amount)),
        }
        self.sum += amount;
        self.most = self.most.max(self.sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fullest_minute_is_open_at_its_end() {
        let mut minute = BusiestMinute::default();
        for (at, most) in [(0, 1), (30_000, 2), (59_999, 3), (60_000, 3), (61_000, 4)] {
            minute.add(Duration::from_millis(at), 1);
            assert_eq!(minute.most, most, "at {at} ms");
        }
    }
}
