//! Questions of a config: which records of a cache are answers to them.

use std::path::Path;

use anyhow::Result;

use super::plan::{Plan, Scope, Standing};
use super::prepare::askings;
use crate::cache;
use crate::cache::question::Past;
use crate::cache::reader::Lines;
use crate::cache::view::RecordView;
use crate::config::{Config, Groups};
use crate::data::groups::{Asked, Counts, Group, LeftOut, Selection, Teacher};
use crate::prompt;

/// Selection of `data.groups`.
///
/// # Errors
/// If a schema of the config or the cache of another run cannot be read.
pub fn selection(config: &Config) -> Result<Selection> {
    match &config.data.groups {
        Groups::All => Ok(Selection::All),
        Groups::Named(names) => Ok(Selection::Named(names.clone())),
        Groups::Asked if config.data.source.is_some() => Ok(Selection::All),
        Groups::Asked => {
            let selection = Selection::Asked(asked(config)?);
            match &config.data.cache {
                Some(dir) => of_other_run(dir, selection),
                None => Ok(selection),
            }
        }
    }
}

/// Selects the only group of another run's cache if it answers none of this config's questions.
fn of_other_run(dir: &Path, selection: Selection) -> Result<Selection> {
    let mut counts = Counts::default();
    if !cache::exists(dir) {
        return Ok(selection);
    }
    let mut lines = Lines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        let record = RecordView::of_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        let group = Group::of_view(&record, &record.params());
        match selection.difference(&group, record.question()) {
            Some(difference) => counts.left_out(&LeftOut { group, difference }),
            None => return Ok(selection),
        }
    }
    Ok(match counts.only() {
        Some(only) => Selection::Named(vec![only.to_owned()]),
        None => selection,
    })
}

fn asked(config: &Config) -> Result<Asked> {
    let askings = askings(config, &[])?;
    let teachers = askings.iter().map(|asking| {
        let teacher = &asking.lane.teacher;
        Teacher::new(&teacher.name, &teacher.base_url, &asking.body(&[], 0))
    });
    let teachers = teachers.collect();
    let questions = match prompt::load(&config.prompts, || Ok(())) {
        Ok(prompts) => {
            let is_open = |_: &str| Ok(Standing::Open);
            let (scope, past) = (Scope::default(), Past::default());
            let plan = Plan::new(prompts, askings, &config.prompts, scope, &past, is_open)?;
            Some(plan.questions)
        }
        Err(error) => {
            // The cache of another run comes without its prompts.
            if config.data.cache.is_none() {
                tracing::warn!(
                    "the prompts cannot be read, so answers are selected by endpoint, model and sampling \
                     alone: {error:#}"
                );
            }
            None
        }
    };
    Ok(Asked {
        questions,
        teachers,
    })
}
