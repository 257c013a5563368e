//! `harvest --again`: rows that have an answer, or are given up, and are to be asked once more.
//!
//! An answer leaves the cache only when all that a night refuses has been looked at, and only if this run
//! asks its question. A run that was stopped goes on by the same command: what is in the file of
//! replaced answers is named as well.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::cache;
use crate::cache::keys::KeySet;
use crate::cache::line;
use crate::cache::question;
use crate::cache::record::{Record, Status};
use crate::cache::rewrite::{RewriteDecision, read_replaced, replaced_file, rewrite};
use crate::cache::unused_answers::question_half_of;
use crate::config::Config;
use crate::exit::Exit;
use crate::plan::prepare::check_fits;
use crate::plan::prepare::request_templates;
use crate::plan::shard::Shard;
use crate::plan::unanswered::Unanswered;
use crate::plan::{Plan, PlanScope, RowStatus};
use crate::prompt::Prompt;
use crate::terminal::format_count;

/// The keys of the rows that are to be asked.
pub(crate) type RowKeys = HashSet<String>;

/// Finds the rows that `words` name and that this run asks for. Changes nothing.
///
/// # Errors
/// [`Exit::Usage`] where nothing is of that name, and whatever the night would refuse.
pub(crate) fn select(
    config: &Config,
    words: &[String],
    shard: Option<Shard>,
    prompts: &[Prompt],
    unanswered: &Unanswered,
) -> Result<RowsToRepeat> {
    let dir = config.own_cache();
    if let Some(under_way) = AgainFile::load(&config.run_dir, words)? {
        let known = crate::cache::open::peek(&dir)?;
        let is_kept = |key: &str| known.contains(key);
        let mut asked = asked(config, shard, prompts, &under_way.keys, is_kept)?;
        // Also with no rows left: the last run ended before `finish`.
        if asked.plan.total > 0 {
            asked.is_resumed = true;
            return Ok(asked);
        }
    }
    let mut found = FoundAnswers::default();
    if cache::exists(&dir) {
        for record in crate::cache::reader::read(&dir)? {
            found.add(&record?, words, true);
        }
    }
    for record in read_replaced(&dir)? {
        found.add(&record?, words, false);
    }
    if names_failed(words) {
        found.names.extend(unanswered.keys().map(str::to_owned));
    }
    let is_kept = |key: &str| {
        found
            .kept
            .contains(&crate::cache::fingerprint::fingerprint(key))
    };
    let asked = asked(config, shard, prompts, &found.names, is_kept)?;
    if asked.plan.total == 0 {
        return Err(found.nothing(words));
    }
    for endpoint in 0..asked.plan.rows_by_endpoint.len() {
        check_fits(config, &asked.plan, endpoint)?;
    }
    Ok(asked)
}

/// Takes the answers to the selected rows out of the cache of the run folder, and forgets such rows
/// without an answer. The cache must be open nowhere.
///
/// # Errors
/// Where the cache is damaged, or the disk fails.
pub(crate) fn remove_from_cache(
    config: &Config,
    words: &[String],
    asked: RowsToRepeat,
    unanswered: &mut Unanswered,
) -> Result<RowKeys> {
    let dir = config.own_cache();
    if asked.is_resumed {
        let (left, done) = (asked.plan.rows.len() as u64, asked.plan.cached);
        match left {
            0 => tracing::warn!(
                "all {} rows that were to be asked again have their new answer; run the same command once \
                 more to start over",
                format_count(done)
            ),
            left => tracing::warn!(
                "{} rows are still to be asked again; {} have their new answer",
                format_count(left),
                format_count(done)
            ),
        }
        if names_failed(words) {
            forget(config, words, &asked, unanswered)?;
        }
        return Ok(asked.wanted());
    }
    let moved = rewrite(&dir, &config.cache, &|line| {
        let record = line::decode(line)?;
        Ok(if is_named(&record, words) && asked.answers(&record) {
            RewriteDecision::Remove
        } else {
            RewriteDecision::Keep
        })
    })?;
    // After the old answers have left the cache: a resumed run takes those that it finds there for new.
    let wanted = asked.wanted();
    AgainFile {
        words: words.to_vec(),
        keys: wanted.clone(),
        has_forgotten: false,
    }
    .save(&config.run_dir)?;
    let forgotten = if names_failed(words) {
        forget(config, words, &asked, unanswered)?
    } else {
        0
    };
    tracing::warn!(
        "{} rows are asked again: {} answers moved to {}, {} rows without an answer start over{}; if it \
         is stopped, run the same command to resume",
        format_count(asked.plan.rows.len() as u64),
        format_count(moved),
        replaced_file(&dir).display(),
        format_count(forgotten),
        match asked.plan.cached {
            0 => String::new(),
            count => format!(", {} have another answer by now", format_count(count)),
        }
    );
    Ok(wanted)
}

/// Removes the failures of the rows from the books, once.
fn forget(
    config: &Config,
    words: &[String],
    asked: &RowsToRepeat,
    unanswered: &mut Unanswered,
) -> Result<u64> {
    let Some(mut under_way) = AgainFile::load(&config.run_dir, words)? else {
        return Ok(0);
    };
    if under_way.has_forgotten {
        return Ok(0);
    }
    let forgotten = unanswered.forget(|key, _| asked.keys.contains(key))?;
    under_way.has_forgotten = true;
    under_way.save(&config.run_dir)?;
    Ok(forgotten.len() as u64)
}

/// Ends what `--again` has begun: every row of a run has ended.
///
/// # Errors
/// Where the file cannot be removed.
pub(crate) fn finish(run_dir: &Path) -> Result<()> {
    let path = AgainFile::file(run_dir);
    if !path.exists() {
        return Ok(());
    }
    crate::fs::remove_file(&path)
}

/// `again.json` in the run folder: rows whose answers have left the cache and are being asked for again. After
/// a stop, the same command asks for the rest, and not again for those that have their new answer.
#[derive(Serialize, Deserialize)]
struct AgainFile {
    words: Vec<String>,
    keys: RowKeys,
    /// The failures of these rows have been removed from the books.
    #[serde(default)]
    has_forgotten: bool,
}

impl AgainFile {
    fn file(run_dir: &Path) -> PathBuf {
        run_dir.join("again.json")
    }

    /// None where nothing was begun with these words.
    fn load(run_dir: &Path, words: &[String]) -> Result<Option<AgainFile>> {
        let path = AgainFile::file(run_dir);
        if !path.exists() {
            return Ok(None);
        }
        let text = crate::fs::read(&path)?;
        let under_way: AgainFile = serde_json::from_slice(&text).map_err(|error| {
            let message = format!(
                "{} is damaged ({error}): delete it, and `--again` starts over",
                path.display()
            );
            Exit::Damaged(message)
        })?;
        Ok((under_way.words == words).then_some(under_way))
    }

    fn save(&self, run_dir: &Path) -> Result<()> {
        crate::fs::write_atomic(&AgainFile::file(run_dir), &serde_json::to_vec(self)?)
    }
}

fn names_failed(words: &[String]) -> bool {
    words.iter().any(|word| word == "failed")
}

/// Answers selected by `--again`.
#[derive(Default)]
struct FoundAnswers {
    /// Question halves of the selected keys, or whole keys.
    names: HashSet<String>,
    /// Number of cached answers by reason or finish reason.
    known: BTreeMap<String, u64>,
    /// Keys of cached answers that are complete and not selected.
    kept: KeySet,
}

impl FoundAnswers {
    fn add(&mut self, record: &Record, words: &[String], is_in_cache: bool) {
        if is_in_cache {
            let name = match record.reason.as_str() {
                "" => record.answer.finish_reason.as_str(),
                reason => reason,
            };
            *self.known.entry(name.to_owned()).or_default() += 1;
        }
        if is_named(record, words) {
            self.names.insert(question_half_of(record));
        } else if is_in_cache && record.cut_at == 0 {
            self.kept
                .insert(crate::cache::fingerprint::fingerprint(&record.key));
        }
    }

    fn nothing(&self, words: &[String]) -> anyhow::Error {
        let words = words.join(",");
        let known = self.known.iter();
        let known: Vec<_> = known
            .map(|(name, count)| format!("{name:?} ({count})"))
            .collect();
        if words == "failed" && self.names.is_empty() {
            let message = "`--again failed` names nothing: no row was bought `retry.max_attempts` times or \
                           refused by a filter, and the command without `--again` asks every other one";
            return Exit::Usage(message.into()).into();
        }
        let message = match (self.names.is_empty(), known.is_empty()) {
            (false, _) => format!(
                "`--again {words}` names answers, and none of them is to a question of this config and \
                 these flags: nothing was changed"
            ),
            (true, true) => format!("`--again {words}` names nothing: the cache holds no answers"),
            (true, false) => format!(
                "`--again {words}` names nothing: the answers in the cache are {}; rows that \
                 failed are asked again by the command without `--again`, or by `--again failed` if they were \
                 bought `retry.max_attempts` times or refused by a content filter",
                known.join(", ")
            ),
        };
        Exit::Usage(message).into()
    }
}

/// Returns true if one of the words selects the record.
fn is_named(record: &Record, words: &[String]) -> bool {
    words.iter().any(|word| match word.as_str() {
        "quarantined" => record.status == Status::Quarantined,
        "length" => matches!(
            record.answer.finish_reason.as_str(),
            "length" | "max_tokens"
        ),
        word => {
            let reason = record.reason.as_str();
            let kind = reason.split(':').next().unwrap_or_default();
            !word.is_empty() && [reason, kind, &record.answer.finish_reason].contains(&word)
        }
    })
}

/// Rows of this run that `--again` selects.
pub(crate) struct RowsToRepeat {
    /// Those that have another answer by now are cached.
    pub plan: Plan,
    /// All keys of theirs.
    keys: HashSet<String>,
    /// Number of selected rows by question.
    of_question: HashMap<String, usize>,
    /// An earlier run has begun with them, and their answers have left the cache.
    is_resumed: bool,
}

impl RowsToRepeat {
    fn wanted(&self) -> RowKeys {
        self.plan.rows.iter().map(|row| row.key.clone()).collect()
    }

    /// Returns true if the record answers one of the rows.
    fn answers(&self, record: &Record) -> bool {
        if self.keys.contains(&record.key) {
            return true;
        }
        let half = question_half_of(record);
        match self.of_question.get(&half) {
            None => false,
            // Of another address, name or place of the cut.
            Some(1) => true,
            Some(_) => {
                let mut keys = self
                    .keys
                    .iter()
                    .filter(|key| question::question_half(key) == half);
                keys.any(|key| question::truncated_key(key, record.cut_at) == record.key)
            }
        }
    }
}

fn asked(
    config: &Config,
    shard: Option<Shard>,
    prompts: &[Prompt],
    names: &HashSet<String>,
    is_kept: impl Fn(&str) -> bool,
) -> Result<RowsToRepeat> {
    let past = crate::cache::open::peek(&config.own_cache())?.past;
    let scope = PlanScope {
        shard,
        only: Some(names),
    };
    let standing = |key: &str| {
        Ok(if is_kept(key) {
            RowStatus::Answered
        } else {
            RowStatus::Open
        })
    };
    let askings = request_templates(config, &[])?;
    let plan = Plan::new(
        prompts.to_vec(),
        askings,
        &config.prompts,
        scope,
        &past,
        standing,
    )?;
    let (mut keys, mut of_question) = (HashSet::new(), HashMap::new());
    for row in &plan.rows {
        keys.insert(row.key.clone());
        keys.extend(row.old_key.as_deref().map(str::to_owned));
        *of_question
            .entry(question::question_half(&row.key).to_owned())
            .or_default() += 1;
    }
    Ok(RowsToRepeat {
        plan,
        keys,
        of_question,
        is_resumed: false,
    })
}
