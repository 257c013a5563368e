//! [`DailyLimit`]: the user's limit of requests in any 24 hours, across restarts. Pure.
//!
//! Requests are counted in slots of five minutes, which keeps the list short. The ledger counts requests before they
//! are sent, so its count is never too low after a kill.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Seconds per day.
const DAY_S: i64 = 86_400;

/// Length of a slot in seconds.
const SLOT_S: i64 = 300;

/// Age of a slot in seconds at which its requests no longer count. The age is measured from the beginning of the slot,
/// but the last request may have been sent at its end.
const EXPIRED_SLOT_S: i64 = DAY_S + SLOT_S;

/// Each write of the ledger counts `limit / PRECOUNT_DIVISOR` requests in advance. A larger divisor means more writes,
/// but fewer requests that are counted and, because of a kill, never sent.
const PRECOUNT_DIVISOR: u64 = 200;

/// The limit, and the count of the requests of the last 24 hours.
#[derive(Debug)]
pub(crate) struct DailyLimit {
    limit: Option<u64>,
    start: Instant,
    /// Slots as (seconds from `start` to the beginning of the slot, number of requests), oldest first.
    slots: VecDeque<(i64, u64)>,
    /// Sum of the requests in `slots`.
    total: u64,
    /// Number of requests that the ledger counts but that are not sent yet. At 0, the ledger must be written before the
    /// next request.
    precounted: u64,
    /// Instant until which the limit stays used up at least. None if it is not used up.
    full_until: Option<Instant>,
}

impl DailyLimit {
    /// Creates the count. `earlier` contains the slots of earlier runs as (age in seconds, number of requests).
    pub(crate) fn new(limit: Option<u64>, earlier: &[(i64, u64)], now: Instant) -> DailyLimit {
        let mut slots: Vec<(i64, u64)> = earlier
            .iter()
            .filter(|(age_s, _)| *age_s < EXPIRED_SLOT_S)
            // If the wall clock was set back, an age may be negative. It counts as 0.
            .map(|&(age_s, count)| (-age_s.max(0), count))
            .collect();
        slots.sort();
        DailyLimit {
            limit,
            start: now,
            total: slots.iter().map(|(_, count)| count).sum(),
            slots: slots.into(),
            precounted: 0,
            full_until: None,
        }
    }

    /// Checks that one more request may be sent.
    ///
    /// # Errors
    /// The instant at which the oldest slot expires.
    pub(crate) fn check(&mut self, now: Instant) -> Result<(), Instant> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let elapsed = (now - self.start).as_secs() as i64;
        while let Some(&(slot, count)) = self.slots.front()
            && slot + EXPIRED_SLOT_S <= elapsed
        {
            self.slots.pop_front();
            self.total -= count;
        }
        self.full_until = match self.slots.front() {
            Some(&(slot, _)) if self.total >= limit => {
                let seconds = (slot + EXPIRED_SLOT_S - elapsed).max(1);
                Some(now + Duration::from_secs(seconds as u64))
            }
            _ => None,
        };
        self.full_until.map_or(Ok(()), Err)
    }

    /// Returns the limit and the instant until which it is used up, or None if it is not used up.
    pub(crate) fn used_up(&self, now: Instant) -> Option<(u64, Instant)> {
        self.limit.zip(self.full_until.filter(|until| *until > now))
    }

    /// Counts a request that is sent.
    pub(crate) fn count_request(&mut self, now: Instant) {
        if self.limit.is_none() {
            return;
        }
        let elapsed = (now - self.start).as_secs() as i64;
        let slot = elapsed - elapsed.rem_euclid(SLOT_S);
        match self.slots.back_mut() {
            Some((last_slot, count)) if *last_slot == slot => *count += 1,
            _ => self.slots.push_back((slot, 1)),
        }
        self.total += 1;
        self.precounted = self.precounted.saturating_sub(1);
    }

    /// Returns true if the ledger must be written before the next request.
    pub(crate) fn must_write_ledger(&self) -> bool {
        self.limit.is_some() && self.precounted == 0
    }

    /// Returns the slots for the ledger as (age in seconds, number of requests). Unless this is the last write of the
    /// run, they include requests counted in advance. These may be sent from now on, so the caller must write the slots
    /// first.
    pub(crate) fn ledger_slots(&mut self, now: Instant, is_last: bool) -> Vec<(i64, u64)> {
        let Some(limit) = self.limit else {
            return Vec::new();
        };
        self.precounted = if is_last {
            0
        } else {
            (limit / PRECOUNT_DIVISOR).max(1)
        };
        let elapsed = (now - self.start).as_secs() as i64;
        let mut slots: Vec<_> = self
            .slots
            .iter()
            .map(|&(slot, count)| (elapsed - slot, count))
            .collect();
        if self.precounted > 0 {
            slots.push((0, self.precounted));
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hours_after(start: Instant, hours: f64) -> Instant {
        start + Duration::from_secs_f64(hours * 3600.0)
    }

    #[test]
    fn daily_limit_holds_in_any_24_hours() {
        check_any_24_hours(|_| false);
    }

    #[test]
    fn daily_limit_holds_across_restarts() {
        check_any_24_hours(|now_s| now_s % 7 == 0);
    }

    /// Sends requests for three days. `restarts` gets the seconds since the start and returns true for a restart.
    fn check_any_24_hours(restarts: impl Fn(u64) -> bool) {
        let start = Instant::now();
        let mut daily = DailyLimit::new(Some(100), &[], start);
        let mut now = start;
        let mut sent = Vec::new();
        while now < hours_after(start, 72.0) {
            if restarts((now - start).as_secs()) {
                let slots = daily.ledger_slots(now, true);
                daily = DailyLimit::new(Some(100), &slots, now);
            }
            match daily.check(now) {
                Ok(()) => {
                    daily.count_request(now);
                    sent.push(now);
                    now += Duration::from_secs(200);
                }
                Err(retry_at) => now = retry_at,
            }
        }
        for &from in &sent {
            let within = sent
                .iter()
                .filter(|&&time| time >= from && time < hours_after(from, 24.0));
            assert!(within.count() <= 100);
        }
        assert!(sent.len() >= 290, "{}", sent.len());
    }

    #[test]
    fn daily_count_survives_restarts_and_a_kill_never_lowers_it() {
        let start = Instant::now();
        let mut daily = DailyLimit::new(Some(1_000), &[], start);
        let mut written = Vec::new();
        for _ in 0..123 {
            if daily.must_write_ledger() {
                written = daily.ledger_slots(start, false);
            }
            daily.check(start).unwrap();
            daily.count_request(start);
        }
        let total = |slots: &[(i64, u64)]| slots.iter().map(|slot| slot.1).sum::<u64>();
        assert!((123..=128).contains(&total(&written)), "{written:?}");
        assert_eq!(total(&daily.ledger_slots(start, true)), 123);

        let mut resumed = DailyLimit::new(Some(125), &[(3_600, 100), (-50, 24)], start);
        resumed.check(start).unwrap();
        resumed.count_request(start);
        let until = resumed.check(start).unwrap_err();
        assert_eq!(until, start + Duration::from_secs(82_800 + 300));
        assert_eq!(resumed.used_up(start), Some((125, until)));
        assert_eq!(resumed.used_up(until), None);
        let mut unlimited = DailyLimit::new(None, &[], start);
        assert!(unlimited.check(start).is_ok() && !unlimited.must_write_ledger());
    }
}
