//! The user's ceiling of requests a day: in no 24 hours do more leave, restarts included.
//!
//! Requests are counted by slots of five minutes, so that a day is a short list. What is written to
//! the ledger of the run runs ahead of what has left, so that a kill can only make it count too many.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

const DAY: i64 = 86_400;
const SLOT: i64 = 300;

/// The ledger is written ahead by this share of the limit.
const AHEAD: u64 = 200;

#[derive(Debug)]
pub(crate) struct DailyLimit {
    limit: Option<u64>,
    start: Instant,
    /// Slots as (seconds from `start` to the slot's beginning, requests), oldest first.
    slots: VecDeque<(i64, u64)>,
    total: u64,
    /// Requests that may still leave before the ledger must be written again.
    ahead: u64,
    /// The limit is used up until then.
    full_until: Option<Instant>,
}

impl DailyLimit {
    /// `earlier` holds the slots of earlier runs as (age in seconds, requests).
    pub(crate) fn new(limit: Option<u64>, earlier: &[(i64, u64)], now: Instant) -> DailyLimit {
        let mut slots: Vec<(i64, u64)> = earlier
            .iter()
            // A wall clock that was set back makes an age negative: count it as just now.
            .map(|&(age, count)| (-age.clamp(0, DAY), count))
            .collect();
        slots.sort();
        DailyLimit {
            limit,
            start: now,
            total: slots.iter().map(|(_, count)| count).sum(),
            slots: slots.into(),
            ahead: 0,
            full_until: None,
        }
    }

    /// Whether one more may leave; if not, when the oldest slot is a day old.
    pub(crate) fn check(&mut self, now: Instant) -> Result<(), Instant> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let elapsed = (now - self.start).as_secs() as i64;
        while let Some(&(slot, count)) = self.slots.front()
            && slot + SLOT + DAY <= elapsed
        {
            self.slots.pop_front();
            self.total -= count;
        }
        self.full_until = match self.slots.front() {
            Some(&(slot, _)) if self.total >= limit => {
                let seconds = (slot + SLOT + DAY - elapsed).max(1);
                Some(now + Duration::from_secs(seconds as u64))
            }
            _ => None,
        };
        self.full_until.map_or(Ok(()), Err)
    }

    /// The limit, and the instant until which it is used up.
    pub(crate) fn used_up(&self, now: Instant) -> Option<(u64, Instant)> {
        self.limit.zip(self.full_until.filter(|until| *until > now))
    }

    pub(crate) fn count(&mut self, now: Instant) {
        if self.limit.is_none() {
            return;
        }
        let elapsed = (now - self.start).as_secs() as i64;
        let slot = elapsed - elapsed.rem_euclid(SLOT);
        match self.slots.back_mut() {
            Some((last, count)) if *last == slot => *count += 1,
            _ => self.slots.push_back((slot, 1)),
        }
        self.total += 1;
        self.ahead = self.ahead.saturating_sub(1);
    }

    /// Whether the ledger must be written before one more leaves.
    pub(crate) fn must_be_written(&self) -> bool {
        self.limit.is_some() && self.ahead == 0
    }

    /// The slots for the ledger, as (age in seconds, requests), with some requests to come in the
    /// newest one unless this is the `last` time.
    pub(crate) fn written(&mut self, now: Instant, last: bool) -> Vec<(i64, u64)> {
        let Some(limit) = self.limit else {
            return Vec::new();
        };
        self.ahead = if last { 0 } else { (limit / AHEAD).max(1) };
        let elapsed = (now - self.start).as_secs() as i64;
        let mut slots: Vec<_> = self
            .slots
            .iter()
            .map(|&(slot, count)| (elapsed - slot, count))
            .collect();
        if self.ahead > 0 {
            slots.push((0, self.ahead));
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, hours: f64) -> Instant {
        start + Duration::from_secs_f64(hours * 3600.0)
    }

    #[test]
    fn no_day_sees_more_than_the_limit() {
        let start = Instant::now();
        let mut day = DailyLimit::new(Some(100), &[], start);
        let (mut now, mut left) = (start, Vec::new());
        while now < at(start, 72.0) {
            match day.check(now) {
                Ok(()) => {
                    day.count(now);
                    left.push(now);
                    now += Duration::from_secs(200);
                }
                Err(until) => now = until,
            }
        }
        for &from in &left {
            let within = left
                .iter()
                .filter(|&&time| time >= from && time < at(from, 24.0));
            assert!(within.count() <= 100);
        }
        assert!(left.len() >= 290, "{}", left.len());
    }

    #[test]
    fn a_restart_goes_on_counting_and_a_kill_counts_too_many_at_most() {
        let start = Instant::now();
        let mut day = DailyLimit::new(Some(1_000), &[], start);
        let mut written = Vec::new();
        for _ in 0..123 {
            if day.must_be_written() {
                written = day.written(start, false);
            }
            day.check(start).unwrap();
            day.count(start);
        }
        let total = |slots: &[(i64, u64)]| slots.iter().map(|slot| slot.1).sum::<u64>();
        assert!((123..=128).contains(&total(&written)), "{written:?}");
        assert_eq!(total(&day.written(start, true)), 123);

        let mut resumed = DailyLimit::new(Some(125), &[(3_600, 100), (-50, 24)], start);
        resumed.check(start).unwrap();
        resumed.count(start);
        let until = resumed.check(start).unwrap_err();
        assert_eq!(until, start + Duration::from_secs(82_800 + 300));
        assert_eq!(resumed.used_up(start), Some((125, until)));
        assert_eq!(resumed.used_up(until), None);
        let mut free = DailyLimit::new(None, &[], start);
        assert!(free.check(start).is_ok() && !free.must_be_written());
    }
}
