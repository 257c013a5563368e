//! One limit of the server: its remaining amount, its refill, and the pace at which it may be used. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::rate_limit::headers::{LimitReport, Refill};
use crate::rate_limit::send_ticket::SendTicket;

/// Time over which a full bucket is used up. A server with a limit of 60 per minute may refuse the second request
/// within one second.
const SPREAD: Duration = Duration::from_secs(60);

/// Time by which requests may run ahead of an even pace.
const BURST: Duration = Duration::from_secs(1);

/// Tolerance for the end of a window: reset times are rounded, and replies arrive late.
const RESET_TOLERANCE: Duration = Duration::from_secs(3);

/// Minimum length of a window, unless a header reports its length.
const SHORTEST_WINDOW: Duration = Duration::from_secs(10);

/// Maximum wait for the end of a window.
const FARTHEST_END: Duration = Duration::from_secs(3_600);

/// Assumed period of a limit if the server does not report it.
const DEFAULT_PERIOD: Duration = Duration::from_secs(60);

/// Estimate of one limit of the server, from its reply headers.
#[derive(Debug)]
pub(crate) struct ServerBucket {
    /// Reported limit; if the server reports only the remaining amount, the maximum of that.
    pub(crate) limit: Option<f64>,
    refill: Refill,
    /// Length of the window, if the server reports it.
    window: Option<Duration>,
    /// Remaining amount at the instant `at`; may be negative.
    pub(crate) level: f64,
    at: Instant,
    /// End of the current window, for a limit with a window.
    ends: Option<Instant>,
    /// End of the window as it was first reported.
    first_end: Option<Instant>,
    /// True if the reset time moves with usage, so the limit has no fixed window.
    has_no_window: bool,
    /// Send time of the request whose reply set the level.
    pub(crate) as_of: Option<Instant>,
    /// Amount charged so far, over all requests.
    pub(crate) charged: f64,
    /// Instant at which an even pace catches up with the usage.
    paced_until: Instant,
}

impl ServerBucket {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            limit: None,
            refill: Refill::Unknown,
            window: None,
            level: f64::INFINITY,
            at: now,
            ends: None,
            first_end: None,
            has_no_window: false,
            as_of: None,
            charged: 0.0,
            paced_until: now,
        }
    }

    pub(crate) fn period(&self) -> Duration {
        match self.refill {
            Refill::Constant(period) => period,
            Refill::AtReset | Refill::Unknown => self.window.unwrap_or(DEFAULT_PERIOD),
        }
    }

    /// Refill rate in units per second; 0 for a limit that refills at its reset.
    fn rate(&self) -> f64 {
        match (self.refill, self.limit) {
            (Refill::AtReset, _) | (_, None) => 0.0,
            (_, Some(limit)) => limit / self.period().as_secs_f64(),
        }
    }

    pub(crate) fn level(&self, now: Instant) -> f64 {
        let limit = self.limit.unwrap_or(f64::INFINITY);
        if self.ends.is_some_and(|end| end <= now) {
            return limit;
        }
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        limit.min(self.level + self.rate() * elapsed)
    }

    /// Earliest instant at which a request that uses `amount` may be sent.
    pub(crate) fn free_at(&self, amount: f64, now: Instant) -> Instant {
        let limit = self.limit.unwrap_or(f64::INFINITY);
        // A request above the limit is sent once the bucket is full: the server refuses it with its own message.
        let missing = amount.min(limit) - self.level(now);
        let filled = if missing <= 0.0 {
            now
        } else if let (Refill::AtReset, Some(end)) = (self.refill, self.ends) {
            // A reset hours from now may be an error of the server. The request is sent: if the reset time is right,
            // the server refuses it.
            if end > now + FARTHEST_END { now } else { end }
        } else {
            let seconds = missing / self.rate().max(1e-9);
            now + Duration::try_from_secs_f64(seconds)
                .unwrap_or(DEFAULT_PERIOD)
                .clamp(Duration::from_millis(1), Duration::from_secs(86_400))
        };
        let paced = self.paced_until.checked_sub(BURST).unwrap_or(now);
        filled.max(paced)
    }

    pub(crate) fn charge(&mut self, amount: f64, now: Instant) {
        self.charged += amount;
        if self.as_of.is_none() {
            return;
        }
        let level = self.level(now);
        if self.ends.is_some_and(|end| end <= now) {
            self.ends = Some(now + self.period());
        }
        let pace = match (self.refill, self.ends) {
            (Refill::AtReset, Some(end)) => level / (end - now).max(BURST).as_secs_f64(),
            _ => self.rate() + level.max(0.0) / SPREAD.as_secs_f64(),
        };
        self.level = level - amount;
        self.at = now;
        if pace.is_finite() && pace > 0.0 {
            let time = Duration::try_from_secs_f64(amount / pace).unwrap_or(DEFAULT_PERIOD);
            self.paced_until = self.paced_until.max(now) + time.min(DEFAULT_PERIOD);
        }
    }

    /// Classifies the refill of the limit by this report and earlier ones.
    ///
    /// A bucket whose capacity is one second of a limit per minute looks like a window that is about to end. The
    /// difference shows when the reported end moves with each reply.
    fn classify_refill(&mut self, report: &LimitReport, now: Instant) -> Refill {
        let refill = report.refill();
        let (Refill::AtReset, Some(reset)) = (refill, report.reset) else {
            return refill;
        };
        let end = now + reset;
        let first = *self.first_end.get_or_insert(end);
        let moved = end.saturating_duration_since(first);
        if moved >= SHORTEST_WINDOW {
            self.first_end = Some(end);
        } else if moved > RESET_TOLERANCE {
            self.has_no_window = true;
        }
        if self.has_no_window {
            Refill::Unknown
        } else {
            refill
        }
    }

    /// Handles an exhausted limit of unknown size: waits for its reset, if the server reports one.
    fn close(&mut self, report: &LimitReport, ticket: &SendTicket, now: Instant) {
        let Some(reset) = report.reset else { return };
        self.as_of = Some(ticket.at);
        self.refill = Refill::AtReset;
        (self.level, self.at) = (0.0, now);
        self.ends = Some(now + reset);
    }

    /// Sets the level by a report. `charged_then` is the amount in [`ServerBucket::charged`] when the request of
    /// `ticket` was sent. Ignores reports that are older than the last one.
    pub(crate) fn sync(
        &mut self,
        report: &LimitReport,
        ticket: &SendTicket,
        charged_then: f64,
        now: Instant,
    ) {
        if self.as_of.is_some_and(|as_of| ticket.at < as_of) {
            return;
        }
        self.window = report.window.or(self.window);
        let reported = report.limit.filter(|limit| *limit > 0.0);
        if report.remaining == Some(0.0) && self.limit.or(reported).is_none() {
            self.close(report, ticket, now);
            return;
        }
        let was_known = self.as_of.replace(ticket.at).is_some();
        self.limit = reported.or(match (self.limit, report.remaining) {
            (Some(limit), Some(remaining)) => Some(limit.max(remaining)),
            (limit, remaining) => limit.or(remaining),
        });
        match (self.refill, self.classify_refill(report, now)) {
            (_, Refill::Unknown) if !self.has_no_window => {}
            // After one reply that looks like the end of a window the reset time may have been rounded.
            (Refill::Constant(_), Refill::AtReset) if was_known => self.refill = Refill::Unknown,
            (_, refill) => self.refill = refill,
        }
        let charged_since = self.charged - charged_then;
        if let Some(remaining) = report.remaining {
            let refilled = self.rate() * (now - ticket.at).as_secs_f64();
            let limit = self.limit.unwrap_or(f64::INFINITY);
            self.level = (remaining + refilled).min(limit) - charged_since;
        } else if !was_known {
            self.level = self.limit.unwrap_or(f64::INFINITY) - charged_since;
        } else {
            self.level = self.level(now);
        }
        self.at = now;
        self.ends = match (self.refill, report.reset) {
            (Refill::AtReset, Some(reset)) => Some(now + reset),
            _ => None,
        };
    }
}
