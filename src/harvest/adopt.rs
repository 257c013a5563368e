//! `cache adopt`: answers to the questions of a config that another endpoint gave, or that were kept by an
//! earlier version, get the keys of this one.

use std::collections::HashMap;

use anyhow::Result;

use super::plan::{Plan, Scope};
use super::{Standing, askings};
use crate::cache::census::Origin;
use crate::cache::question::{self, Past};
use crate::cache::record::SCHEMA;
use crate::cache::rewrite::{Fate, rewrite};
use crate::cache::{self, line};
use crate::config::Config;
use crate::prompt;

/// What [`adopt`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Records that answer questions of the config now.
    pub records: u64,
    /// Questions of the config.
    pub questions: u64,
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
    let mut keys = HashMap::new();
    for (lane, rows) in plan.lanes.iter().enumerate() {
        for row in &plan.rows[rows.clone()] {
            let name = &plan.askings[lane].lane.teacher.name;
            keys.entry(question::half(&row.key))
                .or_insert((&row.key, name));
        }
    }
    let dir = config.own_cache();
    let known = cache::peek(&dir)?;
    let records = rewrite(&dir, &config.cache, &|line| {
        let origin = Origin::of(line)?;
        let half = origin.half();
        let Some((key, name)) = keys.get(half.as_str()) else {
            return Ok(Fate::Stay);
        };
        let mut record = line::decode(line)?;
        if origin.v == 1
            && matches!(
                record.answer.finish_reason.as_str(),
                "length" | "max_tokens"
            )
        {
            record.cut_at = origin.max_tokens();
        }
        let key = match record.cut_at {
            0 => (*key).clone(),
            cut_at => question::cut_key(key, cut_at),
        };
        if key == record.key || known.contains(&key) {
            return Ok(Fate::Stay);
        }
        record.v = SCHEMA;
        record.key = key;
        record.teacher = (*name).clone();
        Ok(Fate::Become(line::encode(&record)?))
    })?;
    Ok(Adopted {
        records,
        questions: plan.rows.len() as u64,
    })
}
