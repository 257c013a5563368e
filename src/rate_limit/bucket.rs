//! One limit of a server's: what is left of it, how it comes back, and how fast it may be used up.

use std::time::Duration;

use tokio::time::Instant;

use crate::rate_limit::headers::{LimitReport, Refill};
use crate::rate_limit::send_ticket::SendTicket;

/// A full bucket is used up over about this long rather than at once: servers that grant 60 a
/// minute may well refuse the second one within a second.
const SPREAD: Duration = Duration::from_secs(60);

/// Burst allowed ahead of an even pace.
const BURST: Duration = Duration::from_secs(1);

/// Reset times are rounded, and replies take their time: the end of a window may move by so much.
const ROUNDED: Duration = Duration::from_secs(3);

/// A window is no shorter, where no header says that it is.
const SHORTEST_WINDOW: Duration = Duration::from_secs(10);

/// A window that ends later is not waited out.
const FARTHEST_END: Duration = Duration::from_secs(3_600);

/// The period of a limit whose server does not tell it.
const USUAL_PERIOD: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct ServerBucket {
    /// As reported; while only `remaining` is, the most that has been seen of it.
    pub(crate) limit: Option<f64>,
    refill: Refill,
    /// Length of a window, if the server reports it.
    window: Option<Duration>,
    /// Amount that remained at the instant `at`; may be negative.
    pub(crate) level: f64,
    at: Instant,
    /// For a window: its end, and what that was when it was first told.
    ends: Option<Instant>,
    first_end: Option<Instant>,
    /// The reset time moves with usage, so the limit has no fixed window.
    is_no_window: bool,
    /// Departure of the request whose reply is believed.
    pub(crate) as_of: Option<Instant>,
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
            is_no_window: false,
            as_of: None,
            charged: 0.0,
            paced_until: now,
        }
    }

    pub(crate) fn period(&self) -> Duration {
        match self.refill {
            Refill::Constant(period) => period,
            Refill::AtReset | Refill::Unknown => self.window.unwrap_or(USUAL_PERIOD),
        }
    }

    /// Units a second that flow back.
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

    /// Earliest instant for a request that uses `amount`.
    pub(crate) fn free_at(&self, amount: f64, now: Instant) -> Instant {
        let limit = self.limit.unwrap_or(f64::INFINITY);
        // What is larger than the limit goes out at a full bucket: the server will say no itself.
        let missing = amount.min(limit) - self.level(now);
        let filled = if missing <= 0.0 {
            now
        } else if let (Refill::AtReset, Some(end)) = (self.refill, self.ends) {
            // A window that ends hours from now may be a mistake of the server's: it is asked, and refuses
            // if it is none.
            if end > now + FARTHEST_END { now } else { end }
        } else {
            let seconds = missing / self.rate().max(1e-9);
            now + Duration::try_from_secs_f64(seconds)
                .unwrap_or(USUAL_PERIOD)
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
            let time = Duration::try_from_secs_f64(amount / pace).unwrap_or(USUAL_PERIOD);
            self.paced_until = self.paced_until.max(now) + time.min(USUAL_PERIOD);
        }
    }

    /// Refill behaviour of the limit, from this report and earlier ones.
    ///
    /// A bucket that holds a second's worth of a limit a minute looks like a window that is about to
    /// end, until that end has come and gone and the next one is as near again.
    fn refill_of(&mut self, report: &LimitReport, now: Instant) -> Refill {
        let refill = report.refill();
        let (Refill::AtReset, Some(reset)) = (refill, report.reset) else {
            return refill;
        };
        let end = now + reset;
        let first = *self.first_end.get_or_insert(end);
        let moved = end.saturating_duration_since(first);
        if moved >= SHORTEST_WINDOW {
            self.first_end = Some(end);
        } else if moved > ROUNDED {
            self.is_no_window = true;
        }
        if self.is_no_window {
            Refill::Unknown
        } else {
            refill
        }
    }

    /// Nothing is left of a limit of unknown size: waits for its reset, if the server reports one, and else no
    /// longer than the refusal itself asks for.
    fn close(&mut self, report: &LimitReport, departure: &SendTicket, now: Instant) {
        let Some(reset) = report.reset else { return };
        self.as_of = Some(departure.at);
        self.refill = Refill::AtReset;
        (self.level, self.at) = (0.0, now);
        self.ends = Some(now + reset);
    }

    pub(crate) fn sync(
        &mut self,
        report: &LimitReport,
        departure: &SendTicket,
        charged_then: f64,
        now: Instant,
    ) {
        if self.as_of.is_some_and(|as_of| departure.at < as_of) {
            return;
        }
        self.window = report.window.or(self.window);
        let told = report.limit.filter(|limit| *limit > 0.0);
        if report.remaining == Some(0.0) && self.limit.or(told).is_none() {
            self.close(report, departure, now);
            return;
        }
        let was_known = self.as_of.replace(departure.at).is_some();
        self.limit = told.or(match (self.limit, report.remaining) {
            (Some(limit), Some(remaining)) => Some(limit.max(remaining)),
            (limit, remaining) => limit.or(remaining),
        });
        match (self.refill, self.refill_of(report, now)) {
            (_, Refill::Unknown) if !self.is_no_window => {}
            // One reply that looks like the end of a window may be a rounded reset time.
            (Refill::Constant(_), Refill::AtReset) if was_known => self.refill = Refill::Unknown,
            (_, refill) => self.refill = refill,
        }
        let since = self.charged - charged_then;
        if let Some(remaining) = report.remaining {
            let back = self.rate() * (now - departure.at).as_secs_f64();
            let limit = self.limit.unwrap_or(f64::INFINITY);
            self.level = (remaining + back).min(limit) - since;
        } else if !was_known {
            self.level = self.limit.unwrap_or(f64::INFINITY) - since;
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
