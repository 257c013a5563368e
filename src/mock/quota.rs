//! [`Quota`]: one rate limit, an amount per minute or per day. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::mock::script::limits::LimitWindow;

/// Tolerance for rounding errors of a bucket that was refilled many times.
const TOLERANCE: f64 = 1e-6;

/// Wait of a quota that does not refill: about 30 years, which can be added to a date without overflow.
const FOREVER: Duration = Duration::from_secs(1_000_000_000);

/// The state of one rate limit. `now` must not decrease from call to call.
#[derive(Debug)]
pub(crate) struct Quota {
    /// The script's limit per `period`.
    base_limit: f64,
    /// Current factor of [`crate::mock::script::limits::LimitChange`].
    factor: f64,
    period: Duration,
    window: QuotaWindow,
}

#[derive(Debug)]
enum QuotaWindow {
    Bucket {
        /// Amount that remains at `updated`.
        level: f64,
        /// Capacity of the bucket as a fraction of the limit.
        burst: f64,
        updated: Instant,
    },
    Fixed {
        /// Amount charged since `window_start`.
        used: f64,
        window_start: Instant,
    },
    Sliding {
        /// Sum of `entries`.
        used: f64,
        /// Charges of the last period.
        entries: VecDeque<(Instant, f64)>,
    },
}

/// The values that rate-limit headers report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QuotaStatus {
    pub limit: f64,
    pub remaining: f64,
    /// Time until the full quota is available again.
    pub reset: Duration,
}

impl Quota {
    /// Creates a quota of `limit` per minute. The capacity of a bucket is what it refills in `burst_s` seconds, at
    /// least 1.
    pub(crate) fn per_minute(limit: u64, window: LimitWindow, burst_s: f64, now: Instant) -> Quota {
        let base_limit = limit as f64;
        let burst = burst_s / 60.0;
        let window = match window {
            LimitWindow::Bucket => QuotaWindow::Bucket {
                // A bucket of requests with a capacity below 1 would reject every request.
                level: (base_limit * burst).max(1.0),
                burst,
                updated: now,
            },
            LimitWindow::FixedMinute => QuotaWindow::Fixed {
                used: 0.0,
                window_start: now,
            },
            LimitWindow::SlidingMinute => QuotaWindow::Sliding {
                used: 0.0,
                entries: VecDeque::new(),
            },
        };
        Quota {
            base_limit,
            factor: 1.0,
            period: Duration::from_secs(60),
            window,
        }
    }

    /// Creates a quota of `limit` per day, which is reset every 24 hours.
    pub(crate) fn per_day(limit: u64, now: Instant) -> Quota {
        Quota {
            base_limit: limit as f64,
            factor: 1.0,
            period: Duration::from_secs(86_400),
            window: QuotaWindow::Fixed {
                used: 0.0,
                window_start: now,
            },
        }
    }

    /// Sets the limit to `factor` times the script's limit.
    pub(crate) fn set_factor(&mut self, now: Instant, factor: f64) {
        self.advance(now);
        self.factor = factor;
        let capacity = self.capacity();
        if let QuotaWindow::Bucket { level, .. } = &mut self.window {
            *level = level.min(capacity);
        }
    }

    /// Returns the current limit per period.
    fn limit(&self) -> f64 {
        self.base_limit * self.factor
    }

    /// Returns the maximum cost of a request that can be admitted. A later correction of its charge may exceed it.
    pub(crate) fn capacity(&self) -> f64 {
        match self.window {
            QuotaWindow::Bucket { burst, .. } => (self.limit() * burst).max(1.0),
            QuotaWindow::Fixed { .. } | QuotaWindow::Sliding { .. } => self.limit(),
        }
    }

    /// Returns the time in which a bucket refills by `amount`, at most [`FOREVER`].
    fn refill_time(&self, amount: f64) -> Duration {
        let seconds = self.period.as_secs_f64() * amount / self.limit();
        Duration::try_from_secs_f64(seconds).map_or(FOREVER, |time| time.min(FOREVER))
    }

    fn remaining(&self) -> f64 {
        match self.window {
            QuotaWindow::Bucket { level, .. } => level,
            QuotaWindow::Fixed { used, .. } | QuotaWindow::Sliding { used, .. } => {
                self.limit() - used
            }
        }
    }

    /// Refills a bucket, or removes the charges that are no longer in the fixed or sliding window.
    fn advance(&mut self, now: Instant) {
        let capacity = self.capacity();
        let limit = self.limit();
        let period = self.period;
        match &mut self.window {
            QuotaWindow::Bucket { level, updated, .. } => {
                let elapsed_periods = now.duration_since(*updated).div_duration_f64(period);
                *level = (*level + limit * elapsed_periods).min(capacity);
                *updated = now.max(*updated);
            }
            QuotaWindow::Fixed { used, window_start } => {
                while now.duration_since(*window_start) >= period {
                    *window_start += period;
                    *used = 0.0;
                }
            }
            QuotaWindow::Sliding { used, entries } => {
                while let Some(&(charged_at, amount)) = entries.front()
                    && now.duration_since(charged_at) >= period
                {
                    *used -= amount;
                    entries.pop_front();
                }
            }
        }
    }

    /// Returns the time until `cost` is available, or None if it exceeds the capacity.
    pub(crate) fn time_until(&mut self, now: Instant, cost: f64) -> Option<Duration> {
        self.advance(now);
        if cost > self.capacity() + TOLERANCE {
            return None;
        }
        let missing = cost - self.remaining();
        if missing <= TOLERANCE {
            return Some(Duration::ZERO);
        }
        Some(match &self.window {
            QuotaWindow::Bucket { .. } => self.refill_time(missing),
            QuotaWindow::Fixed { window_start, .. } => {
                (*window_start + self.period).duration_since(now)
            }
            QuotaWindow::Sliding { entries, .. } => {
                let mut expired = 0.0;
                let last_needed = entries.iter().find(|(_, amount)| {
                    expired += amount;
                    expired + TOLERANCE >= missing
                });
                let charged_at = last_needed.map_or(now, |(time, _)| *time);
                (charged_at + self.period).duration_since(now)
            }
        })
    }

    /// Charges `cost`, even if that makes the remaining amount negative. The level of a bucket never falls below minus
    /// its capacity.
    pub(crate) fn charge(&mut self, now: Instant, cost: f64) {
        self.advance(now);
        let capacity = self.capacity();
        match &mut self.window {
            QuotaWindow::Bucket { level, .. } => *level = (*level - cost).max(-capacity),
            QuotaWindow::Fixed { used, .. } => *used += cost,
            QuotaWindow::Sliding { used, entries } => {
                *used += cost;
                match entries.back_mut() {
                    Some((charged_at, amount)) if *charged_at == now => *amount += cost,
                    _ => entries.push_back((now, cost)),
                }
            }
        }
    }

    /// Refunds `amount` of a charge made at `charged_at`, or charges more if `amount` is negative. Does nothing if the
    /// charge is no longer in the fixed or sliding window.
    pub(crate) fn refund(&mut self, now: Instant, charged_at: Instant, amount: f64) {
        self.advance(now);
        let capacity = self.capacity();
        match &mut self.window {
            QuotaWindow::Bucket { level, .. } => *level = (*level + amount).min(capacity),
            QuotaWindow::Fixed { used, window_start } => {
                if charged_at >= *window_start {
                    *used -= amount;
                }
            }
            QuotaWindow::Sliding { used, entries } => {
                if let Ok(index) = entries.binary_search_by_key(&charged_at, |(time, _)| *time) {
                    entries[index].1 -= amount;
                    *used -= amount;
                }
            }
        }
    }

    /// Returns the values that rate-limit headers report at `now`.
    pub(crate) fn status(&mut self, now: Instant) -> QuotaStatus {
        self.advance(now);
        let remaining = self.remaining().max(0.0);
        let reset = match &self.window {
            QuotaWindow::Bucket { level, .. } => {
                self.refill_time((self.capacity() - level).max(0.0))
            }
            QuotaWindow::Fixed { used, .. } if *used <= 0.0 => Duration::ZERO,
            QuotaWindow::Fixed { window_start, .. } => {
                (*window_start + self.period).duration_since(now)
            }
            QuotaWindow::Sliding { entries, .. } => {
                entries.back().map_or(Duration::ZERO, |(charged_at, _)| {
                    (*charged_at + self.period).duration_since(now)
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
