//! Questions of a config: which records of a cache are answers to them.

use anyhow::Result;

use super::plan::{Plan, Scope, Standing};
use super::prepare::askings;
use crate::cache::question::Past;
use crate::config::{Config, Groups};
use crate::data::groups::{Asked, Selection, Teacher};
use crate::prompt;

/// Selection of `data.groups`.
///
/// # Errors
/// If a schema of the config cannot be read.
pub fn selection(config: &Config) -> Result<Selection> {
    Ok(match &config.data.groups {
        Groups::All => Selection::All,
        Groups::Named(names) => Selection::Named(names.clone()),
        Groups::Asked if config.data.source.is_some() => Selection::All,
        Groups::Asked => Selection::Asked(asked(config)?),
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
            tracing::warn!(
                "the prompts cannot be read, so answers are selected by endpoint, model and sampling alone: \
                 {error:#}"
            );
            None
        }
    };
    Ok(Asked {
        questions,
        teachers,
        is_own: config.data.cache.is_none(),
    })
}
