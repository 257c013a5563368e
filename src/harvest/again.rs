//! `harvest --again`: rows that have an answer, or are given up, and are to be asked once more.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::Result;

use super::unanswered::Unanswered;
use crate::cache::census::Origin;
use crate::cache::record::{Record, Status};
use crate::cache::rewrite::{Fate, replaced_file, rewrite};
use crate::cache::{self, line};
use crate::config::Config;
use crate::exit::Exit;
use crate::terminal::format_count;

/// Which questions are to be asked, by what the keys of their answers end with, or by their keys.
pub type Wanted = HashSet<String>;

/// Takes the answers that `words` name out of the cache of the run folder, and forgets the rows without an
/// answer that they name. The cache must be open nowhere.
///
/// # Errors
/// [`Exit::Usage`] where nothing is of that name.
pub fn take_out(config: &Config, unanswered: &mut Unanswered, words: &[String]) -> Result<Wanted> {
    let dir = config.own_cache();
    let mut wanted = Wanted::new();
    let named = names(&dir, words, &mut wanted)?;
    let mut forgotten = Vec::new();
    if words.iter().any(|word| word == "failed") {
        forgotten = unanswered.forget(|_, _| true)?;
        wanted.extend(forgotten.iter().cloned());
    }
    if wanted.is_empty() {
        let known = match named.is_empty() {
            true => "there is no such answer in the cache".to_owned(),
            false => format!("the answers in the cache are: {}", named.join(", ")),
        };
        let message = format!("`--again {}` names nothing: {known}", words.join(","));
        return Err(Exit::Usage(message).into());
    }
    let moved = rewrite(&dir, &config.cache, &|line| {
        let record = line::decode(line)?;
        Ok(match is_named(&record, words) {
            true => Fate::Leave,
            false => Fate::Stay,
        })
    })?;
    tracing::warn!(
        "{} rows are asked again: {} answers moved to {}, and {} rows without an answer begin anew",
        format_count(wanted.len() as u64),
        format_count(moved),
        replaced_file(&dir).display(),
        format_count(forgotten.len() as u64),
    );
    Ok(wanted)
}

/// The questions of the answers that `words` name, without changing anything. Returns what answers there
/// are.
fn names(dir: &Path, words: &[String], wanted: &mut Wanted) -> Result<Vec<String>> {
    let mut known = BTreeMap::<String, u64>::new();
    if !cache::exists(dir) {
        return Ok(Vec::new());
    }
    for record in cache::read(dir)? {
        let record = record?;
        let name = match record.reason.as_str() {
            "" => record.answer.finish_reason.as_str(),
            reason => reason,
        };
        *known.entry(name.to_owned()).or_default() += 1;
        if is_named(&record, words) {
            wanted.insert(Origin::from(&record).half());
        }
    }
    let known = known.into_iter();
    Ok(known
        .map(|(name, count)| format!("{name:?} ({count})"))
        .collect())
}

/// Is the answer one of those?
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
