//! Counts the cached answers that a run does not use: those of other endpoints, settings or prompts.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::keys::KeySet;
use super::line;
use super::question::{self, Question};
use super::reader::CacheLines;
use super::record::{Record, is_mock};
use crate::cache::fingerprint::Fingerprint;
use crate::terminal::format_count;

/// Number of cached answers that a run does not use, by reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UnusedAnswers {
    /// Answers to questions that are still open, by endpoint. Another endpoint gave them, or their keys are of
    /// an earlier version; `distill cache adopt` adopts them.
    #[serde(rename = "elsewhere")]
    pub adoptable: BTreeMap<String, u64>,
    /// Answers to the same prompts with other settings.
    pub other_settings: u64,
    pub other_prompts: u64,
    /// Number of records that were counted, if that is not all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counted_records: Option<u64>,
}

impl UnusedAnswers {
    /// Recommends `cache adopt` if it would answer open questions. `arguments` are the flags that name the
    /// config.
    pub fn advice(&self, arguments: &str) -> Option<String> {
        let answers: u64 = self.adoptable.values().sum();
        let sources: Vec<&str> = self.adoptable.keys().map(String::as_str).collect();
        (answers > 0).then(|| {
            format!(
                "the cache holds at least {} answers from {} to questions that are still open: \
                 run `distill cache adopt {arguments}` to reuse them instead of requesting them again",
                format_count(answers),
                sources.join(", ")
            )
        })
    }
}

/// The fields of a record that identify its question and its endpoint.
#[derive(Deserialize)]
struct RecordOrigin {
    v: u32,
    key: String,
    #[serde(default)]
    cut_at: u32,
    prompt_id: String,
    endpoint: String,
    #[serde(default)]
    teacher: String,
    fingerprint: String,
}

impl RecordOrigin {
    fn from_line(line: &[u8]) -> Result<RecordOrigin, line::LineError> {
        serde_json::from_slice(line)
            .map_err(|error| line::LineError::InvalidRecord(error.to_string()))
    }

    /// Fingerprint of the question in `line`, as this version computes it.
    fn question_fingerprint(&self, line: &[u8]) -> Result<Fingerprint, line::LineError> {
        Ok(if self.v < 2 {
            let record = line::decode(line)?;
            Question::new(&record.request, record.sample).question_fingerprint()
        } else {
            question::question_fingerprint(&self.key)
        })
    }

    /// Name of the endpoint, or its address if it has none.
    fn source(self) -> String {
        if self.teacher.is_empty() {
            self.endpoint
        } else {
            self.teacher
        }
    }
}

/// Second half of the record's key, as this version computes it.
pub(crate) fn question_half_of(record: &Record) -> String {
    if record.v < 2 {
        Question::new(&record.request, record.sample).question_half()
    } else {
        question::question_half(&record.key).to_owned()
    }
}

/// Counts the records of the cache in `dir` that a run does not use. Reads at most `limit` records.
///
/// `used` are the keys that the run uses, and `asked` the questions that it asks. `open` holds the questions
/// without an answer, with the `max_tokens` of their requests. `is_prompt` returns true for the id of a prompt
/// of the run. `check` is called for each record.
///
/// # Errors
/// If the cache is damaged or `check` fails.
pub(crate) fn count_unused(
    dir: &Path,
    used: &KeySet,
    asked: &KeySet,
    open: &HashMap<Fingerprint, u32>,
    is_prompt: impl Fn(&str) -> bool,
    limit: u64,
    check: impl Fn() -> Result<()>,
) -> Result<UnusedAnswers> {
    let mut unused_answers = UnusedAnswers::default();
    if !super::exists(dir) {
        return Ok(unused_answers);
    }
    let mut lines = CacheLines::open(dir)?;
    let mut records = 0;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        if records == limit {
            unused_answers.counted_records = Some(records);
            break;
        }
        records += 1;
        check()?;
        let origin = RecordOrigin::from_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if used.contains(&crate::cache::fingerprint::fingerprint(&origin.key)) {
            continue;
        }
        let half = origin
            .question_fingerprint(lines.line())
            .map_err(|fault| lines.refuse(fault))?;
        // A truncated answer counts only if the request asks for no more tokens.
        let is_enough = |max_tokens: &u32| origin.cut_at == 0 || origin.cut_at >= *max_tokens;
        if open.get(&half).is_some_and(is_enough) && !is_mock(&origin.fingerprint) {
            *unused_answers.adoptable.entry(origin.source()).or_default() += 1;
            continue;
        }
        match (asked.contains(&half), is_prompt(&origin.prompt_id)) {
            (true, _) => {}
            (false, true) => unused_answers.other_settings += 1,
            (false, false) => unused_answers.other_prompts += 1,
        }
    }
    Ok(unused_answers)
}
