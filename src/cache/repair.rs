//! Repairs a cache: moves damaged bytes, and records that repeat a key, to other files. No record is deleted.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::frames::{self, CompressionLevel, FramePiece, FrameReader};
use super::keys::{self, KeyAndChecksum, KeySet};
use super::line::{self, LineError};
use super::storage::{self, BufferedAppender, WrapFile};
use super::{compressed_file, conflicts_file, exists, plain_file, quarantine_file};

/// Size in bytes of the buffer for reading the plain file.
const BUFFER_BYTES: usize = 1 << 20;

/// Result of [`repair`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Number of records in the cache after the repair.
    pub records: u64,
    /// Number of damaged lines and frames, which are now in the quarantine file.
    pub quarantined: u64,
    /// Size in bytes of these lines and frames.
    pub quarantined_bytes: u64,
    /// Number of readable records in damaged frames.
    pub rescued: u64,
    /// Number of valid records with the key of an earlier record, which are now in the conflicts file.
    pub conflicts: u64,
}

impl RepairReport {
    /// Returns true if the cache needed a repair.
    pub fn changed(&self) -> bool {
        self.quarantined > 0 || self.conflicts > 0
    }
}

/// Moves every damaged line and frame of the cache in `dir` to `responses.quarantine`, and every record with the key of
/// an earlier record to `responses.conflicts.jsonl`.
///
/// Both files are durable before the cache is replaced. After a crash between these two steps and another repair, they
/// may contain a record twice.
///
/// # Errors
/// [`Exit::Usage`](crate::exit::Exit::Usage) if `dir` does not contain a cache. If another process is writing it, a
/// newer version wrote a line, or the disk fails.
pub fn repair(dir: &Path) -> Result<RepairReport> {
    if !exists(dir) {
        return Err(super::not_found(dir));
    }
    let _lock = super::lock(dir)?;
    // Most caches are not damaged, so the first pass only counts.
    let count_report = RepairPass::run(dir, None)?;
    if !count_report.changed() {
        return Ok(count_report);
    }
    let repair_report = RepairPass::run(dir, Some(&storage::plain_storage()))?;
    for file in [quarantine_file(dir), conflicts_file(dir)] {
        crate::fs::remove_if_empty(&file)?;
    }
    Ok(repair_report)
}

/// Callback with bytes that stay in the file.
type OnRetained<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// One pass over both cache files.
struct RepairPass {
    dir: PathBuf,
    report: RepairReport,
    /// Keys of the records that stay in the cache.
    keys: KeySet,
    /// Records of the compressed file. After a crash the plain file may also contain them.
    in_compressed: HashSet<KeyAndChecksum>,
    /// `None` in a pass that only counts.
    moved: Option<MovedFiles>,
}

/// Files to which damaged bytes and conflicting records are moved.
struct MovedFiles {
    quarantine: File,
    conflicts: File,
}

impl RepairPass {
    /// Repairs the files with storage made by `wrap`. If `wrap` is `None`, only counts and changes no file.
    fn run(dir: &Path, wrap: Option<&WrapFile>) -> Result<RepairReport> {
        let moved = match wrap {
            None => None,
            Some(_) => Some(MovedFiles {
                quarantine: storage::open_or_create(&quarantine_file(dir))?,
                conflicts: storage::open_or_create(&conflicts_file(dir))?,
            }),
        };
        let mut pass = RepairPass {
            dir: dir.to_owned(),
            report: RepairReport::default(),
            keys: KeySet::default(),
            in_compressed: HashSet::new(),
            moved,
        };
        pass.rewrite(&compressed_file(dir), wrap, Self::repair_compressed)?;
        pass.rewrite(&plain_file(dir), wrap, Self::repair_plain)?;
        Ok(pass.report)
    }

    /// Runs `repair_file` on the file at `path`, and replaces the file by the bytes that stay. Without `wrap`, the file
    /// does not change.
    fn rewrite(
        &mut self,
        path: &Path,
        wrap: Option<&WrapFile>,
        repair_file: fn(&mut Self, &Path, OnRetained<'_>) -> Result<()>,
    ) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let context = || format!("could not repair {}", path.display());
        match wrap {
            None => repair_file(self, path, &mut |_| Ok(())).with_context(context),
            Some(wrap) => storage::replace(path, wrap, |new: &mut BufferedAppender<'_>| {
                repair_file(self, path, &mut |bytes| Ok(new.append(bytes)?))?;
                self.sync_moved()
            })
            .map(drop)
            .with_context(context),
        }
    }

    /// Makes the moved bytes durable. Must run before the cache file is replaced.
    fn sync_moved(&mut self) -> Result<()> {
        if let Some(moved) = &self.moved {
            moved.quarantine.sync_all()?;
            moved.conflicts.sync_all()?;
            crate::fs::sync_folder(&self.dir)?;
        }
        Ok(())
    }

    fn repair_plain(&mut self, path: &Path, on_retained: OnRetained<'_>) -> Result<()> {
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, File::open(path)?);
        let mut raw = Vec::new();
        let mut is_first = true;
        loop {
            raw.clear();
            if reader.read_until(b'\n', &mut raw)? == 0 {
                return Ok(());
            }
            if let Some(line) = self.retained_record(&raw, std::mem::take(&mut is_first), true)? {
                on_retained(line)?;
                on_retained(b"\n")?;
            }
        }
    }

    fn repair_compressed(&mut self, path: &Path, on_retained: OnRetained<'_>) -> Result<()> {
        let mut frames = FrameReader::new(File::open(path)?);
        let mut source = File::open(path)?;
        let mut read_range = |start: u64, end: u64| -> Result<Vec<u8>> {
            let mut bytes = Vec::new();
            source.seek(SeekFrom::Start(start))?;
            (&mut source).take(end - start).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        while let Some((offset, piece)) = frames.advance()? {
            let (text, is_damaged) = match piece {
                FramePiece::Text(text) => (text, false),
                FramePiece::Bad { end, .. } => {
                    let damaged_bytes = read_range(offset, end)?;
                    self.quarantine(&damaged_bytes)?;
                    let text = frames::salvage(&damaged_bytes);
                    self.report.rescued += memchr::memchr_iter(b'\n', &text).count() as u64;
                    (text, true)
                }
            };
            let mut retained = Vec::with_capacity(text.len());
            let lines = text.split_inclusive(|&byte| byte == b'\n');
            for (number, line) in lines.enumerate() {
                let is_first = offset == 0 && number == 0;
                if let Some(record) = self.retained_record(line, is_first, false)? {
                    retained.extend_from_slice(record);
                    retained.push(b'\n');
                }
            }
            // A frame whose lines all stay is copied unchanged.
            if !is_damaged && retained == text {
                on_retained(&read_range(offset, frames.position())?)?;
            } else if !retained.is_empty() {
                on_retained(&frames::compress(&retained, CompressionLevel::Strong)?)?;
            }
        }
        Ok(())
    }

    /// Returns the record in a raw line if the record stays in the cache. Other content is moved to another file,
    /// except for bytes that editors add, and records that are also in the compressed file. `is_first`: the line is the
    /// first of its file.
    fn retained_record<'a>(
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
        Ok(self.retain(content, is_plain)?.then_some(content))
    }

    /// Returns true if a valid record stays in the cache. A record with the key of an earlier record is moved to the
    /// conflicts file; a record of the plain file that is also in the compressed file is dropped.
    fn retain(&mut self, line: &[u8], is_plain: bool) -> Result<bool> {
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
        if let Some(moved) = &mut self.moved {
            moved.conflicts.write_all(&[line, b"\n"].concat())?;
        }
        Ok(false)
    }

    /// Counts damaged bytes and moves them to the quarantine file.
    fn quarantine(&mut self, raw: &[u8]) -> Result<()> {
        self.report.quarantined += 1;
        self.report.quarantined_bytes += raw.len() as u64;
        if let Some(moved) = &mut self.moved {
            moved.quarantine.write_all(raw)?;
        }
        Ok(())
    }
}

/// Returns true if `line` is a valid record.
///
/// # Errors
/// If a newer version of distill wrote the line.
fn is_record(line: &[u8]) -> Result<bool> {
    let result = line::verify(line)
        .and_then(|_| line::head(line))
        .and_then(|_| line::decode_checked(line));
    match result {
        Ok(_) => Ok(true),
        Err(newer @ LineError::Newer(_)) => Err(newer.into()),
        Err(_) => Ok(false),
    }
}
