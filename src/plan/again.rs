//! `harvest --again`: requests rows again that were answered, given up or refused by a content filter.
//!
//! An answer leaves the cache only after the checks of window, limits and budget have passed, and only if this run
//! requests its row. A rerun of the command after a stop resumes: `again.json` lists the selected rows. If the stop
//! came before `again.json` was written, the selection finds the moved answers in the file of replaced answers.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::cache;
use crate::cache::fingerprint::fingerprint;
use crate::cache::keys::KeySet;
use crate::cache::line;
use crate::cache::question;
use crate::cache::record::{Record, Status, is_truncated};
use crate::cache::rewrite::{RewriteDecision, read_replaced, replaced_file, rewrite};
use crate::cache::unused_answers::question_half_of;
use crate::exit::Exit;
use crate::plan::prepare::check_fits;
use crate::plan::prepare::request_templates;
use crate::plan::run_settings::RunSettings;
use crate::plan::shard::RequestShard;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::prompt::Prompt;
use crate::terminal::format_count;

/// Keys of the rows to request.
pub(crate) type RowKeys = HashSet<String>;

/// Finds the rows of this run that match `selectors`. Does not change a file.
///
/// # Errors
/// [`Exit::Usage`] if `selectors` match no row, or a row exceeds a limit or the budget.
pub(crate) fn select(
    settings: &RunSettings,
    selectors: &[String],
    shard: Option<RequestShard>,
    prompts: &[Prompt],
    unanswered: &Unanswered,
) -> Result<RowsToRepeat> {
    let dir = &settings.cache_dir;
    if let Some(again_file) = AgainFile::load(&settings.run_dir, selectors)? {
        let cached = crate::cache::open::peek(dir)?;
        let has_new_answer = |key: &str| cached.contains(key);
        let mut rows = select_rows(settings, shard, prompts, &again_file.keys, has_new_answer)?;
        // A selection without open rows is resumed as well: the last run was stopped before `finish`.
        if rows.plan.total > 0 {
            rows.is_resumed = true;
            return Ok(rows);
        }
    }
    let mut answers = SelectedAnswers::default();
    if cache::exists(dir) {
        for record in crate::cache::reader::read(dir)? {
            answers.add(&record?, selectors, true);
        }
    }
    for record in read_replaced(dir)? {
        answers.add(&record?, selectors, false);
    }
    if select_failed(selectors) {
        answers
            .selected
            .extend(unanswered.keys().map(str::to_owned));
    }
    let has_other_answer = |key: &str| answers.unselected.contains(&fingerprint(key));
    let rows = select_rows(
        settings,
        shard,
        prompts,
        &answers.selected,
        has_other_answer,
    )?;
    if rows.plan.total == 0 {
        return Err(answers.no_match_error(selectors));
    }
    for endpoint in 0..rows.plan.rows_by_endpoint.len() {
        check_fits(settings.budget_usd, &rows.plan, endpoint)?;
    }
    Ok(rows)
}

/// Moves the answers to the selected rows out of the cache of the run folder, and removes the paid attempts and
/// refusals of these rows from `unanswered`. Returns the keys of the rows to request. No other process may have the
/// cache open.
///
/// # Errors
/// If the cache is damaged, or the disk fails.
pub(crate) fn remove_from_cache(
    settings: &RunSettings,
    selectors: &[String],
    rows: RowsToRepeat,
    unanswered: &mut Unanswered,
) -> Result<RowKeys> {
    let dir = &settings.cache_dir;
    if rows.is_resumed {
        let done = format_count(rows.plan.cached);
        match rows.plan.rows.len() as u64 {
            0 => tracing::warn!(
                "all {done} rows selected by `--again` have a new answer; to replace these answers too, rerun the \
                 command"
            ),
            open => tracing::warn!(
                "resuming `--again`: {} rows are pending, {done} have a new answer",
                format_count(open)
            ),
        }
        if select_failed(selectors) {
            forget(&settings.run_dir, selectors, &rows, unanswered)?;
        }
        return Ok(rows.open_keys());
    }
    let moved = rewrite(dir, &settings.cache, &|line| {
        let record = line::decode(line)?;
        Ok(
            if is_selected(&record, selectors) && rows.has_answer(&record) {
                RewriteDecision::Remove
            } else {
                RewriteDecision::Keep
            },
        )
    })?;
    // Written after the old answers were moved: a resumed run counts any answer in the cache as new.
    let open_keys = rows.open_keys();
    AgainFile {
        selectors: selectors.to_vec(),
        keys: open_keys.clone(),
        has_forgotten: false,
    }
    .save(&settings.run_dir)?;
    let forgotten = if select_failed(selectors) {
        forget(&settings.run_dir, selectors, &rows, unanswered)?
    } else {
        0
    };
    tracing::warn!(
        "requesting {} rows again: {} answers moved to {}, the failures of {} rows were cleared{}; after a \
         stop, rerun the command to resume",
        format_count(rows.plan.rows.len() as u64),
        format_count(moved),
        replaced_file(dir).display(),
        format_count(forgotten),
        match rows.plan.cached {
            0 => String::new(),
            count => format!(", {} rows have another answer", format_count(count)),
        }
    );
    Ok(open_keys)
}

/// Removes the paid attempts and refusals of the rows from `unanswered.jsonl`, once per selection. Returns the number
/// of these rows that the file listed.
fn forget(
    run_dir: &Path,
    selectors: &[String],
    rows: &RowsToRepeat,
    unanswered: &mut Unanswered,
) -> Result<u64> {
    let Some(mut again_file) = AgainFile::load(run_dir, selectors)? else {
        return Ok(0);
    };
    if again_file.has_forgotten {
        return Ok(0);
    }
    let forgotten = unanswered.forget(|key, _| rows.keys.contains(key))?;
    again_file.has_forgotten = true;
    again_file.save(run_dir)?;
    Ok(forgotten.len() as u64)
}

/// Removes `again.json`. The caller has made sure that every selected row has ended.
///
/// # Errors
/// If the file cannot be removed.
pub(crate) fn finish(run_dir: &Path) -> Result<()> {
    let path = AgainFile::file(run_dir);
    if !path.exists() {
        return Ok(());
    }
    crate::fs::remove_file(&path)
}

/// `again.json` in the run folder: rows whose old answers have left the cache. A rerun of the command after a stop
/// requests only the rows without a new answer.
#[derive(Serialize, Deserialize)]
struct AgainFile {
    #[serde(rename = "words")]
    selectors: Vec<String>,
    /// Keys of the rows, by the current key schema.
    keys: RowKeys,
    /// True if the paid attempts and refusals of these rows have been removed from `unanswered.jsonl`.
    #[serde(default)]
    has_forgotten: bool,
}

impl AgainFile {
    fn file(run_dir: &Path) -> PathBuf {
        run_dir.join("again.json")
    }

    /// Reads the selection of a run that was stopped. Returns `None` if there is none, or if its selectors differ.
    fn load(run_dir: &Path, selectors: &[String]) -> Result<Option<AgainFile>> {
        let path = AgainFile::file(run_dir);
        if !path.exists() {
            return Ok(None);
        }
        let text = crate::fs::read(&path)?;
        let again_file: AgainFile = serde_json::from_slice(&text).map_err(|error| {
            let message = format!(
                "{} is damaged ({error}): delete it and rerun the command, which selects the rows again",
                path.display()
            );
            Exit::Damaged(message)
        })?;
        Ok((again_file.selectors == selectors).then_some(again_file))
    }

    fn save(&self, run_dir: &Path) -> Result<()> {
        crate::fs::write_atomic(&AgainFile::file(run_dir), &serde_json::to_vec(self)?)
    }
}

fn select_failed(selectors: &[String]) -> bool {
    selectors.iter().any(|selector| selector == "failed")
}

/// The answers of a run folder, sorted by whether `--again` selects them.
#[derive(Default)]
struct SelectedAnswers {
    /// Question halves of the rows with a selected answer, and keys of the selected rows without an answer.
    selected: HashSet<String>,
    /// Number of cached answers by quarantine reason or, without one, finish reason.
    cached_reasons: BTreeMap<String, u64>,
    /// Fingerprints of the keys of complete cached answers that are not selected.
    unselected: KeySet,
}

impl SelectedAnswers {
    /// Adds a record of the cache, or of the file of replaced answers.
    fn add(&mut self, record: &Record, selectors: &[String], is_in_cache: bool) {
        if is_in_cache {
            let reason = match record.reason.as_str() {
                "" => record.answer.finish_reason.as_str(),
                reason => reason,
            };
            *self.cached_reasons.entry(reason.to_owned()).or_default() += 1;
        }
        if is_selected(record, selectors) {
            self.selected.insert(question_half_of(record));
        } else if is_in_cache && record.cut_at == 0 {
            self.unselected.insert(fingerprint(&record.key));
        }
    }

    /// Returns the error for selectors that match no row of this run.
    fn no_match_error(&self, selectors: &[String]) -> anyhow::Error {
        let selectors = selectors.join(",");
        let reasons = self.cached_reasons.iter();
        let reasons: Vec<_> = reasons
            .map(|(name, count)| format!("{name:?} ({count})"))
            .collect();
        if selectors == "failed" && self.selected.is_empty() {
            let message = "`--again failed` matches no row: no row has used up `retry.max_attempts` paid \
                           attempts or was refused by a content filter; the command without `--again` requests \
                           every other failed row";
            return Exit::Usage(message.into()).into();
        }
        let message = match (self.selected.is_empty(), reasons.is_empty()) {
            (false, _) => format!(
                "`--again {selectors}` matches answers, but none to a question of this config and these \
                 flags: nothing was changed"
            ),
            (true, true) => {
                format!("`--again {selectors}` matches no answer: the cache is empty")
            }
            (true, false) => format!(
                "`--again {selectors}` matches no answer: the answers in the cache are {}; rows that failed are \
                 requested by the command without `--again`, or by `--again failed` if they used up \
                 `retry.max_attempts` paid attempts or were refused by a content filter",
                reasons.join(", ")
            ),
        };
        Exit::Usage(message).into()
    }
}

/// Returns true if one of the selectors matches the record.
fn is_selected(record: &Record, selectors: &[String]) -> bool {
    selectors.iter().any(|selector| match selector.as_str() {
        "quarantined" => record.status == Status::Quarantined,
        "length" => is_truncated(&record.answer.finish_reason),
        selector => {
            let reason = record.reason.as_str();
            let reason_class = reason.split(':').next().unwrap_or_default();
            !selector.is_empty()
                && [reason, reason_class, &record.answer.finish_reason].contains(&selector)
        }
    })
}

/// Rows of this run that `--again` selects.
pub(crate) struct RowsToRepeat {
    /// Plan of the selected rows. A row with another answer in the cache counts as cached.
    pub plan: Plan,
    /// Keys of the rows to request, in every key schema.
    keys: HashSet<String>,
    /// Number of rows to request by question half.
    rows_by_question: HashMap<String, usize>,
    /// True if an earlier run has moved the old answers out of the cache.
    is_resumed: bool,
}

impl RowsToRepeat {
    /// Returns the keys of the rows to request.
    fn open_keys(&self) -> RowKeys {
        self.plan.rows.iter().map(|row| row.key.clone()).collect()
    }

    /// Returns true if the record answers one of the rows to request.
    fn has_answer(&self, record: &Record) -> bool {
        if self.keys.contains(&record.key) {
            return true;
        }
        let question_half = question_half_of(record);
        match self.rows_by_question.get(&question_half) {
            None => false,
            // The answer has another key: it came from another address or teacher name, or was truncated.
            Some(1) => true,
            Some(_) => {
                let mut keys = self
                    .keys
                    .iter()
                    .filter(|key| question::question_half(key) == question_half);
                keys.any(|key| question::truncated_key(key, record.cut_at) == record.key)
            }
        }
    }
}

/// Plans the rows of this run whose key or question half is in `selected`. A row counts as cached if `has_answer`
/// returns true for its key.
fn select_rows(
    settings: &RunSettings,
    shard: Option<RequestShard>,
    prompts: &[Prompt],
    selected: &HashSet<String>,
    has_answer: impl Fn(&str) -> bool,
) -> Result<RowsToRepeat> {
    let variants = crate::cache::open::peek(&settings.cache_dir)?.key_variants;
    let scope = PlanScope {
        shard,
        only: Some(selected),
    };
    let key_status = |key: &str| {
        Ok(if has_answer(key) {
            RowStatus::Answered
        } else {
            RowStatus::Open
        })
    };
    let plan = Plan::new(
        prompts.to_vec(),
        request_templates(&settings.endpoints, &[])?,
        &settings.prompts,
        scope,
        &variants,
        key_status,
    )?;
    let mut keys = HashSet::new();
    let mut rows_by_question = HashMap::new();
    for row in &plan.rows {
        keys.insert(row.key.clone());
        keys.extend(row.old_key.as_deref().map(str::to_owned));
        *rows_by_question
            .entry(question::question_half(&row.key).to_owned())
            .or_default() += 1;
    }
    Ok(RowsToRepeat {
        plan,
        keys,
        rows_by_question,
        is_resumed: false,
    })
}
