//! Merges caches by key, for example those of several machines.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::keys::{self, KeyAndChecksum};
use super::line;
use super::reader::CacheLines;
use super::recovery::{FileEnding, LineScan, ScanError};
use super::storage;
use super::writer::{Cache, EncodedRecord};
use super::{conflicts_file, exists, refusal};
use crate::cache::files::{OnReadProgress, size};
use crate::cache::usage::Usage;
use crate::config;
use crate::exit::Exit;

/// Number of records that are appended in one group.
const GROUP: usize = 256;

/// Maximum number of conflicting keys listed in the report.
const MAX_LISTED_KEYS: usize = 5;

/// Result of merging one source.
#[derive(Debug, Default, PartialEq)]
pub struct MergeReport {
    /// Number of records read from the source, including one that was refused.
    pub records: u64,
    /// Number of records whose key was not in the cache.
    pub added: u64,
    /// Number of records that were already in the cache, byte for byte.
    pub same: u64,
    /// Number of records whose key was in the cache with other content. They are in the conflicts file now.
    pub conflicts: u64,
    /// Keys of the first conflicts.
    pub keys: Vec<String>,
    /// Cost in US dollars of the added records, and of the conflicting ones that were not in the conflicts file yet.
    pub cost_usd: f64,
    /// Token usage of the records that `cost_usd` would include, but that have no cost.
    pub unpriced: Usage,
}

/// Appends the records of `sources` to the cache in `into`, except for records whose key it contains. The cache is
/// created if it does not exist. If two different records have the same key, the first stays, and the second is
/// appended to `responses.conflicts.jsonl`. The sources do not change. An interrupted merge can be rerun.
///
/// # Errors
/// If a source is not a cache, or contains a damaged record ([`Exit::Damaged`]). The records before it are merged.
pub fn merge(
    into: &Path,
    settings: &config::CacheConfig,
    sources: &[PathBuf],
    on_progress: OnReadProgress<'_>,
) -> Result<Vec<MergeReport>> {
    let mut reports = Vec::new();
    merge_all(into, settings, sources, &mut reports, on_progress)?;
    Ok(reports)
}

/// Merges like [`merge`], and fills `reports` with one report per source. If an error ends the merge, the last report
/// is that of the source with the error.
///
/// # Errors
/// The errors of [`merge`].
pub fn merge_all(
    into: &Path,
    settings: &config::CacheConfig,
    sources: &[PathBuf],
    reports: &mut Vec<MergeReport>,
    on_progress: OnReadProgress<'_>,
) -> Result<()> {
    for source in sources {
        check_source(into, source)?;
    }
    // One sync at the end is enough, because a merge can be rerun.
    let settings = config::CacheConfig {
        durability: config::Durability::None,
        ..settings.clone()
    };
    let cache = Cache::open(into, &settings)?;
    let mut job = MergeJob {
        in_cache: identities(into)?,
        conflicts: storage::open_or_create(&conflicts_file(into))?,
        in_conflicts_file: HashSet::new(),
        cache,
    };
    job.load_conflicts(into)?;
    let total: u64 = sources.iter().map(|source| size(source)).sum();
    let mut bytes_before = 0;
    for source in sources {
        let mut report = MergeReport::default();
        let result = job.merge_source(source, &mut report, &mut |bytes| {
            on_progress(bytes_before + bytes, total)
        });
        reports.push(report);
        result?;
        bytes_before += size(source);
    }
    job.cache.sync()?;
    job.conflicts.sync_all()?;
    crate::fs::remove_if_empty(&conflicts_file(into))
}

fn check_source(into: &Path, source: &Path) -> Result<()> {
    if !exists(source) {
        return Err(super::not_found(source));
    }
    if crate::fs::is_same(into, source) {
        let message = format!("{} cannot be merged into itself", source.display());
        return Err(Exit::Usage(message).into());
    }
    Ok(())
}

/// Reads the identities of all records of the cache in `dir`.
fn identities(dir: &Path) -> Result<HashSet<KeyAndChecksum>> {
    let mut lines = CacheLines::open(dir)?;
    let mut identities = HashSet::new();
    while lines
        .advance()
        .map_err(|error| refusal(&lines.path(), error))?
    {
        identities.insert(keys::identity(lines.line())?);
    }
    Ok(identities)
}

/// Returns the cost of a record in US dollars, and its usage if it has no cost. Fails if the record's key does
/// not belong to its request.
fn cost_and_usage(line: &[u8]) -> Result<(f64, Option<Usage>), line::LineError> {
    let cost_usd = line::cost_usd(line)?;
    let record = line::decode_checked(line)?;
    Ok((cost_usd, record.usage.filter(|_| cost_usd == 0.0)))
}

struct MergeJob {
    cache: Cache,
    in_cache: HashSet<KeyAndChecksum>,
    conflicts: File,
    in_conflicts_file: HashSet<KeyAndChecksum>,
}

/// New records of a source that have not been appended yet, and their sums, which are added to the report afterwards.
#[derive(Default)]
struct PendingRecords {
    records: Vec<EncodedRecord>,
    cost_usd: f64,
    unpriced: Usage,
}

impl MergeJob {
    /// Reads the identities of the conflicts that an earlier merge has written, and repairs the end of their file, so
    /// that further conflicts can be appended.
    fn load_conflicts(&mut self, dir: &Path) -> Result<()> {
        let path = conflicts_file(dir);
        let mut scan = LineScan::new(BufReader::new(File::open(&path)?));
        loop {
            match scan.advance() {
                Ok(true) => {
                    self.in_conflicts_file.insert(keys::identity(scan.line())?);
                }
                Ok(false) => break,
                // A damaged conflict is appended a second time if its source is merged again.
                Err(ScanError::Bad(_)) => {}
                Err(error) => return Err(refusal(&path, error)),
            }
        }
        let could_not_write = || format!("could not write to {}", path.display());
        match scan.ending() {
            FileEnding::Clean => Ok(()),
            FileEnding::Unterminated => {
                (self.conflicts.write_all(b"\n")).with_context(could_not_write)
            }
            FileEnding::Torn(tail) => {
                (self.conflicts.set_len(tail.offset)).with_context(could_not_write)
            }
        }
    }

    fn merge_source(
        &mut self,
        source: &Path,
        report: &mut MergeReport,
        on_progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut pending = PendingRecords::default();
        let result = self.read_source(source, &mut pending, report, on_progress);
        self.append(&mut pending, report)?;
        if result.is_err() {
            self.cache.sync()?;
            self.conflicts.sync_all()?;
        }
        result
    }

    /// Reads the records of `source`, and leaves the last new ones in `pending`, also after an error.
    fn read_source(
        &mut self,
        source: &Path,
        pending: &mut PendingRecords,
        report: &mut MergeReport,
        on_progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut lines = CacheLines::open(source)?;
        while lines.advance().map_err(|error| lines.refuse_scan(error))? {
            self.merge_line(lines.line(), pending, report)
                .map_err(|error| match error.downcast::<line::LineError>() {
                    Ok(fault) => lines.refuse(fault),
                    Err(error) => error,
                })?;
            if pending.records.len() == GROUP {
                self.append(pending, report)?;
                on_progress(lines.position())?;
            }
        }
        on_progress(lines.position())?;
        for (path, bad) in lines.torn() {
            tracing::warn!(
                "{}: the last record, at byte {}, is incomplete and was skipped",
                path.display(),
                bad.offset
            );
        }
        Ok(())
    }

    /// Counts the record in `line`, and adds it to `pending` or to the conflicts if the cache does not contain it.
    fn merge_line(
        &mut self,
        line: &[u8],
        pending: &mut PendingRecords,
        report: &mut MergeReport,
    ) -> Result<()> {
        report.records += 1;
        let identity = keys::identity(line)?;
        if self.in_cache.contains(&identity) {
            report.same += 1;
            return Ok(());
        }
        let (cost_usd, unpriced) = cost_and_usage(line)?;
        let unpriced = unpriced.unwrap_or_default();
        let is_pending = |record: &EncodedRecord| record.has_fingerprint(&identity.0);
        if !self.cache.contains_fingerprint(&identity.0) && !pending.records.iter().any(is_pending)
        {
            pending.records.push(EncodedRecord::from_line(line)?);
            pending.cost_usd += cost_usd;
            pending.unpriced.add(&unpriced);
            self.in_cache.insert(identity);
            return Ok(());
        }
        report.conflicts += 1;
        if report.keys.len() < MAX_LISTED_KEYS {
            report.keys.push(line::head(line)?.key.into_owned());
        }
        if self.in_conflicts_file.insert(identity) {
            (self.conflicts.write_all(&[line, b"\n"].concat()))
                .context("could not write to responses.conflicts.jsonl")?;
            // A conflicting answer was paid for as well.
            report.cost_usd += cost_usd;
            report.unpriced.add(&unpriced);
        }
        Ok(())
    }

    /// Appends the pending records to the cache and counts them.
    fn append(&mut self, pending: &mut PendingRecords, report: &mut MergeReport) -> Result<()> {
        self.cache.append_group(&pending.records)?;
        let appended = std::mem::take(pending);
        report.added += appended.records.len() as u64;
        report.cost_usd += appended.cost_usd;
        report.unpriced.add(&appended.unpriced);
        Ok(())
    }
}
