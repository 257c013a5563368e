//! Repair: what is whole stays, everything else moves aside, and nothing is thrown away.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::frames::{self, Effort, FramePiece, FrameReader};
use super::keys::{self, KeySet, RecordIdentity};
use super::line::{self, LineError};
use super::storage::{self, Appender, WrapFile};
use super::{compressed_file, conflicts_file, exists, plain_file, quarantine_file};

/// What [`repair`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Records that are in the cache now.
    pub records: u64,
    /// Damaged lines and broken frames, now in the quarantine file, and their bytes.
    pub quarantined: u64,
    pub quarantined_bytes: u64,
    /// Records that could still be read from broken frames.
    pub rescued: u64,
    /// Whole records whose key an earlier one has, now in the file of conflicts.
    pub conflicts: u64,
}

impl RepairReport {
    /// Was there anything to repair?
    pub fn changed(&self) -> bool {
        self.quarantined > 0 || self.conflicts > 0
    }
}

/// Moves every damaged line and frame of the cache in `dir` to `responses.quarantine`, and every
/// further record of a key to `responses.conflicts.jsonl`. Nobody else may be writing the cache.
///
/// Both are on the disk before the cache itself is replaced, so that after a crash in between they
/// may hold something twice.
///
/// # Errors
/// If a line is of a newer version, since that is no damage; and where the disk fails.
pub fn repair(dir: &Path) -> Result<RepairReport> {
    if !exists(dir) {
        bail!("there is no cache in {}", dir.display());
    }
    let _lock = super::lock(dir)?;
    // First without writing anything: most caches are whole.
    let found = RepairPass::run(dir, None)?;
    if !found.changed() {
        return Ok(found);
    }
    let repaired = RepairPass::run(dir, Some(&storage::plain_storage()))?;
    for file in [quarantine_file(dir), conflicts_file(dir)] {
        crate::fs::remove_if_empty(&file)?;
    }
    Ok(repaired)
}

/// Where what is kept goes.
type Keep<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// One walk through both files.
struct RepairPass {
    dir: PathBuf,
    done: RepairReport,
    keys: KeySet,
    /// What was met in the compressed file: it may be in the plain one again.
    compressed: HashSet<RecordIdentity>,
    aside: Option<AsideFiles>,
}

/// The files that what is not kept goes to.
struct AsideFiles {
    quarantine: File,
    conflicts: File,
}

impl RepairPass {
    /// With a `wrap`, everything is written; without one, only counted.
    fn run(dir: &Path, wrap: Option<&WrapFile>) -> Result<RepairReport> {
        let aside = match wrap {
            None => None,
            Some(_) => Some(AsideFiles {
                quarantine: storage::open_or_create(&quarantine_file(dir))?,
                conflicts: storage::open_or_create(&conflicts_file(dir))?,
            }),
        };
        let mut pass = RepairPass {
            dir: dir.to_owned(),
            done: RepairReport::default(),
            keys: KeySet::default(),
            compressed: HashSet::new(),
            aside,
        };
        pass.rewrite(&compressed_file(dir), wrap, Self::compressed)?;
        pass.rewrite(&plain_file(dir), wrap, Self::plain)?;
        Ok(pass.done)
    }

    fn rewrite(
        &mut self,
        path: &Path,
        wrap: Option<&WrapFile>,
        walk: fn(&mut Self, &Path, Keep<'_>) -> Result<()>,
    ) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let could_not = || format!("could not repair {}", path.display());
        match wrap {
            None => walk(self, path, &mut |_| Ok(())).with_context(could_not),
            Some(wrap) => storage::replace(path, wrap, |new: &mut Appender<'_>| {
                walk(self, path, &mut |bytes| Ok(new.append(bytes)?))?;
                self.sync_aside()
            })
            .map(drop)
            .with_context(could_not),
        }
    }

    /// What is moved aside must be there before it is gone.
    fn sync_aside(&mut self) -> Result<()> {
        if let Some(aside) = &self.aside {
            aside.quarantine.sync_all()?;
            aside.conflicts.sync_all()?;
            crate::fs::sync_folder(&self.dir)?;
        }
        Ok(())
    }

    fn plain(&mut self, path: &Path, keep: Keep<'_>) -> Result<()> {
        let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
        let mut raw = Vec::new();
        let mut is_first = true;
        loop {
            raw.clear();
            if reader.read_until(b'\n', &mut raw)? == 0 {
                return Ok(());
            }
            if let Some(line) = self.kept_record(&raw, std::mem::take(&mut is_first), true)? {
                keep(line)?;
                keep(b"\n")?;
            }
        }
    }

    fn compressed(&mut self, path: &Path, keep: Keep<'_>) -> Result<()> {
        let mut frames = FrameReader::new(File::open(path)?);
        let mut source = File::open(path)?;
        let mut bytes_of = |from: u64, to: u64| -> Result<Vec<u8>> {
            let mut bytes = Vec::new();
            source.seek(SeekFrom::Start(from))?;
            (&mut source).take(to - from).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        while let Some((offset, piece)) = frames.advance()? {
            let (text, raw) = match piece {
                FramePiece::Text(text) => (text, None),
                FramePiece::Bad { end, .. } => {
                    let raw = bytes_of(offset, end)?;
                    self.quarantine(&raw)?;
                    let text = frames::salvage(&raw);
                    self.done.rescued += memchr::memchr_iter(b'\n', &text).count() as u64;
                    (text, Some(raw))
                }
            };
            let mut kept = Vec::with_capacity(text.len());
            let lines = text.split_inclusive(|&byte| byte == b'\n');
            for (number, line) in lines.enumerate() {
                let is_first = offset == 0 && number == 0;
                if let Some(line) = self.kept_record(line, is_first, false)? {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
            // A frame that all of is kept stays as it is.
            match raw {
                None if kept == text => keep(&bytes_of(offset, frames.position())?)?,
                _ if kept.is_empty() => {}
                _ => keep(&frames::compress(&kept, Effort::Strong)?)?,
            }
        }
        Ok(())
    }

    /// The record in a line as it stands in a file, if it stays. Anything else is moved aside, but for
    /// what editors add.
    fn kept_record<'a>(
        &mut self,
        raw: &'a [u8],
        is_first: bool,
        is_plain: bool,
    ) -> Result<Option<&'a [u8]>> {
        let bare = &raw[line::content_range(raw, is_first)];
        if bare.is_empty() {
            return Ok(None);
        }
        if !is_record(bare)? {
            self.quarantine(raw)?;
            return Ok(None);
        }
        Ok(self.is_kept(bare, is_plain)?.then_some(bare))
    }

    /// Does this whole record stay?
    fn is_kept(&mut self, line: &[u8], is_plain: bool) -> Result<bool> {
        let identity = keys::identity(line)?;
        if is_plain && self.compressed.contains(&identity) {
            // A crash in the middle of compressing: it is there already.
            return Ok(false);
        }
        if !is_plain {
            self.compressed.insert(identity);
        }
        if self.keys.insert(identity.0) {
            self.done.records += 1;
            return Ok(true);
        }
        self.done.conflicts += 1;
        if let Some(aside) = &mut self.aside {
            aside.conflicts.write_all(&[line, b"\n"].concat())?;
        }
        Ok(false)
    }

    fn quarantine(&mut self, raw: &[u8]) -> Result<()> {
        self.done.quarantined += 1;
        self.done.quarantined_bytes += raw.len() as u64;
        if let Some(aside) = &mut self.aside {
            aside.quarantine.write_all(raw)?;
        }
        Ok(())
    }
}

/// Is the line a record?
///
/// # Errors
/// If a newer version wrote it.
fn is_record(bare: &[u8]) -> Result<bool> {
    let verdict = line::verify(bare)
        .and_then(|_| line::head(bare))
        .and_then(|_| line::decode_own(bare));
    match verdict {
        Ok(_) => Ok(true),
        Err(newer @ LineError::Newer(_)) => Err(newer.into()),
        Err(_) => Ok(false),
    }
}
