//! One limit: so much of something in so long a time. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::mock::script::limits::LimitWindow;

/// Rounding errors of a bucket that was refilled many times.
const TOLERANCE: f64 = 1e-6;

/// A wait without an end, which can still be added to a date.
const FOREVER: Duration = Duration::from_secs(1_000_000_000);

/// What is left of a limit. `now` must never go back.
#[derive(Debug)]
pub(crate) struct Quota {
    /// What the script says, in a time of `per`.
    nominal: f64,
    factor: f64,
    per: Duration,
    window_state: QuotaWindow,
}

#[derive(Debug)]
enum QuotaWindow {
    Bucket {
        level: f64,
        /// Of `per`: the bucket's size is as much of the limit.
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

/// A gauge as headers tell of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct QuotaStatus {
    pub limit: f64,
    pub remaining: f64,
    /// Until nothing is used.
    pub reset: Duration,
}

impl Quota {
    /// `limit` a minute; a bucket holds `burst_s` seconds' worth of it.
    pub(crate) fn per_minute(limit: u64, window: LimitWindow, burst_s: f64, now: Instant) -> Quota {
        let nominal = limit as f64;
        let burst = burst_s / 60.0;
        let window_state = match window {
            LimitWindow::Bucket => QuotaWindow::Bucket {
                // A bucket that cannot hold one request would let none through.
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

    /// `limit` a day, counted anew every 24 hours.
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

    /// From now on the limit is `factor` times what it was made with.
    pub(crate) fn set_factor(&mut self, now: Instant, factor: f64) {
        self.advance(now);
        self.factor = factor;
        let capacity = self.capacity();
        if let QuotaWindow::Bucket { level, .. } = &mut self.window_state {
            *level = level.min(capacity);
        }
    }

    /// In a time of `per`.
    fn limit(&self) -> f64 {
        self.nominal * self.factor
    }

    /// The most that can be taken at one moment.
    pub(crate) fn capacity(&self) -> f64 {
        match self.window_state {
            QuotaWindow::Bucket { burst, .. } => (self.limit() * burst).max(1.0),
            QuotaWindow::Fixed { .. } | QuotaWindow::Sliding { .. } => self.limit(),
        }
    }

    /// Until a bucket has refilled by `amount`; an age where it does not refill at all.
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
        let (capacity, limit, per) = (self.capacity(), self.limit(), self.per);
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

    /// How long until `cost` can be taken; None if it never can.
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

    /// Takes `cost`, which may be more than there is: what is owed is paid off first. A bucket owes
    /// no more than its size.
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

    /// Corrects what was taken at `taken_at` by `amount`: gives it back, or takes it if negative.
    pub(crate) fn refund(&mut self, now: Instant, taken_at: Instant, amount: f64) {
        self.advance(now);
        let capacity = self.capacity();
        match &mut self.window_state {
            QuotaWindow::Bucket { level, .. } => *level = (*level + amount).min(capacity),
            QuotaWindow::Fixed { used, since } => {
                if taken_at >= *since {
                    *used -= amount;
                }
            }
            QuotaWindow::Sliding { used, entries } => {
                if let Ok(index) = entries.binary_search_by_key(&taken_at, |(at, _)| *at) {
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
