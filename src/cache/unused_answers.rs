//! Counts the cached answers that a run does not use: from other endpoints, settings or prompts.

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

/// Answers that are not those to what is asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UnusedAnswers {
    /// To questions that are still open, from another endpoint or under a name of an earlier version, by
    /// where they come from. `distill cache adopt` takes them over.
    pub elsewhere: BTreeMap<String, u64>,
    /// To the same prompts, asked with other settings.
    pub other_settings: u64,
    pub other_prompts: u64,
}

impl UnusedAnswers {
    /// Advises `cache adopt` where it would answer open questions.
    /// `arguments` are the flags that name the config.
    pub fn advice(&self, arguments: &str) -> Option<String> {
        let answers: u64 = self.elsewhere.values().sum();
        let places: Vec<&str> = self.elsewhere.keys().map(String::as_str).collect();
        (answers > 0).then(|| {
            format!(
                "the cache holds at least {} answers to questions that are still open here, from {}: \
                 `distill cache adopt {arguments}` keeps them, and they are not bought again",
                format_count(answers),
                places.join(", ")
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
        serde_json::from_slice(line).map_err(|error| line::LineError::NoRecord(error.to_string()))
    }

    /// Fingerprint of the question in `line`, as this version sees it.
    fn question_fingerprint(&self, line: &[u8]) -> Result<Fingerprint, line::LineError> {
        Ok(if self.v < 2 {
            let record = line::decode(line)?;
            Question::new(&record.request, record.sample).question_fingerprint()
        } else {
            question::question_fingerprint(&self.key)
        })
    }

    /// Name or address of the endpoint.
    fn source(self) -> String {
        if self.teacher.is_empty() {
            self.endpoint
        } else {
            self.teacher
        }
    }
}

/// Second half of the key that this version gives to the record's question.
pub(crate) fn question_half_of(record: &Record) -> String {
    if record.v < 2 {
        Question::new(&record.request, record.sample).question_half()
    } else {
        question::question_half(&record.key).to_owned()
    }
}

/// Counts the records of the cache in `dir` that have none of the keys that are `used`, and do not answer one
/// of the `asked` questions, or one that is still `open`, with the `max_tokens` of its request; `is_prompt`
/// knows the ids of the prompts. Reads at most `limit` records.
///
/// # Errors
/// Where the cache is damaged, and those of `check`, which is called for each record.
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
    while records < limit && lines.advance().map_err(|error| lines.refuse_scan(error))? {
        records += 1;
        check()?;
        let origin = RecordOrigin::from_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if used.contains(&crate::cache::fingerprint::fingerprint(&origin.key)) {
            continue;
        }
        let half = origin
            .question_fingerprint(lines.line())
            .map_err(|fault| lines.refuse(fault))?;
        // A truncated answer is one where no more tokens are asked for.
        let is_enough = |max_tokens: &u32| origin.cut_at == 0 || origin.cut_at >= *max_tokens;
        if open.get(&half).is_some_and(is_enough) && !is_mock(&origin.fingerprint) {
            *unused_answers.elsewhere.entry(origin.source()).or_default() += 1;
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
