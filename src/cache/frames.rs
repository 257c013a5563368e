//! The compressed form of a cache: zstd frames end to end, each of which holds whole lines.
//!
//! `zstdcat` reads such a file as it is. Pure: bytes in, lines and verdicts out.
//!
//! A frame has a checksum of its own beside those of its lines, and its length can be told from its
//! beginning. What is no frame is *torn* at the end of the file, where a crash may have left it;
//! anywhere else it is *damage*, and so is a frame that is all there and does not decompress.

use std::io::{self, Read, Write};

use super::line::{self, LineError};
use super::recovery::{BadLine, FileEnding, ScanError};

/// Text that goes into one frame, at most one line more. Frames of half of it are 2 % larger, those
/// of twice as much 1 % smaller.
pub const FRAME_TEXT: usize = 8 << 20;

/// Text to compress before looking whether to go on.
const PIECE: usize = 256 << 10;

/// A frame larger than this, or of larger text, is not read: it would have to fit into memory.
const LARGEST: usize = 256 << 20;

/// What a frame begins with (RFC 8878, section 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Bytes to read at a time.
const READ: usize = 1 << 20;

/// So many NUL bytes in a row are blocks that a power loss kept from being written.
const UNWRITTEN: [u8; 64] = [0; 64];

/// How hard to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Some 300 MB/s.
    Fast,
    /// A fifth smaller, at 1.5 MB/s. The digits of logprobs hardly ever repeat: short matches, which
    /// the lower levels take where they can, cost more than the digits themselves do.
    Strong,
}

/// The frame that holds `lines`.
pub fn compress(lines: &[u8], effort: Effort) -> io::Result<Vec<u8>> {
    compress_while(lines, effort, || true).map(Option::unwrap_or_default)
}

/// As [`compress`], for as long as `goes_on`; then none.
pub fn compress_while(
    lines: &[u8],
    effort: Effort,
    goes_on: impl Fn() -> bool,
) -> io::Result<Option<Vec<u8>>> {
    let level = match effort {
        Effort::Fast => 3,
        Effort::Strong => 19,
    };
    let mut encoder = zstd::Encoder::new(Vec::new(), level)?;
    encoder.include_checksum(true)?;
    encoder.include_contentsize(true)?;
    encoder.set_pledged_src_size(Some(lines.len() as u64))?;
    for piece in lines.chunks(PIECE) {
        if !goes_on() {
            return Ok(None);
        }
        encoder.write_all(piece)?;
    }
    encoder.finish().map(Some)
}

/// The lines in a whole frame.
pub fn decompress(frame: &[u8]) -> io::Result<Vec<u8>> {
    let too_large = || io::Error::other(format!("it is larger than {} MiB", LARGEST >> 20));
    match zstd::zstd_safe::get_frame_content_size(frame) {
        Ok(Some(size)) if size > LARGEST as u64 => Err(too_large()),
        Ok(Some(size)) => zstd::bulk::decompress(frame, size as usize),
        // A frame of another writer, which did not know the size beforehand.
        Ok(None) => {
            let mut text = Vec::new();
            let limit = LARGEST as u64 + 1;
            zstd::Decoder::new(frame)?
                .take(limit)
                .read_to_end(&mut text)?;
            match text.len() as u64 {
                size if size == limit => Err(too_large()),
                _ => Ok(text),
            }
        }
        Err(_) => Err(io::Error::other("its header is broken")),
    }
}

/// The whole lines that can still be read from a broken frame.
pub fn salvage(broken: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(decoder) = zstd::Decoder::new(broken) {
        // It fails at the break; what came before stays.
        let _ = decoder.take(LARGEST as u64).read_to_end(&mut text);
    }
    text.split_inclusive(|&byte| byte == b'\n')
        .enumerate()
        .filter(|(_, raw)| raw.ends_with(b"\n"))
        .map(|(number, raw)| &raw[line::content_range(raw, number == 0)])
        .filter(|line| line::verify(line).is_ok())
        .flat_map(|line| [line, b"\n"].concat())
        .collect()
}

/// Walks a compressed file frame by frame.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    /// What has been read and not yet walked.
    buffer: Vec<u8>,
    /// Where it starts in the file.
    offset: u64,
}

/// What comes next in a compressed file.
#[derive(Debug)]
pub enum FramePiece {
    /// The lines in a frame.
    Text(Vec<u8>),
    Bad {
        /// Where the next good frame starts, or the file ends.
        end: u64,
        is_torn: bool,
        why: String,
    },
}

impl<R: Read> FrameReader<R> {
    pub fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            offset: 0,
        }
    }

    /// The bytes of the next frame; none where there is no whole one, be it at the end of the file or
    /// before. Whether it decompresses is for the caller to see.
    pub fn advance_raw(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.fill()?;
        let length = self.frame_at(0)?;
        Ok(length.map(|length| self.take(length)))
    }

    /// The text of the next frame, with the offset of the frame, or what is wrong there.
    pub fn advance(&mut self) -> io::Result<Option<(u64, FramePiece)>> {
        self.fill()?;
        let offset = self.offset;
        match self.frame_at(0)? {
            _ if self.buffer.is_empty() => Ok(None),
            Some(length) => match decompress(&self.buffer[..length]) {
                Ok(text) => {
                    self.take(length);
                    Ok(Some((offset, FramePiece::Text(text))))
                }
                Err(error) => self.bad(Some(length), &error.to_string()).map(Some),
            },
            None => self
                .bad(None, "it is no frame, or not a whole one")
                .map(Some),
        }
    }

    /// Bytes walked so far.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// The length of the frame that starts at `at` in the buffer, which is read as far as it goes.
    fn frame_at(&mut self, at: usize) -> io::Result<Option<usize>> {
        loop {
            let rest = &self.buffer[at..];
            match zstd::zstd_safe::find_frame_compressed_size(rest) {
                Ok(length) => return Ok(Some(length)),
                Err(_) => {
                    let begun = rest.len().min(MAGIC.len());
                    if rest[..begun] != MAGIC[..begun] || rest.len() >= LARGEST {
                        return Ok(None);
                    }
                }
            }
            // Twice as much each time, since the search starts over.
            let more = rest.len().max(READ);
            if !self.read_more(more)? {
                return Ok(None);
            }
        }
    }

    /// Passes over what is no good frame, which may be one of `length` with a wrong content.
    fn bad(&mut self, length: Option<usize>, why: &str) -> io::Result<(u64, FramePiece)> {
        let offset = self.offset;
        let mut has_unwritten = false;
        let mut from = 1;
        let is_last = loop {
            let found = self
                .buffer
                .get(from..)
                .and_then(|rest| memchr::memmem::find(rest, &MAGIC));
            let Some(found) = found else {
                // A beginning of a frame, or of NULs, may continue in what is read next.
                let keep = UNWRITTEN.len().min(self.buffer.len());
                has_unwritten |= holds_unwritten(&self.buffer);
                self.take(self.buffer.len() - keep);
                from = keep.saturating_sub(MAGIC.len() - 1).max(1);
                if !self.read_more(READ)? {
                    self.take(keep);
                    break true;
                }
                continue;
            };
            let at = from + found;
            if let Some(length) = self.frame_at(at)?
                && decompress(&self.buffer[at..at + length]).is_ok()
            {
                self.take(at);
                break false;
            }
            from = at + 1;
        };
        let is_whole = length.is_some();
        let bad = FramePiece::Bad {
            end: self.offset,
            is_torn: is_last && (!is_whole || has_unwritten),
            why: why.to_owned(),
        };
        Ok((offset, bad))
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(length);
        self.offset += length as u64;
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Sees to it that there is something, unless the file has ended.
    fn fill(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            self.read_more(READ)?;
        }
        Ok(())
    }

    /// Reads so many bytes more, or what is left; false if that is nothing.
    fn read_more(&mut self, bytes: usize) -> io::Result<bool> {
        let mut part = (&mut self.reader).take(bytes as u64);
        Ok(part.read_to_end(&mut self.buffer)? > 0)
    }
}

fn holds_unwritten(bytes: &[u8]) -> bool {
    memchr::memmem::find(bytes, &UNWRITTEN).is_some()
}

/// Walks the lines of a compressed file, as [`super::recovery::LineScan`] does those of a plain one.
#[derive(Debug)]
pub struct FrameScan<R> {
    frames: FrameReader<R>,
    /// The text of the current frame, and where that starts in the file.
    text: Vec<u8>,
    frame: u64,
    /// The current line in it, and where the next one starts.
    line: std::ops::Range<usize>,
    next: usize,
    number: u64,
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

    /// Goes to the next whole record; `false` at the end of the file. After a [`ScanError::Bad`]
    /// the scan can go on behind the damage.
    pub fn advance(&mut self) -> Result<bool, ScanError> {
        loop {
            while self.next < self.text.len() {
                let rest = &self.text[self.next..];
                let length = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
                // The lines may have been compressed with what editors add.
                let raw = &rest[..length];
                let bare = line::content_range(raw, self.number == 0);
                self.line = self.next + bare.start..self.next + bare.end;
                self.next += length + 1;
                self.number += 1;
                if !self.line.is_empty() {
                    let line = &self.text[self.line.clone()];
                    let verdict = line::verify(line).and_then(|_| line::head(line));
                    return match verdict {
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

    /// The current record's line, without its line end.
    pub fn line(&self) -> &[u8] {
        &self.text[self.line.clone()]
    }

    /// The current line, with what is wrong with it.
    pub fn bad(&self, fault: LineError) -> BadLine {
        BadLine {
            line: self.number,
            offset: self.frame,
            is_compressed: true,
            fault,
        }
    }

    /// Bytes of the file that have been walked.
    pub fn position(&self) -> u64 {
        self.frames.position()
    }

    /// How the file ends; meaningful once [`FrameScan::advance`] has returned `false`.
    pub fn ending(&self) -> FileEnding {
        match &self.torn {
            Some(bad) => FileEnding::Torn(bad.clone()),
            None => FileEnding::Clean,
        }
    }
}
