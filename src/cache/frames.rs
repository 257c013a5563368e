//! The compressed form of a cache: a sequence of zstd frames, each of which holds whole lines.
//!
//! `zstdcat` reads such a file. The functions here are pure: they read bytes from their arguments, and return lines or
//! a description of the damage.
//!
//! A frame has its own checksum in addition to those of its lines. The headers of its blocks determine its length.
//! Bytes after the last good frame are *torn*: a crash may have left them. But if they begin with a complete frame that
//! does not decompress, they are torn only if they also contain a disk block that was not written. All other bytes that
//! are not a good frame are *damage*.

use std::io::{self, Read, Write};

use super::line::{self, LineError};
use super::recovery::{BadLine, FileEnding, ScanError};

/// Bytes of text in one frame; long lines can make a frame larger. Half the size makes files 2 % larger, double the
/// size makes them 1 % smaller.
pub(crate) const FRAME_TEXT_BYTES: usize = 8 << 20;

/// Bytes of text to compress between two checks for cancellation.
const CANCEL_CHECK_BYTES: usize = 256 << 10;

/// Maximum size in bytes of a frame, and of its text: both must fit into memory.
const MAX_FRAME_BYTES: usize = 256 << 20;

/// First bytes of a frame (RFC 8878, section 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Number of bytes to read at a time.
const READ_BYTES: usize = 1 << 20;

/// A run of NUL bytes this long is taken as part of a disk block that was not written before a power loss.
const UNWRITTEN_BLOCK: [u8; 64] = [0; 64];

/// Trade-off between speed and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionLevel {
    /// About 300 MB/s.
    Fast,
    /// A fifth smaller, at 1.5 MB/s. Lower levels encode the digits of logprobs as short matches, which take more space
    /// than the digits themselves.
    Strong,
}

/// Compresses `lines` into a frame.
pub fn compress(lines: &[u8], level: CompressionLevel) -> io::Result<Vec<u8>> {
    compress_while(lines, level, || true).map(Option::unwrap_or_default)
}

/// As [`compress`]; `None` as soon as `may_continue` returns false.
pub(crate) fn compress_while(
    lines: &[u8],
    level: CompressionLevel,
    may_continue: impl Fn() -> bool,
) -> io::Result<Option<Vec<u8>>> {
    let zstd_level = match level {
        CompressionLevel::Fast => 3,
        CompressionLevel::Strong => 19,
    };
    let mut encoder = zstd::Encoder::new(Vec::new(), zstd_level)?;
    encoder.include_checksum(true)?;
    encoder.include_contentsize(true)?;
    encoder.set_pledged_src_size(Some(lines.len() as u64))?;
    for piece in lines.chunks(CANCEL_CHECK_BYTES) {
        if !may_continue() {
            return Ok(None);
        }
        encoder.write_all(piece)?;
    }
    encoder.finish().map(Some)
}

/// Decompresses a whole frame into its lines.
pub fn decompress(frame: &[u8]) -> io::Result<Vec<u8>> {
    let too_large = || {
        io::Error::other(format!(
            "the text of the frame is larger than {} MiB",
            MAX_FRAME_BYTES >> 20
        ))
    };
    match zstd::zstd_safe::get_frame_content_size(frame) {
        Ok(Some(size)) if size > MAX_FRAME_BYTES as u64 => Err(too_large()),
        Ok(Some(size)) => zstd::bulk::decompress(frame, size as usize),
        // Another program's frame may not declare its size.
        Ok(None) => {
            let mut text = Vec::new();
            let limit = MAX_FRAME_BYTES as u64 + 1;
            zstd::Decoder::new(frame)?
                .take(limit)
                .read_to_end(&mut text)?;
            match text.len() as u64 {
                size if size == limit => Err(too_large()),
                _ => Ok(text),
            }
        }
        Err(_) => Err(io::Error::other("the header of the frame is invalid")),
    }
}

/// Returns the lines with a correct checksum that can still be read from a broken frame.
pub fn salvage(broken: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(decoder) = zstd::Decoder::new(broken) {
        // Decoding fails at the break; the text before it is in `text`.
        let _ = decoder.take(MAX_FRAME_BYTES as u64).read_to_end(&mut text);
    }
    text.split_inclusive(|&byte| byte == b'\n')
        .enumerate()
        .filter(|(_, raw)| raw.ends_with(b"\n"))
        .map(|(number, raw)| &raw[line::content_range(raw, number == 0)])
        .filter(|line| line::verify(line).is_ok())
        .flat_map(|line| [line, b"\n"].concat())
        .collect()
}

/// Reads a compressed file frame by frame.
#[derive(Debug)]
pub(crate) struct FrameReader<R> {
    reader: R,
    /// Bytes read from the file but not yet consumed.
    buffer: Vec<u8>,
    /// Offset of `buffer` in the file.
    offset: u64,
}

/// Next frame of a compressed file, or the damage in its place.
#[derive(Debug)]
pub(crate) enum FramePiece {
    /// The lines in a frame.
    Text(Vec<u8>),
    Bad {
        /// Offset of the next good frame, or of the end of the file.
        end: u64,
        is_torn: bool,
        why: String,
    },
}

impl<R: Read> FrameReader<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            offset: 0,
        }
    }

    /// Returns the bytes of the next frame, not decompressed; `None` at the end of the file, or if the next bytes are
    /// not a whole frame.
    pub(crate) fn advance_raw(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.fill()?;
        let length = self.frame_at(0)?;
        Ok(length.map(|length| self.consume(length)))
    }

    /// Returns the offset and the text of the next frame, or a description of the damage there.
    pub(crate) fn advance(&mut self) -> io::Result<Option<(u64, FramePiece)>> {
        self.fill()?;
        let offset = self.offset;
        match self.frame_at(0)? {
            _ if self.buffer.is_empty() => Ok(None),
            Some(length) => match decompress(&self.buffer[..length]) {
                Ok(text) => {
                    self.consume(length);
                    Ok(Some((offset, FramePiece::Text(text))))
                }
                Err(error) => self.skip_damage(true, &error.to_string()).map(Some),
            },
            None => self.skip_damage(false, "not a whole frame").map(Some),
        }
    }

    /// Number of bytes consumed so far.
    pub(crate) fn position(&self) -> u64 {
        self.offset
    }

    /// Length of the frame that starts at `at` in the buffer; `None` if no whole frame starts there. Reads as much of
    /// the file as the frame needs.
    fn frame_at(&mut self, at: usize) -> io::Result<Option<usize>> {
        loop {
            let rest = &self.buffer[at..];
            match zstd::zstd_safe::find_frame_compressed_size(rest) {
                Ok(length) => return Ok(Some(length)),
                Err(_) => {
                    let prefix = rest.len().min(MAGIC.len());
                    if rest[..prefix] != MAGIC[..prefix] || rest.len() >= MAX_FRAME_BYTES {
                        return Ok(None);
                    }
                }
            }
            // Double the buffer each time, because `find_frame_compressed_size` starts again at the first byte.
            let more = rest.len().max(READ_BYTES);
            if !self.read_more(more)? {
                return Ok(None);
            }
        }
    }

    /// Skips to the next good frame or the end of the file, and describes the damage. `is_complete`: the skipped bytes
    /// begin with a complete frame.
    fn skip_damage(&mut self, is_complete: bool, why: &str) -> io::Result<(u64, FramePiece)> {
        let offset = self.offset;
        let mut has_unwritten_block = false;
        let mut search_start = 1;
        let is_last = loop {
            let magic_offset = self
                .buffer
                .get(search_start..)
                .and_then(|rest| memchr::memmem::find(rest, &MAGIC));
            let Some(magic_offset) = magic_offset else {
                // The start of a frame, or of a run of NULs, may continue in the next bytes of the file.
                let tail_bytes = UNWRITTEN_BLOCK.len().min(self.buffer.len());
                has_unwritten_block |= contains_unwritten_block(&self.buffer);
                self.consume(self.buffer.len() - tail_bytes);
                search_start = tail_bytes.saturating_sub(MAGIC.len() - 1).max(1);
                if !self.read_more(READ_BYTES)? {
                    self.consume(tail_bytes);
                    break true;
                }
                continue;
            };
            let frame_start = search_start + magic_offset;
            if let Some(length) = self.frame_at(frame_start)?
                && decompress(&self.buffer[frame_start..frame_start + length]).is_ok()
            {
                self.consume(frame_start);
                break false;
            }
            search_start = frame_start + 1;
        };
        let bad = FramePiece::Bad {
            end: self.offset,
            is_torn: is_last && (!is_complete || has_unwritten_block),
            why: why.to_owned(),
        };
        Ok((offset, bad))
    }

    fn consume(&mut self, length: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(length);
        self.offset += length as u64;
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Reads more of the file if the buffer is empty.
    fn fill(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            self.read_more(READ_BYTES)?;
        }
        Ok(())
    }

    /// Reads up to `bytes` more bytes; returns false at the end of the file.
    fn read_more(&mut self, bytes: usize) -> io::Result<bool> {
        let mut part = (&mut self.reader).take(bytes as u64);
        Ok(part.read_to_end(&mut self.buffer)? > 0)
    }
}

fn contains_unwritten_block(bytes: &[u8]) -> bool {
    memchr::memmem::find(bytes, &UNWRITTEN_BLOCK).is_some()
}

/// Reads a compressed file record by record, as [`super::recovery::LineScan`] reads a plain one.
#[derive(Debug)]
pub struct FrameScan<R> {
    frames: FrameReader<R>,
    /// Text of the current frame.
    text: Vec<u8>,
    /// Offset of the current frame in the file.
    frame: u64,
    /// Range of the current line in `text`.
    line: std::ops::Range<usize>,
    /// Offset of the next line in `text`.
    next: usize,
    /// Number of the current line in the text of all frames, counted from 1.
    number: u64,
    /// Bytes that a crash may have left at the end of the file.
    torn: Option<BadLine>,
}

impl<R: Read> FrameScan<R> {
    pub fn new(reader: R) -> Self {
        Self {
            frames: FrameReader::new(reader),
            text: Vec::new(),
            frame: 0,
            line: 0..0,
            next: 0,
            number: 0,
            torn: None,
        }
    }

    /// Advances to the next whole record; returns `false` at the end of the file. After a [`ScanError::Bad`] the
    /// scan can continue after the damage.
    pub fn advance(&mut self) -> Result<bool, ScanError> {
        loop {
            while self.next < self.text.len() {
                let rest = &self.text[self.next..];
                let length = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
                // Before the lines were compressed, an editor may have added carriage returns or a byte order mark.
                let raw = &rest[..length];
                let bare = line::content_range(raw, self.number == 0);
                self.line = self.next + bare.start..self.next + bare.end;
                self.next += length + 1;
                self.number += 1;
                if !self.line.is_empty() {
                    let line = &self.text[self.line.clone()];
                    return match line::verify(line).and_then(|_| line::head(line)) {
                        Ok(_) => Ok(true),
                        Err(fault) => Err(self.bad(fault).into()),
                    };
                }
            }
            let Some((offset, piece)) = self.frames.advance()? else {
                return Ok(false);
            };
            self.frame = offset;
            match piece {
                FramePiece::Text(text) => {
                    self.text = text;
                    self.next = 0;
                }
                FramePiece::Bad { is_torn, why, .. } => {
                    let bad = BadLine {
                        line: self.number + 1,
                        ..self.bad(LineError::Frame(why))
                    };
                    if !is_torn {
                        return Err(bad.into());
                    }
                    self.torn = Some(bad);
                }
            }
        }
    }

    /// Line of the current record, without its line end.
    pub fn line(&self) -> &[u8] {
        &self.text[self.line.clone()]
    }

    /// Describes `fault` at the current line.
    pub fn bad(&self, fault: LineError) -> BadLine {
        BadLine {
            line: self.number,
            offset: self.frame,
            is_compressed: true,
            fault,
        }
    }

    /// Number of bytes of the file consumed so far.
    pub fn position(&self) -> u64 {
        self.frames.position()
    }

    /// Returns how the file ends; valid once [`FrameScan::advance`] has returned `false`.
    pub fn ending(&self) -> FileEnding {
        match &self.torn {
            Some(bad) => FileEnding::Torn(bad.clone()),
            None => FileEnding::Clean,
        }
    }
}
