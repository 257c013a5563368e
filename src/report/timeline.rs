//! Statistics of a run by hour, and its use of the rate limits.

use serde::Serialize;
use tokio::time::Instant;

/// Statistics of one hour of the run, counted from the start of the run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct HourStats {
    /// RFC 3339, in UTC.
    pub start: String,
    pub requests: u64,
    pub answered: u64,
    pub failed_attempts: u64,
    /// Seconds of this hour within the run.
    pub seconds: f64,
    /// Seconds of these outside `schedule.window`.
    pub closed_s: f64,
    /// Seconds of these spent waiting for an endpoint that throttled or was down.
    pub waiting_s: f64,
}

/// Requests and tokens sent to one endpoint, and the amounts that the limits of the endpoint and of the user
/// allowed while rows were waiting.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LimitUse {
    pub teacher: String,
    pub requests: u64,
    /// `None` without a known limit.
    pub requests_allowed: Option<f64>,
    /// Prompt estimates and `max_tokens`, as limits count them.
    pub tokens: u64,
    pub tokens_allowed: Option<f64>,
    pub throttled: u64,
    /// Seconds in which rows were waiting to be sent.
    pub open_s: f64,
}

impl LimitUse {
    /// Adds seconds in which rows were waiting to be sent. `per_minute` are the limits of requests and tokens.
    pub fn advance(&mut self, seconds: f64, per_minute: (Option<f64>, Option<f64>)) {
        let add = |allowed: &mut Option<f64>, per_minute: Option<f64>, before: f64| {
            if let Some(per_minute) = per_minute {
                // A limit that headers report later is assumed since the start, with a burst of one second.
                let earlier = per_minute * (before + 1.0) / 60.0;
                *allowed = Some(allowed.unwrap_or(earlier) + per_minute * seconds / 60.0);
            }
        };
        add(&mut self.requests_allowed, per_minute.0, self.open_s);
        add(&mut self.tokens_allowed, per_minute.1, self.open_s);
        self.open_s += seconds;
    }

    /// Used share of the limit that was closest to exhaustion.
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

/// Hours of a run, and the time up to which they are counted.
#[derive(Debug)]
pub(crate) struct Timeline {
    started: Instant,
    last: Instant,
    pub hours: Vec<HourStats>,
    start: jiff::Timestamp,
}

impl Timeline {
    pub(crate) fn new(now: Instant, start: jiff::Timestamp) -> Self {
        let mut timeline = Self {
            started: now,
            last: now,
            hours: Vec::new(),
            start,
        };
        timeline.hour(now);
        timeline
    }

    /// Returns the statistics of the hour at `now`.
    pub(crate) fn hour(&mut self, now: Instant) -> &mut HourStats {
        let index = (now - self.started).as_secs() / 3_600;
        while self.hours.len() as u64 <= index {
            let seconds = self.hours.len() as i64 * 3_600;
            let start = jiff::SignedDuration::from_secs(seconds);
            let start = self.start.checked_add(start).unwrap_or(self.start);
            self.hours.push(HourStats {
                start: format!("{start:.0}"),
                ..HourStats::default()
            });
        }
        &mut self.hours[index as usize]
    }

    /// Adds the seconds since the last call to the current hour, and returns them.
    pub(crate) fn advance(&mut self, now: Instant) -> f64 {
        let seconds = (now - self.last).as_secs_f64();
        self.last = now;
        self.hour(now).seconds += seconds;
        seconds
    }
}

/// Returns the hour with the fewest answers per second within `schedule.window`, among hours with at least half
/// an hour of it.
pub(crate) fn slowest(hours: &[HourStats]) -> Option<&HourStats> {
    let rate = |hour: &HourStats| hour.answered as f64 / (hour.seconds - hour.closed_s);
    hours
        .iter()
        .filter(|hour| hour.seconds - hour.closed_s > 1_800.0)
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
