//! Repairs a cache: moves everything that is not a valid record to other files, and deletes nothing.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::frames::{self, CompressionLevel, FramePiece, FrameReader};
use super::keys::{self, KeyAndChecksum, KeySet};
use super::line::{self, LineError};
use super::storage::{self, BufferedAppender, WrapFile};
use super::{compressed_file, conflicts_file, exists, plain_file, quarantine_file};

/// Result of [`repair`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Number of records in the cache after the repair.
    pub records: u64,
    /// Number of damaged lines and frames, which are in the quarantine file now.
    pub quarantined: u64,
    pub quarantined_bytes: u64,
    /// Number of records recovered from damaged frames.
    pub rescued: u64,
    /// Number of valid records with the key of an earlier record, which are in the conflicts file now.
    pub conflicts: u64,
}

impl RepairReport {
    /// Returns true if the cache needed a repair.
    pub fn changed(&self) -> bool {
        self.quarantined > 0 || self.conflicts > 0
    }
}

/// Moves every damaged line and frame of the cache in `dir` to `responses.quarantine`, and every further record of
/// a key to `responses.conflicts.jsonl`.
///
/// Both files are durable before the cache is replaced. After a crash between the two steps they may contain a
/// record twice.
///
/// # Errors
/// If another process is writing the cache, a newer version wrote a line, or the disk fails.
pub fn repair(dir: &Path) -> Result<RepairReport> {
    if !exists(dir) {
        bail!("no cache found in {}", dir.display());
    }
    let _lock = super::lock(dir)?;
    // Most caches are not damaged, so the first pass only counts.
    let counted = RepairPass::run(dir, None)?;
    if !counted.changed() {
        return Ok(counted);
    }
    let repaired = RepairPass::run(dir, Some(&storage::plain_storage()))?;
    for file in [quarantine_file(dir), conflicts_file(dir)] {
        crate::fs::remove_if_empty(&file)?;
    }
    Ok(repaired)
}

/// Callback with the bytes that stay in the file.
type OnKept<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// One pass over both cache files.
struct RepairPass {
    dir: PathBuf,
    report: RepairReport,
    keys: KeySet,
    /// Records of the compressed file. After a crash the plain file may contain them as well.
    in_compressed: HashSet<KeyAndChecksum>,
    /// None in a pass that only counts.
    aside: Option<AsideFiles>,
}

/// Files for the records that are removed from the cache.
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
            report: RepairReport::default(),
            keys: KeySet::default(),
            in_compressed: HashSet::new(),
            aside,
        };
        pass.rewrite(&compressed_file(dir), wrap, Self::repair_compressed)?;
        pass.rewrite(&plain_file(dir), wrap, Self::repair_plain)?;
        Ok(pass.report)
    }

    fn rewrite(
        &mut self,
        path: &Path,
        wrap: Option<&WrapFile>,
        repair_file: fn(&mut Self, &Path, OnKept<'_>) -> Result<()>,
    ) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let context = || format!("could not repair {}", path.display());
        match wrap {
            None => repair_file(self, path, &mut |_| Ok(())).with_context(context),
            Some(wrap) => storage::replace(path, wrap, |new: &mut BufferedAppender<'_>| {
                repair_file(self, path, &mut |bytes| Ok(new.append(bytes)?))?;
                self.sync_aside()
            })
            .map(drop)
            .with_context(context),
        }
    }

    /// Makes the moved records durable. Must run before the cache is replaced.
    fn sync_aside(&mut self) -> Result<()> {
        if let Some(aside) = &self.aside {
            aside.quarantine.sync_all()?;
            aside.conflicts.sync_all()?;
            crate::fs::sync_folder(&self.dir)?;
        }
        Ok(())
    }

    fn repair_plain(&mut self, path: &Path, keep: OnKept<'_>) -> Result<()> {
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

    fn repair_compressed(&mut self, path: &Path, keep: OnKept<'_>) -> Result<()> {
        let mut frames = FrameReader::new(File::open(path)?);
        let mut source = File::open(path)?;
        let mut read_range = |start: u64, end: u64| -> Result<Vec<u8>> {
            let mut bytes = Vec::new();
            source.seek(SeekFrom::Start(start))?;
            (&mut source).take(end - start).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        while let Some((offset, piece)) = frames.advance()? {
            let (text, raw) = match piece {
                FramePiece::Text(text) => (text, None),
                FramePiece::Bad { end, .. } => {
                    let raw = read_range(offset, end)?;
                    self.quarantine(&raw)?;
                    let text = frames::salvage(&raw);
                    self.report.rescued += memchr::memchr_iter(b'\n', &text).count() as u64;
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
                None if kept == text => keep(&read_range(offset, frames.position())?)?,
                _ if kept.is_empty() => {}
                _ => keep(&frames::compress(&kept, CompressionLevel::Strong)?)?,
            }
        }
        Ok(())
    }

    /// Returns the record in a raw line if it stays in the cache. Other content is moved to another file, except for the
    /// bytes that editors add.
    fn kept_record<'a>(
        &mut self,
        raw: &'a [u8],
        is_first: bool,
        is_plain: bool,
    ) -> Result<Option<&'a [u8]>> {
        let content = &raw[line::content_range(raw, is_first)];
        if content.is_empty() {
            return Ok(None);
        }
        if !is_record(content)? {
            self.quarantine(raw)?;
            return Ok(None);
        }
        Ok(self.is_kept(content, is_plain)?.then_some(content))
    }

    /// Returns true if this record stays in the cache; otherwise counts it and moves it to the conflicts file.
    fn is_kept(&mut self, line: &[u8], is_plain: bool) -> Result<bool> {
        let identity = keys::identity(line)?;
        if is_plain && self.in_compressed.contains(&identity) {
            // A crash during compression left the record in both files.
            return Ok(false);
        }
        if !is_plain {
            self.in_compressed.insert(identity);
        }
        if self.keys.insert(identity.0) {
            self.report.records += 1;
            return Ok(true);
        }
        self.report.conflicts += 1;
        if let Some(aside) = &mut self.aside {
            aside.conflicts.write_all(&[line, b"\n"].concat())?;
        }
        Ok(false)
    }

    fn quarantine(&mut self, raw: &[u8]) -> Result<()> {
        self.report.quarantined += 1;
        self.report.quarantined_bytes += raw.len() as u64;
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
fn is_record(line: &[u8]) -> Result<bool> {
    let result = line::verify(line)
        .and_then(|_| line::head(line))
        .and_then(|_| line::decode_own(line));
    match result {
        Ok(_) => Ok(true),
        Err(newer @ LineError::Newer(_)) => Err(newer.into()),
        Err(_) => Ok(false),
    }
}
