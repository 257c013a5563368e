//! `distill cache repair`, `distill cache merge`, and the result of `distill cache adopt`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use crate::cache::merge::{self, MergeReport};
use crate::cache::open_file::rescue_dir;
use crate::cache::usage::Usage;
use crate::cache::{conflicts_file, quarantine_file, repair};
use crate::commands::{print, print_json};
use crate::config::{self, Price};
use crate::harvest::run_files::MergeAccount;
use crate::plan::adopt::Adopted;
use crate::terminal::progress::ReadProgress;
use crate::terminal::{format_count, format_dollars, sanitise};

/// Version of the JSON output of `distill cache`.
pub(crate) const VERSION: u32 = 1;

/// Repairs the cache in `dir` and prints the result.
///
/// # Errors
/// If the cache cannot be read or written, or another process has it open.
pub(crate) fn repair(dir: &Path, json: bool) -> Result<()> {
    let report = repair::repair(dir)?;
    if json {
        return print_json(&json!({
            "version": VERSION, "dir": dir, "records": report.records,
            "quarantined": report.quarantined, "quarantined_bytes": report.quarantined_bytes,
            "rescued": report.rescued, "conflicts": report.conflicts,
        }));
    }
    let mut text = format!("complete records: {}\n", format_count(report.records));
    if !report.changed() {
        text += "nothing to repair\n";
    }
    if report.quarantined > 0 {
        text += &format!(
            "damaged lines and frames: {} ({} bytes), moved to {}; the next `distill harvest` requests their answers \
             again\n",
            format_count(report.quarantined),
            format_count(report.quarantined_bytes),
            quarantine_file(dir).display()
        );
    }
    if report.rescued > 0 {
        text += &format!(
            "records recovered from damaged frames: {}\n",
            format_count(report.rescued)
        );
    }
    if report.conflicts > 0 {
        text += &format!(
            "records that repeat a key: {}, moved to {}\n",
            format_count(report.conflicts),
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
    let mut progress = ReadProgress::new("merging", json);
    let mut reports = Vec::new();
    let result = merge::merge_all(dir, settings, sources, &mut reports, &mut |done, total| {
        progress.update(done, total);
        Ok(())
    });
    drop(progress);
    // Also after an error: the account must include the answers of the completed merges. It already includes rescued
    // answers, which this run folder paid for.
    let is_rescue = |source: &Path| crate::fs::is_same(source, &rescue_dir(dir));
    let mut cost_usd = 0.0;
    let mut unpriced = Usage::default();
    for (source, report) in sources.iter().zip(&reports) {
        if !is_rescue(source) {
            cost_usd += report.cost_usd;
            unpriced.add(&report.unpriced);
        }
    }
    let is_counted = account.add(cost_usd, unpriced)?;
    result?;
    if json {
        let sources = sources.iter().zip(&reports).map(|(source, report)| {
            json!({
                "dir": source, "records": report.records, "added": report.added,
                "same": report.same, "conflicts": report.conflicts,
            })
        });
        return print_json(&json!({
            "version": VERSION, "dir": dir, "sources": sources.collect::<Vec<_>>(),
        }));
    }
    let mut text = String::new();
    for (source, report) in sources.iter().zip(&reports) {
        text += &merge_text(source, report);
    }
    if is_counted && cost_usd > 0.0 {
        text += &format!(
            "the cost of these answers, {}, now counts as spent by {}\n",
            format_dollars(cost_usd),
            run_dir.display()
        );
    }
    let conflicts: u64 = reports.iter().map(|report| report.conflicts).sum();
    if conflicts > 0 {
        text += &format!(
            "conflicts: {}; these requests have two different answers: the one in the cache stays, the other was \
             appended to {}\n",
            format_count(conflicts),
            conflicts_file(dir).display()
        );
        for key in reports.iter().flat_map(|report| &report.keys) {
            text += &format!("  {key}\n");
        }
        if reports
            .iter()
            .any(|report| report.conflicts > report.keys.len() as u64)
        {
            text += "  and others\n";
        }
    }
    print(&sanitise(&text))
}

/// Formats the counts of one merged cache.
fn merge_text(source: &Path, report: &MergeReport) -> String {
    format!(
        "{}: {} records, {} added, {} already in the cache, {} conflicts\n",
        source.display(),
        format_count(report.records),
        format_count(report.added),
        format_count(report.same),
        format_count(report.conflicts)
    )
}

/// Prints the result of `cache adopt` on the cache in `dir`.
pub(crate) fn print_adopted(dir: &Path, adopted: &Adopted, json: bool) -> Result<()> {
    if json {
        return print_json(&json!({
            "version": VERSION, "dir": dir, "adopted": adopted.records, "questions": adopted.questions,
            "answered": adopted.answered, "mocks": adopted.mocks,
        }));
    }
    let mocks = match adopted.mocks {
        0 => String::new(),
        count => format!(
            "; {} answers of a mock teacher were not adopted",
            format_count(count)
        ),
    };
    print(&format!(
        "adopted: {} answers in {}; {} of {} questions of this config are answered now{mocks}\n",
        format_count(adopted.records),
        dir.display(),
        format_count(adopted.answered),
        format_count(adopted.questions)
    ))
}
