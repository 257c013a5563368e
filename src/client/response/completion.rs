//! A parsed answer, or the reason why a reply with a success status contains none.

use serde_json::{Map, Value};

use crate::cache::record::{Answer, Logprobs};
use crate::cache::usage::Usage;
use crate::client::response::error::ApiError;
use crate::client::secrets::Secrets;

/// An answer with the other fields of its reply.
#[derive(Debug, Default)]
pub struct Completion {
    pub answer: Answer,
    pub usage: Option<Usage>,
    /// Model name as reported; empty if missing.
    pub model: String,
    pub fingerprint: String,
    pub logprobs: Option<Logprobs>,
    /// Reason why the received logprobs cannot be used.
    pub logprobs_fault: Option<String>,
    /// All other fields of the body, with their values unchanged.
    pub extra: Map<String, Value>,
    /// The text came as a stream delta without a finish reason: if the connection broke, the rest of the text is
    /// missing.
    pub is_stream_delta: bool,
    /// Reason why the reply could not be parsed at all.
    pub unreadable: Option<String>,
}

impl Completion {
    /// Returns an answer that was paid for but cannot be parsed.
    pub fn unreadable(problem: String) -> Completion {
        Completion {
            unreadable: Some(problem),
            ..Completion::default()
        }
    }

    /// Returns true if the answer has text of any kind, or tool calls.
    pub fn has_content(&self) -> bool {
        let Answer {
            text,
            refusal,
            reasoning,
            ..
        } = &self.answer;
        let other_fields = self.extra.get("message");
        [text, refusal, reasoning]
            .iter()
            .any(|text| !text.is_empty())
            || other_fields.is_some_and(crate::client::response::text::has_text)
    }

    /// Removes keys that were split between the parts of a reply, and are complete only in the joined answer.
    pub fn clean(&mut self, secrets: &Secrets) {
        // The tokens of the logprobs may spell the key as well.
        let is_in_tokens = self.logprobs.as_ref().is_some_and(|logprobs| {
            secrets.is_in(&logprobs.token.concat())
                || logprobs
                    .top
                    .iter()
                    .flatten()
                    .any(|token| secrets.is_in(token))
        });
        secrets.clean_text(&mut self.model);
        secrets.clean_text(&mut self.fingerprint);
        for value in self.extra.values_mut() {
            secrets.clean_value(value);
        }
        if secrets.clean_answer(&mut self.answer) | is_in_tokens {
            let problem = "the answer held the key";
            self.logprobs_fault = self.logprobs.take().map(|_| problem.into());
        }
    }
}

/// Reason why a reply with a success status contains no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// An error, as some routers send with status 200 after generation has started.
    Error(Box<ApiError>),
    /// The body is empty, truncated or not a completion; the text is the reason. A retry may help.
    Malformed(String),
    /// The body indicates a paid answer that cannot be parsed.
    Unreadable(String),
}

impl NoAnswer {
    pub fn error(error: ApiError) -> NoAnswer {
        NoAnswer::Error(Box::new(error))
    }
}

/// Returns true if the body contains the quoted name `choices`, possibly escaped as in JSON within JSON.
pub(crate) fn mentions_choices(body: &[u8]) -> bool {
    ["\"choices\"", "\"choices\\"]
        .iter()
        .any(|name| memchr::memmem::find(body, name.as_bytes()).is_some())
}
