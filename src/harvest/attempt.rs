//! One attempt: builds the request body, sends it and encodes the answer as a cache line.
//!
//! Each attempt is a task of its own, so that top-k logprobs (megabytes of JSON per second) are parsed on every core.

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

/// A request in flight, with the data needed to settle its reply.
pub(crate) struct Attempt {
    pub upstream: usize,
    pub entry: QueuedRow,
    pub ticket: SendTicket,
    /// Budget reserved for the request.
    pub reserved: Reservation,
}

/// Result of a request task.
pub(crate) struct FinishedAttempt {
    pub attempt: Attempt,
    /// Rate limits reported by the reply's headers.
    pub reports: Vec<LimitReport>,
    pub result: Result<Box<EncodedAnswer>, AttemptError>,
    /// Permit to hold a large reply body in memory, released when the attempt has been settled.
    pub _permit: Option<LargeBodyPermit>,
}

/// An answer, ready to be appended to the cache.
pub(crate) struct EncodedAnswer {
    pub encoded: EncodedRecord,
    pub facts: AnswerFacts,
    /// Upper bound of the tokens used, charged if the reply reports no plausible usage.
    pub bound: TokenBound,
}

/// Sends the request, waits for the reply, and encodes the answer.
///
/// # Errors
/// If a record cannot be encoded, or the body of an unreadable answer cannot be saved.
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
    let body = template.body_for_prompt(prompt, row.sample);
    let sent_at = clock.now();
    let started = Instant::now();
    let reply = transport.complete(&body).await;
    let latency = started.elapsed();
    let now = clock.now().into();
    let mut reports = Vec::new();
    let mut permit = None;
    let mut raw_body = None;
    if let Ok(reply) = &reply {
        reports = headers::parse(&reply.headers, now);
        permit = reply.permit.clone();
        raw_body = Some(reply.body.clone());
    }
    let parser = template.reply_parser(&body, &prompt.messages);
    let completion = match outcome::classify_with(reply, now, parser) {
        Ok(completion) => Ok(*completion),
        Err(AttemptError::Unreadable { problem, body }) => {
            let file = unreadable.save(&row.key, &body)?;
            tracing::warn!(
                "cannot parse an answer ({problem}): its body is saved in {}",
                file.display()
            );
            Ok(Completion::unreadable(problem))
        }
        Err(mut error) => {
            error.clean(&transport.secrets());
            if let (AttemptError::Transient { failure, .. }, Some(raw_body)) = (&error, raw_body)
                && failure.class == "malformed"
            {
                unreadable.save_without_answer(&row.key, &raw_body);
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
    /// Encodes the answer to the request `body`; `bound` is the upper bound of the tokens used.
    ///
    /// # Errors
    /// If the record cannot be encoded.
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
        completion.usage = usage::plausible(reported, text_bytes);
        if completion.usage.is_none() {
            // A usage with only one of its two counts is a lower bound of the billed tokens.
            let mut lower_bound = reported.unwrap_or_default();
            usage::raise_to_counts_in(&mut lower_bound, &completion.extra);
            bound.input_tokens = bound.input_tokens.max(lower_bound.prompt_tokens);
            bound.output_tokens = bound.output_tokens.max(lower_bound.completion_tokens);
        }
        let logprobs_fault = completion.logprobs_fault.clone();
        let record = record(template, row, prompt, body, completion, timing);
        Ok(EncodedAnswer {
            encoded: EncodedRecord::new(&record)?,
            facts: AnswerFacts::new(record, logprobs_fault, max_tokens),
            bound,
        })
    }

    /// Returns the charge for the answer.
    pub(crate) fn charge(&self) -> Charge {
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
