//! Counts the cached answers that a run does not use, because they are for other endpoints, settings or prompts.

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
use crate::terminal::{after_space, format_count};

/// Number of cached answers that a run does not use, by reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UnusedAnswers {
    /// Number of answers to open questions, by endpoint. Another endpoint gave them, or their keys are of an earlier
    /// version; `distill cache adopt` adopts them.
    #[serde(rename = "elsewhere")]
    pub adoptable: BTreeMap<String, u64>,
    /// Number of answers to prompts of the run with other settings.
    pub other_settings: u64,
    /// Number of answers to other prompts.
    pub other_prompts: u64,
    /// Number of records that were read, if the cache contains more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counted_records: Option<u64>,
}

impl UnusedAnswers {
    /// Returns a message that recommends `cache adopt`, if that command would answer open questions. `arguments` are
    /// the flags that select the config.
    pub fn advice(&self, arguments: &str) -> Option<String> {
        let answers: u64 = self.adoptable.values().sum();
        let sources: Vec<&str> = self.adoptable.keys().map(String::as_str).collect();
        (answers > 0).then(|| {
            let arguments = after_space(arguments);
            format!(
                "the cache holds at least {} answers from {} to questions that are still open: \
                 run `distill cache adopt{arguments}` to reuse them instead of requesting them again",
                format_count(answers),
                sources.join(", ")
            )
        })
    }
}

/// Fields of a record that identify its question and its endpoint.
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

    /// Returns the fingerprint of the question of this record, as this version computes it. `line` is the record's
    /// line.
    fn question_fingerprint(&self, line: &[u8]) -> Result<Fingerprint, line::LineError> {
        Ok(if self.v < 2 {
            let record = line::decode(line)?;
            Question::new(&record.request, record.sample).question_fingerprint()
        } else {
            question::question_fingerprint(&self.key)
        })
    }

    /// Returns the name of the endpoint, or its address if it has no name.
    fn source(self) -> String {
        if self.teacher.is_empty() {
            self.endpoint
        } else {
            self.teacher
        }
    }
}

/// Returns the second half of the record's key, as this version computes it.
pub(crate) fn question_half_of(record: &Record) -> String {
    if record.v < 2 {
        Question::new(&record.request, record.sample).question_half()
    } else {
        question::question_half(&record.key).to_owned()
    }
}

/// Counts the records of the cache in `dir` that a run does not use. Reads at most `limit` records. An answer to a
/// question of the run that cannot be adopted is not counted.
///
/// `used_keys` are the keys of the answers that the run uses, and `questions` the questions of the run.
/// `open_questions` contains the questions without an answer, and the `max_tokens` of their requests. `is_prompt`
/// returns true for the id of a prompt of the run. `check_stop` is called for each record; its error ends the count.
///
/// # Errors
/// If the cache cannot be read or is damaged, or `check_stop` fails.
pub(crate) fn count_unused(
    dir: &Path,
    used_keys: &KeySet,
    questions: &KeySet,
    open_questions: &HashMap<Fingerprint, u32>,
    is_prompt: impl Fn(&str) -> bool,
    limit: u64,
    check_stop: impl Fn() -> Result<()>,
) -> Result<UnusedAnswers> {
    let mut unused_answers = UnusedAnswers::default();
    if !super::exists(dir) {
        return Ok(unused_answers);
    }
    let mut lines = CacheLines::open(dir)?;
    let mut records_read = 0;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        if records_read == limit {
            unused_answers.counted_records = Some(records_read);
            break;
        }
        records_read += 1;
        check_stop()?;
        let origin = RecordOrigin::from_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if used_keys.contains(&crate::cache::fingerprint::fingerprint(&origin.key)) {
            continue;
        }
        let question = origin
            .question_fingerprint(lines.line())
            .map_err(|fault| lines.refuse(fault))?;
        // A truncated answer is enough only if the request does not ask for more tokens.
        let is_long_enough = |max_tokens: &u32| origin.cut_at == 0 || origin.cut_at >= *max_tokens;
        let is_adoptable = open_questions.get(&question).is_some_and(is_long_enough)
            && !is_mock(&origin.fingerprint);
        if is_adoptable {
            *unused_answers.adoptable.entry(origin.source()).or_default() += 1;
            continue;
        }
        match (questions.contains(&question), is_prompt(&origin.prompt_id)) {
            (true, _) => {}
            (false, true) => unused_answers.other_settings += 1,
            (false, false) => unused_answers.other_prompts += 1,
        }
    }
    Ok(unused_answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_a_command_with_and_without_arguments() {
        let unused = UnusedAnswers {
            adoptable: BTreeMap::from([("a".into(), 1)]),
            ..UnusedAnswers::default()
        };
        for (arguments, command) in [
            ("", "`distill cache adopt`"),
            ("-c run.toml", "`distill cache adopt -c run.toml`"),
        ] {
            let advice = unused.advice(arguments).unwrap();
            assert!(advice.contains(command), "{advice}");
        }
        assert_eq!(UnusedAnswers::default().advice(""), None);
    }
}
