//! Is it the row that fails, or the endpoint? Pure.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

/// First refusals in the same words after which it is no matter of the rows: a parameter is wrong.
const SAME_REFUSALS: u32 = 5;

/// Doublings of that number for refusals amid answers.
const MAX_DOUBLINGS: u32 = 5;

/// First errors of the server in the same words after which it answers nothing at all.
const SAME_ERRORS: u32 = 6;

/// Rows that must fail before it can be the endpoint.
const OUTAGE_ROWS: usize = 3;

/// Failures in a row that are no accident.
const OUTAGE_FAILURES: usize = 4;

/// A limit by the day may ask for as much.
const MAX_EXCLUDED_WAIT: Duration = Duration::from_secs(86_400);

/// What the endpoint has done of late.
#[derive(Debug)]
pub(crate) struct EndpointHealth {
    /// When a request last succeeded; the start of the run, to begin with.
    last_success: Instant,
    /// Of the time since, what the endpoint asked to be given.
    excluded: Duration,
    /// Has anything ever succeeded, or answered at all?
    succeeded: bool,
    answered: bool,
    has_failed_as_before: bool,
    /// When an attempt first failed after the last request that showed the endpoint in order left.
    failing_since: Option<Instant>,
    /// Rows that have failed since, attempts that have, and the most that was in flight meanwhile.
    failing: HashSet<usize>,
    /// Of these, rows that have been given up.
    given_up: usize,
    failures: usize,
    in_flight: usize,
    /// Failures since an outage began.
    probes: u32,
    /// The last refusal, and how often in a row it came; the same of errors of the server.
    refusal: (String, u32),
    error: (String, u32),
    /// Rounds of refusals for their rate, of waits that are hours long, and of replies that say that no
    /// request can succeed, since one was answered.
    throttled: Rounds,
    long_waits: Rounds,
    claims: Rounds,
    /// Rows that were forbidden since.
    forbidden: HashSet<usize>,
    /// Rows of which a reply said that no request can succeed, since one last did.
    suspects: HashSet<usize>,
    /// When the first of these rows was refused, and how often an answer to a later request contradicted that.
    doubted_since: Option<Instant>,
    contradicted: u32,
    /// Replies that were no answers, before there was one.
    setbacks: u32,
}

/// Counts what all that is in flight may say at once: a reply to a request that left before the last
/// round was counted belongs to that round.
#[derive(Debug, Default)]
struct Rounds {
    count: u32,
    since: Option<Instant>,
}

impl Rounds {
    /// The number of the round that a reply to a request which left at `departed` belongs to, from 1.
    fn add(&mut self, sent_at: Instant, now: Instant) -> u32 {
        if self.since.is_none_or(|since| sent_at >= since) {
            self.count += 1;
            self.since = Some(now);
        }
        self.count
    }
}

impl EndpointHealth {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            last_success: now,
            excluded: Duration::ZERO,
            succeeded: false,
            answered: false,
            has_failed_as_before: false,
            failing_since: None,
            failing: HashSet::new(),
            given_up: 0,
            failures: 0,
            in_flight: 0,
            probes: 0,
            refusal: (String::new(), 0),
            error: (String::new(), 0),
            throttled: Rounds::default(),
            long_waits: Rounds::default(),
            claims: Rounds::default(),
            forbidden: HashSet::new(),
            suspects: HashSet::new(),
            doubted_since: None,
            contradicted: 0,
            setbacks: 0,
        }
    }

    /// A request that left at `departed` was answered. One that left before the failures began shows
    /// nothing about them: it may have been under way for minutes.
    pub(crate) fn success(&mut self, sent_at: Instant, now: Instant) {
        self.last_success = now;
        self.excluded = Duration::ZERO;
        self.succeeded = true;
        self.answered = true;
        let doubted = self.doubted_since.take();
        self.contradicted += u32::from(doubted.is_some_and(|since| sent_at >= since));
        self.forbidden.clear();
        self.suspects.clear();
        for rounds in [&mut self.throttled, &mut self.long_waits, &mut self.claims] {
            if rounds.since.is_none_or(|since| sent_at >= since) {
                *rounds = Rounds::default();
            }
        }
        if self.failing_since.is_some_and(|since| sent_at < since) {
            return;
        }
        self.failing_since = None;
        self.failing.clear();
        self.given_up = 0;
        self.failures = 0;
        self.in_flight = 0;
        self.probes = 0;
    }

    /// Has anything succeeded in this run?
    pub(crate) fn has_succeeded(&self) -> bool {
        self.succeeded
    }

    /// An attempt at `row` failed in a way that may pass, with so many in flight.
    pub(crate) fn failure(
        &mut self,
        row: usize,
        unreachable: bool,
        in_flight: usize,
        now: Instant,
    ) {
        self.setbacks += 1;
        self.failing_since.get_or_insert(now);
        self.answered |= !unreachable;
        self.failing.insert(row);
        self.failures += 1;
        self.in_flight = self.in_flight.max(in_flight);
        self.probes += u32::from(self.is_outage());
    }

    /// Returns true if the row has failed since the last success of any row.
    pub(crate) fn is_failing(&self, row: usize) -> bool {
        self.failing.contains(&row) || self.suspects.contains(&row)
    }

    /// Rows that brought no answer where nothing has succeeded at all, and those of which a reply said last
    /// that nothing can.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = usize> {
        let failing = self.failing.iter().filter(|_| !self.succeeded);
        failing.chain(&self.suspects).copied()
    }

    /// Returns true if the last requests failed and their rows may be the reason.
    pub(crate) fn is_in_doubt(&self) -> bool {
        let has_suspects = self.forbidden.len() > 1 || !self.suspects.is_empty();
        !self.succeeded && self.setbacks > 0 || has_suspects || self.is_outage()
    }

    /// Returns true if several rows in a row were forbidden. The number doubles each time that an answer
    /// contradicts the refusals.
    pub(crate) fn is_forbidding(&self) -> bool {
        let enough = SAME_REFUSALS << self.contradicted.min(MAX_DOUBLINGS);
        self.forbidden.len() >= enough as usize
    }

    /// Times that a refusal that seemed to be the end was followed by an answer.
    pub(crate) fn contradicted(&self) -> u32 {
        self.contradicted
    }

    /// A row has failed as it did while others were answered.
    pub(crate) fn failed_as_before(&mut self) {
        self.answered = true;
        self.has_failed_as_before = true;
    }

    /// Returns true once several requests may be in flight: one has succeeded, or a row has failed as it
    /// did in an earlier run, amid answers.
    pub(crate) fn is_proven(&self) -> bool {
        self.succeeded || self.has_failed_as_before
    }

    /// A reply to this row says that no request can succeed, and none has. Returns the number of such rows.
    pub(crate) fn suspect(&mut self, row: usize) -> usize {
        self.answered = true;
        self.setbacks += 1;
        self.suspects.insert(row);
        self.suspects.len()
    }

    /// When a request last succeeded.
    pub(crate) fn last_success(&self) -> Option<Instant> {
        self.succeeded.then_some(self.last_success)
    }

    /// The row has ended without an answer.
    pub(crate) fn gave_up(&mut self, row: usize) {
        self.given_up += usize::from(self.failing.contains(&row));
    }

    /// Attempts that failed since one succeeded.
    pub(crate) fn failures(&self) -> usize {
        self.failures
    }

    /// The endpoint asked to wait: it is there. Returns how often it did since it last answered, all that
    /// was in flight at once counted as one.
    pub(crate) fn throttled(&mut self, sent_at: Instant, now: Instant) -> u32 {
        self.answered = true;
        self.throttled.add(sent_at, now)
    }

    /// As [`Health::throttled`], of waits that are hours long.
    pub(crate) fn long_wait_requested(&mut self, sent_at: Instant, now: Instant) -> u32 {
        self.long_waits.add(sent_at, now)
    }

    /// As [`Health::throttled`], of replies that say that no request can succeed.
    pub(crate) fn claimed(&mut self, row: usize, sent_at: Instant, now: Instant) -> u32 {
        self.answered = true;
        self.doubted_since.get_or_insert(now);
        self.suspects.insert(row);
        self.claims.add(sent_at, now)
    }

    /// The endpoint forbade a row. True if it has forbidden several in a row.
    pub(crate) fn request_forbidden(&mut self, row: usize, now: Instant) -> bool {
        self.doubted_since.get_or_insert(now);
        self.forbidden.insert(row);
        self.is_forbidding()
    }

    /// The endpoint refused a row. True if it has refused all that it was asked, in the same words:
    /// then the next one need not be asked.
    pub(crate) fn refused(&mut self, message: &str) -> bool {
        self.answered = true;
        self.setbacks += 1;
        count_repeats(&mut self.refusal, message) >= SAME_REFUSALS && !self.succeeded
    }

    /// The server failed with this message. True if it has failed at all that it was asked, in the same
    /// words.
    pub(crate) fn failed_alike(&mut self, message: &str) -> bool {
        count_repeats(&mut self.error, message) >= SAME_ERRORS && !self.succeeded
    }

    /// Nothing has ever answered at this address.
    pub(crate) fn never_answered(&self) -> bool {
        !self.answered
    }

    /// As many attempts as are in flight at once have failed without a success in between, and those
    /// of several rows: it is the endpoint, and no row is to blame.
    pub(crate) fn is_outage(&self) -> bool {
        self.failing.len() >= OUTAGE_ROWS && self.failures >= self.in_flight.max(OUTAGE_FAILURES)
    }

    /// Are there rows among the `remaining` that have not failed since something last succeeded?
    pub(crate) fn has_others(&self, remaining: usize) -> bool {
        remaining + self.given_up > self.failing.len()
    }

    /// A row has failed so many times. Was that the endpoint's fault, for all we know? So it is where
    /// nothing has succeeded meanwhile and some of the `remaining` rows have not failed yet.
    pub(crate) fn may_be_the_endpoint(&self, attempts: u32, remaining: usize) -> bool {
        self.failures >= attempts as usize && self.has_others(remaining)
    }

    /// Failures since the outage began, from 1; 0 where there is none.
    pub(crate) fn probes(&self) -> u32 {
        self.probes
    }

    /// The endpoint said for how long to wait, and it is obeyed: that is no outage.
    pub(crate) fn exclude_wait(&mut self, wait: Duration) {
        self.excluded = (self.excluded + wait).min(MAX_EXCLUDED_WAIT);
    }

    /// How long nothing has succeeded, without the time that the endpoint asked for.
    pub(crate) fn time_without_success(&self, now: Instant) -> Duration {
        (now - self.last_success).saturating_sub(self.excluded)
    }
}

/// Counts a message that comes again. Returns how often in a row it has come.
fn count_repeats(last: &mut (String, u32), message: &str) -> u32 {
    if last.0 != message {
        *last = (message.into(), 0);
    }
    last.1 += 1;
    last.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_row_is_no_outage_and_many_are_until_one_succeeds() {
        let now = Instant::now();
        let mut health = EndpointHealth::new(now);
        for _ in 0..10 {
            health.failure(0, false, 2, Instant::now());
        }
        assert!(!health.is_outage());
        health.failure(1, true, 2, Instant::now());
        health.failure(2, true, 2, Instant::now());
        assert!(health.is_outage() && !health.never_answered());
        assert_eq!(health.probes(), 1);
        let later = now + Duration::from_secs(9);
        assert_eq!(health.time_without_success(later), Duration::from_secs(9));
        health.exclude_wait(Duration::from_secs(5));
        assert_eq!(health.time_without_success(later), Duration::from_secs(4));
        health.success(later, later);
        assert!(!health.is_outage() && health.probes() == 0);
        assert_eq!(health.time_without_success(later), Duration::ZERO);
    }

    #[test]
    fn a_row_is_blamed_only_beside_others_that_succeed_or_when_all_have_failed() {
        let mut health = EndpointHealth::new(Instant::now());
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
        let mut health = EndpointHealth::new(early);
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
        let mut health = EndpointHealth::new(Instant::now());
        for row in 0..31 {
            health.failure(row, false, 32 - row, Instant::now());
        }
        assert!(!health.is_outage());
        health.failure(31, false, 1, Instant::now());
        assert!(health.is_outage());
    }

    #[test]
    fn an_endpoint_that_refuses_everything_alike_is_asked_no_more() {
        let mut health = EndpointHealth::new(Instant::now());
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

    #[test]
    fn what_is_in_flight_at_once_is_one_round() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut health = EndpointHealth::new(start);
        let rounds: Vec<u32> = (0..32).map(|_| health.throttled(start, at(1))).collect();
        assert_eq!(rounds, [1; 32]);
        assert_eq!(
            (
                health.throttled(at(2), at(3)),
                health.throttled(at(2), at(4))
            ),
            (2, 2)
        );
        // An answer to what left before the last round shows nothing about it.
        health.success(at(1), at(5));
        assert_eq!(health.throttled(at(6), at(7)), 3);
        health.success(at(8), at(9));
        assert_eq!(health.throttled(at(10), at(11)), 1);
    }

    #[test]
    fn errors_in_the_same_words_are_an_end_only_where_nothing_ever_succeeded() {
        let mut health = EndpointHealth::new(Instant::now());
        assert!((1..SAME_ERRORS).all(|_| !health.failed_alike("500: no schema")));
        assert!(health.failed_alike("500: no schema"));
        assert!(!health.failed_alike("500: another"));
        health.success(Instant::now(), Instant::now());
        assert!((0..10).all(|_| !health.failed_alike("500: no schema")));
        let forbade =
            |health: &mut EndpointHealth, row| health.request_forbidden(row, Instant::now());
        assert!((1..5).all(|row| !forbade(&mut health, row)) && !forbade(&mut health, 4));
        assert!(forbade(&mut health, 5));
        // An answer shows that it is the rows: more of them have to be forbidden from then on.
        health.success(Instant::now(), Instant::now());
        assert_eq!(health.contradicted(), 1);
        assert!((6..15).all(|row| !forbade(&mut health, row)));
        assert!(forbade(&mut health, 15));
    }
}
