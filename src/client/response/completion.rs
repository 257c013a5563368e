//! TODO

use crate::cache::record::Answer;
use crate::cache::record::Logprobs;
use crate::cache::usage::Usage;
use crate::client::response::error::ApiError;
use crate::client::secrets::Secrets;
use serde_json::Map;
use serde_json::Value;

/// An answer with what came along.
#[derive(Debug, Default)]
pub struct Completion {
    pub answer: Answer,
    pub usage: Option<Usage>,
    /// As reported; empty if it was not.
    pub model: String,
    pub fingerprint: String,
    pub logprobs: Option<Logprobs>,
    /// Why logprobs that did come cannot be used.
    pub logprobs_fault: Option<String>,
    /// Everything else in the body, as it came.
    pub extra: Map<String, Value>,
    /// Its text came as a piece of a stream does, and without an end: if the body was cut, more was to come.
    pub is_piece: bool,
    /// Why nothing of it could be read.
    pub unreadable: Option<String>,
}

impl Completion {
    /// An answer that was paid for and cannot be read.
    pub fn unreadable(problem: String) -> Completion {
        Completion {
            unreadable: Some(problem),
            ..Completion::default()
        }
    }

    /// Returns true if there is something in it to keep: text of any kind, or calls of tools.
    pub fn says_something(&self) -> bool {
        let Answer {
            text,
            refusal,
            reasoning,
            ..
        } = &self.answer;
        let rest = self.extra.get("message");
        [text, refusal, reasoning]
            .iter()
            .any(|text| !text.is_empty())
            || rest.is_some_and(crate::client::response::text::speaks)
    }

    /// Takes keys out of an answer that came in pieces, none of which held one.
    pub fn clean(&mut self, secrets: &Secrets) {
        // The key was taken out of the text, and is left in the bytes of tokens.
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

/// A body with a good status that holds no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// An error in a good status, as some routers send once generation has begun.
    Error(Box<ApiError>),
    /// Nothing, a body that ends early, or no completion at all: the text says which. Asking again may
    /// help.
    Malformed(String),
    /// There are signs of an answer, which was paid for, but it cannot be read.
    Unreadable(String),
}

impl NoAnswer {
    pub fn error(error: ApiError) -> NoAnswer {
        NoAnswer::Error(Box::new(error))
    }
}

/// Is there a field of this name, also in JSON within JSON?
pub(crate) fn names_choices(body: &[u8]) -> bool {
    ["\"choices\"", "\"choices\\"]
        .iter()
        .any(|name| memchr::memmem::find(body, name.as_bytes()).is_some())
}
