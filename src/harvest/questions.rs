//! Questions of a config: which records of a cache are answers to them.

use std::cell::RefCell;
use std::path::Path;

use anyhow::Result;

use super::plan::{Plan, Scope, Standing};
use super::prepare::askings;
use super::request::Asking;
use crate::cache;
use crate::cache::keys::{self, Keys};
use crate::cache::reader::Lines;
use crate::cache::view::RecordView;
use crate::config::{Config, Groups};
use crate::data::groups::{Asked, Candidate, Counts, Difference, Rows, Selection, Teacher};
use crate::prompt::{self, Prompt};

/// Selection of `data.groups`.
///
/// # Errors
/// If a schema of the config or the cache of another run cannot be read.
pub fn selection(config: &Config) -> Result<Selection> {
    match &config.data.groups {
        Groups::All => Ok(Selection::All),
        Groups::Named(names) => Ok(Selection::Named(names.clone())),
        Groups::Asked if config.data.source.is_some() => Ok(Selection::All),
        Groups::Asked => asked(config),
    }
}

fn asked(config: &Config) -> Result<Selection> {
    let askings = askings(config, &[])?;
    let teachers = askings.iter().map(|asking| {
        let teacher = &asking.lane.teacher;
        Teacher::new(&teacher.name, &teacher.base_url, &asking.body(&[], 0))
    });
    let teachers = teachers.collect();
    let prompts = prompt::load(&config.prompts, || Ok(()));
    let (rows, problem) = match prompts {
        Ok(prompts) => (Some(rows(config, prompts, askings)?), None),
        Err(error) => (None, Some(error)),
    };
    let selection = Selection::Asked(Asked { rows, teachers });
    if let Some(dir) = &config.data.cache
        && let Some(only) = only_group_of(dir, &selection)?
    {
        return Ok(Selection::Named(vec![only]));
    }
    if let Some(error) = problem {
        tracing::warn!(
            "the prompts cannot be read, so answers are selected by endpoint, model and sampling alone: {error:#}"
        );
    }
    Ok(selection)
}

/// Id of the only group of another run's cache, if no answer in it is from a teacher of this config.
fn only_group_of(dir: &Path, selection: &Selection) -> Result<Option<String>> {
    let mut counts = Counts::default();
    if !cache::exists(dir) {
        return Ok(None);
    }
    let mut lines = Lines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        let record = RecordView::of_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        let candidate = Candidate::of_view(&record, &record.params());
        match selection.check(&candidate) {
            Ok(()) | Err(Difference::Question | Difference::Truncated) => return Ok(None),
            Err(difference) => counts.left_out(&candidate.group, difference),
        }
    }
    Ok(counts.only().map(str::to_owned))
}

/// Rows of the plan, with all names under which the cache may hold their answers.
fn rows(config: &Config, prompts: Vec<Prompt>, askings: Vec<Asking>) -> Result<Rows> {
    let past = cache::peek(&config.training_cache())?.past;
    let names = RefCell::new(Keys::default());
    let standing = |name: &str| {
        names.borrow_mut().insert(keys::fingerprint(name));
        Ok(Standing::Open)
    };
    let scope = Scope::default();
    let plan = Plan::new(prompts, askings, &config.prompts, scope, &past, standing)?;
    Ok(Rows {
        questions: plan.questions,
        keys: names.into_inner(),
    })
}
