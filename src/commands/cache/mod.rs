//! `distill cache`: shows, verifies, repairs, merges, adopts and exports cached answers.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | `cache stats`, `cache verify`, `cache show` |
//! | `maintenance.rs` | `cache repair`, `cache merge`, `cache adopt` |
//! | `../export.rs` | `cache export` |
//!
//! With `--json` each action prints one object with a `version`. Text from records is sanitised before it is
//! printed.

pub(crate) mod maintenance;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use super::{export, load_config, print, print_json};
use crate::cache;
use crate::cache::reader::{self, VerifyReport};
use crate::cache::record::{Record, Status};
use crate::cache::recovery::BadLine;
use crate::cache::rewrite;
use crate::cache::stats::CacheStats;
use crate::cli::{CacheAction, CacheArgs, CacheLocation, ConfigFile, GlobalArgs};
use crate::commands::cache::maintenance::VERSION;
use crate::config::{self, Compression, Config};
use crate::exit::Exit;
use crate::terminal::progress::ReadProgress;
use crate::terminal::{format_count, sanitise};

/// Runs the action that the command line names.
pub fn run(args: &CacheArgs, global: &GlobalArgs) -> Result<()> {
    match &args.action {
        CacheAction::Stats(location) => stats(&folder(location)?, global.json),
        CacheAction::Verify(location) => verify(&folder(location)?, global.json),
        CacheAction::Repair(location) => maintenance::repair(&folder(location)?, global.json),
        CacheAction::Merge { location, sources } => {
            let price = config(location)?.map_or_else(Default::default, |config| {
                crate::harvest::run_files::highest_prices(&config.endpoints())
            });
            let dir = folder(location)?;
            maintenance::merge(&dir, &settings(location)?, &price, sources, global.json)
        }
        CacheAction::Adopt(file) => {
            let config = load_config(file)?.config;
            let dir = config.own_cache();
            let adopted = crate::plan::adopt::adopt(
                &config.prompts,
                &config.endpoints(),
                &dir,
                &config.cache,
            )?;
            maintenance::print_adopted(&dir, &adopted, global.json)
        }
        CacheAction::Show {
            location,
            record,
            limit,
        } => show(&folder(location)?, record.as_deref(), *limit, global.json),
        CacheAction::Export(args) => export::run(args, global),
    }
}

/// Returns the cache folder that the flags select.
fn folder(location: &CacheLocation) -> Result<PathBuf> {
    match (&location.dir, config(location)?) {
        (Some(dir), _) => Ok(dir.clone()),
        (None, Some(config)) => Ok(config.own_cache()),
        (None, None) => Err(Exit::Usage("give -c FILE or --dir DIR".into()).into()),
    }
}

/// Loads the config that the flags select; `None` if they select a folder alone.
fn config(location: &CacheLocation) -> Result<Option<Config>> {
    let load = |file: &PathBuf| {
        let file = ConfigFile {
            file: file.clone(),
            set: Vec::new(),
        };
        Ok(load_config(&file)?.config)
    };
    location.config.as_ref().map(load).transpose()
}

/// Returns the settings for writing the cache: the `[cache]` section of the config, or the defaults if only the folder
/// is given. A compressed cache in a given folder stays compressed.
fn settings(location: &CacheLocation) -> Result<config::CacheConfig> {
    let mut settings = config(location)?.map_or_else(Default::default, |config| config.cache);
    if let Some(dir) = &location.dir
        && cache::compressed_file(dir).exists()
    {
        settings.compression = Compression::Zstd;
    }
    Ok(settings)
}

/// Prints statistics of the cache in `dir`.
///
/// # Errors
/// If the cache cannot be read.
pub fn stats(dir: &Path, json: bool) -> Result<()> {
    let mut stats = CacheStats::default();
    for record in crate::cache::reader::read(dir)? {
        let record = record?;
        stats.add(&record);
        stats.measure_logprobs(&record)?;
    }
    for record in rewrite::read_replaced(dir)? {
        stats.replaced.add(&record?);
    }
    let bytes = crate::cache::files::size(dir);
    if json {
        return print_json(&json!({
            "version": VERSION, "dir": dir, "bytes": bytes, "stats": stats,
            "logprob_bytes_per_token": stats.logprobs.bytes_per_token().map(|(cached, _)| cached),
            "openai_bytes_per_token": stats.logprobs.bytes_per_token().map(|(_, received)| received),
        }));
    }
    print(&stats_text(&stats, dir, bytes))
}

fn stats_text(stats: &CacheStats, dir: &Path, bytes: u64) -> String {
    let quarantined: u64 = stats.quarantined.values().sum();
    let usage = &stats.usage;
    let mut rows = vec![
        (
            "cache",
            format!("{}, {} bytes", dir.display(), format_count(bytes)),
        ),
        (
            "records",
            format!(
                "{} ({} ok, {quarantined} quarantined)",
                stats.records, stats.ok
            ),
        ),
        ("quarantined", counts(&stats.quarantined)),
        ("finish reasons", counts(&stats.finish_reasons)),
        ("models", counts(&stats.models)),
        (
            "prompt tokens",
            format!("{} ({} cached)", usage.prompt_tokens, usage.cached_tokens),
        ),
        (
            "completion tokens",
            format!(
                "{} ({} reasoning)",
                usage.completion_tokens, usage.reasoning_tokens
            ),
        ),
        ("without usage", stats.without_usage.to_string()),
        ("cost", format!("${:.4}", stats.cost_usd)),
        ("without a price", stats.without_cost.to_string()),
        (
            "replaced by --again",
            format!(
                "{} (${:.4})",
                stats.replaced.records, stats.replaced.cost_usd
            ),
        ),
        (
            "with logprobs",
            format!(
                "{} ({} do not match their text)",
                stats.logprobs.records, stats.logprobs.not_matching_text
            ),
        ),
    ];
    if let Some((cached, received)) = stats.logprobs.bytes_per_token() {
        rows.push((
            "logprob bytes",
            format!(
                "{cached:.0} per token of {} (as sent by the API: {received:.0})",
                stats.logprobs.tokens
            ),
        ));
        rows.push((
            "in total",
            format!(
                "{:.0} bytes per token, with all other fields",
                bytes as f64 / stats.logprobs.tokens as f64
            ),
        ));
    }
    rows.push(("first sent", or_dash(stats.first_sent_at)));
    rows.push(("last sent", or_dash(stats.last_sent_at)));
    rows.iter()
        .map(|(name, value)| format!("{name:<19} {}\n", sanitise(value)))
        .collect()
}

/// Formats counts by name, most frequent first: `stop 120, length 3`.
fn counts(counts: &BTreeMap<String, u64>) -> String {
    let mut entries: Vec<_> = counts.iter().collect();
    entries.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let texts = entries.iter().map(|(name, count)| match name.as_str() {
        "" => format!("(none) {count}"),
        name => format!("{name} {count}"),
    });
    match texts.collect::<Vec<_>>().join(", ") {
        text if text.is_empty() => "-".to_owned(),
        text => text,
    }
}

/// Formats a value, or "-" for `None`.
fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Reads the whole cache in `dir` and prints all damage. An incomplete record at the end of a file is not an error,
/// because the next harvest moves it to another file.
///
/// # Errors
/// If lines are damaged ([`Exit::Damaged`]) or keys are repeated.
pub fn verify(dir: &Path, json: bool) -> Result<()> {
    let mut progress = ReadProgress::new("verifying", json);
    let report = reader::verify_cache(dir, &mut |done, total| {
        progress.update(done, total);
        Ok(())
    })?;
    drop(progress);
    if json {
        print_json(&verify_json(dir, &report))?;
    } else {
        print(&verify_text(&report))?;
    }
    let dir = dir.display();
    if !report.damaged.is_empty() {
        return Err(Exit::Damaged(format!(
            "{dir}: damaged lines: {}; restore the cache from a backup, or run `distill cache repair`, which moves \
             the damaged records to another file, so that `distill harvest` requests their answers again",
            report.damaged.len()
        ))
        .into());
    }
    if !report.repeated.is_empty() {
        return Err(anyhow!(
            "{dir}: keys with more than one record: {}; run `distill cache repair`, which keeps the first record \
             of each and moves the others to another file",
            report.repeated.len()
        ));
    }
    Ok(())
}

fn verify_json(dir: &Path, report: &VerifyReport) -> Value {
    let bad_line = |(file, bad): &(PathBuf, BadLine)| json!({ "file": file, "line": bad.line, "offset": bad.offset, "fault": bad.fault.to_string() });
    json!({
        "version": VERSION,
        "dir": dir,
        "bytes": report.bytes,
        "records": report.records,
        "damaged": report.damaged.iter().map(bad_line).collect::<Vec<_>>(),
        "torn": report.torn.iter().map(bad_line).collect::<Vec<_>>(),
        "repeated_keys": report.repeated.iter()
            .map(|(key, count)| json!({ "key": key, "records": count }))
            .collect::<Vec<_>>(),
    })
}

fn verify_text(report: &VerifyReport) -> String {
    let mut text = format!(
        "complete records: {}, bytes: {}\n",
        report.records, report.bytes
    );
    for (file, bad) in &report.damaged {
        text += &format!("{}: {bad}\n", file.display());
    }
    for (key, count) in &report.repeated {
        text += &format!("key {key} has {count} records\n");
    }
    for (file, torn) in &report.torn {
        text += &format!(
            "{}: an incomplete record at the end, from byte {}: the next `distill harvest` moves it to another \
             file and requests its answer again\n",
            file.display(),
            torn.offset
        );
    }
    sanitise(&text).into_owned()
}

/// Prints the first records of the cache in `dir`, at most `limit`. With a selector, prints only records whose prompt
/// id is `selector` or whose key starts with it.
pub fn show(dir: &Path, selector: Option<&str>, limit: usize, json: bool) -> Result<()> {
    let mut shown = Vec::new();
    for record in crate::cache::reader::read(dir)? {
        if shown.len() == limit {
            break;
        }
        let record = record?;
        if selector
            .is_none_or(|selector| record.prompt_id == selector || record.key.starts_with(selector))
        {
            shown.push(record);
        }
    }
    // With a limit of 0 no record was compared with the selector.
    if let Some(selector) = selector
        && shown.is_empty()
        && limit > 0
    {
        let message = format!(
            "no record has the prompt id `{}` or a key that starts with it",
            sanitise(selector)
        );
        return Err(Exit::Usage(message).into());
    }
    if json {
        return print_json(&json!({ "version": VERSION, "records": shown }));
    }
    print(
        &shown
            .iter()
            .map(record_text)
            .collect::<Vec<_>>()
            .join("\n\n"),
    )
}

fn record_text(record: &Record) -> String {
    let status = match record.status {
        Status::Ok => "ok".to_owned(),
        Status::Quarantined => format!("quarantined ({})", record.reason),
    };
    let mut text = format!(
        "key     {}\nprompt  {}, sample {}\nstatus  {status}, finish_reason {}\nmodel   {} at {}\n\
         sent    {}, {} ms, {} attempts\n",
        record.key,
        record.prompt_id,
        record.sample,
        record.answer.finish_reason,
        record.model,
        record.endpoint,
        record.timing.sent_at,
        record.timing.latency_ms,
        record.timing.attempts,
    );
    if let Some(usage) = &record.usage {
        text += &format!(
            "tokens  {} prompt, {} completion\n",
            usage.prompt_tokens, usage.completion_tokens
        );
    }
    if let Some(logprobs) = &record.logprobs {
        text += &format!("logprobs for {} tokens\n", logprobs.token.len());
    }
    let messages = record.request.get("messages").and_then(Value::as_array);
    for message in messages.into_iter().flatten() {
        text += &format!(
            "[{}] {}\n",
            plain(&message["role"]),
            plain(&message["content"])
        );
    }
    for (name, part) in [
        ("reasoning", &record.answer.reasoning),
        ("refusal", &record.answer.refusal),
        ("answer", &record.answer.text),
    ] {
        if !part.is_empty() {
            text += &format!("[{name}] {part}\n");
        }
    }
    sanitise(&text).into_owned()
}

/// Formats strings without quotes, everything else as JSON.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terminal::escape_unsafe;

    #[test]
    fn control_and_bidi_characters_are_escaped_in_text_and_in_json() {
        let hostile = "\u{1b}]0;title\u{7} \u{9b}2J \u{202e}gpj.exe \u{2066} caf\u{e9}\ttab";
        let has_unsafe_chars = |text: &str| {
            text.chars().any(|c| {
                (c.is_control() && c != '\n' && c != '\t') || "\u{202e}\u{2066}".contains(c)
            })
        };
        let mut record = crate::cache::line::decode(
            include_str!("../../../tests/it/golden/cache-v1.jsonl")
                .lines()
                .next()
                .unwrap()
                .as_bytes(),
        )
        .unwrap();
        record.answer.text = hostile.to_owned();
        record.model = hostile.to_owned();
        record.prompt_id = hostile.to_owned();
        record.request["messages"][0]["content"] = json!(hostile);
        assert!(!has_unsafe_chars(&record_text(&record)));
        let mut stats = CacheStats::default();
        stats.add(&record);
        assert!(!has_unsafe_chars(&stats_text(&stats, Path::new("x"), 1)));

        let value = json!({ "records": [record] });
        let line = serde_json::to_string(&value).unwrap();
        let line = escape_unsafe(&line);
        assert!(!has_unsafe_chars(&line) && line.contains("caf\u{e9}"));
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }
}
