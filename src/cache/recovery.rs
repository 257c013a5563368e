//! Finds the complete lines of a cache file, and determines how the file ends. Pure: reads from a `BufRead`.
//!
//! A crash can leave two things at the end of an append-only file: a line without its newline, or blocks that
//! were never written and read as NUL bytes. Such a *torn tail*, which no other line follows, was never synced, so it
//! may be cut off. Every other invalid line is *damage*, caused for example by a disk error or an edit by hand, and is
//! always reported.

use std::collections::VecDeque;
use std::io::{self, BufRead};
use std::ops::Range;

use super::line::{self, LineError};

/// Line that is not a valid record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, {} byte {offset}, is damaged: {fault}", if *is_compressed { "in the frame at" } else { "at" })]
pub struct BadLine {
    /// Number of the line, counted from 1; in a compressed file, counted in the decompressed text.
    pub line: u64,
    /// Offset of the line in the file in bytes; in a compressed file, the offset of the line's frame.
    pub offset: u64,
    /// True if the line is in the compressed file.
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

/// State of the end of a file.
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
    /// Key of the current record.
    key: String,
    /// True if the current line ends with a newline.
    is_terminated: bool,
    /// Number of the current line, counted from 1.
    number: u64,
    /// Offset of the current line in bytes.
    start: u64,
    /// Offset in bytes of the content of the current line, which follows a byte order mark.
    content_start: u64,
    /// Offset of the next line in bytes.
    next: u64,
    /// Lines of a possible torn tail.
    torn: Vec<BadLine>,
    /// Damaged lines before the current line that are reported first, and the result of checking the current line.
    pending: VecDeque<Result<(), BadLine>>,
}

impl<R: BufRead> LineScan<R> {
    pub fn new(reader: R) -> Self {
        Self::starting_at(reader, 0, 0)
    }

    /// Starts a scan after the first `bytes` bytes of a file, which contain `lines` complete lines. `reader` is at this
    /// position.
    pub(crate) fn starting_at(reader: R, bytes: u64, lines: u64) -> Self {
        Self {
            reader,
            line: Vec::new(),
            key: String::new(),
            is_terminated: true,
            number: lines,
            start: bytes,
            content_start: bytes,
            next: bytes,
            torn: Vec::new(),
            pending: VecDeque::new(),
        }
    }

    /// Advances to the next complete record; returns `false` at the end of the file. After a [`ScanError::Bad`], the
    /// next call continues after the damage.
    pub fn advance(&mut self) -> Result<bool, ScanError> {
        if let Some(result) = self.pending.pop_front() {
            return Ok(result.map(|()| true)?);
        }
        while self.read_line()? {
            if self.line.is_empty() {
                continue;
            }
            let result = self.check();
            if let Err(bad) = &result
                && self.may_be_torn(bad)
            {
                self.torn.push(bad.clone());
                continue;
            }
            // This line follows the bad lines, so they are damage and not a torn tail.
            self.pending.extend(self.torn.drain(..).map(Err));
            self.pending.push_back(result);
            if let Some(result) = self.pending.pop_front() {
                return Ok(result.map(|()| true)?);
            }
        }
        Ok(false)
    }

    /// Returns the line of the current record, without its line end.
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    /// Returns the key of the current record.
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

    /// Returns the byte range of the current line's content in the file: without its line end and without a byte order
    /// mark.
    pub fn content(&self) -> Range<u64> {
        self.content_start..self.content_start + self.line.len() as u64
    }

    /// Number of bytes before the next line; after [`LineScan::advance`] has returned `false`, the length of the file.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Returns how the file ends; valid after [`LineScan::advance`] has returned `false`.
    pub fn ending(&self) -> FileEnding {
        match self.torn.first() {
            Some(bad) => FileEnding::Torn(bad.clone()),
            None if self.is_terminated => FileEnding::Clean,
            None => FileEnding::Unterminated,
        }
    }

    /// Checks the checksum, schema and key of the current line, and stores its key.
    fn check(&mut self) -> Result<(), BadLine> {
        let head = line::verify(&self.line).and_then(|_| line::head(&self.line));
        let head = head.map_err(|fault| self.bad(fault))?;
        self.key.clear();
        self.key.push_str(&head.key);
        Ok(())
    }

    /// Returns true if the current line, with the fault `bad`, looks like part of a torn tail: it has no newline, or
    /// contains NUL bytes of a block that was not written.
    fn may_be_torn(&self, bad: &BadLine) -> bool {
        matches!(bad.fault, LineError::MissingChecksum | LineError::Checksum)
            && (!self.is_terminated || self.line.contains(&0))
    }

    /// Reads the next line, without the bytes that editors add; returns false at the end of the file.
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
        let content = line::content_range(&self.line, self.start == 0);
        self.content_start = self.start + content.start as u64;
        self.line.truncate(content.end);
        self.line.drain(..content.start);
        Ok(true)
    }
}
