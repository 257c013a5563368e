//! `cache adopt`: answers to the questions of a config that another endpoint gave, or that were kept by an
//! earlier version, get the keys of this one.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use anyhow::Result;

use crate::cache;
use crate::cache::line;
use crate::cache::question;
use crate::cache::question::KeyVariants;
use crate::cache::record::{SCHEMA, is_mock};
use crate::cache::rewrite::{RewriteDecision, rewrite};
use crate::cache::unused_answers::question_half_of;
use crate::config::Config;
use crate::plan::RowStatus;
use crate::plan::prepare::request_templates;
use crate::plan::{Plan, PlanScope};
use crate::prompt;

/// Result of [`adopt`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Records that answer questions of the config now.
    pub records: u64,
    /// Answers of a mock at another address, which are not taken over.
    pub mocks: u64,
    /// Questions of the config.
    pub questions: u64,
    /// Of these, answered now, adopted answers included.
    pub answered: u64,
}

/// A question of the config.
struct AdoptableRow<'a> {
    key: &'a str,
    teacher: &'a str,
    base_url: &'a str,
    max_tokens: u32,
}

impl AdoptableRow<'_> {
    /// Key of an answer that was truncated at `cut_at` tokens; 0 if it is complete.
    fn key_of_answer(&self, cut_at: u32) -> String {
        match cut_at {
            0 => self.key.to_owned(),
            cut_at => question::truncated_key(self.key, cut_at),
        }
    }

    fn is_answered_by(&self, cut_at: u32) -> bool {
        cut_at == 0 || cut_at >= self.max_tokens
    }
}

/// Returns true if one of the rows is asked at this address.
fn is_asked(rows: &[AdoptableRow], base_url: &str) -> bool {
    let address = question::endpoint("", base_url);
    rows.iter()
        .any(|row| question::endpoint("", row.base_url) == address)
}

/// Takes over the answers in the cache of the run folder.
///
/// # Errors
/// Where the config, the prompts or the cache cannot be read, or another process has the cache.
pub fn adopt(config: &Config) -> Result<Adopted> {
    let prompts = prompt::load(&config.prompts, || Ok(()))?;
    let open = |_: &str| Ok(RowStatus::Open);
    let (scope, past) = (PlanScope::default(), KeyVariants::default());
    let plan = Plan::new(
        prompts,
        request_templates(config, &[])?,
        &config.prompts,
        scope,
        &past,
        open,
    )?;
    let mut rows = HashMap::<&str, Vec<AdoptableRow>>::new();
    for (endpoint, of_endpoint) in plan.rows_by_endpoint.iter().enumerate() {
        let settings = &plan.templates[endpoint].endpoint;
        for row in &plan.rows[of_endpoint.clone()] {
            let of_question = rows.entry(question::question_half(&row.key)).or_default();
            of_question.push(AdoptableRow {
                key: &row.key,
                teacher: &settings.teacher.name,
                base_url: &settings.teacher.base_url,
                max_tokens: settings.sampling.max_tokens,
            });
        }
    }
    let dir = config.own_cache();
    let known = crate::cache::open::peek(&dir)?;
    let mut targets = HashMap::<String, (String, &str)>::new();
    let (mut taken, mut answered) = (HashSet::new(), HashSet::new());
    let records = if cache::exists(&dir) {
        Some(crate::cache::reader::read(&dir)?)
    } else {
        None
    };
    let mut others = Vec::new();
    let mut mocks = 0;
    for record in records.into_iter().flatten() {
        let record = record?;
        let cut_at = question::cut_at(&record.request, &record.answer.finish_reason);
        let half = question_half_of(&record);
        let Some(of_question) = rows.get(half.as_str()) else {
            continue;
        };
        // What answers a question of this config already stays where it is.
        let is_ours = |row: &&AdoptableRow| row.key_of_answer(cut_at) == record.key;
        match of_question.iter().find(is_ours) {
            Some(row) if row.is_answered_by(cut_at) => {
                answered.insert(row.key);
            }
            Some(_) => {}
            // A mock may only have stood in for the teacher.
            None if is_mock(&record.fingerprint) && !is_asked(of_question, &record.endpoint) => {
                mocks += 1;
            }
            None => others.push((cut_at, half, record.key)),
        }
    }
    // Complete answers (0) first, then truncated ones, longest first.
    others.sort_by_key(|(cut_at, ..)| (*cut_at > 0, Reverse(*cut_at)));
    for (cut_at, half, record) in others {
        let of_question = rows.get(half.as_str()).into_iter().flatten();
        let mut free = of_question.filter(|row| {
            // A truncated answer is adopted if there is no other.
            let least = if row.is_answered_by(cut_at) {
                row.max_tokens
            } else {
                0
            };
            let mut cut_keys = known.past.truncated_keys(row.key, least);
            let is_there = known.contains(row.key) || cut_keys.any(|key| known.contains(&key));
            !is_there && !taken.contains(row.key)
        });
        if let Some(row) = free.next() {
            taken.insert(row.key);
            if row.is_answered_by(cut_at) {
                answered.insert(row.key);
            }
            targets.insert(record, (row.key_of_answer(cut_at), row.teacher));
        }
    }
    let records = rewrite(&dir, &config.cache, &|line| {
        let Some((key, name)) = targets.get(&*line::head(line)?.key) else {
            return Ok(RewriteDecision::Keep);
        };
        let mut record = line::decode(line)?;
        record.cut_at = question::cut_at(&record.request, &record.answer.finish_reason);
        record.v = SCHEMA;
        record.key.clone_from(key);
        record.teacher = (*name).to_owned();
        Ok(RewriteDecision::Replace(line::encode(&record)?))
    })?;
    Ok(Adopted {
        records,
        mocks,
        questions: plan.rows.len() as u64,
        answered: answered.len() as u64,
    })
}
