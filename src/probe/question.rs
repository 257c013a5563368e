//! One question of a probe: what it may cost, how often it is asked, and what came of it.

use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};

use crate::budget::account::{Amount, Bill};
use crate::budget::price::Bound;
use crate::client::attempt_error::{Claim, Trouble};
use crate::client::outcome;
use crate::client::response::completion::Completion;
use crate::client::response::usage;
use crate::client::transport::Reply;
use crate::config::MaxTokensField;

use crate::budget::account::Account;
use crate::budget::ledger::Files;
use crate::client::transport::Transport;
use crate::config::Lane;
use crate::probe::findings::Endpoint;
use std::sync::Arc;

/// Attempts at one request, throttling aside.
const ATTEMPTS: u32 = 3;

/// Outcome of a probe request.
pub(crate) enum Asked {
    Answer(Box<Completion>, Reply),
    /// An error, with the endpoint's words, and the reply if there was one.
    Refused(String, Option<Reply>),
}

impl Probe<'_> {
    /// Reserves what the question may cost.
    fn reserve(&mut self, body: &Value) -> Result<Amount> {
        let amount = self.account.bound(&bound(body), &self.lane.price);
        if self.account.reserve(&amount)? {
            Ok(amount)
        } else {
            Err(crate::budget::account::out_of_money(self.account))
        }
    }

    fn settle(
        &mut self,
        reserved: &Amount,
        body: &Value,
        classified: &Result<Box<Completion>, Trouble>,
    ) -> Result<()> {
        let bill = match classified {
            Ok(completion) => {
                let text = completion.answer.text.len() + completion.answer.reasoning.len();
                usage::measured(completion.usage, text)
                    .map_or(Bill::Answered(bound(body)), Bill::Measured)
            }
            Err(Trouble::Unreadable { .. }) => Bill::Possible,
            Err(
                Trouble::Refused(failure)
                | Trouble::Filtered(failure)
                | Trouble::Transient { failure, .. },
            ) if failure.may_be_billed => Bill::Possible,
            Err(_) => Bill::Nothing,
        };
        self.account.settle(reserved, bill, &self.lane.price);
        self.account.flush()
    }

    /// Asks until there is an answer or a refusal.
    pub(crate) async fn ask(
        &mut self,
        prompt: &str,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<Asked> {
        let field = self
            .found
            .max_tokens_field
            .unwrap_or(self.lane.sampling.max_tokens_field);
        let mut body = Map::new();
        body.insert("model".into(), json!(self.lane.teacher.model));
        let message = json!({"role": "user", "content": prompt});
        body.insert("messages".into(), json!([message]));
        body.insert(field.name().into(), json!(self.max_tokens));
        change(&mut body);
        let body = Value::Object(body);
        let patience = Instant::now() + Duration::from_secs(300);
        let mut attempts = 0;
        loop {
            self.found.requests += 1;
            let reserved = self.reserve(&body)?;
            let reply = self.transport.ask(&body).await;
            let now = std::time::SystemTime::now();
            let classified = outcome::classify(reply.clone(), now);
            self.settle(&reserved, &body, &classified)?;
            let trouble = match classified {
                Ok(completion) => {
                    self.has_answered = true;
                    return Ok(Asked::Answer(completion, reply?));
                }
                Err(trouble) => trouble,
            };
            let (wait, message) = match trouble {
                Trouble::Claim(claim) if !self.has_answered => {
                    let message = claim.failure.message;
                    return Err(crate::client::refused::refused(
                        claim.reason,
                        &message,
                        &self.lane.teacher,
                    ));
                }
                Trouble::Claim(Claim { failure, .. })
                | Trouble::Refused(failure)
                | Trouble::Filtered(failure) => {
                    return Ok(Asked::Refused(failure.message, reply.ok()));
                }
                Trouble::Throttled { wait, message } => {
                    (wait.unwrap_or(Duration::from_secs(5)), message)
                }
                Trouble::Transient { failure, wait } => {
                    attempts += 1;
                    (wait.max(Duration::from_millis(500)), failure.message)
                }
                Trouble::KeyRenewed => (Duration::ZERO, "the key had expired".into()),
                Trouble::Unreadable { problem, .. } => {
                    attempts = ATTEMPTS;
                    (
                        Duration::ZERO,
                        format!("its reply cannot be read: {problem}"),
                    )
                }
            };
            if attempts >= ATTEMPTS && self.has_answered {
                return Ok(Asked::Refused(message, reply.ok()));
            }
            if attempts >= ATTEMPTS || Instant::now() + wait > patience {
                return Err(anyhow!("the endpoint does not answer: {message}"));
            }
            sleep(wait).await;
        }
    }
}

/// The most that a question can use.
fn bound(body: &Value) -> Bound {
    let number = |name: &str| body.get(name).and_then(Value::as_u64);
    let fields = [
        MaxTokensField::MaxTokens,
        MaxTokensField::MaxCompletionTokens,
    ];
    let max_tokens = fields.iter().find_map(|field| number(field.name()));
    let answers = number("n").unwrap_or(1);
    let max_tokens = max_tokens.unwrap_or(0).saturating_mul(answers);
    let messages = body["messages"].as_array().map_or(0, Vec::len);
    let max_tokens = u32::try_from(max_tokens).unwrap_or(u32::MAX);
    Bound::of_request(body.to_string().len(), messages, max_tokens)
}

pub(crate) struct Probe<'a> {
    pub(super) lane: Lane,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) account: &'a mut Account<Files>,
    pub(super) found: Endpoint,
    pub(super) max_tokens: u32,
    /// A plain question has been answered: from then on an error is a finding.
    pub(super) has_answered: bool,
}
