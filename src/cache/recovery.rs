//! Which lines of a cache file are whole, and how the file ends. Pure: bytes in, verdicts out.
//!
//! A crash can leave two things at the end of an append-only file: a line that stops short of its
//! newline, or blocks that were never written and read as NUL bytes. Such a *torn tail*, with no
//! whole record after it, was never acknowledged and may be cut. Every other line that does not
//! verify is *damage* (bit rot, an edit by hand), wherever it stands, and is never passed over.

use std::io::{self, BufRead};

use super::line::{self, LineError};

/// A line that is no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, {} byte {offset}, is damaged: {fault}", if *is_compressed { "in the frame at" } else { "at" })]
pub struct BadLine {
    /// Counted from 1; in a compressed file, of its text.
    pub line: u64,
    /// Where the line starts in the file; in a compressed one, where its frame does.
    pub offset: u64,
    pub is_compressed: bool,
    pub fault: LineError,
}

/// Why a scan stopped short.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error(transparent)]
    Bad(#[from] BadLine),
}

/// How a file ends, once it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileEnding {
    /// With a whole line, or the file is empty.
    Clean,
    /// With a whole record that lacks its newline.
    Unterminated,
    /// With a torn tail, which starts here.
    Torn(BadLine),
}

/// Walks a cache file record by record, in memory for one line.
#[derive(Debug)]
pub struct LineScan<R> {
    reader: R,
    /// The current line, without its line end.
    line: Vec<u8>,
    key: String,
    terminated: bool,
    /// Number of the current line.
    number: u64,
    /// Where the current line starts, and where the next one does.
    start: u64,
    next: u64,
    /// The first of the bad lines that may turn out to be a torn tail.
    torn: Option<BadLine>,
    /// What the current line turned out to be, where older damage had to be reported first.
    held: Option<Result<(), BadLine>>,
}

impl<R: BufRead> LineScan<R> {
    pub fn new(reader: R) -> Self {
        Self::starting_at(reader, 0, 0)
    }

    /// Of the rest of a file, whose first so many bytes are so many whole lines.
    pub fn starting_at(reader: R, bytes: u64, lines: u64) -> Self {
        Self {
            reader,
            line: Vec::new(),
            key: String::new(),
            terminated: true,
            number: lines,
            start: bytes,
            next: bytes,
            torn: None,
            held: None,
        }
    }

    /// Goes to the next whole record; `false` at the end of the file.
    ///
    /// After a [`ScanError::Bad`] the scan can go on behind the damage, to list the rest of it.
    pub fn advance(&mut self) -> Result<bool, ScanError> {
        if let Some(verdict) = self.held.take() {
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
            // Something follows the tear, so that it is no tail.
            if let Some(bad) = self.torn.take() {
                self.held = Some(verdict);
                return Err(bad.into());
            }
            return Ok(verdict.map(|()| true)?);
        }
        Ok(false)
    }

    /// The current record's line, without its line end.
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    /// The current record's key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The current line, with what is wrong with it.
    pub fn bad(&self, fault: LineError) -> BadLine {
        BadLine {
            line: self.number,
            offset: self.start,
            is_compressed: false,
            fault,
        }
    }

    /// Bytes read so far; after the last record, the length of the file.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// How the file ends; meaningful once [`LineScan::advance`] has returned `false`.
    pub fn ending(&self) -> FileEnding {
        match &self.torn {
            Some(bad) => FileEnding::Torn(bad.clone()),
            None if self.terminated => FileEnding::Clean,
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
            && (!self.terminated || self.line.contains(&0))
    }

    /// Reads one line and drops what editors add to it.
    fn read_line(&mut self) -> io::Result<bool> {
        self.line.clear();
        let length = self.reader.read_until(b'\n', &mut self.line)?;
        if length == 0 {
            return Ok(false);
        }
        self.number += 1;
        self.start = self.next;
        self.next += length as u64;
        self.terminated = self.line.last() == Some(&b'\n');
        let bare = line::content_range(&self.line, self.start == 0);
        self.line.truncate(bare.end);
        self.line.drain(..bare.start);
        Ok(true)
    }
}
