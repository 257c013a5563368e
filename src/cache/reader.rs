//! Reads a cache sequentially, also while another process writes it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, Take};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::frames::FrameScan;
use super::keys::{self, KeyAndChecksum};
use super::line::{self, LineError};
use super::record::Record;
use super::recovery::{BadLine, FileEnding, LineScan, ScanError};
use super::{compressed_file, damaged, plain_file, refusal};

/// Reads the records of the cache in `dir` in the order in which they were appended.
///
/// A torn tail is skipped, because another process may be writing it. A damaged line yields an error with its
/// number and offset ([`crate::exit::Exit::Damaged`]), and ends the iteration.
pub fn read(dir: &Path) -> Result<impl Iterator<Item = Result<Record>> + use<>> {
    Ok(Records {
        lines: CacheLines::open(dir)?,
        done: false,
    })
}

struct Records {
    lines: CacheLines,
    done: bool,
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let lines = &mut self.lines;
        let record = match lines.advance() {
            Ok(true) => line::decode(lines.line()).map_err(|fault| lines.refuse(fault)),
            Ok(false) => {
                self.done = true;
                lines.warn_of_torn();
                return None;
            }
            Err(error) => Err(lines.refuse_scan(error)),
        };
        self.done = record.is_err();
        Some(record)
    }
}

/// Reads the whole lines of a cache: first those of the compressed file, then those of the plain file that are
/// not in the compressed one.
pub struct CacheLines {
    dir: PathBuf,
    compressed: Option<FrameScan<File>>,
    plain: Option<LineScan<BufReader<Take<File>>>>,
    /// Records of the plain file.
    in_plain: HashSet<KeyAndChecksum>,
    /// Records that are in both files.
    in_both: HashSet<KeyAndChecksum>,
    is_in_plain: bool,
}

impl CacheLines {
    /// Opens the cache in `dir`.
    ///
    /// # Errors
    /// If there is no cache, or it cannot be read.
    pub fn open(dir: &Path) -> Result<CacheLines> {
        super::check_files(dir)?;
        // The plain file is opened first: a line that is compressed from now on is found in the other file.
        let plain = open(&plain_file(dir))?;
        let compressed = open(&compressed_file(dir))?;
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
                bail!(
                    "no cache found in {}: run `distill harvest` first",
                    dir.display()
                );
            }
            return Ok(lines);
        };
        // A line that is appended later may be compressed before it is read here, so reading stops at the current
        // length.
        let mut length = u64::MAX;
        if lines.compressed.is_some() {
            let mut scan = LineScan::new(BufReader::with_capacity(1 << 20, &plain));
            // Damage is reported later, when the line is read.
            while let Ok(true) = scan.advance() {
                lines.in_plain.extend(keys::identity(scan.line()));
            }
            length = scan.position();
            plain
                .rewind()
                .with_context(|| format!("could not read {}", plain_file(dir).display()))?;
        }
        let plain = BufReader::with_capacity(1 << 20, plain.take(length));
        lines.plain = Some(LineScan::new(plain));
        Ok(lines)
    }

    /// Returns true if the current line comes from the plain file.
    pub fn is_in_plain(&self) -> bool {
        self.is_in_plain
    }

    /// Advances to the next whole record; returns `false` at the end. After a [`ScanError::Bad`] reading can
    /// continue after the damage.
    pub fn advance(&mut self) -> Result<bool, ScanError> {
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
            let is_repeated = !self.in_both.is_empty()
                && keys::identity(scan.line())
                    .is_ok_and(|identity| self.in_both.contains(&identity));
            if !is_repeated {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Line of the current record, without its line end.
    pub fn line(&self) -> &[u8] {
        match (&self.compressed, &self.plain) {
            (Some(scan), _) if !self.is_in_plain => scan.line(),
            (_, Some(scan)) => scan.line(),
            _ => &[],
        }
    }

    /// Path of the file that contains the current line.
    pub fn path(&self) -> PathBuf {
        if self.compressed.is_some() && !self.is_in_plain {
            compressed_file(&self.dir)
        } else {
            plain_file(&self.dir)
        }
    }

    /// Returns the error for a fault of the current line.
    pub fn refuse(&self, fault: LineError) -> anyhow::Error {
        damaged(&self.path(), &self.bad(fault))
    }

    /// Returns the error for a failure of [`CacheLines::advance`].
    pub fn refuse_scan(&self, error: ScanError) -> anyhow::Error {
        refusal(&self.path(), error)
    }

    /// Location of the current line.
    pub fn place(&self) -> LineLocation {
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

    /// Number of bytes of both files that have been read.
    pub fn position(&self) -> u64 {
        let compressed = self.compressed.as_ref().map_or(0, FrameScan::position);
        compressed + self.plain.as_ref().map_or(0, LineScan::position)
    }

    /// Torn tails; valid once [`CacheLines::advance`] has returned `false`.
    pub fn torn(&self) -> Vec<(PathBuf, BadLine)> {
        let compressed = self.compressed.as_ref().map(FrameScan::ending);
        let endings = [
            (compressed_file(&self.dir), compressed),
            (
                plain_file(&self.dir),
                self.plain.as_ref().map(LineScan::ending),
            ),
        ];
        let torn = endings
            .into_iter()
            .filter_map(|(path, ending)| match ending {
                Some(FileEnding::Torn(bad)) => Some((path, bad)),
                _ => None,
            });
        torn.collect()
    }

    /// Warns about torn tails, once [`CacheLines::advance`] has returned `false`.
    pub fn warn_of_torn(&self) {
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
pub struct LineLocation(BadLine);

impl LineLocation {
    /// Offset of the line in the plain file; `None` if it is compressed.
    pub fn offset(&self) -> Option<u64> {
        (!self.0.is_compressed).then_some(self.0.offset)
    }

    /// Returns the error for a fault of this line in the cache in `dir`.
    pub fn refuse(&self, dir: &Path, fault: LineError) -> anyhow::Error {
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

fn open(path: &Path) -> Result<Option<File>> {
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
    /// Number of whole records.
    pub records: u64,
    /// Size of the files in bytes.
    pub bytes: u64,
    /// Keys of more than one record, with the number of their records.
    pub repeated: Vec<(String, u64)>,
    /// Damaged lines and frames, each with its file.
    pub damaged: Vec<(PathBuf, BadLine)>,
    /// Torn tails, each with its file.
    pub torn: Vec<(PathBuf, BadLine)>,
}

/// Decodes every record of the cache in `dir`, and lists all damage.
pub fn verify_cache(
    dir: &Path,
    on_progress: crate::cache::files::OnReadProgress<'_>,
) -> Result<VerifyReport> {
    let mut lines = CacheLines::open(dir)?;
    let total = crate::cache::files::size(dir);
    let mut findings = VerifyReport::default();
    let mut keys = std::collections::BTreeMap::<String, u64>::new();
    loop {
        match lines.advance() {
            Ok(true) => match line::decode_own(lines.line()) {
                Ok(record) => {
                    findings.records += 1;
                    *keys.entry(record.key).or_default() += 1;
                    on_progress(lines.position(), total)?;
                }
                Err(fault) => findings.damaged.push((lines.path(), lines.bad(fault))),
            },
            Ok(false) => break,
            Err(ScanError::Bad(bad)) => findings.damaged.push((lines.path(), bad)),
            Err(error) => return Err(refusal(&lines.path(), error)),
        }
    }
    findings.bytes = lines.position();
    findings.torn = lines.torn();
    findings.repeated = keys.into_iter().filter(|(_, count)| *count > 1).collect();
    Ok(findings)
}
