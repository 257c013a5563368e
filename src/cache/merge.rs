//! Merging caches by key: those of several machines into one, say.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::keys::{self, RecordIdentity};
use super::line;
use super::reader::CacheLines;
use super::recovery::LineScan;
use super::storage;
use super::writer::{Cache, EncodedRecord};
use super::{conflicts_file, exists, refusal};
use crate::cache::files::{OnReadProgress, size};
use crate::cache::usage::Usage;
use crate::config;
use crate::exit::Exit;

/// Records are appended so many at a time.
const GROUP: usize = 256;

/// So many keys of conflicts are told by name.
const NAMED: usize = 5;

/// What came of one source of a merge.
#[derive(Debug, Default, PartialEq)]
pub struct MergeReport {
    pub records: u64,
    /// Those whose key the cache did not have.
    pub added: u64,
    /// Those that it had already, byte for byte.
    pub same: u64,
    /// Those whose key it had with another record: another answer, which was paid for as well. They
    /// are in the file of conflicts now.
    pub conflicts: u64,
    /// The first keys of those.
    pub keys: Vec<String>,
    /// Cost of the added records in dollars, and the tokens of those without a price.
    pub cost_usd: f64,
    pub unpriced: Usage,
}

/// Appends to the cache in `into`, which is created if need be, every record of `sources` whose key
/// it does not have. Of two records of one key the first stays; the other one is appended to
/// `responses.conflicts.jsonl` beside it. The sources stay as they are. A merge that was interrupted
/// can simply be run again.
///
/// # Errors
/// If a source is no cache, or is damaged ([`Exit::Damaged`]; what came before the damage is merged).
pub fn merge(
    into: &Path,
    settings: &config::Cache,
    sources: &[PathBuf],
    on_progress: OnReadProgress<'_>,
) -> Result<Vec<MergeReport>> {
    let mut all = Vec::new();
    merge_all(into, settings, sources, &mut all, on_progress)?;
    Ok(all)
}

/// As [`merge`]; `all` has what was merged also after an error.
///
/// # Errors
/// As [`merge`].
pub fn merge_all(
    into: &Path,
    settings: &config::Cache,
    sources: &[PathBuf],
    all: &mut Vec<MergeReport>,
    on_progress: OnReadProgress<'_>,
) -> Result<()> {
    for source in sources {
        check_source(into, source)?;
    }
    // One sync at the end does: a merge can be run again.
    let settings = config::Cache {
        durability: config::Durability::None,
        ..settings.clone()
    };
    let cache = Cache::open(into, &settings)?;
    let mut merging = MergeJob {
        known: identities(into)?,
        conflicts: storage::open_or_create(&conflicts_file(into))?,
        told: HashSet::new(),
        cache,
    };
    merging.load_known_conflicts(into)?;
    let total: u64 = sources.iter().map(|source| size(source)).sum();
    let mut before = 0;
    for source in sources {
        let mut merged = MergeReport::default();
        let taken = merging.merge_source(source, &mut merged, &mut |bytes| {
            on_progress(before + bytes, total)
        });
        all.push(merged);
        taken?;
        before += size(source);
    }
    merging.cache.sync()?;
    merging.conflicts.sync_all()?;
    crate::fs::remove_if_empty(&conflicts_file(into))
}

fn check_source(into: &Path, source: &Path) -> Result<()> {
    if !exists(source) {
        let message = format!(
            "there is no cache in {}: give the folder that holds responses.jsonl",
            source.display()
        );
        return Err(Exit::Usage(message).into());
    }
    let is_same = match (into.canonicalize(), source.canonicalize()) {
        (Ok(into), Ok(source)) => into == source,
        _ => false,
    };
    if is_same {
        let message = format!("{} cannot be merged into itself", source.display());
        return Err(Exit::Usage(message).into());
    }
    Ok(())
}

/// The records that the cache in `dir` holds.
fn identities(dir: &Path) -> Result<HashSet<RecordIdentity>> {
    let mut lines = CacheLines::open(dir)?;
    let mut known = HashSet::new();
    while lines
        .advance()
        .map_err(|error| refusal(&lines.path(), error))?
    {
        known.insert(keys::identity(lines.line())?);
    }
    Ok(known)
}

/// Cost of a record in dollars, and its usage if it has no cost. It is refused where its key is not its own.
fn cost_and_usage(line: &[u8]) -> Result<(f64, Option<Usage>), line::LineError> {
    let cost_usd = line::cost_usd(line)?;
    let record = line::decode_own(line)?;
    Ok((cost_usd, record.usage.filter(|_| cost_usd == 0.0)))
}

struct MergeJob {
    cache: Cache,
    known: HashSet<RecordIdentity>,
    conflicts: File,
    /// The records in the file of conflicts.
    told: HashSet<RecordIdentity>,
}

impl MergeJob {
    fn load_known_conflicts(&mut self, dir: &Path) -> Result<()> {
        let path = conflicts_file(dir);
        let mut scan = LineScan::new(BufReader::new(File::open(&path)?));
        // A torn tail or damage in it only costs that a conflict may be in it twice.
        while let Ok(true) = scan.advance() {
            self.told.insert(keys::identity(scan.line())?);
        }
        Ok(())
    }

    fn merge_source(
        &mut self,
        source: &Path,
        merged: &mut MergeReport,
        on_progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut lines = CacheLines::open(source)?;
        let mut group = Vec::with_capacity(GROUP);
        loop {
            let is_more = match lines.advance() {
                Ok(is_more) => is_more,
                Err(error) => {
                    self.cache.append_group(&group)?;
                    self.cache.sync()?;
                    return Err(refusal(&lines.path(), error));
                }
            };
            if group.len() == GROUP || !is_more {
                self.cache.append_group(&group)?;
                group.clear();
                on_progress(lines.position())?;
            }
            if !is_more {
                break;
            }
            merged.records += 1;
            let line = lines.line();
            let identity = keys::identity(line)?;
            if self.known.contains(&identity) {
                merged.same += 1;
            } else if self.cache.contains_fingerprint(&identity.0)
                || group
                    .iter()
                    .any(|sealed: &EncodedRecord| sealed.has_fingerprint(&identity.0))
            {
                self.keep_conflict(line, identity, merged)?;
            } else {
                merged.added += 1;
                self.known.insert(identity);
                group.push(EncodedRecord::from_line(line).map_err(|fault| lines.refuse(fault))?);
                let (cost_usd, unpriced) =
                    cost_and_usage(line).map_err(|fault| lines.refuse(fault))?;
                merged.cost_usd += cost_usd;
                if let Some(usage) = unpriced {
                    merged.unpriced.add(&usage);
                }
            }
        }
        for (path, bad) in lines.torn() {
            tracing::warn!(
                "{}: the last record, at byte {}, is not whole and is left out",
                path.display(),
                bad.offset
            );
        }
        Ok(())
    }

    fn keep_conflict(
        &mut self,
        line: &[u8],
        identity: RecordIdentity,
        merged: &mut MergeReport,
    ) -> Result<()> {
        merged.conflicts += 1;
        if merged.keys.len() < NAMED {
            merged.keys.push(line::head(line)?.key.into_owned());
        }
        if self.told.insert(identity) {
            // It was paid for, too.
            let (cost_usd, unpriced) = cost_and_usage(line)?;
            merged.cost_usd += cost_usd;
            merged.unpriced.add(&unpriced.unwrap_or_default());
            (self.conflicts.write_all(&[line, b"\n"].concat()))
                .context("could not keep a conflict")?;
        }
        Ok(())
    }
}
