//! Whose answers a cache holds besides those that a run can use.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::keys::{self, Fingerprint};
use super::question::{self, Question};
use super::reader::Lines;
use super::record::Record;
use super::{line, stored};
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
    /// What to do with answers to what is still open.
    pub fn advice(&self) -> Option<String> {
        let answers: u64 = self.elsewhere.values().sum();
        let places: Vec<&str> = self.elsewhere.keys().map(String::as_str).collect();
        (answers > 0).then(|| {
            format!(
                "the cache holds {} whole answers to questions that are still open here, from {}: `distill cache \
                 adopt -c CONFIG` keeps them, and they are not bought again",
                format_count(answers),
                places.join(", ")
            )
        })
    }
}

/// What tells where a record belongs.
#[derive(Deserialize)]
pub struct Origin {
    pub v: u32,
    pub key: String,
    #[serde(default)]
    pub cut_at: u32,
    pub prompt_id: String,
    pub sample: u32,
    pub endpoint: String,
    #[serde(default)]
    pub teacher: String,
    #[serde(with = "stored::request")]
    request: Value,
}

impl From<&Record> for Origin {
    fn from(record: &Record) -> Origin {
        Origin {
            v: record.v,
            key: record.key.clone(),
            cut_at: record.cut_at,
            prompt_id: record.prompt_id.clone(),
            sample: record.sample,
            endpoint: record.endpoint.clone(),
            teacher: record.teacher.clone(),
            request: record.request.clone(),
        }
    }
}

impl Origin {
    /// # Errors
    /// Where the line is no record.
    pub fn of(line: &[u8]) -> Result<Origin, line::Fault> {
        serde_json::from_slice(line).map_err(|error| line::Fault::NoRecord(error.to_string()))
    }

    /// What the keys of all answers to its question end with.
    pub fn half(&self) -> String {
        match self.v {
            1 => Question::of(&self.request, self.sample).half(),
            _ => question::half(&self.key).to_owned(),
        }
    }

    /// `max_tokens` of its request.
    pub fn max_tokens(&self) -> u32 {
        let fields = ["max_completion_tokens", "max_tokens"];
        let told = fields
            .iter()
            .find_map(|name| self.request.get(*name)?.as_u64());
        told.and_then(|told| u32::try_from(told).ok())
            .unwrap_or(u32::MAX)
    }

    fn place(&self) -> String {
        match self.teacher.as_str() {
            "" => self.endpoint.clone(),
            name => name.to_owned(),
        }
    }
}

/// Counts the records of the cache in `dir` that have none of the keys that are `used`, and do not answer one
/// of the `asked` questions, or one that is still `open`; `is_prompt` knows the ids of the prompts.
///
/// # Errors
/// Where the cache is damaged.
pub fn census(
    dir: &Path,
    used: &HashSet<Fingerprint>,
    asked: &HashSet<Fingerprint>,
    open: &HashSet<Fingerprint>,
    is_prompt: impl Fn(&str) -> bool,
) -> Result<Census> {
    let mut census = Census::default();
    if !super::exists(dir) {
        return Ok(census);
    }
    let mut lines = Lines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        let origin = Origin::of(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if used.contains(&keys::fingerprint(&origin.key)) {
            continue;
        }
        let half = keys::fingerprint(&origin.half());
        if open.contains(&half) && origin.cut_at == 0 {
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
