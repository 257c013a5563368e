//! `cache adopt`: gives cached answers the keys of the current config. The answers may come from another
//! endpoint or from an earlier version of distill.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::Result;

use crate::cache;
use crate::cache::line;
use crate::cache::question;
use crate::cache::question::KeyVariants;
use crate::cache::record::{SCHEMA, is_mock};
use crate::cache::rewrite::{RewriteDecision, rewrite};
use crate::cache::unused_answers::question_half_of;
use crate::config::{CacheConfig, EndpointConfig, PromptsConfig};
use crate::plan::RowStatus;
use crate::plan::prepare::request_templates;
use crate::plan::{Plan, PlanScope};
use crate::prompt;

/// Result of [`adopt`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Number of records that got a new key.
    pub records: u64,
    /// Number of answers of a mock at another address; they are not adopted.
    pub mocks: u64,
    /// Number of questions of the config.
    pub questions: u64,
    /// Number of questions with an answer, adopted answers included.
    pub answered: u64,
}

/// A question of the config that may adopt an answer.
struct AdoptableRow<'a> {
    key: &'a str,
    teacher: &'a str,
    base_url: &'a str,
    max_tokens: u32,
}

impl AdoptableRow<'_> {
    /// Returns the key of an answer to this row. `cut_at` is the `max_tokens` at which the answer was truncated, or 0
    /// if it is complete.
    fn key_of_answer(&self, cut_at: u32) -> String {
        match cut_at {
            0 => self.key.to_owned(),
            cut_at => question::truncated_key(self.key, cut_at),
        }
    }

    /// Returns true if the answer is complete, or was truncated at `max_tokens` or later.
    fn is_answered_by(&self, cut_at: u32) -> bool {
        cut_at == 0 || cut_at >= self.max_tokens
    }
}

/// Returns true if one of the rows is sent to this address.
fn is_sent_to(rows: &[AdoptableRow], base_url: &str) -> bool {
    let address = question::endpoint("", base_url);
    rows.iter()
        .any(|row| question::endpoint("", row.base_url) == address)
}

/// Adopts the answers in `dir`, the cache folder of a run.
///
/// # Errors
/// If the config, the prompts or the cache cannot be read, or another process has the cache open.
pub fn adopt(
    prompts: &PromptsConfig,
    endpoints: &[EndpointConfig],
    dir: &Path,
    settings: &CacheConfig,
) -> Result<Adopted> {
    let all_open = |_: &str| Ok(RowStatus::Open);
    let plan = Plan::new(
        prompt::load(prompts, || Ok(()))?,
        request_templates(endpoints, &[])?,
        prompts,
        PlanScope::default(),
        &KeyVariants::default(),
        all_open,
    )?;
    let mut rows = HashMap::<&str, Vec<AdoptableRow>>::new();
    for (endpoint, endpoint_rows) in plan.rows_by_endpoint.iter().enumerate() {
        let settings = &plan.templates[endpoint].endpoint;
        for row in &plan.rows[endpoint_rows.clone()] {
            let question_rows = rows.entry(question::question_half(&row.key)).or_default();
            question_rows.push(AdoptableRow {
                key: &row.key,
                teacher: &settings.teacher.name,
                base_url: &settings.teacher.base_url,
                max_tokens: settings.sampling.max_tokens,
            });
        }
    }
    let cached = crate::cache::open::peek(dir)?;
    // New key and teacher of each adopted record, by its old key.
    let mut new_keys = HashMap::<String, (String, &str)>::new();
    let mut adopting_keys = HashSet::new();
    let mut answered = HashSet::new();
    let old_records = if cache::exists(dir) {
        Some(crate::cache::reader::read(dir)?)
    } else {
        None
    };
    let mut candidates = Vec::new();
    let mut mocks = 0;
    for record in old_records.into_iter().flatten() {
        let record = record?;
        let cut_at = question::cut_at(&record.request, &record.answer.finish_reason);
        let question_half = question_half_of(&record);
        let Some(question_rows) = rows.get(question_half.as_str()) else {
            continue;
        };
        // An answer that already has a key of this config keeps it.
        let has_record_key = |row: &&AdoptableRow| row.key_of_answer(cut_at) == record.key;
        match question_rows.iter().find(has_record_key) {
            Some(row) if row.is_answered_by(cut_at) => {
                answered.insert(row.key);
            }
            Some(_) => {}
            // A mock at another address may have been used to test the config before the teacher was set.
            None if is_mock(&record.fingerprint)
                && !is_sent_to(question_rows, &record.endpoint) =>
            {
                mocks += 1;
            }
            None => candidates.push((cut_at, question_half, record.key)),
        }
    }
    // Complete answers first, then truncated ones, the longest first.
    candidates.sort_by_key(|(cut_at, ..)| (*cut_at > 0, Reverse(*cut_at)));
    for (cut_at, question_half, record_key) in candidates {
        let question_rows = rows.get(question_half.as_str()).into_iter().flatten();
        let mut unanswered_rows = question_rows.filter(|row| {
            // An answer truncated before `max_tokens` is adopted only if the cache has no other answer to the question.
            let min_length = if row.is_answered_by(cut_at) {
                row.max_tokens
            } else {
                0
            };
            let mut truncated_keys = cached.key_variants.truncated_keys(row.key, min_length);
            let is_cached =
                cached.contains(row.key) || truncated_keys.any(|key| cached.contains(&key));
            !is_cached && !adopting_keys.contains(row.key)
        });
        if let Some(row) = unanswered_rows.next() {
            adopting_keys.insert(row.key);
            if row.is_answered_by(cut_at) {
                answered.insert(row.key);
            }
            new_keys.insert(record_key, (row.key_of_answer(cut_at), row.teacher));
        }
    }
    let adopted_records = rewrite(dir, settings, &|line| {
        let Some((new_key, teacher)) = new_keys.get(&*line::head(line)?.key) else {
            return Ok(RewriteDecision::Keep);
        };
        let mut record = line::decode(line)?;
        record.cut_at = question::cut_at(&record.request, &record.answer.finish_reason);
        record.v = SCHEMA;
        record.key.clone_from(new_key);
        record.teacher = (*teacher).to_owned();
        Ok(RewriteDecision::Replace(line::encode(&record)?))
    })?;
    Ok(Adopted {
        records: adopted_records,
        mocks,
        questions: plan.rows.len() as u64,
        answered: answered.len() as u64,
    })
}
