//! [`ConcurrencyLimit`]: the maximum number of requests in flight (the window). If the server answers 429 or reports
//! limits, the window follows additive increase and multiplicative decrease. Otherwise a search by latency sets it.
//! Pure.
//!
//! A server with a queue shows its capacity only by its latency: when the server is saturated, halving the window
//! halves the latency and leaves the throughput unchanged. From time to time the search tries a smaller or a larger
//! window. It keeps the smaller one if the latency fell in proportion, and the larger one if the latency did not rise
//! in proportion. By Little's law (window = throughput * latency) this compares throughputs.

use std::time::Duration;

use tokio::time::Instant;

/// Ratio of the smaller to the larger window of a trial.
const TRIAL_RATIO: f64 = 0.75;

/// Minimum slope of log latency over log window at which the server counts as saturated. At a slope of 1, latency is
/// proportional to the window; at 0, it does not depend on the window.
const SATURATED_SLOPE: f64 = 0.8;

/// Minimum number of answers in a latency measurement.
const MIN_SAMPLES: f64 = 128.0;

/// Minimum number of answers in a latency measurement, as a multiple of the window.
const MIN_SAMPLES_PER_WINDOW: f64 = 4.0;

/// Maximum number of measurements to skip before a trial. The number doubles after each failed trial.
const MAX_PAUSE: u32 = 64;

/// Maximum number of requests in flight to one endpoint.
#[derive(Debug)]
pub(crate) struct ConcurrencyLimit {
    /// `limits.concurrency`.
    max_window: f64,
    /// Current maximum number of requests in flight.
    window: f64,
    /// Time of the last decrease after a 429. A 429 for a request that was sent before it causes no further decrease.
    last_decrease: Option<Instant>,
    search: LatencySearch,
}

/// The search for the smallest window that keeps a queueing server busy.
#[derive(Debug)]
struct LatencySearch {
    /// False after the server has throttled a request or reported a limit.
    is_active: bool,
    /// Start of the measurement. Answers to requests sent before it do not count.
    measuring_since: Option<Instant>,
    /// Sum of the measured latencies in seconds.
    latency_sum_s: f64,
    /// Number of measured latencies.
    count: u32,
    /// Window, and mean latency in seconds, before the current trial. None if no trial is running.
    baseline: Option<(f64, f64)>,
    /// True if the trial has a larger window than the baseline: the current trial or, if none is running, the next one.
    is_trial_larger: bool,
    /// Number of measurements to skip after the next failed trial.
    pause_after_failure: u32,
    /// Number of measurements to skip before the next trial.
    remaining_pause: u32,
}

impl ConcurrencyLimit {
    pub(crate) fn new(max_window: usize) -> Self {
        let max_window = max_window.max(1) as f64;
        Self {
            max_window,
            window: max_window,
            last_decrease: None,
            search: LatencySearch {
                is_active: true,
                measuring_since: None,
                latency_sum_s: 0.0,
                count: 0,
                baseline: None,
                is_trial_larger: false,
                pause_after_failure: 1,
                remaining_pause: 0,
            },
        }
    }

    /// Returns the maximum number of requests in flight.
    pub(crate) fn max_in_flight(&self) -> usize {
        self.window as usize
    }

    /// Records an answer to a request that was sent at `sent_at`. `is_full` is true if the window, not a rate limit
    /// or the end of the queue, bounds the number of requests in flight.
    pub(crate) fn answered(&mut self, sent_at: Instant, now: Instant, is_full: bool) {
        if !self.search.is_active {
            self.window = (self.window + 1.0 / self.window).min(self.max_window);
        } else if is_full {
            self.measure(sent_at, now);
        }
    }

    /// Records a throttled request. Requests that were in flight together cause only one decrease.
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

    /// Ends the search by latency, because the server throttles or reports limits.
    pub(crate) fn follow_limits(&mut self) {
        self.search.is_active = false;
    }

    /// Adds a latency to the measurement. At its end, starts a trial or evaluates one.
    fn measure(&mut self, sent_at: Instant, now: Instant) {
        let search = &mut self.search;
        let start = *search.measuring_since.get_or_insert(now);
        if sent_at < start {
            return;
        }
        search.latency_sum_s += (now - sent_at).max(Duration::from_micros(1)).as_secs_f64();
        search.count += 1;
        if f64::from(search.count) < MIN_SAMPLES.max(MIN_SAMPLES_PER_WINDOW * self.window) {
            return;
        }
        let latency = search.latency_sum_s / f64::from(search.count);
        search.measuring_since = Some(now);
        search.latency_sum_s = 0.0;
        search.count = 0;
        let Some((baseline_window, baseline_latency)) = search.baseline.take() else {
            if search.remaining_pause > 0 {
                search.remaining_pause -= 1;
                return;
            }
            search.baseline = Some((self.window, latency));
            let trial_window = if search.is_trial_larger {
                (self.window / TRIAL_RATIO).ceil().min(self.max_window)
            } else {
                (self.window * TRIAL_RATIO).floor().max(1.0)
            };
            if trial_window == self.window {
                search.baseline = None;
                search.is_trial_larger = !search.is_trial_larger;
            }
            self.window = trial_window;
            return;
        };
        // d log(latency) / d log(window)
        let slope = (latency / baseline_latency).ln() / (self.window / baseline_window).ln();
        let is_saturated = slope >= SATURATED_SLOPE;
        // A smaller window is kept if the server is saturated, a larger one if it is not.
        if is_saturated != search.is_trial_larger {
            search.pause_after_failure = 1;
        } else {
            self.window = baseline_window;
            search.is_trial_larger = !search.is_trial_larger;
            search.remaining_pause = search.pause_after_failure;
            search.pause_after_failure = (search.pause_after_failure * 2).min(MAX_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the windows over time with a server whose latency in seconds is `latency(requests in flight)`.
    fn windows(max_window: usize, rounds: usize, latency: impl Fn(f64) -> f64) -> Vec<usize> {
        let mut concurrency = ConcurrencyLimit::new(max_window);
        let mut now = Instant::now();
        (0..rounds)
            .map(|_| {
                let slots = concurrency.max_in_flight();
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
        // The server processes 16 requests at a time and queues the others.
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
        assert_eq!(concurrency.max_in_flight(), 16);
        concurrency.throttled(at(2), at(3));
        assert_eq!(concurrency.max_in_flight(), 8);
        for _ in 0..10 {
            concurrency.throttled(at(100), at(100));
            concurrency.throttled(at(101), at(101));
        }
        assert_eq!(concurrency.max_in_flight(), 1);
        for second in 200..1_200 {
            concurrency.answered(at(second), at(second + 1), true);
        }
        assert_eq!(concurrency.max_in_flight(), 32);
    }
}
