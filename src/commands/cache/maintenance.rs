//! `distill cache repair`, `distill cache merge`, and the result of `distill cache adopt`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use crate::cache::merge::{self, MergeReport};
use crate::cache::usage::Usage;
use crate::cache::{conflicts_file, quarantine_file, repair};
use crate::commands::{print, print_json};
use crate::config::{self, Price};
use crate::harvest::run_files::MergeAccount;
use crate::plan::adopt::Adopted;
use crate::terminal::progress::ReadProgress;
use crate::terminal::{format_count, sanitise};

/// Repairs the cache in `dir` and prints the result.
pub(crate) fn repair(dir: &Path, json: bool) -> Result<()> {
    let done = repair::repair(dir)?;
    if json {
        return print_json(&json!({
            "version": VERSION, "dir": dir, "records": done.records,
            "quarantined": done.quarantined, "quarantined_bytes": done.quarantined_bytes,
            "rescued": done.rescued, "conflicts": done.conflicts,
        }));
    }
    let mut text = format!("whole records: {}\n", format_count(done.records));
    if !done.changed() {
        text += "nothing to repair\n";
    }
    if done.quarantined > 0 {
        text += &format!(
            "damaged lines and frames: {} ({} bytes), moved to {}; the next `distill harvest` asks their prompts \
             again\n",
            format_count(done.quarantined),
            format_count(done.quarantined_bytes),
            quarantine_file(dir).display()
        );
    }
    if done.rescued > 0 {
        text += &format!(
            "records recovered from damaged frames: {}\n",
            format_count(done.rescued)
        );
    }
    if done.conflicts > 0 {
        text += &format!(
            "records that repeat a key: {}, moved to {}\n",
            format_count(done.conflicts),
            conflicts_file(dir).display()
        );
    }
    print(&sanitise(&text))
}

/// Merges `sources` into the cache in `dir` and prints the result for each.
pub(crate) fn merge(
    dir: &Path,
    settings: &config::CacheConfig,
    price: &Price,
    sources: &[PathBuf],
    json: bool,
) -> Result<()> {
    let run_dir = dir.parent().unwrap_or(Path::new("."));
    let account = MergeAccount::open(run_dir, price)?;
    let mut reading = ReadProgress::new("merging", json);
    let mut all = Vec::new();
    let merged = merge::merge_all(dir, settings, sources, &mut all, &mut |done, total| {
        reading.update(done, total);
        Ok(())
    });
    drop(reading);
    let cost_usd = all.iter().map(|merged| merged.cost_usd).sum();
    let mut unpriced = Usage::default();
    all.iter().for_each(|merged| unpriced.add(&merged.unpriced));
    account.add(cost_usd, unpriced)?;
    merged?;
    if json {
        let sources = sources.iter().zip(&all).map(|(source, merged)| {
            json!({
                "dir": source, "records": merged.records, "added": merged.added,
                "same": merged.same, "conflicts": merged.conflicts,
            })
        });
        return print_json(&json!({
            "version": VERSION, "dir": dir, "sources": sources.collect::<Vec<_>>(),
        }));
    }
    let mut text = String::new();
    for (source, merged) in sources.iter().zip(&all) {
        text += &line(source, merged);
    }
    let conflicts: u64 = all.iter().map(|merged| merged.conflicts).sum();
    if conflicts > 0 {
        text += &format!(
            "conflicts: {}; these requests have two different answers: the one in the cache stays, the other was \
             appended to {}\n",
            format_count(conflicts),
            conflicts_file(dir).display()
        );
        for key in all.iter().flat_map(|merged| &merged.keys) {
            text += &format!("  {key}\n");
        }
        if all
            .iter()
            .any(|merged| merged.conflicts > merged.keys.len() as u64)
        {
            text += "  and others\n";
        }
    }
    print(&sanitise(&text))
}

fn line(source: &Path, merged: &MergeReport) -> String {
    format!(
        "{}: {} records, {} added, {} already in the cache, {} conflicts\n",
        source.display(),
        format_count(merged.records),
        format_count(merged.added),
        format_count(merged.same),
        format_count(merged.conflicts)
    )
}

/// Prints the result of `cache adopt` on the cache in `dir`.
pub(crate) fn adopted(dir: &Path, done: &Adopted, json: bool) -> Result<()> {
    if json {
        return print_json(&json!({
            "version": VERSION, "dir": dir, "adopted": done.records, "questions": done.questions,
            "answered": done.answered, "mocks": done.mocks,
        }));
    }
    let mocks = match done.mocks {
        0 => String::new(),
        count => format!(
            "; {} answers of a mock teacher were not adopted",
            format_count(count)
        ),
    };
    print(&format!(
        "adopted: {} answers in {}; {} of {} questions of this config are answered now{mocks}\n",
        format_count(done.records),
        dir.display(),
        format_count(done.answered),
        format_count(done.questions)
    ))
}

/// Version of the JSON output of `distill cache`.
pub(crate) const VERSION: u32 = 1;
