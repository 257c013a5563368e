//! Repairs a cache: moves everything that is not a whole record to other files, and deletes nothing.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::frames::{self, Effort, FramePiece, FrameReader};
use super::keys::{self, KeyAndChecksum, KeySet};
use super::line::{self, LineError};
use super::storage::{self, BufferedAppender, WrapFile};
use super::{compressed_file, conflicts_file, exists, plain_file, quarantine_file};

/// Result of [`repair`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Records that are in the cache now.
    pub records: u64,
    /// Damaged lines and frames, which are in the quarantine file now.
    pub quarantined: u64,
    pub quarantined_bytes: u64,
    /// Records that were recovered from damaged frames.
    pub rescued: u64,
    /// Whole records with the key of an earlier record, which are in the conflicts file now.
    pub conflicts: u64,
}

impl RepairReport {
    /// Returns true if the cache was not whole.
    pub fn changed(&self) -> bool {
        self.quarantined > 0 || self.conflicts > 0
    }
}

/// Moves every damaged line and frame of the cache in `dir` to `responses.quarantine`, and every further record of
/// a key to `responses.conflicts.jsonl`.
///
/// Both files are durable before the cache is replaced. After a crash between the two steps they may hold a record
/// twice.
///
/// # Errors
/// If another process is writing the cache, a newer version wrote a line, or the disk fails.
pub fn repair(dir: &Path) -> Result<RepairReport> {
    if !exists(dir) {
        bail!("there is no cache in {}", dir.display());
    }
    let _lock = super::lock(dir)?;
    // Most caches are whole, so the first pass only counts.
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

/// Callback with the bytes that stay in the file.
type OnKept<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// One pass over both files.
struct RepairPass {
    dir: PathBuf,
    done: RepairReport,
    keys: KeySet,
    /// Records of the compressed file: after a crash they may be in the plain file as well.
    compressed: HashSet<KeyAndChecksum>,
    aside: Option<AsideFiles>,
}

/// Files for the records that do not stay.
struct AsideFiles {
    quarantine: File,
    conflicts: File,
}

impl RepairPass {
    /// Repairs the files if `wrap` is given; counts only if it is `None`.
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
        walk: fn(&mut Self, &Path, OnKept<'_>) -> Result<()>,
    ) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let could_not = || format!("could not repair {}", path.display());
        match wrap {
            None => walk(self, path, &mut |_| Ok(())).with_context(could_not),
            Some(wrap) => storage::replace(path, wrap, |new: &mut BufferedAppender<'_>| {
                walk(self, path, &mut |bytes| Ok(new.append(bytes)?))?;
                self.sync_aside()
            })
            .map(drop)
            .with_context(could_not),
        }
    }

    /// Makes the moved records durable, before they leave the cache.
    fn sync_aside(&mut self) -> Result<()> {
        if let Some(aside) = &self.aside {
            aside.quarantine.sync_all()?;
            aside.conflicts.sync_all()?;
            crate::fs::sync_folder(&self.dir)?;
        }
        Ok(())
    }

    fn plain(&mut self, path: &Path, keep: OnKept<'_>) -> Result<()> {
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

    fn compressed(&mut self, path: &Path, keep: OnKept<'_>) -> Result<()> {
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
            // A frame whose lines all stay is copied unchanged.
            match raw {
                None if kept == text => keep(&bytes_of(offset, frames.position())?)?,
                _ if kept.is_empty() => {}
                _ => keep(&frames::compress(&kept, Effort::Strong)?)?,
            }
        }
        Ok(())
    }

    /// Returns the record in a raw line of a file if it stays. Anything else is moved to another file, except for
    /// the bytes that editors add.
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

    /// Returns true if this whole record stays.
    fn is_kept(&mut self, line: &[u8], is_plain: bool) -> Result<bool> {
        let identity = keys::identity(line)?;
        if is_plain && self.compressed.contains(&identity) {
            // A crash during compression left the record in both files.
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

/// Returns true if the line is a valid record.
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
