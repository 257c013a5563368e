//! TODO

use crate::cache::record::Record;
use crate::cache::record::Status;
use crate::cache::usage::Usage;
use crate::data::align::token_ids;
use crate::report::usable_logprobs;
use foldhash::fast::FixedState;
use std::hash::BuildHasher;

/// Properties of an answer that the monitor checks.
#[derive(Debug, Clone)]
pub struct AnswerFacts {
    /// A hash of the id of the prompt that it answers.
    pub prompt: u64,
    pub status: Status,
    /// Quarantine reason; empty if the answer is ok.
    pub reason: String,
    pub is_cut_off: bool,
    /// As the endpoint calls it.
    pub model: String,
    /// A hash of the text, and its length in bytes.
    pub text: (u64, usize),
    /// Reason for unusable logprobs; None if they are usable.
    pub without_logprobs: Option<String>,
    /// The tokens of its logprobs are named by id.
    pub has_token_ids: bool,
    pub usage: Option<Usage>,
    /// The tokens that it may have used.
    pub max_tokens: u64,
}

impl AnswerFacts {
    /// Of a record that may have used so many tokens. `fault` says why its logprobs were dropped.
    pub fn new(record: Record, fault: Option<String>, max_tokens: u64) -> AnswerFacts {
        let hash = |text: &str| FixedState::default().hash_one(text);
        let text = &record.answer.text;
        let why = match &record.logprobs {
            Some(logprobs) => usable_logprobs::problem(logprobs, text).map(String::from),
            None => Some(fault.map_or("none came".into(), |_| "they cannot be read".into())),
        };
        let logprobs = record.logprobs.as_ref();
        AnswerFacts {
            has_token_ids: logprobs.is_some_and(|logprobs| token_ids::are_ids(&logprobs.token)),
            prompt: hash(&record.prompt_id),
            text: (hash(text), text.len()),
            without_logprobs: why,
            status: record.status,
            is_cut_off: record.answer.finish_reason == "length",
            usage: record.usage,
            reason: record.reason,
            model: record.model,
            max_tokens,
        }
    }
}
