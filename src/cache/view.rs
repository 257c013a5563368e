//! What training reads of a line, borrowed from it: a cache has more tokens than memory has room for,
//! and most of the time of reading one with owned fields goes into allocating them.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use jiff::civil::DateTime;
use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::line::Fault;
use super::record::{self, Logprobs, RawToken, Status};
use super::{columns, stored};
use crate::prompt::Message;

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
    request: Request,
    pub answer: Answer,
    pub fingerprint: String,
    #[serde(borrow, default)]
    pub logprobs: Option<LogprobsView<'a>>,
    #[serde(borrow, default)]
    timing: Timing<'a>,
}

#[derive(Debug, Default, Deserialize)]
struct Timing<'a> {
    #[serde(borrow)]
    sent_at: Cow<'a, str>,
}

/// As `stored::request` writes it.
#[derive(Debug, Deserialize)]
struct Request {
    model: String,
    messages: Vec<Message>,
    params: String,
}

#[derive(Debug, Deserialize)]
pub struct Answer {
    pub text: String,
    pub finish_reason: String,
    #[serde(default)]
    pub reasoning: String,
}

impl<'a> RecordView<'a> {
    /// The record in a line that [`super::line::verify`] and [`super::line::head`] have accepted.
    pub fn of_line(line: &'a [u8]) -> Result<Self, Fault> {
        let no_record = |why: String| Fault::NoRecord(why);
        // Once for the line, instead of once for each of its strings.
        let line = std::str::from_utf8(line).map_err(|e| no_record(e.to_string()))?;
        match Self::of_usual_line(line) {
            Some(record) => Ok(record),
            None => serde_json::from_str(line).map_err(|e| no_record(e.to_string())),
        }
    }

    /// The record in a line with logprobs, as this version writes it: the logprobs are nearly all of
    /// it, and reading them by a parser for any JSON takes twice the time.
    fn of_usual_line(line: &'a str) -> Option<Self> {
        const LOGPROBS: &str = ",\"logprobs\":{";
        // Not in a string, where a quotation mark has a backslash before it.
        let at = memchr::memmem::find(line.as_bytes(), LOGPROBS.as_bytes())?;
        // Were this inside of something, what stands before it would not be whole.
        let head = format!("{}}}", &line[..at]);
        let head: RecordView = serde_json::from_str(&head).ok()?;
        let (logprobs, rest) = columns::read(&line[at + LOGPROBS.len()..])?;
        let rest = rest.strip_prefix(",\"matches_text\":")?;
        let rest = ["true", "false"]
            .iter()
            .find_map(|value| rest.strip_prefix(value))?;
        let sent_at = rest.strip_prefix("},\"timing\":{\"sent_at\":\"")?;
        let (sent_at, _) = sent_at.split_once('"')?;
        Some(RecordView {
            logprobs: Some(logprobs),
            timing: Timing {
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

/// [`Logprobs`] of T tokens without a list per position, and every token by its bytes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(from = "Stored<'a>", bound(deserialize = "'de: 'a"))]
pub struct LogprobsView<'a> {
    /// The emitted tokens (T); empty where the bytes are not known.
    pub token: Vec<Cow<'a, [u8]>>,
    /// Their logprobs (T).
    pub logprob: Vec<Option<f32>>,
    /// The alternatives of all positions, and their logprobs.
    pub top: Lists<Cow<'a, [u8]>>,
    pub top_logprob: Lists<Option<f32>>,
}

/// Lists, end to end.
#[derive(Debug, Clone, PartialEq)]
pub struct Lists<T> {
    values: Vec<T>,
    /// Where each list ends.
    ends: Vec<usize>,
}

impl<T> Default for Lists<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            ends: Vec::new(),
        }
    }
}

impl<T> Lists<T> {
    fn range(&self, at: usize) -> Range<usize> {
        match (at.checked_sub(1), self.ends.get(at)) {
            (_, None) => 0..0,
            (None, Some(&end)) => 0..end,
            (Some(before), Some(&end)) => self.ends[before]..end,
        }
    }

    /// The list at `at`; an empty one behind the last.
    pub fn get(&self, at: usize) -> &[T] {
        &self.values[self.range(at)]
    }

    /// Number of lists.
    pub fn lists(&self) -> usize {
        self.ends.len()
    }

    /// Values in all lists.
    pub fn total(&self) -> usize {
        self.values.len()
    }

    /// Makes room for so many values in so many lists.
    pub fn reserve(&mut self, values: usize, lists: usize) {
        self.values.reserve(values);
        self.ends.reserve(lists);
    }

    /// Appends a value to the list that [`Self::end`] ends.
    pub fn push(&mut self, value: T) {
        self.values.push(value);
    }

    /// Ends a list.
    pub fn end(&mut self) {
        self.ends.push(self.values.len());
    }

    fn from_lists<'a, U: 'a>(
        lists: impl IntoIterator<Item = &'a Vec<U>>,
        value: impl Fn(&'a U) -> T,
    ) -> Self {
        let mut all = Self::default();
        for list in lists {
            all.values.extend(list.iter().map(&value));
            all.ends.push(all.values.len());
        }
        all
    }
}

impl<'a> From<&'a Logprobs> for LogprobsView<'a> {
    fn from(logprobs: &'a Logprobs) -> Self {
        let bytes = |token: &'a String| Cow::Borrowed(token.as_bytes());
        let mut view = Self {
            token: logprobs.token.iter().map(bytes).collect(),
            logprob: logprobs.logprob.clone(),
            top: Lists::from_lists(&logprobs.top, bytes),
            top_logprob: Lists::from_lists(&logprobs.top_logprob, |&logprob| logprob),
        };
        view.put_raw(&logprobs.raw);
        view
    }
}

impl<'a> LogprobsView<'a> {
    /// Maps the bytes of all tokens; those for which `of` returns None are kept.
    pub fn map_tokens(&self, of: impl Fn(&[u8]) -> Option<Vec<u8>>) -> LogprobsView<'a> {
        let map = |bytes: &Cow<'a, [u8]>| of(bytes).map_or_else(|| bytes.clone(), Cow::Owned);
        LogprobsView {
            token: self.token.iter().map(map).collect(),
            logprob: self.logprob.clone(),
            top: Lists {
                values: self.top.values.iter().map(map).collect(),
                ends: self.top.ends.clone(),
            },
            top_logprob: self.top_logprob.clone(),
        }
    }

    /// Puts the tokens that are no UTF-8 where an empty text holds their place.
    pub fn put_raw(&mut self, raw: &[RawToken]) {
        for token in raw {
            let position = token.position as usize;
            let place = match usize::try_from(token.rank) {
                Err(_) => self.token.get_mut(position),
                Ok(rank) => {
                    let range = self.top.range(position);
                    self.top.values[range].get_mut(rank)
                }
            };
            if let (Some(place), Some(bytes)) = (place, token.bytes())
                && place.is_empty()
            {
                *place = Cow::Owned(bytes);
            }
        }
    }
}

/// The fields of [`Logprobs`] as they stand in a line.
#[derive(Deserialize)]
struct Stored<'a> {
    #[serde(borrow)]
    token: Vec<Bytes<'a>>,
    logprob: Vec<Option<f32>>,
    #[serde(borrow)]
    top: Lists<Bytes<'a>>,
    top_logprob: Lists<Option<f32>>,
    #[serde(with = "stored::raw")]
    raw: Vec<RawToken>,
}

impl<'a> From<Stored<'a>> for LogprobsView<'a> {
    fn from(stored: Stored<'a>) -> Self {
        // These keep the allocation.
        let bytes = |tokens: Vec<Bytes<'a>>| tokens.into_iter().map(|token| token.0).collect();
        let mut view = Self {
            token: bytes(stored.token),
            logprob: stored.logprob,
            top: Lists {
                values: bytes(stored.top.values),
                ends: stored.top.ends,
            },
            top_logprob: stored.top_logprob,
        };
        view.put_raw(&stored.raw);
        view
    }
}

/// The bytes of a JSON string; borrowed unless it has escapes.
struct Bytes<'a>(Cow<'a, [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for Bytes<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl<'de> Visitor<'de> for Text {
            type Value = Cow<'de, [u8]>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text.as_bytes()))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.as_bytes().to_vec()))
            }
        }

        deserializer.deserialize_str(Text).map(Bytes)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Lists<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Outer<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Outer<T> {
            type Value = Lists<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of lists")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut lists: A) -> Result<Lists<T>, A::Error> {
                let mut all = Lists::default();
                while lists.next_element_seed(Inner(&mut all.values))?.is_some() {
                    all.ends.push(all.values.len());
                }
                Ok(all)
            }
        }

        deserializer.deserialize_seq(Outer(PhantomData))
    }
}

/// Appends a list to those before it.
struct Inner<'v, T>(&'v mut Vec<T>);

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Inner<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Inner<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        while let Some(value) = values.next_element()? {
            self.0.push(value);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
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
            let fast = RecordView::of_usual_line(&line).unwrap();
            let other: RecordView = serde_json::from_str(&line).unwrap();
            assert_eq!(fast.sent_at(), other.sent_at());
            assert!(fast.sent_at().is_some());
            assert_eq!(fast.logprobs, other.logprobs);
        }
    }
}
