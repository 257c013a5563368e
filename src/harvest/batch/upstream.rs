//! One teacher in a run in batch mode: its rows that wait, and whether it can be spoken to.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use tokio::time::Instant;

use crate::client::attempt_error::{AttemptError, RefusalClaim, RowFailure};
use crate::client::outcome;
use crate::client::transport::BatchApi;
use crate::client::transport::Transport;
use crate::config::{self, Config};
use crate::exit::Exit;
use crate::harvest::answer_monitor::AnswerMonitor;
use crate::harvest::run_error;
use crate::plan::Plan;
use crate::plan::queue::QueuedRow;

/// Calls after which an address at which nothing has ever answered is given up.
const FIRST_CONTACT_CALLS: u32 = 3;

/// Times in a row that an endpoint which has answered says that no request can succeed, before it is
/// believed.
const CLAIMS: u32 = 4;

/// Batches in a row that fail as a whole.
const FAILED_BATCHES: u32 = 3;

pub(crate) struct BatchUpstream {
    pub index: usize,
    pub settings: config::EndpointConfig,
    pub transport: Arc<dyn Transport>,
    /// Rows that are in no batch.
    pub waiting: VecDeque<QueuedRow>,
    /// Tokens in batches under way: as the user or a refusal says.
    pub token_limit: Option<u64>,
    /// An answer has come.
    pub has_answered: bool,
    /// Nothing is sent before.
    pub not_before: Instant,
    /// When the batches under way are looked at next.
    pub next_poll: Instant,
    /// Calls that failed since one succeeded, and when that was.
    failures: u32,
    last_success: Instant,
    /// Something has answered at this address.
    is_there: bool,
    failed_batches: u32,
    /// The endpoint knows of batches of ours.
    pub has_batches: bool,
    /// Batches since the last answered row in which every row says that no request can succeed.
    claims: u32,
    /// Calls since the last successful one that were refused in this way.
    refused_calls: u32,
    /// Monitors the usefulness of its answers.
    pub monitor: AnswerMonitor,
    /// Why nothing more is sent to it; the other upstreams go on.
    stopped: Option<anyhow::Error>,
}

impl BatchUpstream {
    pub(crate) fn new(
        plan: &Plan,
        index: usize,
        transport: Arc<dyn Transport>,
        config: &Config,
    ) -> BatchUpstream {
        let now = Instant::now();
        let rows = plan.rows_by_endpoint[index].clone();
        BatchUpstream {
            index,
            settings: plan.templates[index].endpoint.clone(),
            transport,
            waiting: rows.map(QueuedRow::fresh).collect(),
            token_limit: config.batch.enqueued_tokens,
            has_answered: false,
            not_before: now,
            next_poll: now,
            failures: 0,
            last_success: now,
            is_there: false,
            failed_batches: 0,
            has_batches: false,
            claims: 0,
            refused_calls: 0,
            monitor: AnswerMonitor::from_config(&plan.templates[index].endpoint, config),
            stopped: None,
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    pub(crate) fn stop(&mut self, error: anyhow::Error) {
        self.stopped.get_or_insert(error);
    }

    pub(crate) fn take_error(&mut self) -> Option<anyhow::Error> {
        self.stopped.take()
    }

    pub(crate) fn success(&mut self) {
        self.failures = 0;
        self.refused_calls = 0;
        self.last_success = Instant::now();
        self.is_there = true;
    }

    /// A call failed. Returns for how long nothing is sent, and why.
    pub(crate) fn call_failed(
        &mut self,
        error: AttemptError,
        retry: &config::RetryConfig,
    ) -> (Duration, String) {
        let now = Instant::now();
        self.failures += 1;
        let (least, message) = match error {
            AttemptError::Claim(claim) => return self.claimed(claim, retry),
            AttemptError::Refused(failure) | AttemptError::Filtered(failure) => {
                self.stop(anyhow!(
                    "the endpoint takes no batches ({}): set `schedule.mode = \"realtime\"`, or \
                     change in `[batch]` what it names",
                    failure.message
                ));
                return (Duration::ZERO, failure.message);
            }
            AttemptError::Throttled { wait, message } => {
                self.is_there = true;
                (wait, message)
            }
            AttemptError::KeyRenewed => return (Duration::ZERO, String::new()),
            AttemptError::Unreadable { problem, .. } => (None, problem),
            AttemptError::Transient { failure, wait } => {
                self.is_there |= !failure.unreachable;
                if !self.is_there && self.failures >= FIRST_CONTACT_CALLS {
                    self.stop(run_error::nothing_answers(
                        &self.settings.teacher,
                        &failure.message,
                    ));
                }
                (Some(wait), failure.message)
            }
        };
        let silence = now - self.last_success;
        if silence.as_secs_f64() >= retry.max_outage_s {
            self.stop(run_error::outage(silence, &message));
        }
        // At least half of the pause is certain.
        let random = 0.5 + fastrand::f64() / 2.0;
        let pause = outcome::backoff(self.failures, retry, random).max(least.unwrap_or_default());
        self.not_before = now + pause;
        (pause, message)
    }

    /// A call says that no request can succeed. Before there is a batch that is believed at once; after that
    /// only where it is said again and again.
    fn claimed(&mut self, claim: RefusalClaim, retry: &config::RetryConfig) -> (Duration, String) {
        self.refused_calls += 1;
        let pause = outcome::backoff(self.failures, retry, 1.0);
        self.not_before = Instant::now() + pause;
        let message = claim.failure.message.clone();
        self.stop_if_confirmed(claim, self.has_batches, self.refused_calls);
        (pause, message)
    }

    /// As [`Lane::claimed`], for a batch in which every row says so.
    pub(crate) fn all_claimed(&mut self, claim: RefusalClaim, retry: &config::RetryConfig) {
        self.claims += 1;
        self.not_before = Instant::now() + outcome::backoff(self.claims, retry, 1.0);
        self.stop_if_confirmed(claim, self.has_answered, self.claims);
    }

    fn stop_if_confirmed(&mut self, claim: RefusalClaim, is_doubtful: bool, times: u32) {
        let RefusalClaim { reason, failure } = claim;
        let teacher = &self.settings.teacher;
        if !is_doubtful {
            self.stop(crate::client::refused::refused(
                reason,
                &failure.message,
                teacher,
            ));
        } else if times > CLAIMS {
            self.stop(crate::client::refused::refused_by_now(
                reason,
                &failure.message,
                teacher,
            ));
        }
    }

    /// A batch has brought answers.
    pub(crate) fn batch_succeeded(&mut self) {
        self.failed_batches = 0;
        self.claims = 0;
    }

    /// A batch has failed as a whole.
    pub(crate) fn batch_failed(&mut self, message: &str, retry: &config::RetryConfig) {
        self.failed_batches += 1;
        if self.failed_batches >= FAILED_BATCHES {
            self.stop(anyhow!(
                "the endpoint fails every batch ({message}): change what it names in `[batch]`, \
                 `[sampling]` or `[teacher]`, or set `schedule.mode = \"realtime\"`"
            ));
        }
        self.not_before = Instant::now() + outcome::backoff(self.failed_batches, retry, 1.0);
    }

    /// Nothing else of ours is under way, and there is no room for a row of so many tokens.
    pub(crate) fn single_row_exceeds_limit(&mut self, tokens: u64, retry: &config::RetryConfig) {
        self.failed_batches += 1;
        if self.failed_batches >= 2 * FAILED_BATCHES {
            let message = format!(
                "the endpoint's limit of enqueued tokens leaves no room for a batch of {tokens}: \
                 other batches of the account may be under way; run the same command later"
            );
            self.stop(Exit::Resumable(message).into());
        }
        let pause = outcome::backoff(self.failed_batches, retry, 1.0);
        self.not_before = Instant::now() + pause.max(Duration::from_secs(30));
    }
}

/// The way to an endpoint's batches.
pub(crate) fn batches(transport: &Arc<dyn Transport>) -> Result<&dyn BatchApi, AttemptError> {
    transport.batches().ok_or_else(|| {
        let message = "there is no way to its batches";
        AttemptError::Refused(RowFailure::new("no batches", message))
    })
}
