//! What training reads of a line, borrowed from it: a cache has more tokens than memory has room for,
//! and most of the time of reading one with owned fields goes into allocating them.

use crate::cache::logprobs_view::LogprobsView;
use std::borrow::Cow;

use jiff::civil::DateTime;
use serde::Deserialize;
use serde_json::Value;

use super::columns;
use super::line::LineError;
use super::record::{self, Status};
use crate::prompt::message::Message;

/// The part of a [`super::record::Record`] that training needs.
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
    #[serde(borrow)]
    sent_at: Cow<'a, str>,
}

/// As `stored::request` writes it.
#[derive(Debug, Deserialize)]
struct RequestView {
    model: String,
    messages: Vec<Message>,
    params: String,
}

#[derive(Debug, Deserialize)]
pub struct AnswerView {
    pub text: String,
    pub finish_reason: String,
    #[serde(default)]
    pub reasoning: String,
}

impl<'a> RecordView<'a> {
    /// The record in a line that [`super::line::verify`] and [`super::line::head`] have accepted.
    pub fn from_line(line: &'a [u8]) -> Result<Self, LineError> {
        let no_record = |why: String| LineError::InvalidRecord(why);
        // Once for the line, instead of once for each of its strings.
        let line = std::str::from_utf8(line).map_err(|e| no_record(e.to_string()))?;
        match Self::from_canonical_line(line) {
            Some(record) => Ok(record),
            None => serde_json::from_str(line).map_err(|e| no_record(e.to_string())),
        }
    }

    /// The record in a line with logprobs, as this version writes it: the logprobs are nearly all of
    /// it, and reading them by a parser for any JSON takes twice the time.
    fn from_canonical_line(line: &'a str) -> Option<Self> {
        const LOGPROBS: &str = ",\"logprobs\":{";
        // Not in a string, where a quotation mark has a backslash before it.
        let at = memchr::memmem::find(line.as_bytes(), LOGPROBS.as_bytes())?;
        // Were this inside of something, what stands before it would not be whole.
        let head = format!("{}}}", &line[..at]);
        let head: RecordView = serde_json::from_str(&head).ok()?;
        let (logprobs, rest) = columns::parse(&line[at + LOGPROBS.len()..])?;
        let rest = rest.strip_prefix(",\"matches_text\":")?;
        let rest = ["true", "false"]
            .iter()
            .find_map(|value| rest.strip_prefix(value))?;
        let sent_at = rest.strip_prefix("},\"timing\":{\"sent_at\":\"")?;
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

    /// Model that was asked.
    pub fn request_model(&self) -> &str {
        &self.request.model
    }

    /// When the request was sent, in UTC.
    pub fn sent_at(&self) -> Option<DateTime> {
        record::Timing::date(&self.timing.sent_at)
    }

    /// The parameters of the request, other than model and messages.
    pub fn params(&self) -> Value {
        serde_json::from_str(&self.request.params).unwrap_or_default()
    }

    /// The messages that were sent; or, where they are more than roles and texts, the request's
    /// parameters, which hold them.
    pub fn take_messages(&mut self) -> Result<Vec<Message>, Value> {
        match self.request.messages.is_empty() {
            false => Ok(std::mem::take(&mut self.request.messages)),
            true => Err(serde_json::from_str(&self.request.params).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cache::record::Logprobs;
    use serde_json::json;

    use super::*;
    use crate::cache::record::{Record, Timing};

    /// The other parser takes twice the time.
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
            let other: RecordView = serde_json::from_str(&line).unwrap();
            assert_eq!(fast.sent_at(), other.sent_at());
            assert!(fast.sent_at().is_some());
            assert_eq!(fast.logprobs, other.logprobs);
        }
    }
}
