//! Records that leave the cache to be asked for again, or get another key. Nothing is thrown away.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::frames::{self, Effort, FRAME_TEXT};
use super::keys;
use super::line;
use super::reader::CacheLines;
use super::record::Record;
use super::storage::{self, Appender};
use super::writer::Cache;
use super::{compressed_file, plain_file};
use crate::config;

/// Decision about one record.
pub(crate) enum RewriteDecision {
    Keep,
    /// Another line takes its place, with its newline.
    Replace(Vec<u8>),
    /// It moves to the file of replaced answers.
    Remove,
}

/// Decides about a line, without its newline. It may be called twice for a line, with the same result.
pub(crate) type DecideRewrite<'a> = &'a dyn Fn(&[u8]) -> Result<RewriteDecision>;

/// The file that has what was asked for again.
pub(crate) fn replaced_file(dir: &Path) -> PathBuf {
    dir.join("responses.replaced.jsonl")
}

/// The answers in `dir` that were asked for again; damaged lines are left out.
///
/// # Errors
/// Where the file cannot be read.
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

/// Rewrites the cache in `dir`, which nobody else may be writing. What leaves it is on the disk elsewhere
/// before it is gone, so that after a crash in between it may be there twice. Returns how many records
/// did not stay.
///
/// # Errors
/// Where the cache is damaged, or the disk fails.
pub(crate) fn rewrite(
    dir: &Path,
    settings: &config::Cache,
    decide: DecideRewrite<'_>,
) -> Result<u64> {
    if !super::exists(dir) {
        return Ok(0);
    }
    // What a crash has left is mended first.
    drop(Cache::open(dir, settings)?);
    let _lock = super::lock(dir)?;
    // Decided once for all records; the few that do not stay are looked at again as they are written.
    let mut marked = HashSet::new();
    walk(dir, |_, line| {
        if !matches!(decide(line)?, RewriteDecision::Keep) {
            marked.insert(keys::identity(line)?);
        }
        Ok(())
    })?;
    if marked.is_empty() {
        return Ok(0);
    }
    let decide = |line: &[u8]| -> Result<RewriteDecision> {
        if marked.contains(&keys::identity(line)?) {
            decide(line)
        } else {
            Ok(RewriteDecision::Keep)
        }
    };
    keep_replaced(dir, &decide)?;
    if compressed_file(dir).exists() {
        replace(&compressed_file(dir), |new| {
            let mut text = Vec::with_capacity(FRAME_TEXT);
            walk(dir, |is_plain, line| {
                if !is_plain {
                    push(&mut text, line, decide(line)?);
                }
                if text.len() >= FRAME_TEXT {
                    new.append(&frames::compress(&text, Effort::Fast)?)?;
                    text.clear();
                }
                Ok(())
            })?;
            if text.is_empty() {
                return Ok(());
            }
            Ok(new.append(&frames::compress(&text, Effort::Fast)?)?)
        })?;
    }
    replace(&plain_file(dir), |new| {
        let mut text = Vec::new();
        walk(dir, |is_plain, line| {
            if is_plain {
                text.clear();
                push(&mut text, line, decide(line)?);
                new.append(&text)?;
            }
            Ok(())
        })
    })?;
    Ok(marked.len() as u64)
}

fn replace(path: &Path, fill: impl FnOnce(&mut Appender<'_>) -> Result<()>) -> Result<()> {
    storage::replace(path, &storage::plain_storage(), fill)
        .map(drop)
        .with_context(|| format!("could not rewrite {}", path.display()))
}

fn push(text: &mut Vec<u8>, line: &[u8], fate: RewriteDecision) {
    match fate {
        RewriteDecision::Remove => {}
        RewriteDecision::Replace(line) => text.extend_from_slice(&line),
        RewriteDecision::Keep => {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
}

/// Appends what is to leave to its file, durably.
fn keep_replaced(dir: &Path, decide: DecideRewrite<'_>) -> Result<()> {
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

/// Hands each whole line to `take`; the flag says whether it is in the plain file.
fn walk(dir: &Path, mut take: impl FnMut(bool, &[u8]) -> Result<()>) -> Result<()> {
    let mut lines = CacheLines::open(dir)?;
    while lines.advance().map_err(|error| lines.refuse_scan(error))? {
        take(lines.is_in_plain(), lines.line())?;
    }
    Ok(())
}
