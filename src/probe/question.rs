//! One request of a probe: its budget reservation, its retries and its outcome.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};

use crate::budget::account::{Account, Charge, Reservation};
use crate::budget::ledger::LedgerFiles;
use crate::budget::price::TokenBound;
use crate::client::attempt_error::{AttemptError, EndpointRefusal};
use crate::client::outcome;
use crate::client::response::completion::Completion;
use crate::client::response::usage;
use crate::client::transport::{HttpReply, Transport};
use crate::config::{EndpointConfig, MaxTokensField};
use crate::probe::findings::ProbedEndpoint;

/// Maximum number of attempts of one request, not counting throttled ones.
const MAX_ATTEMPTS: u32 = 3;

/// Time after which a request is not retried.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Pause after a throttled attempt whose reply does not state how long to wait.
const THROTTLED_PAUSE: Duration = Duration::from_secs(5);

/// Minimum pause after a transient failure.
const MIN_PAUSE: Duration = Duration::from_millis(500);

/// Outcome of a probe request.
pub(crate) enum ProbeOutcome {
    Answer(Box<Completion>, HttpReply),
    /// The error message, and the reply; `None` if the connection failed.
    Refused(String, Option<HttpReply>),
}

/// A running probe of one endpoint.
pub(crate) struct Probe<'a> {
    pub(super) config: EndpointConfig,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) account: &'a mut Account<LedgerFiles>,
    pub(super) findings: ProbedEndpoint,
    /// Maximum number of tokens of the next answers.
    pub(super) max_tokens: u32,
    /// True after the first answer: later errors are findings.
    pub(super) has_answered: bool,
}

impl Probe<'_> {
    /// Reserves the maximum cost of the request in the budget.
    ///
    /// # Errors
    /// If the budget is exhausted, or the ledger cannot be written.
    fn reserve(&mut self, body: &Value) -> Result<Reservation> {
        let amount = self.account.bound(&bound(body), &self.config.price);
        if self.account.reserve(&amount)? {
            Ok(amount)
        } else {
            Err(crate::budget::account::budget_exhausted(self.account))
        }
    }

    /// Replaces the reservation by the cost of the reply.
    fn settle(
        &mut self,
        reserved: &Reservation,
        body: &Value,
        classified: &Result<Box<Completion>, AttemptError>,
    ) -> Result<()> {
        let charge = match classified {
            Ok(completion) => {
                let text = completion.answer.text.len() + completion.answer.reasoning.len();
                usage::plausible(completion.usage, text)
                    .map_or(Charge::Answered(bound(body)), Charge::Measured)
            }
            Err(AttemptError::Unreadable { .. }) => Charge::Possible,
            Err(
                AttemptError::Refused(failure)
                | AttemptError::EndpointRefused(EndpointRefusal { failure, .. })
                | AttemptError::Filtered(failure)
                | AttemptError::Transient { failure, .. },
            ) if failure.may_be_billed => Charge::Possible,
            Err(_) => Charge::Nothing,
        };
        self.account.settle(reserved, charge, &self.config.price);
        self.account.flush()
    }

    /// Sends the prompt, with the fields that `change` sets, until it is answered or refused.
    ///
    /// # Errors
    /// If, before the first answer, the endpoint claims that no request can succeed, fails [`MAX_ATTEMPTS`] times, or
    /// sends a reply that cannot be parsed; if the retries would take longer than [`TIMEOUT`]; or if the budget is
    /// exhausted.
    pub(crate) async fn send(
        &mut self,
        prompt: &str,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<ProbeOutcome> {
        let field = self
            .findings
            .max_tokens_field
            .unwrap_or(self.config.sampling.max_tokens_field);
        let mut body = Map::new();
        body.insert("model".into(), json!(self.config.teacher.model));
        let message = json!({"role": "user", "content": prompt});
        body.insert("messages".into(), json!([message]));
        body.insert(field.name().into(), json!(self.max_tokens));
        change(&mut body);
        let body = Value::Object(body);
        let deadline = Instant::now() + TIMEOUT;
        let mut attempts = 0;
        loop {
            self.findings.requests += 1;
            let reserved = self.reserve(&body)?;
            let reply = self.transport.complete(&body).await;
            let now = std::time::SystemTime::now();
            let classified = outcome::classify(reply.clone(), now);
            self.settle(&reserved, &body, &classified)?;
            let error = match classified {
                Ok(completion) => {
                    self.has_answered = true;
                    return Ok(ProbeOutcome::Answer(completion, reply?));
                }
                Err(error) => error,
            };
            let (wait, message) = match error {
                AttemptError::EndpointRefused(refusal) if !self.has_answered => {
                    let message = refusal.failure.message;
                    return Err(crate::client::refused::refused(
                        refusal.reason,
                        &message,
                        &self.config.teacher,
                    ));
                }
                AttemptError::EndpointRefused(EndpointRefusal { failure, .. })
                | AttemptError::Refused(failure)
                | AttemptError::Filtered(failure) => {
                    return Ok(ProbeOutcome::Refused(failure.message, reply.ok()));
                }
                AttemptError::Throttled { wait, message } => {
                    (wait.unwrap_or(THROTTLED_PAUSE), message)
                }
                AttemptError::Transient { failure, wait } => {
                    attempts += 1;
                    (wait.max(MIN_PAUSE), failure.message)
                }
                AttemptError::KeyRenewed => (Duration::ZERO, "the key had expired".into()),
                AttemptError::Unreadable { problem, .. } => {
                    attempts = MAX_ATTEMPTS;
                    (
                        Duration::ZERO,
                        format!("its reply cannot be parsed: {problem}"),
                    )
                }
            };
            if attempts >= MAX_ATTEMPTS && self.has_answered {
                return Ok(ProbeOutcome::Refused(message, reply.ok()));
            }
            if attempts >= MAX_ATTEMPTS || Instant::now() + wait > deadline {
                return Err(anyhow!("the endpoint does not answer: {message}"));
            }
            sleep(wait).await;
        }
    }
}

/// Returns the upper bound of the tokens of a request. With `n` answers, each may have `max_tokens` tokens.
fn bound(body: &Value) -> TokenBound {
    let number = |name: &str| body.get(name).and_then(Value::as_u64);
    let fields = [
        MaxTokensField::MaxTokens,
        MaxTokensField::MaxCompletionTokens,
    ];
    let max_tokens = fields.iter().find_map(|field| number(field.name()));
    let answers = number("n").unwrap_or(1);
    let completion_tokens = max_tokens.unwrap_or(0).saturating_mul(answers);
    let completion_tokens = u32::try_from(completion_tokens).unwrap_or(u32::MAX);
    let messages = body["messages"].as_array().map_or(0, Vec::len);
    TokenBound::for_request(body.to_string().len(), messages, completion_tokens)
}
