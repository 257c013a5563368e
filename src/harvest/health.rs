//! Decides whether a row or the endpoint is failing. Pure.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

/// Number of consecutive refusals with the same message, before any success, after which the settings are assumed to be
/// wrong. Also the number of forbidden rows after which the endpoint counts as forbidding every row.
const SAME_REFUSALS: u32 = 5;

/// Maximum number of doublings of [`SAME_REFUSALS`] for forbidden rows, one for each answer that contradicted earlier
/// refusals.
const MAX_DOUBLINGS: u32 = 5;

/// Number of consecutive server errors with the same message, before any success, after which the endpoint stops.
const SAME_ERRORS: u32 = 6;

/// Minimum number of failing rows in an outage.
const OUTAGE_ROWS: usize = 3;

/// Minimum number of consecutive failures in an outage.
const OUTAGE_FAILURES: usize = 4;

/// Maximum total of the waits that are excluded from an outage: a daily limit may require a day.
const MAX_EXCLUDED_WAIT: Duration = Duration::from_secs(86_400);

/// Recent successes and failures of an endpoint.
#[derive(Debug)]
pub(crate) struct EndpointHealth {
    /// Time of the last success; initially the start of the plan.
    last_success: Instant,
    /// Total of the waits since the last success that do not count as time without success: waits requested by the
    /// endpoint, and outages of the shared limits.
    excluded_wait: Duration,
    /// Total of the time since the last success in which the run itself sent nothing: outside the request window, until
    /// a limit of the user allows a request, or without disk space. It does not count as time without success.
    held_back: Duration,
    /// A request has succeeded.
    has_succeeded: bool,
    /// The endpoint has sent a reply of any kind.
    has_replied: bool,
    /// A row has failed with the same error as in an earlier run in which other rows were answered.
    has_failed_as_before: bool,
    /// Time of the first failure since the last success.
    failing_since: Option<Instant>,
    /// Rows that have failed since `failing_since`.
    failing: HashSet<usize>,
    /// Number of rows in `failing` that were given up.
    given_up: usize,
    /// Number of attempts that have failed since `failing_since`.
    failures: usize,
    /// Largest number of requests in flight since `failing_since`.
    max_in_flight: usize,
    /// Number of failures since an outage began.
    probes: u32,
    /// Message of the last refusal.
    refusal: RepeatedMessage,
    /// Message of the last server error.
    server_error: RepeatedMessage,
    /// Rounds of throttled requests since the last answer.
    throttled: Rounds,
    /// Rounds of requested waits that are hours long.
    long_waits: Rounds,
    /// Rounds of endpoint refusals.
    endpoint_refusals: Rounds,
    /// Rows that were forbidden since the last answer.
    forbidden: HashSet<usize>,
    /// Rows with an endpoint refusal since the last answer.
    suspects: HashSet<usize>,
    /// Time of the first endpoint refusal or forbidden row since the last answer.
    doubted_since: Option<Instant>,
    /// Number of times that an answer to a request sent after `doubted_since` contradicted the refusals.
    contradictions: u32,
    /// True once an attempt has failed or was refused. Used only before the first success.
    has_failed: bool,
}

/// A message, and the number of its consecutive occurrences.
#[derive(Debug, Default)]
struct RepeatedMessage {
    text: String,
    count: u32,
}

impl RepeatedMessage {
    /// Counts an occurrence of `message`. Returns the number of its consecutive occurrences.
    fn add(&mut self, message: &str) -> u32 {
        if self.text != message {
            *self = RepeatedMessage {
                text: message.into(),
                count: 0,
            };
        }
        self.count += 1;
        self.count
    }
}

/// Counts rounds of refusals. All requests in flight may be refused together, so a refusal of a request that was sent
/// before the current round began belongs to that round.
#[derive(Debug, Default)]
struct Rounds {
    count: u32,
    since: Option<Instant>,
}

impl Rounds {
    /// Returns the number, from 1, of the round of a reply to a request sent at `sent_at`.
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
            excluded_wait: Duration::ZERO,
            held_back: Duration::ZERO,
            has_succeeded: false,
            has_replied: false,
            has_failed_as_before: false,
            failing_since: None,
            failing: HashSet::new(),
            given_up: 0,
            failures: 0,
            max_in_flight: 0,
            probes: 0,
            refusal: RepeatedMessage::default(),
            server_error: RepeatedMessage::default(),
            throttled: Rounds::default(),
            long_waits: Rounds::default(),
            endpoint_refusals: Rounds::default(),
            forbidden: HashSet::new(),
            suspects: HashSet::new(),
            doubted_since: None,
            contradictions: 0,
            has_failed: false,
        }
    }

    /// Records an answer to a request sent at `sent_at`. The answer resets the failures, unless the request was sent
    /// before the first failure: such a request may have been in flight for minutes.
    pub(crate) fn success(&mut self, sent_at: Instant, now: Instant) {
        self.last_success = now;
        self.excluded_wait = Duration::ZERO;
        self.held_back = Duration::ZERO;
        self.has_succeeded = true;
        self.has_replied = true;
        let doubted_since = self.doubted_since.take();
        self.contradictions += u32::from(doubted_since.is_some_and(|since| sent_at >= since));
        self.forbidden.clear();
        self.suspects.clear();
        for rounds in [
            &mut self.throttled,
            &mut self.long_waits,
            &mut self.endpoint_refusals,
        ] {
            if rounds.since.is_none_or(|since| sent_at >= since) {
                *rounds = Rounds::default();
            }
        }
        if self.failing_since.is_some_and(|since| sent_at < since) {
            return;
        }
        self.reset_failures();
    }

    /// Discards the failures of an earlier plan: their rows are not rows of the next plan, and the time between the
    /// plans is not time without success.
    pub(crate) fn begin_plan(&mut self, now: Instant) {
        self.last_success = now;
        self.excluded_wait = Duration::ZERO;
        self.held_back = Duration::ZERO;
        self.reset_failures();
        self.forbidden.clear();
        self.suspects.clear();
        self.doubted_since = None;
    }

    fn reset_failures(&mut self) {
        self.failing_since = None;
        self.failing.clear();
        self.given_up = 0;
        self.failures = 0;
        self.max_in_flight = 0;
        self.probes = 0;
    }

    /// Returns true if a request of this run has succeeded.
    pub(crate) fn has_succeeded(&self) -> bool {
        self.has_succeeded
    }

    /// Records a transient failure of `row`, with `in_flight` requests in flight, this one included.
    pub(crate) fn failure(
        &mut self,
        row: usize,
        is_unreachable: bool,
        in_flight: usize,
        now: Instant,
    ) {
        self.has_failed = true;
        self.failing_since.get_or_insert(now);
        self.has_replied |= !is_unreachable;
        self.failing.insert(row);
        self.failures += 1;
        self.max_in_flight = self.max_in_flight.max(in_flight);
        self.probes += u32::from(self.is_outage());
    }

    /// Returns true if the row has failed, or got an endpoint refusal, since the last success of any row.
    pub(crate) fn is_failing(&self, row: usize) -> bool {
        self.failing.contains(&row) || self.suspects.contains(&row)
    }

    /// Returns the rows with an endpoint refusal since the last answer, and all failing rows if nothing has succeeded.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = usize> {
        let failing = self.failing.iter().filter(|_| !self.has_succeeded);
        failing.chain(&self.suspects).copied()
    }

    /// Returns true if the last requests failed and their rows may be the cause.
    pub(crate) fn is_in_doubt(&self) -> bool {
        let has_suspects = self.forbidden.len() > 1 || !self.suspects.is_empty();
        !self.has_succeeded && self.has_failed || has_suspects || self.is_outage()
    }

    /// Returns true if the number of rows that were forbidden since the last answer has reached its threshold. The
    /// threshold doubles each time that an answer contradicts the refusals.
    pub(crate) fn is_forbidding(&self) -> bool {
        let threshold = SAME_REFUSALS << self.contradictions.min(MAX_DOUBLINGS);
        self.forbidden.len() >= threshold as usize
    }

    /// Returns the number of times that an answer contradicted endpoint refusals or forbidden rows.
    pub(crate) fn contradictions(&self) -> u32 {
        self.contradictions
    }

    /// Records that a row failed with the same error as in an earlier run in which other rows were answered.
    pub(crate) fn failed_as_before(&mut self) {
        self.has_replied = true;
        self.has_failed_as_before = true;
    }

    /// Returns true once several requests may be in flight: one has succeeded, or a row has failed with the same error
    /// as in an earlier run in which other rows were answered.
    pub(crate) fn is_proven(&self) -> bool {
        self.has_succeeded || self.has_failed_as_before
    }

    /// Records an endpoint refusal before the first answer. Returns the number of rows with an endpoint refusal.
    pub(crate) fn endpoint_refused_before_answer(&mut self, row: usize) -> usize {
        self.has_replied = true;
        self.has_failed = true;
        self.suspects.insert(row);
        self.suspects.len()
    }

    /// Returns the time of the last success; None before the first one.
    pub(crate) fn last_success(&self) -> Option<Instant> {
        self.has_succeeded.then_some(self.last_success)
    }

    /// Records that a row has ended without an answer.
    pub(crate) fn row_given_up(&mut self, row: usize) {
        self.given_up += usize::from(self.failing.contains(&row));
    }

    /// Returns the number of attempts that have failed since the last success.
    pub(crate) fn failures(&self) -> usize {
        self.failures
    }

    /// Records a throttled request. Returns the number of rounds since the last answer.
    pub(crate) fn throttled(&mut self, sent_at: Instant, now: Instant) -> u32 {
        self.has_replied = true;
        self.throttled.add(sent_at, now)
    }

    /// Records a requested wait that is hours long. Returns the number of rounds since the last answer.
    pub(crate) fn long_wait_requested(&mut self, sent_at: Instant, now: Instant) -> u32 {
        self.long_waits.add(sent_at, now)
    }

    /// Records an endpoint refusal after the first answer. Returns the number of rounds since the last answer.
    pub(crate) fn endpoint_refused(&mut self, row: usize, sent_at: Instant, now: Instant) -> u32 {
        self.has_replied = true;
        self.doubted_since.get_or_insert(now);
        self.suspects.insert(row);
        self.endpoint_refusals.add(sent_at, now)
    }

    /// Records a forbidden row. Returns true if the endpoint now counts as forbidding; see
    /// [`EndpointHealth::is_forbidding`].
    pub(crate) fn request_forbidden(&mut self, row: usize, now: Instant) -> bool {
        self.doubted_since.get_or_insert(now);
        self.forbidden.insert(row);
        self.is_forbidding()
    }

    /// Records a refusal. Returns true if nothing has succeeded and at least [`SAME_REFUSALS`] consecutive refusals had
    /// this message.
    pub(crate) fn refused(&mut self, message: &str) -> bool {
        self.has_replied = true;
        self.has_failed = true;
        self.refusal.add(message) >= SAME_REFUSALS && !self.has_succeeded
    }

    /// Records a server error. Returns true if nothing has succeeded and at least [`SAME_ERRORS`] consecutive errors
    /// had this message.
    pub(crate) fn server_failed(&mut self, message: &str) -> bool {
        self.server_error.add(message) >= SAME_ERRORS && !self.has_succeeded
    }

    /// Returns true if no reply has arrived from this address in this run.
    pub(crate) fn never_replied(&self) -> bool {
        !self.has_replied
    }

    /// Returns true during an outage. Since the last success, several rows have failed, and the number of failed
    /// attempts has reached the number of requests in flight.
    pub(crate) fn is_outage(&self) -> bool {
        self.failing.len() >= OUTAGE_ROWS
            && self.failures >= self.max_in_flight.max(OUTAGE_FAILURES)
    }

    /// Returns true if some of the `remaining` rows have not failed since the last success.
    pub(crate) fn has_unfailed_rows(&self, remaining: usize) -> bool {
        remaining + self.given_up > self.failing.len()
    }

    /// Returns true if the endpoint may have caused the `attempts` failures of a row: nothing has succeeded
    /// meanwhile, and some of the `remaining` rows have not failed yet.
    pub(crate) fn may_be_endpoint_fault(&self, attempts: u32, remaining: usize) -> bool {
        self.failures >= attempts as usize && self.has_unfailed_rows(remaining)
    }

    /// Returns the number of failures since the outage began; 0 without an outage.
    pub(crate) fn probes(&self) -> u32 {
        self.probes
    }

    /// Excludes a wait from the time without success.
    pub(crate) fn exclude_wait(&mut self, wait: Duration) {
        self.excluded_wait = (self.excluded_wait + wait).min(MAX_EXCLUDED_WAIT);
    }

    /// Excludes time in which the run itself sent nothing. It has no maximum, unlike the waits that the endpoint
    /// requests.
    pub(crate) fn exclude_held_back(&mut self, elapsed: Duration) {
        self.held_back += elapsed;
    }

    /// Returns the time since the last success, without the excluded waits and the time in which the run itself sent
    /// nothing.
    pub(crate) fn time_without_success(&self, now: Instant) -> Duration {
        (now - self.last_success).saturating_sub(self.excluded_wait + self.held_back)
    }
}

#[cfg(test)]
mod tests;
