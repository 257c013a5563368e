//! Reads a cache sequentially. Another process may write the cache at the same time.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, Take};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::frames::FrameScan;
use super::keys::{self, KeyAndChecksum};
use super::line::{self, LineError};
use super::record::Record;
use super::recovery::{BadLine, FileEnding, LineScan, ScanError};
use super::{compressed_file, damaged, plain_file, refusal};
use crate::exit::Exit;

/// Size in bytes of the buffers for reading the plain file.
const BUFFER_BYTES: usize = 1 << 20;

/// Reads the records of the cache in `dir` in the order in which they were appended.
///
/// A torn tail is skipped with a warning, because another process may be writing it. A damaged line yields an error
/// with its number and offset ([`Exit::Damaged`]), and ends the iteration.
///
/// # Errors
/// [`Exit::Usage`] if there is no cache in `dir`. If the cache cannot be opened.
pub fn read(dir: &Path) -> Result<impl Iterator<Item = Result<Record>> + use<>> {
    Ok(Records {
        lines: CacheLines::open(dir)?,
        is_done: false,
    })
}

struct Records {
    lines: CacheLines,
    is_done: bool,
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        let lines = &mut self.lines;
        let record = match lines.advance() {
            Ok(true) => line::decode(lines.line()).map_err(|fault| lines.refuse(fault)),
            Ok(false) => {
                self.is_done = true;
                lines.warn_of_torn();
                return None;
            }
            Err(error) => Err(lines.refuse_scan(error)),
        };
        self.is_done = record.is_err();
        Some(record)
    }
}

/// Reads the complete lines of a cache: first the lines of the compressed file, then the lines of the plain file that
/// are not in the compressed file.
pub(crate) struct CacheLines {
    dir: PathBuf,
    compressed: Option<FrameScan<File>>,
    plain: Option<LineScan<BufReader<Take<File>>>>,
    /// Records of the plain file; empty if there is no compressed file.
    in_plain: HashSet<KeyAndChecksum>,
    /// Records of the compressed file, as far as it has been read, that are also in the plain file.
    in_both: HashSet<KeyAndChecksum>,
    /// True if the current line is in the plain file.
    is_in_plain: bool,
}

impl CacheLines {
    /// Opens the cache in `dir`.
    ///
    /// # Errors
    /// [`Exit::Usage`] if there is no cache. If it cannot be read.
    pub(crate) fn open(dir: &Path) -> Result<CacheLines> {
        super::check_files(dir)?;
        // The plain file is opened first: a line that is compressed from now on is read from the compressed file.
        let plain = open_if_exists(&plain_file(dir))?;
        let compressed = open_if_exists(&compressed_file(dir))?;
        let mut lines = CacheLines {
            dir: dir.to_owned(),
            compressed: compressed.map(FrameScan::new),
            plain: None,
            in_plain: HashSet::new(),
            in_both: HashSet::new(),
            is_in_plain: false,
        };
        let Some(mut plain) = plain else {
            if lines.compressed.is_none() {
                bail!(Exit::Usage(format!(
                    "no cache found in {}: run `distill harvest` first",
                    dir.display()
                )));
            }
            return Ok(lines);
        };
        // A line that is appended from now on may be compressed before it is read from the plain file, and would be
        // read twice. So the plain file is read only up to its current length.
        let mut length = u64::MAX;
        if lines.compressed.is_some() {
            let mut scan = LineScan::new(BufReader::with_capacity(BUFFER_BYTES, &plain));
            loop {
                match scan.advance() {
                    Ok(true) => lines.in_plain.extend(keys::identity(scan.line())),
                    // Reported later, when `advance` reaches the damage.
                    Err(ScanError::Bad(_)) => {}
                    Err(error) => return Err(refusal(&plain_file(dir), error)),
                    Ok(false) => break,
                }
            }
            length = scan.position();
            plain
                .rewind()
                .with_context(|| format!("could not read {}", plain_file(dir).display()))?;
        }
        let plain = BufReader::with_capacity(BUFFER_BYTES, plain.take(length));
        lines.plain = Some(LineScan::new(plain));
        Ok(lines)
    }

    /// Returns true if the current line is in the plain file.
    pub(crate) fn is_in_plain(&self) -> bool {
        self.is_in_plain
    }

    /// Advances to the next complete record; returns `false` at the end. After a [`ScanError::Bad`], the next call
    /// continues after the damage.
    pub(crate) fn advance(&mut self) -> Result<bool, ScanError> {
        if let (Some(scan), false) = (&mut self.compressed, self.is_in_plain)
            && scan.advance()?
        {
            if !self.in_plain.is_empty()
                && let Ok(identity) = keys::identity(scan.line())
                && self.in_plain.contains(&identity)
            {
                self.in_both.insert(identity);
            }
            return Ok(true);
        }
        self.is_in_plain = true;
        let Some(scan) = &mut self.plain else {
            return Ok(false);
        };
        while scan.advance()? {
            let is_compressed = !self.in_both.is_empty()
                && keys::identity(scan.line())
                    .is_ok_and(|identity| self.in_both.contains(&identity));
            if !is_compressed {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the line of the current record, without its line end; an empty slice if there is none.
    pub(crate) fn line(&self) -> &[u8] {
        match (&self.compressed, &self.plain) {
            (Some(scan), _) if !self.is_in_plain => scan.line(),
            (_, Some(scan)) => scan.line(),
            _ => &[],
        }
    }

    /// Returns the byte range of the current line's content in the plain file; `None` if the line is in the compressed
    /// file.
    pub(crate) fn plain_content(&self) -> Option<Range<u64>> {
        let scan = self.plain.as_ref().filter(|_| self.is_in_plain)?;
        Some(scan.content())
    }

    /// Returns the path of the file that contains the current line.
    pub(crate) fn path(&self) -> PathBuf {
        if self.compressed.is_some() && !self.is_in_plain {
            compressed_file(&self.dir)
        } else {
            plain_file(&self.dir)
        }
    }

    /// Returns the error for a fault of the current line.
    pub(crate) fn refuse(&self, fault: LineError) -> anyhow::Error {
        damaged(&self.path(), &self.bad(fault))
    }

    /// Returns the error for a failure of [`CacheLines::advance`].
    pub(crate) fn refuse_scan(&self, error: ScanError) -> anyhow::Error {
        refusal(&self.path(), error)
    }

    /// Returns the location of the current line.
    pub(crate) fn location(&self) -> LineLocation {
        // The fault is replaced in `LineLocation::refuse`.
        LineLocation(self.bad(LineError::MissingChecksum))
    }

    /// Describes `fault` at the current line.
    fn bad(&self, fault: LineError) -> BadLine {
        match (&self.compressed, &self.plain) {
            (Some(scan), _) if !self.is_in_plain => scan.bad(fault),
            (_, Some(scan)) => scan.bad(fault),
            (_, None) => BadLine {
                line: 0,
                offset: 0,
                is_compressed: false,
                fault,
            },
        }
    }

    /// Number of bytes of both files that have been read so far.
    pub(crate) fn position(&self) -> u64 {
        let compressed = self.compressed.as_ref().map_or(0, FrameScan::position);
        compressed + self.plain.as_ref().map_or(0, LineScan::position)
    }

    /// Returns the torn tails of both files, each with its path; valid after [`CacheLines::advance`] has returned
    /// `false`.
    pub(crate) fn torn(&self) -> Vec<(PathBuf, BadLine)> {
        let mut torn = Vec::new();
        if let Some(FileEnding::Torn(bad)) = self.compressed.as_ref().map(FrameScan::ending) {
            torn.push((compressed_file(&self.dir), bad));
        }
        if let Some(FileEnding::Torn(bad)) = self.plain.as_ref().map(LineScan::ending) {
            torn.push((plain_file(&self.dir), bad));
        }
        torn
    }

    /// Warns about torn tails, after [`CacheLines::advance`] has returned `false`.
    pub(crate) fn warn_of_torn(&self) {
        for (path, bad) in self.torn() {
            tracing::warn!(
                "{}: the last record, at byte {}, is incomplete and was skipped: another process is writing it \
                 or was stopped",
                path.display(),
                bad.offset
            );
        }
    }
}

/// Location of a line in a cache.
#[derive(Debug, Clone)]
pub(crate) struct LineLocation(BadLine);

impl LineLocation {
    /// Returns the error for a fault of this line in the cache in `dir`.
    pub(crate) fn refuse(&self, dir: &Path, fault: LineError) -> anyhow::Error {
        let path = if self.0.is_compressed {
            compressed_file(dir)
        } else {
            plain_file(dir)
        };
        let bad = BadLine {
            fault,
            ..self.0.clone()
        };
        damaged(&path, &bad)
    }
}

/// Opens a file for reading; returns `None` if it does not exist.
fn open_if_exists(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("could not open {}", path.display())))
        }
    }
}

/// Result of [`verify_cache`].
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// Number of valid records.
    pub records: u64,
    /// Size of both files in bytes.
    pub bytes: u64,
    /// Keys with more than one record, and their numbers of records.
    pub repeated: Vec<(String, u64)>,
    /// Damaged lines and frames, each with its file.
    pub damaged: Vec<(PathBuf, BadLine)>,
    /// Torn tails, each with its file.
    pub torn: Vec<(PathBuf, BadLine)>,
}

/// Decodes every record of the cache in `dir`, and lists damage and repeated keys.
///
/// # Errors
/// [`Exit::Usage`] if there is no cache in `dir`. If it cannot be read, or `on_progress` fails. Damage is not an error.
pub fn verify_cache(
    dir: &Path,
    on_progress: crate::cache::files::OnReadProgress<'_>,
) -> Result<VerifyReport> {
    let mut lines = CacheLines::open(dir)?;
    let total = crate::cache::files::size(dir);
    let mut report = VerifyReport::default();
    let mut record_counts = std::collections::BTreeMap::<String, u64>::new();
    loop {
        match lines.advance() {
            Ok(true) => match line::decode_checked(lines.line()) {
                Ok(record) => {
                    report.records += 1;
                    *record_counts.entry(record.key).or_default() += 1;
                    on_progress(lines.position(), total)?;
                }
                Err(fault) => report.damaged.push((lines.path(), lines.bad(fault))),
            },
            Ok(false) => break,
            Err(ScanError::Bad(bad)) => report.damaged.push((lines.path(), bad)),
            Err(error) => return Err(refusal(&lines.path(), error)),
        }
    }
    report.bytes = lines.position();
    report.torn = lines.torn();
    report.repeated = record_counts
        .into_iter()
        .filter(|(_, count)| *count > 1)
        .collect();
    Ok(report)
}
