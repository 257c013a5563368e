//! Maximum number of requests in flight (the window): additive increase and multiplicative decrease on 429s, or
//! the gradient of latency for a server that never answers 429. Pure.
//!
//! A server with a queue shows its limit only by latency: once it is saturated, half the window halves the
//! latency, and the throughput stays the same. From time to time a smaller window is tried, and kept if latency
//! fell in proportion; or a larger one, and kept if latency did not rise in proportion. By Little's law this
//! compares throughputs.

use std::time::Duration;

use tokio::time::Instant;

/// Ratio of the smaller to the larger window of a trial.
const STEP: f64 = 0.75;

/// Minimum slope of log latency over log window at which the server counts as saturated; 1 means in proportion, 0
/// no dependence.
const SATURATED: f64 = 0.8;

/// Minimum number of answers per latency measurement.
const SAMPLES: f64 = 128.0;

/// Maximum number of measurements between trials; it doubles after each failed trial.
const LONGEST_PAUSE: u32 = 64;

/// Window of one endpoint.
#[derive(Debug)]
pub(crate) struct ConcurrencyLimit {
    /// `limits.concurrency`.
    max_window: f64,
    window: f64,
    /// Time of the last decrease. Refusals of requests that were sent before it cause no further decrease.
    last_decrease: Option<Instant>,
    gradient: Gradient,
}

/// The search for the smallest window that keeps a queueing server busy.
#[derive(Debug)]
struct Gradient {
    /// False once the server has throttled a request or reported a limit.
    is_active: bool,
    /// Start of the measurement: answers to requests sent before it do not count.
    since: Option<Instant>,
    /// Sum of the measured latencies in seconds.
    sum: f64,
    /// Number of measured latencies.
    count: u32,
    /// Window and mean latency before the current trial.
    before: Option<(f64, f64)>,
    /// True if the next trial has a larger window.
    upwards: bool,
    /// Number of measurements to skip after the next failed trial.
    pause: u32,
    /// Number of measurements to skip before the next trial.
    paused: u32,
}

impl ConcurrencyLimit {
    pub(crate) fn new(max_window: usize) -> Self {
        let max_window = max_window.max(1) as f64;
        Self {
            max_window,
            window: max_window,
            last_decrease: None,
            gradient: Gradient {
                is_active: true,
                since: None,
                sum: 0.0,
                count: 0,
                before: None,
                upwards: false,
                pause: 1,
                paused: 0,
            },
        }
    }

    /// Number of requests that may be in flight.
    pub(crate) fn free_slots(&self) -> usize {
        self.window as usize
    }

    /// Records an answer to a request that was sent at `sent_at`. `is_full` is true if the window, not a rate limit
    /// or the end of the queue, bounds the number of requests in flight.
    pub(crate) fn answered(&mut self, sent_at: Instant, now: Instant, is_full: bool) {
        if !self.gradient.is_active {
            self.window = (self.window + 1.0 / self.window).min(self.max_window);
        } else if is_full {
            self.measure(sent_at, now);
        }
    }

    /// Records a throttled request. All requests that were in flight together cause one decrease.
    pub(crate) fn throttled(&mut self, sent_at: Instant, now: Instant) {
        self.follow_limits();
        if self
            .last_decrease
            .is_some_and(|decrease| sent_at < decrease)
        {
            return;
        }
        self.window = (self.window / 2.0).max(1.0);
        self.last_decrease = Some(now);
    }

    /// Stops the search by latency: the server throttles or reports limits, so latency does not show its capacity.
    pub(crate) fn follow_limits(&mut self) {
        self.gradient.is_active = false;
    }

    fn measure(&mut self, sent_at: Instant, now: Instant) {
        let gradient = &mut self.gradient;
        let since = *gradient.since.get_or_insert(now);
        if sent_at < since {
            return;
        }
        gradient.sum += (now - sent_at).max(Duration::from_micros(1)).as_secs_f64();
        gradient.count += 1;
        if f64::from(gradient.count) < SAMPLES.max(4.0 * self.window) {
            return;
        }
        let latency = gradient.sum / f64::from(gradient.count);
        (gradient.since, gradient.sum, gradient.count) = (Some(now), 0.0, 0);
        let Some((window, before)) = gradient.before.take() else {
            if gradient.paused > 0 {
                gradient.paused -= 1;
                return;
            }
            gradient.before = Some((self.window, latency));
            let trial = if gradient.upwards {
                (self.window / STEP).ceil().min(self.max_window)
            } else {
                (self.window * STEP).floor().max(1.0)
            };
            if trial == self.window {
                gradient.before = None;
                gradient.upwards = !gradient.upwards;
            }
            self.window = trial;
            return;
        };
        // d log(latency) / d log(window)
        let slope = (latency / before).ln() / (self.window / window).ln();
        let is_saturated = slope >= SATURATED;
        if is_saturated != gradient.upwards {
            gradient.pause = 1;
        } else {
            self.window = window;
            gradient.upwards = !gradient.upwards;
            gradient.paused = gradient.pause;
            gradient.pause = (gradient.pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows over time against a server whose latency is `latency(requests in flight)` seconds.
    fn windows(max_window: usize, rounds: usize, latency: impl Fn(f64) -> f64) -> Vec<usize> {
        let mut concurrency = ConcurrencyLimit::new(max_window);
        let mut now = Instant::now();
        (0..rounds)
            .map(|_| {
                let slots = concurrency.free_slots();
                let sent_at = now;
                now += Duration::from_secs_f64(latency(slots as f64));
                for _ in 0..slots {
                    concurrency.answered(sent_at, now, true);
                }
                slots
            })
            .collect()
    }

    #[test]
    fn concurrency_of_a_queueing_server_settles_near_its_capacity() {
        // The server works on 16 requests at a time, and queues the others.
        let windows = windows(200, 3_000, |in_flight| 0.5 * (in_flight / 16.0).max(1.0));
        let last = &windows[windows.len() / 2..];
        let mean = last.iter().sum::<usize>() as f64 / last.len() as f64;
        assert!((14.0..30.0).contains(&mean), "{mean}");
        assert!(*last.iter().min().unwrap() >= 12, "{last:?}");
    }

    #[test]
    fn concurrency_of_a_server_without_a_queue_stays_at_the_limit() {
        let windows = windows(64, 2_000, |_| 0.5);
        let mean = windows.iter().sum::<usize>() as f64 / windows.len() as f64;
        assert!(mean > 62.0, "{mean}");
    }

    #[test]
    fn throttling_halves_concurrency_once_per_flight_and_answers_restore_it() {
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
