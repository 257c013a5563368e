//! Statistics of a run by hour, and its use of the rate limits.

use serde::Serialize;
use tokio::time::Instant;

/// Statistics of one hour of the run, counted from the start of the run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct HourStats {
    /// Start of the hour, RFC 3339 in UTC.
    pub start: String,
    pub requests: u64,
    pub answered: u64,
    pub failed_attempts: u64,
    /// Number of seconds of this hour within the run.
    pub seconds: f64,
    /// Part of `seconds` outside `schedule.window`.
    pub closed_s: f64,
    /// Part of `seconds` in which an endpoint throttled or was down, or the shared limits were unavailable.
    pub waiting_s: f64,
}

/// Requests and tokens sent to one endpoint, and the amounts that the limits of the endpoint and of the user
/// allowed while rows were waiting.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LimitUse {
    pub teacher: String,
    pub requests: u64,
    /// Number of requests that the limits allowed; `None` without a known limit.
    pub requests_allowed: Option<f64>,
    /// Sum of the prompt estimates and of `max_tokens`, as limits count them.
    pub tokens: u64,
    /// Number of tokens that the limits allowed; `None` without a known limit.
    pub tokens_allowed: Option<f64>,
    /// Number of requests that the endpoint throttled.
    pub throttled: u64,
    /// Number of seconds in which rows were waiting to be sent.
    pub open_s: f64,
}

impl LimitUse {
    /// Adds seconds in which rows were waiting to be sent. `per_minute` has the limits of requests and of tokens per
    /// minute, in this order.
    pub fn advance(&mut self, seconds: f64, per_minute: (Option<f64>, Option<f64>)) {
        let seconds_before = self.open_s;
        let add = |allowed: &mut Option<f64>, per_minute: Option<f64>| {
            if let Some(per_minute) = per_minute {
                // A limit that headers report later is assumed to apply since the start, with a burst of one second.
                let allowed_before = per_minute * (seconds_before + 1.0) / 60.0;
                *allowed = Some(allowed.unwrap_or(allowed_before) + per_minute * seconds / 60.0);
            }
        };
        let (requests_per_minute, tokens_per_minute) = per_minute;
        add(&mut self.requests_allowed, requests_per_minute);
        add(&mut self.tokens_allowed, tokens_per_minute);
        self.open_s += seconds;
    }

    /// Returns the used share of the limit that was closest to exhaustion; `None` without a known limit.
    pub fn share(&self) -> Option<f64> {
        let share = |used: u64, allowed: Option<f64>| {
            allowed
                .filter(|allowed| *allowed > 0.0)
                .map(|allowed| used as f64 / allowed)
        };
        let requests = share(self.requests, self.requests_allowed);
        let tokens = share(self.tokens, self.tokens_allowed);
        match (requests, tokens) {
            (Some(requests), Some(tokens)) => Some(requests.max(tokens)),
            (requests, tokens) => requests.or(tokens),
        }
    }
}

/// Statistics of the hours of a run.
#[derive(Debug)]
pub(crate) struct Timeline {
    started: Instant,
    /// Wall-clock time of `started`.
    started_at: jiff::Timestamp,
    /// Time up to which `hours` counts seconds.
    counted_until: Instant,
    pub hours: Vec<HourStats>,
}

const SECONDS_PER_HOUR: u64 = 3_600;

impl Timeline {
    /// Starts at `now`, which is `started_at` on the wall clock.
    pub(crate) fn new(now: Instant, started_at: jiff::Timestamp) -> Self {
        let mut timeline = Self {
            started: now,
            started_at,
            counted_until: now,
            hours: Vec::new(),
        };
        timeline.hour(now);
        timeline
    }

    /// Returns the statistics of the hour that contains `now`.
    pub(crate) fn hour(&mut self, now: Instant) -> &mut HourStats {
        let index = (now - self.started).as_secs() / SECONDS_PER_HOUR;
        while self.hours.len() as u64 <= index {
            let elapsed = jiff::SignedDuration::from_hours(self.hours.len() as i64);
            let start = self.started_at.checked_add(elapsed);
            let start = start.unwrap_or(self.started_at);
            self.hours.push(HourStats {
                start: format!("{start:.0}"),
                ..HourStats::default()
            });
        }
        &mut self.hours[index as usize]
    }

    /// Adds the seconds since the last call to the current hour, and returns them.
    pub(crate) fn advance(&mut self, now: Instant) -> f64 {
        let seconds = (now - self.counted_until).as_secs_f64();
        self.counted_until = now;
        self.hour(now).seconds += seconds;
        seconds
    }
}

/// Minimum number of seconds within `schedule.window` for an hour to be compared with others.
const MIN_COMPARED_SECONDS: f64 = 1_800.0;

/// Returns the hour with the fewest answers per second within `schedule.window`. Only hours with more than
/// [`MIN_COMPARED_SECONDS`] within the window are compared.
pub(crate) fn slowest(hours: &[HourStats]) -> Option<&HourStats> {
    let open_seconds = |hour: &HourStats| hour.seconds - hour.closed_s;
    let rate = |hour: &HourStats| hour.answered as f64 / open_seconds(hour);
    hours
        .iter()
        .filter(|hour| open_seconds(hour) > MIN_COMPARED_SECONDS)
        .min_by(|a, b| rate(a).total_cmp(&rate(b)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn slowest_hour_excludes_hours_outside_the_window() {
        let start = Instant::now();
        let wall = "2026-11-22T22:00:00Z".parse().unwrap();
        let mut timeline = Timeline::new(start, wall);
        for minute in 0..180 {
            let now = start + Duration::from_secs(60 * minute + 59);
            timeline.advance(now);
            timeline.hour(now).answered += if minute / 60 == 1 { 3 } else { 10 };
        }
        assert_eq!(timeline.hours.len(), 3);
        let slow = slowest(&timeline.hours).unwrap();
        assert_eq!(
            (slow.start.as_str(), slow.answered),
            ("2026-11-22T23:00:00Z", 180)
        );
        timeline.hours[1].closed_s = 3_500.0;
        assert_ne!(slowest(&timeline.hours).unwrap().answered, 180);
        assert_eq!(slowest(&[]), None);
    }

    #[test]
    fn limit_use_share_compares_sent_with_allowed_amounts() {
        let mut used = LimitUse {
            requests: 90,
            tokens: 100,
            ..LimitUse::default()
        };
        assert_eq!(used.share(), None);
        used.advance(29.0, (None, None));
        used.advance(30.0, (Some(100.0), None));
        assert_eq!(used.share(), Some(0.9));
        used.advance(60.0, (Some(50.0), Some(50.0)));
        assert_eq!(used.requests_allowed, Some(150.0));
        assert_eq!(used.share(), Some(1.0));
    }
}
