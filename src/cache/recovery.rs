//! Finds the complete lines of a cache file, and determines how the file ends. Pure: reads from a `BufRead`.
//!
//! A crash can leave two things at the end of an append-only file: a line without its newline, or blocks that
//! were never written and read as NUL bytes. Such a *torn tail*, which no complete record follows, was never
//! acknowledged and may be cut off. Every other line without a valid checksum is *damage*, such as bit rot or an
//! edit by hand, and is always reported.

use std::io::{self, BufRead};

use super::line::{self, LineError};

/// A line that is not a valid record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, {} byte {offset}, is damaged: {fault}", if *is_compressed { "in the frame at" } else { "at" })]
pub struct BadLine {
    /// Number of the line, counted from 1; in a compressed file, within its text.
    pub line: u64,
    /// Offset of the line in the file; in a compressed file, offset of its frame.
    pub offset: u64,
    pub is_compressed: bool,
    pub fault: LineError,
}

/// Reason why a scan stopped.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error(transparent)]
    Bad(#[from] BadLine),
}

/// End of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileEnding {
    /// The file ends with a complete line, or is empty.
    Clean,
    /// The file ends with a complete record without its newline.
    Unterminated,
    /// The file ends with a torn tail, which begins with this line.
    Torn(BadLine),
}

/// Reads a cache file record by record; holds one line in memory.
#[derive(Debug)]
pub struct LineScan<R> {
    reader: R,
    /// The current line, without its line end.
    line: Vec<u8>,
    key: String,
    is_terminated: bool,
    /// Number of the current line.
    number: u64,
    /// Offset of the current line.
    start: u64,
    /// Offset of the next line.
    next: u64,
    /// First line of what may be a torn tail.
    torn: Option<BadLine>,
    /// Result of the check of the current line, if damage before it had to be reported first.
    pending: Option<Result<(), BadLine>>,
}

impl<R: BufRead> LineScan<R> {
    pub fn new(reader: R) -> Self {
        Self::starting_at(reader, 0, 0)
    }

    /// Starts a scan after the first `bytes` bytes of a file, which are `lines` complete lines.
    pub fn starting_at(reader: R, bytes: u64, lines: u64) -> Self {
        Self {
            reader,
            line: Vec::new(),
            key: String::new(),
            is_terminated: true,
            number: lines,
            start: bytes,
            next: bytes,
            torn: None,
            pending: None,
        }
    }

    /// Advances to the next complete record; returns `false` at the end of the file. After a [`ScanError::Bad`] the
    /// scan can continue after the damage.
    pub fn advance(&mut self) -> Result<bool, ScanError> {
        if let Some(verdict) = self.pending.take() {
            return Ok(verdict.map(|()| true)?);
        }
        while self.read_line()? {
            if self.line.is_empty() {
                continue;
            }
            let verdict = self.check();
            if let Err(bad) = &verdict
                && self.may_be_torn(bad)
            {
                self.torn.get_or_insert_with(|| bad.clone());
                continue;
            }
            // A line follows the bad lines, so they are damage and not a torn tail.
            if let Some(bad) = self.torn.take() {
                self.pending = Some(verdict);
                return Err(bad.into());
            }
            return Ok(verdict.map(|()| true)?);
        }
        Ok(false)
    }

    /// Line of the current record, without its line end.
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    /// Key of the current record.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Describes `fault` at the current line.
    pub fn bad(&self, fault: LineError) -> BadLine {
        BadLine {
            line: self.number,
            offset: self.start,
            is_compressed: false,
            fault,
        }
    }

    /// Offset of the current line in the file.
    pub fn offset(&self) -> u64 {
        self.start
    }

    /// Number of bytes read so far; after the last record, the length of the file.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Returns how the file ends; valid once [`LineScan::advance`] has returned `false`.
    pub fn ending(&self) -> FileEnding {
        match &self.torn {
            Some(bad) => FileEnding::Torn(bad.clone()),
            None if self.is_terminated => FileEnding::Clean,
            None => FileEnding::Unterminated,
        }
    }

    fn check(&mut self) -> Result<(), BadLine> {
        let head = line::verify(&self.line).and_then(|_| line::head(&self.line));
        let head = head.map_err(|fault| self.bad(fault))?;
        self.key.clear();
        self.key.push_str(&head.key);
        Ok(())
    }

    fn may_be_torn(&self, bad: &BadLine) -> bool {
        matches!(bad.fault, LineError::MissingChecksum | LineError::Checksum)
            && (!self.is_terminated || self.line.contains(&0))
    }

    /// Reads one line, without the bytes that editors add.
    fn read_line(&mut self) -> io::Result<bool> {
        self.line.clear();
        let length = self.reader.read_until(b'\n', &mut self.line)?;
        if length == 0 {
            return Ok(false);
        }
        self.number += 1;
        self.start = self.next;
        self.next += length as u64;
        self.is_terminated = self.line.last() == Some(&b'\n');
        let bare = line::content_range(&self.line, self.start == 0);
        self.line.truncate(bare.end);
        self.line.drain(..bare.start);
        Ok(true)
    }
}
