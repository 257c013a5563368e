//! Counts the cached answers that a run does not use: from other endpoints, settings or prompts.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::keys::Keys;
use super::line;
use super::question::{self, Question};
use super::reader::Lines;
use super::record::{Record, is_mock};
use crate::cache::fingerprint::Fingerprint;
use crate::terminal::format_count;

/// Answers that are not those to what is asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Census {
    /// To questions that are still open, from another endpoint or under a name of an earlier version, by
    /// where they come from. `distill cache adopt` takes them over.
    pub elsewhere: BTreeMap<String, u64>,
    /// To the same prompts, asked with other settings.
    pub other_settings: u64,
    pub other_prompts: u64,
}

impl Census {
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
struct Origin {
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

impl Origin {
    fn of(line: &[u8]) -> Result<Origin, line::Fault> {
        serde_json::from_slice(line).map_err(|error| line::Fault::NoRecord(error.to_string()))
    }

    /// Fingerprint of the question in `line`, as this version sees it.
    fn half(&self, line: &[u8]) -> Result<Fingerprint, line::Fault> {
        Ok(if self.v < 2 {
            let record = line::decode(line)?;
            Question::of(&record.request, record.sample).fingerprint()
        } else {
            question::fingerprint(&self.key)
        })
    }

    /// Name or address of the endpoint.
    fn place(self) -> String {
        if self.teacher.is_empty() {
            self.endpoint
        } else {
            self.teacher
        }
    }
}

/// Second half of the key that this version gives to the record's question.
pub(crate) fn half_of(record: &Record) -> String {
    if record.v < 2 {
        Question::of(&record.request, record.sample).half()
    } else {
        question::half(&record.key).to_owned()
    }
}

/// Counts the records of the cache in `dir` that have none of the keys that are `used`, and do not answer one
/// of the `asked` questions, or one that is still `open`, with the `max_tokens` of its request; `is_prompt`
/// knows the ids of the prompts. Reads at most `limit` records.
///
/// # Errors
/// Where the cache is damaged, and those of `check`, which is called for each record.
pub(crate) fn census(
    dir: &Path,
    used: &Keys,
    asked: &Keys,
    open: &HashMap<Fingerprint, u32>,
    is_prompt: impl Fn(&str) -> bool,
    limit: u64,
    check: impl Fn() -> Result<()>,
) -> Result<Census> {
    let mut census = Census::default();
    if !super::exists(dir) {
        return Ok(census);
    }
    let mut lines = Lines::open(dir)?;
    let mut records = 0;
    while records < limit && lines.advance().map_err(|error| lines.refuse_scan(error))? {
        records += 1;
        check()?;
        let origin = Origin::of(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if used.contains(&crate::cache::fingerprint::fingerprint(&origin.key)) {
            continue;
        }
        let half = origin
            .half(lines.line())
            .map_err(|fault| lines.refuse(fault))?;
        // A truncated answer is one where no more tokens are asked for.
        let is_enough = |max_tokens: &u32| origin.cut_at == 0 || origin.cut_at >= *max_tokens;
        if open.get(&half).is_some_and(is_enough) && !is_mock(&origin.fingerprint) {
            *census.elsewhere.entry(origin.place()).or_default() += 1;
            continue;
        }
        match (asked.contains(&half), is_prompt(&origin.prompt_id)) {
            (true, _) => {}
            (false, true) => census.other_settings += 1,
            (false, false) => census.other_prompts += 1,
        }
    }
    Ok(census)
}
