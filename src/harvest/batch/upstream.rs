//! Live state of one endpoint in batch mode: its waiting rows, and the failures of its calls and batches.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use tokio::time::Instant;

use crate::client::attempt_error::{AttemptError, EndpointRefusal, RowFailure};
use crate::client::transport::BatchApi;
use crate::client::transport::Transport;
use crate::config;
use crate::exit::Exit;
use crate::harvest::answer_monitor::AnswerMonitor;
use crate::harvest::backoff::backoff;
use crate::harvest::run_error;
use crate::harvest::upstream::LONGEST_WAIT;
use crate::plan::Plan;
use crate::plan::queue::QueuedRow;
use crate::plan::run_settings::RunSettings;

/// Number of failed calls after which an upstream stops if its address has never replied.
const FIRST_CONTACT_CALLS: u32 = 3;

/// Maximum number of consecutive endpoint refusals ([`EndpointRefusal`]) from an endpoint that has worked before. The
/// next one stops it.
const MAX_ENDPOINT_REFUSALS: u32 = 4;

/// Number of consecutive failed batches after which the upstream stops.
const MAX_FAILED_BATCHES: u32 = 3;

/// Number of consecutive failed calls whose requested waits are excluded from an outage. Later waits are not excluded.
const MAX_EXCLUDED_WAITS: u32 = 8;

/// Minimum pause after a batch of one row exceeded the limit of enqueued tokens.
const MIN_TOKEN_LIMIT_PAUSE: Duration = Duration::from_secs(30);

/// Live state of an endpoint in batch mode.
pub(crate) struct BatchUpstream {
    pub index: usize,
    pub settings: config::EndpointConfig,
    pub transport: Arc<dyn Transport>,
    /// Rows that are not in a part.
    pub waiting: VecDeque<QueuedRow>,
    /// Maximum tokens in unfinished parts, from the config or from an error of the endpoint.
    pub token_limit: Option<u64>,
    /// True once a row was answered or refused by a content filter.
    pub has_answered: bool,
    /// Earliest time of the next call.
    pub not_before: Instant,
    /// Time of the next poll of the batches under way.
    pub next_poll: Instant,
    /// Number of failed calls since the last success.
    failures: u32,
    /// Time of the first failed call since the last success.
    failing_since: Option<Instant>,
    /// Total of the time since `failing_since` that does not count as an outage: waits requested by the endpoint, and
    /// time outside the request window.
    excluded_wait: Duration,
    /// True once the address has sent a reply.
    has_replied: bool,
    /// Number of consecutive failed batches.
    failed_batches: u32,
    /// True once the endpoint has accepted a batch.
    pub has_batches: bool,
    /// Number of batches that ended with an endpoint refusal and without answers, since the last batch with answers.
    refused_batches: u32,
    /// Number of calls since the last success that were answered by an endpoint refusal.
    refused_calls: u32,
    /// Detects consecutive answers that training cannot use.
    pub monitor: AnswerMonitor,
    /// Error that stopped this upstream; other upstreams continue.
    stopped: Option<anyhow::Error>,
}

impl BatchUpstream {
    pub(crate) fn new(
        plan: &Plan,
        index: usize,
        transport: Arc<dyn Transport>,
        run: &RunSettings,
    ) -> BatchUpstream {
        let now = Instant::now();
        let rows = plan.rows_by_endpoint[index].clone();
        BatchUpstream {
            index,
            settings: plan.templates[index].endpoint.clone(),
            transport,
            waiting: rows.map(QueuedRow::fresh).collect(),
            token_limit: run.batch.enqueued_tokens,
            has_answered: false,
            not_before: now,
            next_poll: now,
            failures: 0,
            failing_since: None,
            excluded_wait: Duration::ZERO,
            has_replied: false,
            failed_batches: 0,
            has_batches: false,
            refused_batches: 0,
            refused_calls: 0,
            monitor: AnswerMonitor::from_settings(&plan.templates[index].endpoint, run),
            stopped: None,
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// Stops the upstream. The first error is kept.
    pub(crate) fn stop(&mut self, error: anyhow::Error) {
        self.stopped.get_or_insert(error);
    }

    pub(crate) fn take_error(&mut self) -> Option<anyhow::Error> {
        self.stopped.take()
    }

    /// Records a successful call.
    pub(crate) fn success(&mut self) {
        self.failures = 0;
        self.refused_calls = 0;
        self.failing_since = None;
        self.excluded_wait = Duration::ZERO;
        self.has_replied = true;
    }

    /// Excludes time in which no call was made from an outage.
    pub(crate) fn exclude_wait(&mut self, elapsed: Duration) {
        self.excluded_wait += elapsed;
    }

    /// Handles a failed call. Returns the pause before the next call, and its reason.
    pub(crate) fn call_failed(
        &mut self,
        error: AttemptError,
        retry: &config::RetryConfig,
    ) -> (Duration, String) {
        let now = Instant::now();
        self.failures += 1;
        let failing_since = *self.failing_since.get_or_insert(now);
        let (requested_wait, message) = match error {
            AttemptError::EndpointRefused(refusal) => return self.call_refused(refusal, retry),
            AttemptError::Refused(failure) | AttemptError::Filtered(failure) => {
                self.stop(anyhow!(
                    "the endpoint accepts no batches ({}): set `schedule.mode = \"realtime\"`, or \
                     change the field that it names in `[batch]`",
                    failure.message
                ));
                return (Duration::ZERO, failure.message);
            }
            AttemptError::Throttled { wait, message } => {
                self.has_replied = true;
                (wait.map(|wait| wait.min(LONGEST_WAIT)), message)
            }
            AttemptError::KeyRenewed => return (Duration::ZERO, String::new()),
            AttemptError::Unreadable { problem, .. } => (None, problem),
            AttemptError::Transient { failure, wait } => {
                self.has_replied |= !failure.is_unreachable;
                if !self.has_replied && self.failures >= FIRST_CONTACT_CALLS {
                    self.stop(run_error::no_reply(
                        &self.settings.teacher,
                        &failure.message,
                    ));
                }
                // After an error, servers only guess the wait: ignore a wait of hours.
                (
                    Some(wait).filter(|wait| *wait <= LONGEST_WAIT),
                    failure.message,
                )
            }
        };
        let outage = (now - failing_since).saturating_sub(self.excluded_wait);
        if outage >= retry.max_outage {
            self.stop(run_error::outage(outage, &message));
        }
        // Jitter applies to the upper half of the pause only.
        let random = 0.5 + fastrand::f64() / 2.0;
        let requested_wait = requested_wait.unwrap_or_default();
        if requested_wait > retry.max && self.failures <= MAX_EXCLUDED_WAITS {
            self.exclude_wait(requested_wait);
        }
        let pause = backoff(self.failures, retry, random).max(requested_wait);
        self.not_before = now + pause;
        (pause, message)
    }

    /// Handles an endpoint refusal in reply to a call. The upstream stops at the first one if the endpoint has not
    /// accepted a batch yet, and otherwise after more than [`MAX_ENDPOINT_REFUSALS`] of them.
    fn call_refused(
        &mut self,
        refusal: EndpointRefusal,
        retry: &config::RetryConfig,
    ) -> (Duration, String) {
        self.refused_calls += 1;
        let pause = backoff(self.failures, retry, 1.0);
        self.not_before = Instant::now() + pause;
        let message = refusal.failure.message.clone();
        self.stop_if_confirmed(refusal, self.has_batches, self.refused_calls);
        (pause, message)
    }

    /// Handles an endpoint refusal in a batch without answers. The upstream stops at the first one if no row was
    /// answered yet, and otherwise after more than [`MAX_ENDPOINT_REFUSALS`] of them.
    pub(crate) fn batch_refused(&mut self, refusal: EndpointRefusal, retry: &config::RetryConfig) {
        self.refused_batches += 1;
        self.not_before = Instant::now() + backoff(self.refused_batches, retry, 1.0);
        self.stop_if_confirmed(refusal, self.has_answered, self.refused_batches);
    }

    /// Stops after `count` endpoint refusals, if these are enough. `has_worked` is true if the endpoint has worked
    /// before, so that more than one is needed.
    fn stop_if_confirmed(&mut self, refusal: EndpointRefusal, has_worked: bool, count: u32) {
        let EndpointRefusal { reason, failure } = refusal;
        let teacher = &self.settings.teacher;
        if !has_worked {
            self.stop(crate::client::refused::refused(
                reason,
                &failure.message,
                teacher,
            ));
        } else if count > MAX_ENDPOINT_REFUSALS {
            self.stop(crate::client::refused::refused_after_answers(
                reason,
                &failure.message,
                teacher,
            ));
        }
    }

    /// Resets the failure counts after a batch with answers or with rows that a content filter refused.
    pub(crate) fn batch_succeeded(&mut self) {
        self.failed_batches = 0;
        self.refused_batches = 0;
    }

    /// Handles a batch that failed as a whole.
    pub(crate) fn batch_failed(&mut self, message: &str, retry: &config::RetryConfig) {
        self.failed_batches += 1;
        if self.failed_batches >= MAX_FAILED_BATCHES {
            self.stop(anyhow!(
                "the endpoint fails every batch ({message}): change the setting that the message is about in `[batch]`, \
                 `[sampling]` or `[teacher]`, or set `schedule.mode = \"realtime\"`"
            ));
        }
        self.not_before = Instant::now() + backoff(self.failed_batches, retry, 1.0);
    }

    /// Handles a batch of one row that exceeds the limit of enqueued tokens although no other batch is under way.
    pub(crate) fn single_row_exceeds_limit(&mut self, tokens: u64, retry: &config::RetryConfig) {
        self.failed_batches += 1;
        if self.failed_batches >= 2 * MAX_FAILED_BATCHES {
            let message = format!(
                "the endpoint's limit of enqueued tokens has no room for a batch of {tokens} tokens: \
                 other batches of the account may be under way; rerun the command later"
            );
            self.stop(Exit::Resumable(message).into());
        }
        let pause = backoff(self.failed_batches, retry, 1.0);
        self.not_before = Instant::now() + pause.max(MIN_TOKEN_LIMIT_PAUSE);
    }
}

/// Returns the batch API of a transport.
pub(crate) fn batches(transport: &Arc<dyn Transport>) -> Result<&dyn BatchApi, AttemptError> {
    transport.batches().ok_or_else(|| {
        let message = "its transport has no batch API";
        AttemptError::Refused(RowFailure::new("no batches", message))
    })
}
