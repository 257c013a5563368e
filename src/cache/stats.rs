//! Counts and sums over the records of a cache, as `distill cache stats` shows them.

use std::collections::{BTreeMap, HashSet};
use std::io;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::record::{Logprobs, MISSING_LOGPROB, Record, Status};
use crate::cache::usage::Usage;

/// Sums over the records of a cache.
#[derive(Debug, Default, Serialize)]
pub struct CacheStats {
    pub records: u64,
    /// Number of records with status `ok`.
    pub ok: u64,
    /// Number of quarantined records by reason.
    pub quarantined: BTreeMap<String, u64>,
    /// Number of records by `finish_reason`.
    pub finish_reasons: BTreeMap<String, u64>,
    /// Number of records by the model name that the endpoint reported.
    pub models: BTreeMap<String, u64>,
    pub usage: Usage,
    /// Number of records whose endpoint reported no usage; `usage` does not include them.
    pub without_usage: u64,
    pub cost_usd: f64,
    /// Number of records without a cost; `cost_usd` does not include them.
    pub without_cost: u64,
    pub logprobs: LogprobStats,
    pub replaced: ReplacedStats,
    #[serde(serialize_with = "serialize_time")]
    pub first_sent_at: Option<Timestamp>,
    #[serde(serialize_with = "serialize_time")]
    pub last_sent_at: Option<Timestamp>,
}

/// Sums over the answers that were removed from the cache because their prompts were requested again.
#[derive(Debug, Default, Serialize)]
pub struct ReplacedStats {
    pub records: u64,
    pub cost_usd: f64,
    /// Key and time of each counted answer: after a crash the file may contain an answer twice.
    #[serde(skip)]
    counted: HashSet<(String, String)>,
}

impl ReplacedStats {
    /// Counts one record, unless it was already counted.
    pub fn add(&mut self, record: &Record) {
        let id = (record.key.clone(), record.timing.sent_at.clone());
        if self.counted.insert(id) {
            self.records += 1;
            self.cost_usd += record.cost_usd.unwrap_or(0.0);
        }
    }
}

/// Counts and sizes of the logprobs.
#[derive(Debug, Default, Serialize)]
pub struct LogprobStats {
    /// Number of records with logprobs.
    pub records: u64,
    /// Number of records whose concatenated tokens differ from the answer's text. Training uses hard labels for such a
    /// record, unless it finds the answer within the text of the tokens, or decodes raw vocabulary entries or token
    /// ids.
    pub not_matching_text: u64,
    /// Number of emitted tokens of the records with logprobs.
    pub tokens: u64,
    /// Size in bytes of the logprobs as uncompressed JSON of the cache. Like `openai_bytes`, 0 unless
    /// [`CacheStats::measure_logprobs`] is called.
    pub bytes: u64,
    /// Size in bytes of the same logprobs in the JSON of OpenAI's API.
    pub openai_bytes: u64,
}

impl LogprobStats {
    /// Returns the bytes per emitted token in the cache, and in the JSON of OpenAI's API; `None` if there are no
    /// tokens.
    pub fn bytes_per_token(&self) -> Option<(f64, f64)> {
        let tokens = self.tokens as f64;
        (self.tokens > 0).then(|| {
            (
                self.bytes as f64 / tokens,
                self.openai_bytes as f64 / tokens,
            )
        })
    }
}

impl CacheStats {
    /// Counts one record.
    pub fn add(&mut self, record: &Record) {
        self.records += 1;
        match record.status {
            Status::Ok => self.ok += 1,
            Status::Quarantined => count(&mut self.quarantined, &record.reason),
        }
        count(&mut self.finish_reasons, &record.answer.finish_reason);
        count(&mut self.models, &record.model);
        match &record.usage {
            None => self.without_usage += 1,
            Some(usage) => self.usage.add(usage),
        }
        match record.cost_usd {
            None => self.without_cost += 1,
            Some(usd) => self.cost_usd += usd,
        }
        if let Some(logprobs) = &record.logprobs {
            self.logprobs.records += 1;
            self.logprobs.not_matching_text += u64::from(!logprobs.matches_text);
            self.logprobs.tokens += logprobs.token.len() as u64;
        }
        if let Ok(sent_at) = record.timing.sent_at.parse::<Timestamp>() {
            let first = self.first_sent_at.get_or_insert(sent_at);
            *first = sent_at.min(*first);
            let last = self.last_sent_at.get_or_insert(sent_at);
            *last = sent_at.max(*last);
        }
    }

    /// Encodes the record's logprobs and adds their sizes. This is slow for large caches.
    pub fn measure_logprobs(&mut self, record: &Record) -> Result<()> {
        if let Some(logprobs) = &record.logprobs {
            self.logprobs.bytes += json_bytes(logprobs)?;
            self.logprobs.openai_bytes += json_bytes(&to_openai(logprobs))?;
        }
        Ok(())
    }
}

fn serialize_time<S: Serializer>(
    time: &Option<Timestamp>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    time.map(|time| time.to_string()).serialize(serializer)
}

fn count(counts: &mut BTreeMap<String, u64>, name: &str) {
    *counts.entry(name.to_owned()).or_default() += 1;
}

/// [`RawToken::rank`](crate::cache::raw_token::RawToken::rank) of an emitted token.
const EMITTED_RANK: i32 = -1;

/// One position in `choices[].logprobs.content[]` of the chat API, or one of its alternatives.
#[derive(Serialize)]
struct OpenAiToken<'a> {
    token: &'a str,
    logprob: f32,
    bytes: Vec<u8>,
    /// `None` for an alternative.
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<OpenAiToken<'a>>>,
}

/// Converts logprobs to the form of OpenAI's API.
fn to_openai(logprobs: &Logprobs) -> Vec<OpenAiToken<'_>> {
    let raw: BTreeMap<(u32, i32), Vec<u8>> = logprobs
        .raw
        .iter()
        .filter_map(|token| Some(((token.position, token.rank), token.bytes()?)))
        .collect();
    let openai_token = |position: usize, rank: i32, token, logprob: Option<f32>| OpenAiToken {
        token,
        logprob: logprob.unwrap_or(MISSING_LOGPROB),
        bytes: match raw.get(&(position as u32, rank)) {
            Some(bytes) => bytes.clone(),
            None => token.as_bytes().to_vec(),
        },
        top_logprobs: None,
    };
    let positions = logprobs.token.iter().zip(&logprobs.logprob);
    let alternatives = logprobs.top.iter().zip(&logprobs.top_logprob);
    let mut openai_tokens = Vec::with_capacity(logprobs.token.len());
    for (position, (emitted, (top, top_logprob))) in positions.zip(alternatives).enumerate() {
        let top_logprobs = (top.iter().zip(top_logprob).enumerate())
            .map(|(rank, (text, &logprob))| openai_token(position, rank as i32, text, logprob))
            .collect();
        let (text, &logprob) = emitted;
        openai_tokens.push(OpenAiToken {
            top_logprobs: Some(top_logprobs),
            ..openai_token(position, EMITTED_RANK, text, logprob)
        });
    }
    openai_tokens
}

/// Returns the length in bytes of `value` as compact JSON.
fn json_bytes(value: &impl Serialize) -> Result<u64> {
    struct ByteCounter(u64);
    impl io::Write for ByteCounter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counter = ByteCounter(0);
    serde_json::to_writer(&mut counter, value).context("could not measure logprobs")?;
    Ok(counter.0)
}
