//! One attempt, from the request body to the sealed line of the cache. It runs in a task of its own,
//! so that top-k logprobs, megabytes of JSON a second, are read on every core.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use tokio::time::Instant;

use super::record::record;
use crate::budget::account::{Charge, Reservation};
use crate::budget::price::TokenBound;
use crate::cache::record::Timing;
use crate::cache::writer::EncodedRecord;
use crate::client::attempt_error::AttemptError;
use crate::client::outcome;
use crate::client::request::RequestTemplate;
use crate::client::response::completion::Completion;
use crate::client::response::usage;
use crate::client::transport::{LargeBodyPermit, Transport};
use crate::clock::WallClock;
use crate::harvest::unreadable_bodies::UnreadableBodies;
use crate::plan::queue::QueuedRow;
use crate::plan::{Plan, PlannedRow};
use crate::prompt::Prompt;
use crate::rate_limit::headers;
use crate::rate_limit::headers::LimitReport;
use crate::rate_limit::send_ticket::SendTicket;
use crate::report::answer_facts::AnswerFacts;

/// A request on its way, and all that must be known when it comes back.
pub(crate) struct Attempt {
    pub upstream: usize,
    pub entry: QueuedRow,
    pub ticket: SendTicket,
    /// Reserved for it.
    pub reserved: Reservation,
}

/// What a request task brings back.
pub(crate) struct FinishedAttempt {
    pub attempt: Attempt,
    /// What the reply's headers say about limits.
    pub reports: Vec<LimitReport>,
    pub result: Result<Box<EncodedAnswer>, AttemptError>,
    /// Given back once a large answer is recorded.
    pub _permit: Option<LargeBodyPermit>,
}

/// An answer, ready to be appended.
pub(crate) struct EncodedAnswer {
    pub encoded: EncodedRecord,
    pub facts: AnswerFacts,
    /// The most tokens that it can have used, for an answer without usage.
    pub bound: TokenBound,
}

/// Sends the request, waits for the reply, and makes a record of the answer.
///
/// # Errors
/// Where a record cannot be encoded, or an answer that cannot be read cannot be kept.
pub(crate) async fn run(
    plan: Arc<Plan>,
    transport: Arc<dyn Transport>,
    clock: WallClock,
    unreadable: UnreadableBodies,
    attempt: Attempt,
) -> Result<FinishedAttempt> {
    let row = &plan.rows[attempt.entry.row];
    let template = &plan.templates[attempt.upstream];
    let prompt = &plan.prompts[row.prompt as usize];
    let body = template.body_of(prompt, row.sample);
    let sent_at = clock.now();
    let started = Instant::now();
    let reply = transport.ask(&body).await;
    let latency = started.elapsed();
    let now = clock.now().into();
    let (mut reports, mut permit, mut raw) = (Vec::new(), None, None);
    if let Ok(reply) = &reply {
        reports = headers::parse(&reply.headers, now);
        permit = reply.permit.clone();
        raw = Some(reply.body.clone());
    }
    let read = |reply: &[u8]| template.read(reply, &body, &prompt.messages);
    let completion = match outcome::classify_by(reply, now, read) {
        Ok(completion) => Ok(*completion),
        Err(AttemptError::Unreadable { problem, body }) => {
            let file = unreadable.keep(&row.key, &body)?;
            tracing::warn!(
                "an answer cannot be read ({problem}): it is kept in {}",
                file.display()
            );
            Ok(Completion::unreadable(problem))
        }
        Err(mut error) => {
            error.clean(&transport.secrets());
            if let (AttemptError::Transient { failure, .. }, Some(raw)) = (&error, raw)
                && failure.class == "malformed"
            {
                unreadable.keep_unpaid(&row.key, &raw);
            }
            Err(error)
        }
    };
    let result = match completion {
        Err(error) => Err(error),
        Ok(mut completion) => {
            completion.clean(&transport.secrets());
            let bound = plan.bound(attempt.upstream, attempt.entry.row);
            let timing = timing(sent_at, latency, attempt.entry.failed + 1);
            let answered =
                EncodedAnswer::new(template, row, prompt, body, bound, completion, timing)?;
            Ok(Box::new(answered))
        }
    };
    Ok(FinishedAttempt {
        attempt,
        reports,
        result,
        _permit: permit,
    })
}

impl EncodedAnswer {
    /// The answer to `body`, which may have used `bound` at the most.
    ///
    /// # Errors
    /// Where a record cannot be encoded.
    pub(crate) fn new(
        template: &RequestTemplate,
        row: &PlannedRow,
        prompt: &Prompt,
        body: Value,
        mut bound: TokenBound,
        mut completion: Completion,
        timing: Timing,
    ) -> Result<EncodedAnswer> {
        let max_tokens = bound.output_tokens;
        let answer = &completion.answer;
        let text_bytes = answer.text.len() + answer.reasoning.len() + answer.refusal.len();
        let reported = completion.usage;
        completion.usage = usage::measured(reported, text_bytes);
        if completion.usage.is_none() {
            // A usage with one of its two counts is a lower limit of what was billed.
            let mut least = reported.unwrap_or_default();
            usage::raise_by(&mut least, &completion.extra);
            bound.input_tokens = bound.input_tokens.max(least.prompt_tokens);
            bound.output_tokens = bound.output_tokens.max(least.completion_tokens);
        }
        let fault = completion.logprobs_fault.clone();
        let record = record(template, row, prompt, body, completion, timing);
        Ok(EncodedAnswer {
            encoded: EncodedRecord::new(&record)?,
            facts: AnswerFacts::new(record, fault, max_tokens),
            bound,
        })
    }

    /// What it cost.
    pub(crate) fn bill(&self) -> Charge {
        match self.facts.usage {
            Some(usage) => Charge::Measured(usage),
            None => Charge::Answered(self.bound),
        }
    }
}

fn timing(sent_at: jiff::Timestamp, latency: Duration, attempts: u32) -> Timing {
    Timing {
        sent_at: Timing::stamp(sent_at),
        latency_ms: latency.as_millis() as u64,
        attempts,
    }
}
