//! [`ServerBucket`]: one limit of the server, with its remaining amount, its refill, and the pace at which it is used.
//! Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::rate_limit::headers::{LimitReport, Refill};
use crate::rate_limit::send_ticket::SendTicket;

/// Time over which the requests of a full bucket are spread. They are not sent at once, because a server with a limit
/// of 60 per minute may refuse a second request within one second.
const SPREAD: Duration = Duration::from_secs(60);

/// Time by which requests may run ahead of an even pace.
const BURST: Duration = Duration::from_secs(1);

/// Tolerance for the reported end of a window, because reset times are rounded and replies arrive late.
const RESET_TOLERANCE: Duration = Duration::from_secs(3);

/// Minimum time by which the reported end of a window moves when a new window begins.
const MIN_SHIFT_TO_NEW_WINDOW: Duration = Duration::from_secs(10);

/// Maximum wait for the end of a window. If the reported end is later, requests are sent anyway.
const MAX_WAIT_FOR_RESET: Duration = Duration::from_secs(3_600);

/// Minimum wait for a refill.
const MIN_REFILL_WAIT: Duration = Duration::from_millis(1);

/// Maximum wait for a refill.
const MAX_REFILL_WAIT: Duration = Duration::from_secs(86_400);

/// Maximum delay that pacing adds after one request.
const MAX_PACING_DELAY: Duration = Duration::from_secs(60);

/// Assumed period of a limit if the server does not report it.
const DEFAULT_PERIOD: Duration = Duration::from_secs(60);

/// Estimate of one limit of the server, from the headers of its replies.
#[derive(Debug)]
pub(crate) struct ServerBucket {
    /// The reported limit, or the largest remaining amount if the server reports only that.
    pub(crate) limit: Option<f64>,
    refill: Refill,
    /// Length of the window, if the server reports it.
    window: Option<Duration>,
    /// Remaining amount at `updated`. May be negative.
    pub(crate) level: f64,
    /// Time of the last change of `level`.
    updated: Instant,
    /// End of the current window, if the limit has windows.
    window_end: Option<Instant>,
    /// End of the current window according to the first reply within it.
    first_window_end: Option<Instant>,
    /// True if the reset time has moved with usage, which shows that the limit has no fixed window.
    has_no_window: bool,
    /// Send time of the request whose reply set the level. None until the server has reported the limit.
    pub(crate) last_report_sent_at: Option<Instant>,
    /// Amount charged by all requests since the start, minus the refunds.
    pub(crate) charged: f64,
    /// Instant at which an even pace would send the next request. The request may be sent up to [`BURST`] earlier.
    /// Refunds do not change it.
    paced_until: Instant,
}

impl ServerBucket {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            limit: None,
            refill: Refill::Unknown,
            window: None,
            level: f64::INFINITY,
            updated: now,
            window_end: None,
            first_window_end: None,
            has_no_window: false,
            last_report_sent_at: None,
            charged: 0.0,
            paced_until: now,
        }
    }

    /// Returns the time in which the full limit becomes available.
    pub(crate) fn period(&self) -> Duration {
        match self.refill {
            Refill::Constant(period) => period,
            Refill::AtReset | Refill::Unknown => self.window.unwrap_or(DEFAULT_PERIOD),
        }
    }

    /// Returns the refill rate in units per second; 0 if the limit refills at its reset or is unknown.
    fn rate(&self) -> f64 {
        match (self.refill, self.limit) {
            (Refill::AtReset, _) | (_, None) => 0.0,
            (_, Some(limit)) => limit / self.period().as_secs_f64(),
        }
    }

    /// Returns the estimated remaining amount.
    pub(crate) fn level(&self, now: Instant) -> f64 {
        let limit = self.limit.unwrap_or(f64::INFINITY);
        if self.window_end.is_some_and(|end| end <= now) {
            return limit;
        }
        let elapsed = now.saturating_duration_since(self.updated).as_secs_f64();
        limit.min(self.level + self.rate() * elapsed)
    }

    /// Returns the earliest instant at which a request that uses `amount` may be sent.
    pub(crate) fn earliest_send(&self, amount: f64, now: Instant) -> Instant {
        let limit = self.limit.unwrap_or(f64::INFINITY);
        // A request that exceeds the limit is sent when the bucket is full, so that the server explains the refusal.
        let missing = amount.min(limit) - self.level(now);
        let filled = if missing <= 0.0 {
            now
        } else if let (Refill::AtReset, Some(end)) = (self.refill, self.window_end) {
            // A reset time hours ahead may be an error of the server, so the request is sent. If the reset time is
            // right, the server refuses the request.
            if end > now + MAX_WAIT_FOR_RESET {
                now
            } else {
                end
            }
        } else {
            // The minimum rate avoids a division by zero.
            let seconds = missing / self.rate().max(1e-9);
            now + Duration::try_from_secs_f64(seconds)
                .unwrap_or(DEFAULT_PERIOD)
                .clamp(MIN_REFILL_WAIT, MAX_REFILL_WAIT)
        };
        let paced = self.paced_until.checked_sub(BURST).unwrap_or(now);
        filled.max(paced)
    }

    /// Charges a request that is sent, and paces the next one.
    pub(crate) fn charge(&mut self, amount: f64, now: Instant) {
        self.charged += amount;
        if self.last_report_sent_at.is_none() {
            return;
        }
        let level = self.level(now);
        if self.window_end.is_some_and(|end| end <= now) {
            self.window_end = Some(now + self.period());
        }
        let pace = match (self.refill, self.window_end) {
            (Refill::AtReset, Some(end)) => level / (end - now).max(BURST).as_secs_f64(),
            _ => self.rate() + level.max(0.0) / SPREAD.as_secs_f64(),
        };
        self.level = level - amount;
        self.updated = now;
        if pace.is_finite() && pace > 0.0 {
            let delay = Duration::try_from_secs_f64(amount / pace).unwrap_or(MAX_PACING_DELAY);
            self.paced_until = self.paced_until.max(now) + delay.min(MAX_PACING_DELAY);
        }
    }

    /// Determines, from this report and earlier ones, how the limit refills.
    ///
    /// Some servers enforce a limit per minute with a token bucket that holds only the amount of one second. One reply
    /// from such a bucket looks like a window that is about to end. Several replies distinguish the two: only a token
    /// bucket moves the reported end with each reply.
    fn classify_refill(&mut self, report: &LimitReport, now: Instant) -> Refill {
        let refill = report.refill();
        let (Refill::AtReset, Some(reset)) = (refill, report.reset) else {
            return refill;
        };
        let end = now + reset;
        let first_end = *self.first_window_end.get_or_insert(end);
        let moved = end.saturating_duration_since(first_end);
        if moved >= MIN_SHIFT_TO_NEW_WINDOW {
            self.first_window_end = Some(end);
        } else if moved > RESET_TOLERANCE {
            self.has_no_window = true;
        }
        if self.has_no_window {
            Refill::Unknown
        } else {
            refill
        }
    }

    /// Handles an exhausted limit of unknown size: blocks requests until the reset time, if the server reports it.
    fn block_until_reset(&mut self, report: &LimitReport, ticket: &SendTicket, now: Instant) {
        let Some(reset) = report.reset else { return };
        self.last_report_sent_at = Some(ticket.sent_at);
        self.refill = Refill::AtReset;
        self.level = 0.0;
        self.updated = now;
        self.window_end = Some(now + reset);
    }

    /// Sets the level from a report. `charged_at_send` was the value of [`ServerBucket::charged`] when the request of
    /// `ticket` was sent. Ignores replies to requests that were sent before the one whose reply set the level.
    pub(crate) fn sync(
        &mut self,
        report: &LimitReport,
        ticket: &SendTicket,
        charged_at_send: f64,
        now: Instant,
    ) {
        let last_report = self.last_report_sent_at;
        if last_report.is_some_and(|last_sent_at| ticket.sent_at < last_sent_at) {
            return;
        }
        self.window = report.window.or(self.window);
        let reported_limit = report.limit.filter(|limit| *limit > 0.0);
        if report.remaining == Some(0.0) && self.limit.or(reported_limit).is_none() {
            self.block_until_reset(report, ticket, now);
            return;
        }
        let had_report = self.last_report_sent_at.replace(ticket.sent_at).is_some();
        self.limit = reported_limit.or(match (self.limit, report.remaining) {
            (Some(limit), Some(remaining)) => Some(limit.max(remaining)),
            (limit, remaining) => limit.or(remaining),
        });
        match (self.refill, self.classify_refill(report, now)) {
            (_, Refill::Unknown) if !self.has_no_window => {}
            // Earlier replies showed a constant rate, and this one shows a window, perhaps only because its reset time
            // is rounded. Neither is assumed.
            (Refill::Constant(_), Refill::AtReset) if had_report => self.refill = Refill::Unknown,
            (_, refill) => self.refill = refill,
        }
        let charged_since = self.charged - charged_at_send;
        if let Some(remaining) = report.remaining {
            let refilled = self.rate() * (now - ticket.sent_at).as_secs_f64();
            let limit = self.limit.unwrap_or(f64::INFINITY);
            self.level = (remaining + refilled).min(limit) - charged_since;
        } else if !had_report {
            self.level = self.limit.unwrap_or(f64::INFINITY) - charged_since;
        } else {
            self.level = self.level(now);
        }
        self.updated = now;
        self.window_end = match (self.refill, report.reset) {
            (Refill::AtReset, Some(reset)) => Some(now + reset),
            // A reply without a reset time does not end the window of an earlier reply.
            (Refill::AtReset, None) => self.window_end.filter(|end| *end > now),
            _ => None,
        };
        if self.refill == Refill::AtReset && self.window_end.is_none() {
            self.refill = Refill::Unknown;
        }
    }
}
