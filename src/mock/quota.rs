//! One rate limit: an amount per minute or per day. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::mock::script::limits::LimitWindow;

/// Tolerance for rounding errors of a bucket that was refilled many times.
const TOLERANCE: f64 = 1e-6;

/// Stands for an endless wait; small enough to be added to a date.
const FOREVER: Duration = Duration::from_secs(1_000_000_000);

/// The state of one rate limit. `now` must be monotonic.
#[derive(Debug)]
pub(crate) struct Quota {
    /// The script's limit per `per`.
    nominal: f64,
    factor: f64,
    per: Duration,
    window_state: QuotaWindow,
}

#[derive(Debug)]
enum QuotaWindow {
    Bucket {
        level: f64,
        /// The bucket's capacity as a fraction of the limit.
        burst: f64,
        at: Instant,
    },
    Fixed {
        used: f64,
        since: Instant,
    },
    Sliding {
        used: f64,
        entries: VecDeque<(Instant, f64)>,
    },
}

/// The values that rate-limit headers report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QuotaStatus {
    pub limit: f64,
    pub remaining: f64,
    /// Time until the quota is unused again.
    pub reset: Duration,
}

impl Quota {
    /// Makes a quota of `limit` per minute. A bucket's capacity is the limit of `burst_s` seconds.
    pub(crate) fn per_minute(limit: u64, window: LimitWindow, burst_s: f64, now: Instant) -> Quota {
        let nominal = limit as f64;
        let burst = burst_s / 60.0;
        let window_state = match window {
            LimitWindow::Bucket => QuotaWindow::Bucket {
                // A bucket with a capacity below one request would reject all.
                level: (nominal * burst).max(1.0),
                burst,
                at: now,
            },
            LimitWindow::FixedMinute => QuotaWindow::Fixed {
                used: 0.0,
                since: now,
            },
            LimitWindow::SlidingMinute => QuotaWindow::Sliding {
                used: 0.0,
                entries: VecDeque::new(),
            },
        };
        Quota {
            nominal,
            factor: 1.0,
            per: Duration::from_secs(60),
            window_state,
        }
    }

    /// Makes a quota of `limit` per day, reset every 24 hours.
    pub(crate) fn per_day(limit: u64, now: Instant) -> Quota {
        Quota {
            nominal: limit as f64,
            factor: 1.0,
            per: Duration::from_secs(86_400),
            window_state: QuotaWindow::Fixed {
                used: 0.0,
                since: now,
            },
        }
    }

    /// Sets the limit to `factor` times the script's limit.
    pub(crate) fn set_factor(&mut self, now: Instant, factor: f64) {
        self.advance(now);
        self.factor = factor;
        let capacity = self.capacity();
        if let QuotaWindow::Bucket { level, .. } = &mut self.window_state {
            *level = level.min(capacity);
        }
    }

    /// The current limit per `per`.
    fn limit(&self) -> f64 {
        self.nominal * self.factor
    }

    /// Maximum amount that can be charged at one moment.
    pub(crate) fn capacity(&self) -> f64 {
        match self.window_state {
            QuotaWindow::Bucket { burst, .. } => (self.limit() * burst).max(1.0),
            QuotaWindow::Fixed { .. } | QuotaWindow::Sliding { .. } => self.limit(),
        }
    }

    /// Time in which a bucket refills by `amount`; [`FOREVER`] if it does not refill.
    fn refill_time(&self, amount: f64) -> Duration {
        let seconds = self.per.as_secs_f64() * amount / self.limit();
        Duration::try_from_secs_f64(seconds).map_or(FOREVER, |time| time.min(FOREVER))
    }

    fn remaining(&self) -> f64 {
        match self.window_state {
            QuotaWindow::Bucket { level, .. } => level,
            QuotaWindow::Fixed { used, .. } | QuotaWindow::Sliding { used, .. } => {
                self.limit() - used
            }
        }
    }

    fn advance(&mut self, now: Instant) {
        let capacity = self.capacity();
        let limit = self.limit();
        let per = self.per;
        match &mut self.window_state {
            QuotaWindow::Bucket { level, at, .. } => {
                let passed = now.duration_since(*at).div_duration_f64(per);
                *level = (*level + limit * passed).min(capacity);
                *at = now.max(*at);
            }
            QuotaWindow::Fixed { used, since } => {
                while now.duration_since(*since) >= per {
                    *since += per;
                    *used = 0.0;
                }
            }
            QuotaWindow::Sliding { used, entries } => {
                while let Some(&(at, amount)) = entries.front()
                    && now.duration_since(at) >= per
                {
                    *used -= amount;
                    entries.pop_front();
                }
            }
        }
    }

    /// Time until `cost` is available, or `None` if it exceeds the capacity.
    pub(crate) fn time_until(&mut self, now: Instant, cost: f64) -> Option<Duration> {
        self.advance(now);
        if cost > self.capacity() + TOLERANCE {
            return None;
        }
        let missing = cost - self.remaining();
        if missing <= TOLERANCE {
            return Some(Duration::ZERO);
        }
        Some(match &self.window_state {
            QuotaWindow::Bucket { .. } => self.refill_time(missing),
            QuotaWindow::Fixed { since, .. } => (*since + self.per).duration_since(now),
            QuotaWindow::Sliding { entries, .. } => {
                let mut freed = 0.0;
                let enough = entries.iter().find(|(_, amount)| {
                    freed += amount;
                    freed + TOLERANCE >= missing
                });
                let at = enough.map_or(now, |(at, _)| *at);
                (at + self.per).duration_since(now)
            }
        })
    }

    /// Charges `cost`. It may exceed what remains: the quota becomes negative, a bucket at most by
    /// its capacity.
    pub(crate) fn charge(&mut self, now: Instant, cost: f64) {
        self.advance(now);
        let capacity = self.capacity();
        match &mut self.window_state {
            QuotaWindow::Bucket { level, .. } => *level = (*level - cost).max(-capacity),
            QuotaWindow::Fixed { used, .. } => *used += cost,
            QuotaWindow::Sliding { used, entries } => {
                *used += cost;
                match entries.back_mut() {
                    Some((at, amount)) if *at == now => *amount += cost,
                    _ => entries.push_back((now, cost)),
                }
            }
        }
    }

    /// Returns `amount` of a charge made at `charged_at`; a negative amount is charged.
    pub(crate) fn refund(&mut self, now: Instant, charged_at: Instant, amount: f64) {
        self.advance(now);
        let capacity = self.capacity();
        match &mut self.window_state {
            QuotaWindow::Bucket { level, .. } => *level = (*level + amount).min(capacity),
            QuotaWindow::Fixed { used, since } => {
                if charged_at >= *since {
                    *used -= amount;
                }
            }
            QuotaWindow::Sliding { used, entries } => {
                if let Ok(index) = entries.binary_search_by_key(&charged_at, |(at, _)| *at) {
                    entries[index].1 -= amount;
                    *used -= amount;
                }
            }
        }
    }

    pub(crate) fn status(&mut self, now: Instant) -> QuotaStatus {
        self.advance(now);
        let remaining = self.remaining().max(0.0);
        let reset = match &self.window_state {
            QuotaWindow::Bucket { level, .. } => {
                self.refill_time((self.capacity() - level).max(0.0))
            }
            QuotaWindow::Fixed { used, .. } if *used <= 0.0 => Duration::ZERO,
            QuotaWindow::Fixed { since, .. } => (*since + self.per).duration_since(now),
            QuotaWindow::Sliding { entries, .. } => {
                entries.back().map_or(Duration::ZERO, |(at, _)| {
                    (*at + self.per).duration_since(now)
                })
            }
        };
        QuotaStatus {
            limit: self.limit(),
            remaining,
            reset,
        }
    }
}
