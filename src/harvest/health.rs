//! Is it the row that fails, or the endpoint? Pure.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

/// So many first refusals in the same words are no matter of the rows: a parameter is wrong.
const SAME_REFUSALS: u32 = 5;

/// What the endpoint has done of late.
#[derive(Debug)]
pub struct Health {
    concurrency: usize,
    /// When a request last succeeded; the start of the run, to begin with.
    last_success: Instant,
    /// Has anything ever succeeded, or answered at all?
    succeeded: bool,
    answered: bool,
    /// Rows that have failed since.
    failing: HashSet<usize>,
    /// Failures since an outage began.
    probes: u32,
    /// The last refusal, and how often in a row it came.
    refusal: (String, u32),
}

impl Health {
    pub fn new(concurrency: usize, now: Instant) -> Self {
        Self {
            concurrency: concurrency.max(1),
            last_success: now,
            succeeded: false,
            answered: false,
            failing: HashSet::new(),
            probes: 0,
            refusal: (String::new(), 0),
        }
    }

    pub fn success(&mut self, now: Instant) {
        self.last_success = now;
        self.succeeded = true;
        self.answered = true;
        self.failing.clear();
        self.probes = 0;
    }

    /// An attempt at `row` failed in a way that may pass.
    pub fn failure(&mut self, row: usize, unreachable: bool) {
        self.answered |= !unreachable;
        self.failing.insert(row);
        self.probes += u32::from(self.is_outage());
    }

    /// The endpoint asked to wait: it is there.
    pub fn throttled(&mut self) {
        self.answered = true;
    }

    /// The endpoint refused a row. True if it has refused all that it was asked, in the same words:
    /// then the next one need not be asked.
    pub fn refused(&mut self, message: &str) -> bool {
        self.answered = true;
        if self.refusal.0 != message {
            self.refusal = (message.into(), 0);
        }
        self.refusal.1 += 1;
        !self.succeeded && self.refusal.1 >= SAME_REFUSALS
    }

    /// Nothing has ever answered at this address.
    pub fn never_answered(&self) -> bool {
        !self.answered
    }

    /// As many rows as are asked at once have failed without a success in between: it is the
    /// endpoint, and no row is to blame.
    pub fn is_outage(&self) -> bool {
        self.failing.len() >= self.concurrency.max(3)
    }

    /// Failures since the outage began, from 1; 0 where there is none.
    pub fn probes(&self) -> u32 {
        self.probes
    }

    /// Requests that may be in flight: one probe during an outage.
    pub fn room(&self) -> usize {
        match self.is_outage() {
            true => 1,
            false => self.concurrency,
        }
    }

    /// How long nothing has succeeded.
    pub fn silence(&self, now: Instant) -> Duration {
        now - self.last_success
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_row_is_no_outage_and_many_are_until_one_succeeds() {
        let now = Instant::now();
        let mut health = Health::new(4, now);
        for _ in 0..10 {
            health.failure(0, false);
        }
        assert!(!health.is_outage());
        for row in 1..4 {
            health.failure(row, true);
        }
        assert!(health.is_outage() && !health.never_answered());
        assert_eq!((health.room(), health.probes()), (1, 1));
        let later = now + Duration::from_secs(9);
        assert_eq!(health.silence(later), Duration::from_secs(9));
        health.success(later);
        assert_eq!((health.room(), health.probes()), (4, 0));
        assert_eq!(health.silence(later), Duration::ZERO);
    }

    #[test]
    fn an_endpoint_that_refuses_everything_alike_is_asked_no_more() {
        let mut health = Health::new(1, Instant::now());
        for _ in 1..SAME_REFUSALS {
            assert!(!health.refused("no logprobs"));
        }
        assert!(health.refused("no logprobs"));
        assert!(!health.refused("too long"));
        health.success(Instant::now());
        for _ in 0..10 {
            assert!(!health.refused("too long"));
        }
    }
}
