//! Removes records whose prompts are to be requested again, or changes the keys of records. Removed records are moved
//! to `responses.replaced.jsonl`.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::frames::{self, CompressionLevel, FRAME_TEXT_BYTES};
use super::keys;
use super::line;
use super::reader::CacheLines;
use super::record::Record;
use super::storage::{self, BufferedAppender};
use super::writer::Cache;
use super::{compressed_file, plain_file};
use crate::config;

/// Decision about one record.
pub(crate) enum RewriteDecision {
    Keep,
    /// Replaces the record by this line, which includes its newline.
    Replace(Vec<u8>),
    /// Moves the record to the file of replaced answers.
    Remove,
}

/// Decides about a line (without its newline). May be called several times for a line, and must return the same
/// decision each time.
pub(crate) type DecideRewrite<'a> = &'a dyn Fn(&[u8]) -> Result<RewriteDecision>;

/// File of the removed answers, whose prompts are requested again.
pub(crate) fn replaced_file(dir: &Path) -> PathBuf {
    dir.join("responses.replaced.jsonl")
}

/// Reads the replaced answers of the cache in `dir`; none if there is no such file. Lines that cannot be decoded are
/// skipped; checksums are not verified.
///
/// # Errors
/// If the file cannot be opened. An item is an error if the file cannot be read.
pub(crate) fn read_replaced(dir: &Path) -> Result<impl Iterator<Item = Result<Record>>> {
    let path = replaced_file(dir);
    let could_not_read = format!("could not read {}", path.display());
    let file = path.exists().then(|| File::open(&path)).transpose();
    let file = file.with_context(|| could_not_read.clone())?;
    let lines = file.map(|file| BufReader::new(file).split(b'\n'));
    Ok(lines
        .into_iter()
        .flatten()
        .filter_map(move |line| match line {
            Ok(line) => line::decode(&line).ok().map(Ok),
            Err(error) => Some(Err(anyhow!(error).context(could_not_read.clone()))),
        }))
}

/// Rewrites the cache in `dir`. Returns the number of records that were replaced or removed.
///
/// Removed records are durable in `responses.replaced.jsonl` before they leave the cache. After a crash between the two
/// steps a record may be in both.
///
/// # Errors
/// If another process is writing the cache, the cache is damaged, `decide` fails, or the disk fails.
pub(crate) fn rewrite(
    dir: &Path,
    settings: &config::CacheConfig,
    decide: DecideRewrite<'_>,
) -> Result<u64> {
    if !super::exists(dir) {
        return Ok(0);
    }
    // Opening the cache repairs it after a crash.
    drop(Cache::open(dir, settings)?);
    let _lock = super::lock(dir)?;
    // The first pass calls `decide` for all records, the later passes only for the few records that change.
    let mut changed_records = HashSet::new();
    for_each_line(dir, |_, line| {
        if !matches!(decide(line)?, RewriteDecision::Keep) {
            changed_records.insert(keys::identity(line)?);
        }
        Ok(())
    })?;
    if changed_records.is_empty() {
        return Ok(0);
    }
    let decide = |line: &[u8]| -> Result<RewriteDecision> {
        if changed_records.contains(&keys::identity(line)?) {
            decide(line)
        } else {
            Ok(RewriteDecision::Keep)
        }
    };
    save_removed(dir, &decide)?;
    if compressed_file(dir).exists() {
        replace(&compressed_file(dir), |new| {
            let mut text = Vec::with_capacity(FRAME_TEXT_BYTES);
            for_each_line(dir, |is_plain, line| {
                if !is_plain {
                    push_decided(&mut text, line, decide(line)?);
                }
                if text.len() >= FRAME_TEXT_BYTES {
                    new.append(&frames::compress(&text, CompressionLevel::Fast)?)?;
                    text.clear();
                }
                Ok(())
            })?;
            if text.is_empty() {
                return Ok(());
            }
            Ok(new.append(&frames::compress(&text, CompressionLevel::Fast)?)?)
        })?;
    }
    replace(&plain_file(dir), |new| {
        let mut text = Vec::new();
        for_each_line(dir, |is_plain, line| {
            if is_plain {
                text.clear();
                push_decided(&mut text, line, decide(line)?);
                new.append(&text)?;
            }
            Ok(())
        })
    })?;
    Ok(changed_records.len() as u64)
}

fn replace(path: &Path, fill: impl FnOnce(&mut BufferedAppender<'_>) -> Result<()>) -> Result<()> {
    storage::replace(path, &storage::plain_storage(), fill)
        .map(drop)
        .with_context(|| format!("could not rewrite {}", path.display()))
}

/// Appends to `text` the line that `decision` leaves in the cache, if any.
fn push_decided(text: &mut Vec<u8>, line: &[u8], decision: RewriteDecision) {
    match decision {
        RewriteDecision::Remove => {}
        RewriteDecision::Replace(new_line) => text.extend_from_slice(&new_line),
        RewriteDecision::Keep => {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
}

/// Durably appends the records to be removed to `responses.replaced.jsonl`.
fn save_removed(dir: &Path, decide: DecideRewrite<'_>) -> Result<()> {
    let path = replaced_file(dir);
    let could_not_write = || format!("could not write {}", path.display());
    let mut file = storage::open_or_create(&path)?;
    for_each_line(dir, |_, line| {
        if let RewriteDecision::Remove = decide(line)? {
            file.write_all(&[line, b"\n"].concat())
                .with_context(could_not_write)?;
        }
        Ok(())
    })?;
    file.sync_all().with_context(could_not_write)?;
    crate::fs::sync_folder(dir).with_context(could_not_write)?;
    crate::fs::remove_if_empty(&path)
}

/// Calls `on_line` with each record's line, and with true if the line is in the plain file.
fn for_each_line(dir: &Path, mut on_line: impl FnMut(bool, &[u8]) -> Result<()>) -> Result<()> {
    let mut lines = CacheLines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        on_line(lines.is_in_plain(), lines.line())?;
    }
    Ok(())
}
