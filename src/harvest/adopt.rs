//! `cache adopt`: answers to the questions of a config that another endpoint gave, or that were kept by an
//! earlier version, get the keys of this one.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use super::plan::{Plan, Scope};
use super::{Standing, askings};
use crate::cache::census::half_of;
use crate::cache::question::{self, Past};
use crate::cache::record::SCHEMA;
use crate::cache::rewrite::{Fate, rewrite};
use crate::cache::{self, line};
use crate::config::Config;
use crate::prompt;

/// Result of [`adopt`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Records that answer questions of the config now.
    pub records: u64,
    /// Questions of the config.
    pub questions: u64,
    /// Of these, answered now, adopted answers included.
    pub answered: u64,
}

/// Takes over the answers in the cache of the run folder.
///
/// # Errors
/// Where the config, the prompts or the cache cannot be read, or another process has the cache.
pub fn adopt(config: &Config) -> Result<Adopted> {
    let prompts = prompt::load(&config.prompts, || Ok(()))?;
    let open = |_: &str| Ok(Standing::Open);
    let (scope, past) = (Scope::default(), Past::default());
    let plan = Plan::new(
        prompts,
        askings(config, &[])?,
        &config.prompts,
        scope,
        &past,
        open,
    )?;
    let mut rows = HashMap::<&str, Vec<(&str, &str)>>::new();
    for (lane, of_lane) in plan.lanes.iter().enumerate() {
        let name = plan.askings[lane].lane.teacher.name.as_str();
        for row in &plan.rows[of_lane.clone()] {
            let of_question = rows.entry(question::half(&row.key)).or_default();
            of_question.push((&row.key, name));
        }
    }
    let dir = config.own_cache();
    let known = cache::peek(&dir)?;
    let mut targets = HashMap::<String, (String, &str)>::new();
    let (mut taken, mut answered) = (HashSet::new(), HashSet::new());
    let records = if cache::exists(&dir) {
        Some(cache::read(&dir)?)
    } else {
        None
    };
    for record in records.into_iter().flatten() {
        let record = record?;
        let cut_at = question::cut_at(&record.request, &record.answer.finish_reason);
        let name_of = |key: &str| match cut_at {
            0 => key.to_owned(),
            cut_at => question::cut_key(key, cut_at),
        };
        let Some(of_question) = rows.get(half_of(&record).as_str()) else {
            continue;
        };
        // What answers a question of this config already stays where it is.
        let mut keys = of_question.iter().map(|(key, _)| key);
        if let Some(key) = keys.find(|key| name_of(key) == record.key) {
            answered.insert(*key);
            continue;
        }
        let is_answered = |plain: &str| {
            known.contains(plain)
                || known
                    .past
                    .cut_keys(plain, 0)
                    .any(|key| known.contains(&key))
        };
        let free = of_question.iter().find_map(|(plain, name)| {
            let key = name_of(plain);
            let is_free = !is_answered(plain) && !taken.contains(plain);
            is_free.then_some((*plain, key, *name))
        });
        if let Some((plain, key, name)) = free {
            taken.insert(plain);
            answered.insert(plain);
            targets.insert(record.key, (key, name));
        }
    }
    let records = rewrite(&dir, &config.cache, &|line| {
        let Some((key, name)) = targets.get(&*line::head(line)?.key) else {
            return Ok(Fate::Stay);
        };
        let mut record = line::decode(line)?;
        record.cut_at = question::cut_at(&record.request, &record.answer.finish_reason);
        record.v = SCHEMA;
        record.key.clone_from(key);
        record.teacher = (*name).to_owned();
        Ok(Fate::Become(line::encode(&record)?))
    })?;
    Ok(Adopted {
        records,
        questions: plan.rows.len() as u64,
        answered: answered.len() as u64,
    })
}
