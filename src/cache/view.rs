//! [`RecordView`]: the part of a record that training needs, with logprobs borrowed from its line.
//!
//! With owned logprobs, reading a cache would spend most of its time on allocations.

use std::borrow::Cow;

use jiff::civil::DateTime;
use serde::Deserialize;
use serde_json::Value;

use super::columns;
use super::line::LineError;
use super::logprobs_view::LogprobsView;
use super::record::{self, Status};
use crate::prompt::message::Message;

/// Part of a [`super::record::Record`] that training needs.
#[derive(Debug, Deserialize)]
pub struct RecordView<'a> {
    pub key: String,
    #[serde(default)]
    pub cut_at: u32,
    pub prompt_id: String,
    pub status: Status,
    pub endpoint: String,
    #[serde(default)]
    pub teacher: String,
    request: RequestView,
    pub answer: AnswerView,
    pub fingerprint: String,
    #[serde(borrow, default)]
    pub logprobs: Option<LogprobsView<'a>>,
    #[serde(borrow, default)]
    timing: TimingView<'a>,
}

#[derive(Debug, Default, Deserialize)]
struct TimingView<'a> {
    /// See [`record::Timing::sent_at`].
    #[serde(borrow)]
    sent_at: Cow<'a, str>,
}

/// Request in the form of [`super::stored::request`].
#[derive(Debug, Deserialize)]
struct RequestView {
    model: String,
    messages: Vec<Message>,
    params: String,
}

/// Part of a [`super::record::Answer`] that training needs.
#[derive(Debug, Deserialize)]
pub struct AnswerView {
    pub text: String,
    pub finish_reason: String,
    #[serde(default)]
    pub reasoning: String,
}

impl<'a> RecordView<'a> {
    /// Decodes the record in a line that [`super::line::verify`] and [`super::line::head`] have accepted.
    pub fn from_line(line: &'a [u8]) -> Result<Self, LineError> {
        // UTF-8 is checked once for the line, instead of once for each string.
        let line = std::str::from_utf8(line)
            .map_err(|error| LineError::InvalidRecord(error.to_string()))?;
        match Self::from_canonical_line(line) {
            Some(record) => Ok(record),
            None => serde_json::from_str(line)
                .map_err(|error| LineError::InvalidRecord(error.to_string())),
        }
    }

    /// Decodes a line with logprobs in exactly the form that this version writes; `None` for any other form. Logprobs
    /// are most of a line, and a general JSON parser takes twice the time.
    fn from_canonical_line(line: &'a str) -> Option<Self> {
        const LOGPROBS: &str = ",\"logprobs\":{";
        // This text cannot occur inside a string, where quotation marks are escaped.
        let start = memchr::memmem::find(line.as_bytes(), LOGPROBS.as_bytes())?;
        // If this were a field of a nested object, the text before it would not become a valid object.
        let head = format!("{}}}", &line[..start]);
        let head: RecordView = serde_json::from_str(&head).ok()?;
        let (logprobs, remaining) = columns::parse(&line[start + LOGPROBS.len()..])?;
        let remaining = remaining.strip_prefix(",\"matches_text\":")?;
        let remaining = ["true", "false"]
            .iter()
            .find_map(|value| remaining.strip_prefix(value))?;
        let sent_at = remaining.strip_prefix("},\"timing\":{\"sent_at\":\"")?;
        let (sent_at, _) = sent_at.split_once('"')?;
        Some(RecordView {
            logprobs: Some(logprobs),
            timing: TimingView {
                sent_at: sent_at.into(),
            },
            key: head.key,
            cut_at: head.cut_at,
            prompt_id: head.prompt_id,
            status: head.status,
            endpoint: head.endpoint,
            teacher: head.teacher,
            request: head.request,
            answer: head.answer,
            fingerprint: head.fingerprint,
        })
    }

    /// Returns the model in the request; empty if the request has no model.
    pub(crate) fn request_model(&self) -> &str {
        &self.request.model
    }

    /// Returns the time at which the request was sent, in UTC; `None` if it is not a valid timestamp.
    pub fn sent_at(&self) -> Option<DateTime> {
        record::Timing::date(&self.timing.sent_at)
    }

    /// Returns the parameters of the request other than model and messages; null if they are not valid JSON.
    pub fn params(&self) -> Value {
        serde_json::from_str(&self.request.params).unwrap_or_default()
    }

    /// Takes the messages of the request.
    ///
    /// # Errors
    /// The request's parameters, if a message is not just a role and a text: the parameters then contain all messages.
    pub(crate) fn take_messages(&mut self) -> Result<Vec<Message>, Value> {
        if self.request.messages.is_empty() {
            Err(serde_json::from_str(&self.request.params).unwrap_or_default())
        } else {
            Ok(std::mem::take(&mut self.request.messages))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cache::record::{Logprobs, Record, Timing};

    /// The general parser takes twice the time.
    #[test]
    fn records_with_logprobs_are_read_by_the_fast_parser() {
        let record = json!({
            "v": 2, "key": "k", "prompt_id": "p", "sample": 0, "status": "ok", "reason": "",
            "endpoint": "http://a/v1", "request": {"model": "m", "messages": [], "params": "{}"},
            "answer": {"text": "ab", "finish_reason": "stop", "refusal": "", "reasoning": ""},
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "reasoning_tokens": 0},
            "model": "", "fingerprint": "", "logprobs": null,
            "timing": {"sent_at": "", "latency_ms": 0, "attempts": 1}, "cost_usd": 0.0, "extra": "{}",
        });
        let mut record: Record = serde_json::from_value(record).unwrap();
        record.timing = Timing {
            sent_at: "2026-02-28T23:59:59.999Z".into(),
            ..Timing::default()
        };
        for matches_text in [true, false] {
            record.logprobs = Some(Logprobs {
                token: vec!["ab".into()],
                logprob: vec![Some(-0.5)],
                top: vec![vec!["ab".into(), "c".into()]],
                top_logprob: vec![vec![Some(-0.5), None]],
                raw: Vec::new(),
                matches_text,
            });
            let line = serde_json::to_string(&record).unwrap();
            let fast = RecordView::from_canonical_line(&line).unwrap();
            let general: RecordView = serde_json::from_str(&line).unwrap();
            assert_eq!(fast.sent_at(), general.sent_at());
            assert!(fast.sent_at().is_some());
            assert_eq!(fast.logprobs, general.logprobs);
        }
    }
}
