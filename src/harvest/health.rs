//! Is it the row that fails, or the endpoint? Pure.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

/// So many first refusals in the same words are no matter of the rows: a parameter is wrong.
const SAME_REFUSALS: u32 = 5;

/// So many rows must fail before it can be the endpoint.
const SEVERAL_ROWS: usize = 3;

/// So many failures in a row are no accident.
const FAILURES: usize = 4;

/// A limit by the day may ask for as much.
const LONGEST_EXCUSE: Duration = Duration::from_secs(86_400);

/// What the endpoint has done of late.
#[derive(Debug)]
pub struct Health {
    /// When a request last succeeded; the start of the run, to begin with.
    last_success: Instant,
    /// Of the time since, what the endpoint asked to be given.
    excused: Duration,
    /// Has anything ever succeeded, or answered at all?
    succeeded: bool,
    answered: bool,
    /// When an attempt first failed after the last request that showed the endpoint in order left.
    failing_since: Option<Instant>,
    /// Rows that have failed since, attempts that have, and the most that was in flight meanwhile.
    failing: HashSet<usize>,
    failures: usize,
    in_flight: usize,
    /// Failures since an outage began.
    probes: u32,
    /// Requests refused for their rate since one was answered.
    throttled: u32,
    /// The last refusal, and how often in a row it came.
    refusal: (String, u32),
}

impl Health {
    pub fn new(now: Instant) -> Self {
        Self {
            last_success: now,
            excused: Duration::ZERO,
            succeeded: false,
            answered: false,
            failing_since: None,
            failing: HashSet::new(),
            failures: 0,
            in_flight: 0,
            probes: 0,
            throttled: 0,
            refusal: (String::new(), 0),
        }
    }

    /// A request that left at `departed` was answered. One that left before the failures began shows
    /// nothing about them: it may have been under way for minutes.
    pub fn success(&mut self, departed: Instant, now: Instant) {
        self.last_success = now;
        self.excused = Duration::ZERO;
        self.succeeded = true;
        self.answered = true;
        if self.failing_since.is_some_and(|since| departed < since) {
            return;
        }
        self.failing_since = None;
        self.failing.clear();
        self.failures = 0;
        self.in_flight = 0;
        self.probes = 0;
        self.throttled = 0;
    }

    /// An attempt at `row` failed in a way that may pass, with so many in flight.
    pub fn failure(&mut self, row: usize, unreachable: bool, in_flight: usize, now: Instant) {
        self.failing_since.get_or_insert(now);
        self.answered |= !unreachable;
        self.failing.insert(row);
        self.failures += 1;
        self.in_flight = self.in_flight.max(in_flight);
        self.probes += u32::from(self.is_outage());
    }

    /// The endpoint asked to wait: it is there. Returns how often it did since it last answered.
    pub fn throttled(&mut self) -> u32 {
        self.answered = true;
        self.throttled += 1;
        self.throttled
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

    /// As many attempts as are in flight at once have failed without a success in between, and those
    /// of several rows: it is the endpoint, and no row is to blame.
    pub fn is_outage(&self) -> bool {
        self.failing.len() >= SEVERAL_ROWS && self.failures >= self.in_flight.max(FAILURES)
    }

    /// A row has failed so many times. Was that the endpoint's fault, for all we know? So it is where
    /// nothing has succeeded meanwhile and some of the `remaining` rows have not failed yet.
    pub fn may_be_the_endpoint(&self, attempts: u32, remaining: usize) -> bool {
        self.failures >= attempts as usize && remaining > self.failing.len()
    }

    /// Failures since the outage began, from 1; 0 where there is none.
    pub fn probes(&self) -> u32 {
        self.probes
    }

    /// The endpoint said for how long to wait, and it is obeyed: that is no outage.
    pub fn excuse(&mut self, wait: Duration) {
        self.excused = (self.excused + wait).min(LONGEST_EXCUSE);
    }

    /// How long nothing has succeeded, without the time that the endpoint asked for.
    pub fn silence(&self, now: Instant) -> Duration {
        (now - self.last_success).saturating_sub(self.excused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_row_is_no_outage_and_many_are_until_one_succeeds() {
        let now = Instant::now();
        let mut health = Health::new(now);
        for _ in 0..10 {
            health.failure(0, false, 2, Instant::now());
        }
        assert!(!health.is_outage());
        health.failure(1, true, 2, Instant::now());
        health.failure(2, true, 2, Instant::now());
        assert!(health.is_outage() && !health.never_answered());
        assert_eq!(health.probes(), 1);
        let later = now + Duration::from_secs(9);
        assert_eq!(health.silence(later), Duration::from_secs(9));
        health.excuse(Duration::from_secs(5));
        assert_eq!(health.silence(later), Duration::from_secs(4));
        health.success(later, later);
        assert!(!health.is_outage() && health.probes() == 0);
        assert_eq!(health.silence(later), Duration::ZERO);
    }

    #[test]
    fn a_row_is_blamed_only_beside_others_that_succeed_or_when_all_have_failed() {
        let mut health = Health::new(Instant::now());
        for _ in 0..6 {
            health.failure(0, false, 1, Instant::now());
        }
        assert!(health.may_be_the_endpoint(6, 2));
        assert!(!health.may_be_the_endpoint(6, 1), "there is no other row");
        health.success(Instant::now(), Instant::now());
        health.failure(0, false, 1, Instant::now());
        assert!(!health.may_be_the_endpoint(7, 2), "another one succeeded");
    }

    #[test]
    fn an_answer_to_what_left_before_the_failures_shows_nothing_about_them() {
        let early = Instant::now();
        let mut health = Health::new(early);
        for row in 0..5 {
            health.failure(row, false, 3, Instant::now());
        }
        health.success(early, Instant::now());
        assert!(health.is_outage());
        let later = Instant::now() + Duration::from_millis(1);
        health.success(later, later);
        assert!(!health.is_outage());
    }

    #[test]
    fn all_that_is_in_flight_must_fail() {
        let mut health = Health::new(Instant::now());
        for row in 0..31 {
            health.failure(row, false, 32 - row, Instant::now());
        }
        assert!(!health.is_outage());
        health.failure(31, false, 1, Instant::now());
        assert!(health.is_outage());
    }

    #[test]
    fn an_endpoint_that_refuses_everything_alike_is_asked_no_more() {
        let mut health = Health::new(Instant::now());
        for _ in 1..SAME_REFUSALS {
            assert!(!health.refused("no logprobs"));
        }
        assert!(health.refused("no logprobs"));
        assert!(!health.refused("too long"));
        health.success(Instant::now(), Instant::now());
        for _ in 0..10 {
            assert!(!health.refused("too long"));
        }
    }
}
