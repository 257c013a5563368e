//! Questions of a config: which records of a cache are answers to them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};

use crate::cache;
use crate::cache::question;
use crate::cache::reader::CacheLines;
use crate::cache::view::RecordView;
use crate::client::request::RequestTemplate;
use crate::config::{Config, Groups};
use crate::data::groups::{
    ConfigSelection, ExclusionReason, PlannedRows, RecordIdentity, Selection, TeacherIdentity,
};
use crate::exit::Exit;
use crate::plan::prepare::request_templates;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::prompt;
use crate::prompt::Prompt;

/// Selection of `data.groups`.
///
/// # Errors
/// If a schema of the config or the cache cannot be read; [`Exit::Usage`] for a name that no group has.
pub fn selection(config: &Config) -> Result<Selection> {
    match &config.data.groups {
        Groups::All => Ok(Selection::All),
        Groups::Named(names) => named(&config.training_cache(), names.clone()),
        Groups::Asked if config.data.source.is_some() => Ok(Selection::All),
        Groups::Asked => asked(config),
    }
}

/// Selects the groups of these names.
///
/// # Errors
/// If the cache cannot be read; [`Exit::Usage`] for a name that no group has.
pub fn named(dir: &Path, names: Vec<String>) -> Result<Selection> {
    let mut unknown = names.clone();
    let mut groups = BTreeMap::new();
    each_candidate(dir, |candidate| {
        let group = candidate.group;
        unknown.retain(|name| !group.is_named(name));
        groups.entry(group.id()).or_insert(group);
        !unknown.is_empty()
    })?;
    // Without a cache, its absence is reported when it is read.
    if let (Some(name), true) = (unknown.first(), cache::exists(dir)) {
        let lines = groups.iter().map(|(id, group)| format!("\n{id}: {group}"));
        let of_mocks = if groups.values().any(|group| group.is_mock) {
            "\nThose of a mock are named by id, or all of them by \"mock\""
        } else {
            ""
        };
        bail!(Exit::Usage(format!(
            "data.groups (or --groups) names \"{name}\", and {} has no such group, but:{}{of_mocks}",
            dir.display(),
            lines.collect::<String>()
        )));
    }
    Ok(Selection::Named(names))
}

/// Calls `each` with the records of a cache until it returns false.
fn each_candidate(dir: &Path, mut each: impl FnMut(RecordIdentity) -> bool) -> Result<()> {
    if !cache::exists(dir) {
        return Ok(());
    }
    let mut lines = CacheLines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        let record = RecordView::from_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if !each(RecordIdentity::from_view(&record, &record.params())) {
            break;
        }
    }
    Ok(())
}

fn asked(config: &Config) -> Result<Selection> {
    let askings = request_templates(config, &[])?;
    let teachers = askings.iter().map(|asking| {
        let teacher = &asking.endpoint.teacher;
        TeacherIdentity::new(&teacher.name, &teacher.base_url, &asking.body(&[], 0))
    });
    let teachers = teachers.collect();
    let prompts = prompt::load(&config.prompts, || Ok(()));
    let (rows, problem) = match prompts {
        Ok(prompts) => (Some(rows(config, prompts, askings)?), None),
        Err(error) => (None, Some(error)),
    };
    let selection = Selection::Config(ConfigSelection { rows, teachers });
    if let Some(dir) = &config.data.cache
        && let Some(only) = only_group_of(dir, &selection)?
    {
        tracing::warn!(
            "data.cache has no answers of this config's teacher, model and sampling: its only group is used"
        );
        return Ok(Selection::Named(vec![only]));
    }
    if let Some(error) = problem {
        tracing::warn!(
            "the prompts cannot be read, so answers are selected by endpoint, model and sampling alone: {error:#}"
        );
    }
    Ok(selection)
}

/// Id of the only group of another run's cache, if none of its answers is of a mock or of this config's teachers.
fn only_group_of(dir: &Path, selection: &Selection) -> Result<Option<String>> {
    let mut groups = BTreeMap::new();
    let mut has_answers = false;
    each_candidate(dir, |candidate| {
        has_answers = matches!(
            selection.check(&candidate),
            Ok(())
                | Err(ExclusionReason::Question
                    | ExclusionReason::Duplicate
                    | ExclusionReason::Truncated
                    | ExclusionReason::Adoptable
                    | ExclusionReason::Mock)
        );
        groups.insert(candidate.group.id(), candidate.group);
        !has_answers && groups.len() < 2
    })?;
    Ok(match groups.len() {
        1 if !has_answers => groups.into_keys().next(),
        _ => None,
    })
}

/// Rows of the plan, each with the name of its answer in the cache: the first of several, in the order of the harvest.
fn rows(
    config: &Config,
    prompts: Vec<Prompt>,
    request_templates: Vec<RequestTemplate>,
) -> Result<PlannedRows> {
    let known = crate::cache::open::peek(&config.training_cache())?;
    let rows = RefCell::new(PlannedRows::default());
    let standing = |name: &str| {
        if !known.contains(name) {
            return Ok(RowStatus::Open);
        }
        let mut rows = rows.borrow_mut();
        rows.keys
            .insert(crate::cache::fingerprint::fingerprint(name));
        rows.answered.insert(question::question_fingerprint(name));
        Ok(RowStatus::Answered)
    };
    let scope = PlanScope::default();
    let plan = Plan::new(
        prompts,
        request_templates,
        &config.prompts,
        scope,
        &known.past,
        standing,
    )?;
    Ok(PlannedRows {
        questions: plan.questions,
        ..rows.into_inner()
    })
}
