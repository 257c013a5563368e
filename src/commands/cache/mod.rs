//! `distill cache`: shows, verifies, repairs and merges the cache.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | `cache stats`, `cache verify`, `cache show` |
//! | `maintenance.rs` | `cache repair`, `cache merge` and the result of `cache adopt` |
//! | `../export.rs` | `cache export` |
//!
//! With `--json` each action prints one object with a `version`. Text from records is sanitised before it is
//! printed.

pub(crate) mod maintenance;

use crate::commands::cache::maintenance::VERSION;
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
use crate::cli::{CacheAction, CacheArgs, CachePlace, ConfigFile, Global};
use crate::config::{self, Compression, Config};
use crate::exit::Exit;
use crate::terminal::progress::ReadProgress;
use crate::terminal::{format_count, sanitise};

/// Runs the action that the command line names.
pub fn run(args: &CacheArgs, global: &Global) -> Result<()> {
    match &args.action {
        CacheAction::Stats(place) => stats(&folder(place)?, global.json),
        CacheAction::Verify(place) => verify(&folder(place)?, global.json),
        CacheAction::Repair(place) => maintenance::repair(&folder(place)?, global.json),
        CacheAction::Merge { place, sources } => {
            let price = config(place)?.map_or_else(Default::default, |config| {
                crate::harvest::run_files::highest_prices(&config.endpoints())
            });
            let dir = folder(place)?;
            maintenance::merge(&dir, &settings(place)?, &price, sources, global.json)
        }
        CacheAction::Adopt(file) => {
            let config = load_config(file)?.config;
            let dir = config.own_cache();
            let done = crate::plan::adopt::adopt(
                &config.prompts,
                &config.endpoints(),
                &dir,
                &config.cache,
            )?;
            maintenance::adopted(&dir, &done, global.json)
        }
        CacheAction::Show {
            place,
            record,
            limit,
        } => show(&folder(place)?, record.as_deref(), *limit, global.json),
        CacheAction::Export(args) => export::run(args, global),
    }
}

fn folder(place: &CachePlace) -> Result<PathBuf> {
    match (&place.dir, config(place)?) {
        (Some(dir), _) => Ok(dir.clone()),
        (None, Some(config)) => Ok(config.own_cache()),
        (None, None) => Err(Exit::Usage("give -c FILE or --dir DIR".into()).into()),
    }
}

fn config(place: &CachePlace) -> Result<Option<Config>> {
    let load = |file: &PathBuf| {
        let file = ConfigFile {
            file: file.clone(),
            set: Vec::new(),
        };
        Ok(load_config(&file)?.config)
    };
    place.config.as_ref().map(load).transpose()
}

/// Settings for writing the cache: those of the config if there is one. Otherwise a compressed cache stays
/// compressed.
fn settings(place: &CachePlace) -> Result<config::CacheConfig> {
    let mut settings = config(place)?.map_or_else(Default::default, |config| config.cache);
    if let Some(dir) = &place.dir
        && cache::compressed_file(dir).exists()
    {
        settings.compression = Compression::Zstd;
    }
    Ok(settings)
}

/// Prints statistics of the cache in `dir`.
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
            "logprob_bytes_per_token": stats.logprobs.bytes_per_token().map(|(ours, _)| ours),
            "openai_bytes_per_token": stats.logprobs.bytes_per_token().map(|(_, theirs)| theirs),
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
    if let Some((ours, theirs)) = stats.logprobs.bytes_per_token() {
        rows.push((
            "logprob bytes",
            format!(
                "{ours:.0} per token of {} (as sent by the API: {theirs:.0})",
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

/// `stop 120, length 3`, most frequent first.
fn counts(counts: &BTreeMap<String, u64>) -> String {
    let mut entries: Vec<_> = counts.iter().collect();
    entries.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let named = entries.iter().map(|(name, count)| match name.as_str() {
        "" => format!("(none) {count}"),
        name => format!("{name} {count}"),
    });
    match named.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => "-".to_owned(),
        some => some,
    }
}

fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Reads the whole cache in `dir` and prints all damage. A torn tail is not an error, because the next harvest
/// repairs it.
///
/// # Errors
/// If lines are damaged ([`Exit::Damaged`]) or keys are repeated.
pub fn verify(dir: &Path, json: bool) -> Result<()> {
    let mut reading = ReadProgress::new("verifying", json);
    let findings = reader::verify_cache(dir, &mut |done, total| {
        reading.update(done, total);
        Ok(())
    })?;
    drop(reading);
    if json {
        print_json(&findings_json(dir, &findings))?;
    } else {
        print(&findings_text(&findings))?;
    }
    let dir = dir.display();
    if !findings.damaged.is_empty() {
        return Err(Exit::Damaged(format!(
            "{dir}: damaged lines: {}; restore the cache from a backup, or run `distill cache repair`, which moves \
             the damaged records to another file, so that their prompts are asked again",
            findings.damaged.len()
        ))
        .into());
    }
    if !findings.repeated.is_empty() {
        return Err(anyhow!(
            "{dir}: keys with more than one record: {}; run `distill cache repair`, which keeps the first record \
             of each and moves the others to another file",
            findings.repeated.len()
        ));
    }
    Ok(())
}

fn findings_json(dir: &Path, findings: &VerifyReport) -> Value {
    let bad = |(file, bad): &(PathBuf, BadLine)| json!({ "file": file, "line": bad.line, "offset": bad.offset, "fault": bad.fault.to_string() });
    json!({
        "version": VERSION,
        "dir": dir,
        "bytes": findings.bytes,
        "records": findings.records,
        "damaged": findings.damaged.iter().map(bad).collect::<Vec<_>>(),
        "torn": findings.torn.iter().map(bad).collect::<Vec<_>>(),
        "repeated_keys": findings.repeated.iter()
            .map(|(key, count)| json!({ "key": key, "records": count }))
            .collect::<Vec<_>>(),
    })
}

fn findings_text(findings: &VerifyReport) -> String {
    let mut text = format!(
        "whole records: {}, bytes: {}\n",
        findings.records, findings.bytes
    );
    for (file, bad) in &findings.damaged {
        text += &format!("{}: {bad}\n", file.display());
    }
    for (key, count) in &findings.repeated {
        text += &format!("key {key} has {count} records\n");
    }
    for (file, torn) in &findings.torn {
        text += &format!(
            "{}: an incomplete record at the end, from byte {}: the next `distill harvest` moves it to another \
             file and asks its prompt again\n",
            file.display(),
            torn.offset
        );
    }
    sanitise(&text).into_owned()
}

/// Prints at most `limit` records of the cache in `dir`: those whose prompt id is `selector` or whose key starts
/// with it, or all if it is `None`.
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
    if let (Some(selector), true) = (selector, shown.is_empty()) {
        return Err(anyhow!(
            "no record has the prompt id `{}` or a key that starts with it",
            sanitise(selector)
        ));
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
    fn hostile_text_is_inert_as_text_and_as_json() {
        let hostile = "\u{1b}]0;title\u{7} \u{9b}2J \u{202e}gpj.exe \u{2066} caf\u{e9}\ttab";
        let active = |text: &str| {
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
        assert!(!active(&record_text(&record)));
        let mut stats = CacheStats::default();
        stats.add(&record);
        assert!(!active(&stats_text(&stats, Path::new("x"), 1)));

        let value = json!({ "records": [record] });
        let line = serde_json::to_string(&value).unwrap();
        let line = escape_unsafe(&line);
        assert!(!active(&line) && line.contains("caf\u{e9}"));
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }
}
