//! Selection of the cached answers that `train`, `eval` and `export` use, by `data.groups`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};

use crate::cache;
use crate::cache::question;
use crate::cache::reader::CacheLines;
use crate::cache::view::RecordView;
use crate::client::request::RequestTemplate;
use crate::config::{Config, Groups, PromptsConfig};
use crate::data::groups::{
    ConfigSelection, ExclusionReason, PlannedRows, RecordProperties, Selection, TeacherIdentity,
};
use crate::exit::Exit;
use crate::plan::prepare::request_templates;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::prompt;
use crate::prompt::Prompt;

/// Returns the selection of answers that `data.groups` describes.
///
/// # Errors
/// If the cache or a JSON schema of the config cannot be read; [`Exit::Usage`] if a name matches no group.
pub fn selection(config: &Config) -> Result<Selection> {
    match &config.data.groups {
        Groups::All => Ok(Selection::All),
        Groups::Named(names) => named(&config.training_cache(), names.clone()),
        Groups::Asked if config.data.source.is_some() => Ok(Selection::All),
        Groups::Asked => {
            let templates = request_templates(&config.endpoints(), &[])?;
            let planned =
                PlannedQuestions::load(&config.prompts, &config.training_cache(), templates)?;
            planned.selection(config.data.cache.as_deref())
        }
    }
}

/// Selects the groups of the cache in `dir` that have one of the names.
///
/// # Errors
/// If the cache cannot be read; [`Exit::Usage`] if a name matches no group.
pub fn named(dir: &Path, names: Vec<String>) -> Result<Selection> {
    let mut unknown = names.clone();
    let mut groups = BTreeMap::new();
    for_each_record(dir, |record| {
        let group = record.group;
        unknown.retain(|name| !group.is_named(name));
        groups.entry(group.id()).or_insert(group);
        !unknown.is_empty()
    })?;
    // A missing cache is reported later, when it is read.
    if let (Some(name), true) = (unknown.first(), cache::exists(dir)) {
        let lines = groups.iter().map(|(id, group)| format!("\n{id}: {group}"));
        let mock_hint = if groups.values().any(|group| group.is_mock) {
            "\nselect a group of a mock by its id, or all groups of mocks by \"mock\""
        } else {
            ""
        };
        bail!(Exit::Usage(format!(
            "`data.groups` (or --groups) names \"{name}\", but {} has no such group; its groups are:{}{mock_hint}",
            dir.display(),
            lines.collect::<String>()
        )));
    }
    Ok(Selection::Named(names))
}

/// Calls `visit` with the properties of each record of a cache until `visit` returns false.
fn for_each_record(dir: &Path, mut visit: impl FnMut(RecordProperties) -> bool) -> Result<()> {
    if !cache::exists(dir) {
        return Ok(());
    }
    let mut lines = CacheLines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        let record = RecordView::from_line(lines.line()).map_err(|fault| lines.refuse(fault))?;
        if !visit(RecordProperties::from_view(&record, &record.params())) {
            break;
        }
    }
    Ok(())
}

/// The questions of a config.
struct PlannedQuestions {
    selection: Selection,
    /// True if the config sets `teacher.model`. A config that trains on another run's cache may omit it.
    names_teacher: bool,
    /// Error of the prompts file; without prompts, answers are selected by endpoint, model and sampling alone.
    load_error: Option<anyhow::Error>,
}

impl PlannedQuestions {
    /// Plans the questions and looks up their answers in a cache.
    fn load(
        prompts: &PromptsConfig,
        cache_dir: &Path,
        templates: Vec<RequestTemplate>,
    ) -> Result<PlannedQuestions> {
        let names_teacher = templates
            .iter()
            .any(|template| !template.endpoint.teacher.model.is_empty());
        let teachers = templates.iter().map(|template| {
            let teacher = &template.endpoint.teacher;
            TeacherIdentity::new(&teacher.name, &teacher.base_url, &template.body(&[], 0))
        });
        let teachers = teachers.collect();
        let (rows, load_error) = match prompt::load(prompts, || Ok(())) {
            Ok(loaded) => {
                let rows = planned_rows(prompts, cache_dir, loaded, templates)?;
                (Some(rows), None)
            }
            Err(error) => (None, Some(error)),
        };
        Ok(PlannedQuestions {
            selection: Selection::Config(ConfigSelection { rows, teachers }),
            names_teacher,
            load_error,
        })
    }

    /// Returns the selection of the answers to these questions. If `other_cache`, the folder `data.cache`, has none of
    /// these answers and only one group, that group is selected.
    fn selection(self, other_cache: Option<&Path>) -> Result<Selection> {
        if let Some(dir) = other_cache
            && let Some(only_group) = only_group_of(dir, &self.selection)?
        {
            if self.names_teacher {
                tracing::warn!(
                    "`data.cache` has no answers for this config's teacher, model and sampling: using its only group"
                );
            }
            return Ok(Selection::Named(vec![only_group]));
        }
        if let Some(error) = self.load_error {
            tracing::warn!(
                "cannot read the prompts, selecting answers by endpoint, model and sampling alone: {error:#}"
            );
        }
        Ok(self.selection)
    }
}

/// Returns the id of the only group of another run's cache. Returns `None` if the cache has several groups, or an
/// answer of a mock or of this config's teachers.
fn only_group_of(dir: &Path, selection: &Selection) -> Result<Option<String>> {
    let mut groups = BTreeMap::new();
    let mut has_own_answers = false;
    for_each_record(dir, |record| {
        has_own_answers = matches!(
            selection.check(&record),
            Ok(())
                | Err(ExclusionReason::Question
                    | ExclusionReason::Duplicate
                    | ExclusionReason::Truncated
                    | ExclusionReason::Adoptable
                    | ExclusionReason::Mock)
        );
        groups.insert(record.group.id(), record.group);
        !has_own_answers && groups.len() < 2
    })?;
    Ok(match groups.len() {
        1 if !has_own_answers => groups.into_keys().next(),
        _ => None,
    })
}

/// Plans the questions of the config, and collects the cache key of each answer. If a question has several answers,
/// the one that the harvest finds first is collected.
fn planned_rows(
    settings: &PromptsConfig,
    cache_dir: &Path,
    prompts: Vec<Prompt>,
    request_templates: Vec<RequestTemplate>,
) -> Result<PlannedRows> {
    let cached = crate::cache::open::peek(cache_dir)?;
    let rows = RefCell::new(PlannedRows::default());
    let key_status = |key: &str| {
        if !cached.contains(key) {
            return Ok(RowStatus::Open);
        }
        let mut rows = rows.borrow_mut();
        rows.keys
            .insert(crate::cache::fingerprint::fingerprint(key));
        rows.answered.insert(question::question_fingerprint(key));
        Ok(RowStatus::Answered)
    };
    let plan = Plan::new(
        prompts,
        request_templates,
        settings,
        PlanScope::default(),
        &cached.key_variants,
        key_status,
    )?;
    Ok(PlannedRows {
        questions: plan.questions,
        ..rows.into_inner()
    })
}
