//! How many requests may be in flight: additive increase, multiplicative decrease on 429; by the
//! gradient of latency where a server never answers 429.
//!
//! A server that queues shows its limit as latency alone: once it is saturated, half as many
//! requests at once take half as long each, and nothing is lost by sending fewer. So from time to
//! time a smaller window is tried, and kept if latency fell in proportion; a larger one likewise,
//! and kept if latency did not rise in proportion. By Little's law this compares throughputs.

use std::time::Duration;

use tokio::time::Instant;

/// The share of the window that is tried.
const STEP: f64 = 0.75;

/// Latency that follows the window by at least so much (1: in proportion, 0: not at all) shows
/// that the server is saturated.
const SATURATED: f64 = 0.8;

/// Answers over which a latency is measured, at the least.
const SAMPLES: f64 = 128.0;

/// Measurements without a trial, at most, after trials that led nowhere.
const LONGEST_REST: u32 = 64;

#[derive(Debug)]
pub(crate) struct ConcurrencyLimit {
    ceiling: f64,
    window: f64,
    /// A refusal of a request that left before this was answered by the cut then made.
    last_cut: Option<Instant>,
    gradient: Gradient,
}

/// The search for the smallest window that keeps a queueing server busy.
#[derive(Debug)]
struct Gradient {
    /// Only of a server that never asks to wait and tells no limits.
    is_on: bool,
    /// Answers to requests that left from here on count.
    since: Option<Instant>,
    sum: f64,
    count: u32,
    /// Window and mean latency before the trial that is on.
    before: Option<(f64, f64)>,
    /// The next trial is upwards.
    upwards: bool,
    rest: u32,
    resting: u32,
}

impl ConcurrencyLimit {
    pub(crate) fn new(ceiling: usize) -> Self {
        let ceiling = ceiling.max(1) as f64;
        Self {
            ceiling,
            window: ceiling,
            last_cut: None,
            gradient: Gradient {
                is_on: true,
                since: None,
                sum: 0.0,
                count: 0,
                before: None,
                upwards: false,
                rest: 1,
                resting: 0,
            },
        }
    }

    /// Requests that may be in flight.
    pub(crate) fn free_slots(&self) -> usize {
        self.window as usize
    }

    /// An answer came to a request that left at `departed`. `is_full`: the window, and not a
    /// limit or the end of the queue, decides how many are in flight.
    pub(crate) fn answered(&mut self, departed: Instant, now: Instant, is_full: bool) {
        if !self.gradient.is_on {
            self.window = (self.window + 1.0 / self.window).min(self.ceiling);
        } else if is_full {
            self.measure(departed, now);
        }
    }

    /// The server refused a request for its rate. One cut answers all that were in flight then.
    pub(crate) fn throttled(&mut self, departed: Instant, now: Instant) {
        self.follow_limits();
        if self.last_cut.is_some_and(|cut| departed < cut) {
            return;
        }
        self.window = (self.window / 2.0).max(1.0);
        self.last_cut = Some(now);
    }

    /// The server has limits of its own and tells them: its latency means nothing.
    pub(crate) fn follow_limits(&mut self) {
        self.gradient.is_on = false;
    }

    fn measure(&mut self, departed: Instant, now: Instant) {
        let gradient = &mut self.gradient;
        let since = *gradient.since.get_or_insert(now);
        if departed < since {
            return;
        }
        gradient.sum += (now - departed).max(Duration::from_micros(1)).as_secs_f64();
        gradient.count += 1;
        if f64::from(gradient.count) < SAMPLES.max(4.0 * self.window) {
            return;
        }
        let latency = gradient.sum / f64::from(gradient.count);
        (gradient.since, gradient.sum, gradient.count) = (Some(now), 0.0, 0);
        let Some((window, before)) = gradient.before.take() else {
            if gradient.resting > 0 {
                gradient.resting -= 1;
                return;
            }
            gradient.before = Some((self.window, latency));
            let tried = match gradient.upwards {
                true => (self.window / STEP).ceil().min(self.ceiling),
                false => (self.window * STEP).floor().max(1.0),
            };
            if tried == self.window {
                gradient.before = None;
                gradient.upwards = !gradient.upwards;
            }
            self.window = tried;
            return;
        };
        // d log(latency) / d log(window)
        let slope = (latency / before).ln() / (self.window / window).ln();
        let is_better = match gradient.upwards {
            true => slope < SATURATED,
            false => slope >= SATURATED,
        };
        if is_better {
            gradient.rest = 1;
        } else {
            self.window = window;
            gradient.upwards = !gradient.upwards;
            gradient.resting = gradient.rest;
            gradient.rest = (gradient.rest * 2).min(LONGEST_REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows over time against a server whose latency is `latency(requests in flight)` seconds.
    fn windows(ceiling: usize, rounds: usize, latency: impl Fn(f64) -> f64) -> Vec<usize> {
        let mut concurrency = ConcurrencyLimit::new(ceiling);
        let mut now = Instant::now();
        (0..rounds)
            .map(|_| {
                let room = concurrency.free_slots();
                let departed = now;
                now += Duration::from_secs_f64(latency(room as f64));
                for _ in 0..room {
                    concurrency.answered(departed, now, true);
                }
                room
            })
            .collect()
    }

    #[test]
    fn a_saturated_server_is_left_its_queue_and_kept_busy() {
        // 16 at a time; the rest waits.
        let windows = windows(200, 3_000, |in_flight| 0.5 * (in_flight / 16.0).max(1.0));
        let last = &windows[windows.len() / 2..];
        let mean = last.iter().sum::<usize>() as f64 / last.len() as f64;
        assert!((14.0..30.0).contains(&mean), "{mean}");
        assert!(*last.iter().min().unwrap() >= 12, "{last:?}");
    }

    #[test]
    fn a_server_that_does_not_queue_is_sent_all_that_is_allowed() {
        let windows = windows(64, 2_000, |_| 0.5);
        let mean = windows.iter().sum::<usize>() as f64 / windows.len() as f64;
        assert!(mean > 62.0, "{mean}");
    }

    #[test]
    fn a_429_halves_once_for_all_in_flight_and_answers_bring_it_back() {
        let start = Instant::now();
        let mut concurrency = ConcurrencyLimit::new(32);
        let at = |seconds| start + Duration::from_secs(seconds);
        for _ in 0..20 {
            concurrency.throttled(start, at(1));
        }
        assert_eq!(concurrency.free_slots(), 16);
        concurrency.throttled(at(2), at(3));
        assert_eq!(concurrency.free_slots(), 8);
        for _ in 0..10 {
            concurrency.throttled(at(100), at(100));
            concurrency.throttled(at(101), at(101));
        }
        assert_eq!(concurrency.free_slots(), 1);
        for second in 200..1_200 {
            concurrency.answered(at(second), at(second + 1), true);
        }
        assert_eq!(concurrency.free_slots(), 32);
    }
}
