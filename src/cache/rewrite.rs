//! Removes records whose prompts are to be requested again, or changes keys of records. Removed records are not deleted:
//! they are kept in `responses.replaced.jsonl`.

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
    /// The record is replaced by this line, with its newline.
    Replace(Vec<u8>),
    /// The record moves to the file of replaced answers.
    Remove,
}

/// Decides about a line (without its newline). It is called several times for a line and must return the same result.
pub(crate) type DecideRewrite<'a> = &'a dyn Fn(&[u8]) -> Result<RewriteDecision>;

/// File of the removed answers, whose prompts were requested again.
pub(crate) fn replaced_file(dir: &Path) -> PathBuf {
    dir.join("responses.replaced.jsonl")
}

/// Reads the replaced answers of the cache in `dir`; damaged lines are skipped.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn read_replaced(dir: &Path) -> Result<impl Iterator<Item = Result<Record>>> {
    let path = replaced_file(dir);
    let could_not = format!("could not read {}", path.display());
    let file = path.exists().then(|| File::open(&path)).transpose();
    let file = file.with_context(|| could_not.clone())?;
    let lines = file.map(|file| BufReader::new(file).split(b'\n'));
    Ok(lines
        .into_iter()
        .flatten()
        .filter_map(move |line| match line {
            Ok(line) => line::decode(&line).ok().map(Ok),
            Err(error) => Some(Err(anyhow!(error).context(could_not.clone()))),
        }))
}

/// Rewrites the cache in `dir`. Returns the number of records that were replaced or removed.
///
/// Removed records are durable in their file before they leave the cache. After a crash between the two steps a
/// record may be in both.
///
/// # Errors
/// If another process is writing the cache, the cache is damaged, or the disk fails.
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
    // The first pass calls `decide` for all records, the later ones only for the few that change.
    let mut changing = HashSet::new();
    walk(dir, |_, line| {
        if !matches!(decide(line)?, RewriteDecision::Keep) {
            changing.insert(keys::identity(line)?);
        }
        Ok(())
    })?;
    if changing.is_empty() {
        return Ok(0);
    }
    let decide = |line: &[u8]| -> Result<RewriteDecision> {
        if changing.contains(&keys::identity(line)?) {
            decide(line)
        } else {
            Ok(RewriteDecision::Keep)
        }
    };
    save_removed(dir, &decide)?;
    if compressed_file(dir).exists() {
        replace(&compressed_file(dir), |new| {
            let mut text = Vec::with_capacity(FRAME_TEXT_BYTES);
            walk(dir, |is_plain, line| {
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
        walk(dir, |is_plain, line| {
            if is_plain {
                text.clear();
                push_decided(&mut text, line, decide(line)?);
                new.append(&text)?;
            }
            Ok(())
        })
    })?;
    Ok(changing.len() as u64)
}

fn replace(path: &Path, fill: impl FnOnce(&mut BufferedAppender<'_>) -> Result<()>) -> Result<()> {
    storage::replace(path, &storage::plain_storage(), fill)
        .map(drop)
        .with_context(|| format!("could not rewrite {}", path.display()))
}

fn push_decided(text: &mut Vec<u8>, line: &[u8], decision: RewriteDecision) {
    match decision {
        RewriteDecision::Remove => {}
        RewriteDecision::Replace(line) => text.extend_from_slice(&line),
        RewriteDecision::Keep => {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
}

/// Appends the records that are to be removed to `responses.replaced.jsonl`, and syncs the file.
fn save_removed(dir: &Path, decide: DecideRewrite<'_>) -> Result<()> {
    let path = replaced_file(dir);
    let could_not = || format!("could not write {}", path.display());
    let mut file = storage::open_or_create(&path)?;
    walk(dir, |_, line| {
        if let RewriteDecision::Remove = decide(line)? {
            file.write_all(&[line, b"\n"].concat())
                .with_context(could_not)?;
        }
        Ok(())
    })?;
    file.sync_all().with_context(could_not)?;
    crate::fs::sync_folder(dir).with_context(could_not)?;
    crate::fs::remove_if_empty(&path)
}

/// Calls `on_line` for each record; the flag is true for lines of the plain file.
fn walk(dir: &Path, mut on_line: impl FnMut(bool, &[u8]) -> Result<()>) -> Result<()> {
    let mut lines = CacheLines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        on_line(lines.is_in_plain(), lines.line())?;
    }
    Ok(())
}
