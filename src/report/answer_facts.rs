//! Properties of an answer that the summary counts and the monitor checks.

use crate::cache::record::{Record, Status, is_mock, is_truncated};
use crate::cache::usage::Usage;
use crate::data::align::token_ids;
use crate::report::usable_logprobs;
use foldhash::fast::FixedState;
use std::hash::BuildHasher;

/// Properties of one answer.
#[derive(Debug, Clone)]
pub struct AnswerFacts {
    /// Hash of the prompt id.
    pub prompt: u64,
    pub status: Status,
    /// Quarantine reason; empty if the answer is ok.
    pub reason: String,
    pub is_cut_off: bool,
    pub finish_reason: String,
    /// Name of the model in the reply.
    pub model: String,
    pub text_hash: u64,
    /// Length of the text in bytes.
    pub text_bytes: usize,
    /// Reason why the answer has no usable logprobs; `None` if it has some.
    pub without_logprobs: Option<String>,
    /// True if the logprobs name tokens by id (`token_id:N`).
    pub has_token_ids: bool,
    pub usage: Option<Usage>,
    /// Maximum number of completion tokens, from the request.
    pub max_tokens: u64,
    /// True if the answer comes from a mock teacher, which is scripted.
    pub is_mock: bool,
}

impl AnswerFacts {
    /// Collects the properties of a record. `fault` is the reason why the logprobs of the reply were dropped; `None` if
    /// they were kept, or the reply had none. `max_tokens` comes from the request.
    pub fn new(record: Record, fault: Option<String>, max_tokens: u64) -> AnswerFacts {
        let hash = |text: &str| FixedState::default().hash_one(text);
        let text = &record.answer.text;
        let logprobs = record.logprobs.as_ref();
        let problem = match logprobs {
            Some(logprobs) => usable_logprobs::problem(logprobs, text),
            None if fault.is_some() => Some("they cannot be read"),
            None => Some("none came"),
        };
        AnswerFacts {
            has_token_ids: logprobs.is_some_and(|logprobs| token_ids::are_ids(&logprobs.token)),
            prompt: hash(&record.prompt_id),
            text_hash: hash(text),
            text_bytes: text.len(),
            without_logprobs: problem.map(String::from),
            status: record.status,
            is_cut_off: is_truncated(&record.answer.finish_reason),
            usage: record.usage,
            reason: record.reason,
            finish_reason: record.answer.finish_reason,
            model: record.model,
            max_tokens,
            is_mock: is_mock(&record.fingerprint),
        }
    }
}
