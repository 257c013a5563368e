//! Verifies every checksum of a large cache on all cores, to open it.
//!
//! Verification stops at the first block with a line that is not whole and in the form that this version writes.
//! A sequential [`LineScan`](crate::cache::recovery::LineScan) continues there.

use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::cache::frames::{self, FrameReader};
use crate::cache::keys::{self, KeyAndChecksum};
use crate::cache::line;
use crate::cache::question::KeyVariants;

/// Bytes of plain text that one core verifies at a time.
const BLOCK: usize = 2 << 20;

/// Contents of a block of whole lines.
#[derive(Debug, Default)]
pub(crate) struct VerifiedBlock {
    pub records: Vec<KeyAndChecksum>,
    pub key_variants: KeyVariants,
    pub cost_usd: f64,
    /// Size of the block in the file in bytes.
    pub bytes: u64,
}

/// Verifies the lines in `text`; `None` if a line is not whole and in the form that this version writes.
fn check(text: &[u8]) -> Option<VerifiedBlock> {
    let mut block = VerifiedBlock::default();
    let mut rest = text;
    while !rest.is_empty() {
        let end = memchr::memchr(b'\n', rest)?;
        let line = &rest[..end];
        rest = &rest[end + 1..];
        block.records.push(keys::identity(line).ok()?);
        let head = line::head(line).ok()?;
        block.key_variants.insert(head.v, head.cut_at);
        block.cost_usd += line::cost_usd(line).ok()?;
    }
    Some(block)
}

/// Verifies a plain file: calls `on_block` for the good blocks in order, up to the first other one.
///
/// # Errors
/// If the file at `path` cannot be read, or one of `on_block`.
pub(crate) fn verify_plain(
    file: impl Read + Send,
    path: &Path,
    on_block: impl FnMut(VerifiedBlock) -> Result<()>,
) -> Result<()> {
    let mut blocks = LineBlocks {
        file,
        rest: Vec::new(),
    };
    let check = |text: Vec<u8>| {
        let block = check(&text)?;
        Some(VerifiedBlock {
            bytes: text.len() as u64,
            ..block
        })
    };
    let next = || blocks.advance().with_context(|| could_not_read(path));
    in_order(next, check, on_block)
}

/// As [`verify_plain`], for a compressed file.
///
/// # Errors
/// If the file at `path` cannot be read, or one of `on_block`.
pub(crate) fn verify_compressed(
    file: impl Read + Send,
    path: &Path,
    on_block: impl FnMut(VerifiedBlock) -> Result<()>,
) -> Result<()> {
    let mut frames = FrameReader::new(file);
    let check = |frame: Vec<u8>| {
        let block = check(&frames::decompress(&frame).ok()?)?;
        Some(VerifiedBlock {
            bytes: frame.len() as u64,
            ..block
        })
    };
    let next = || frames.advance_raw().with_context(|| could_not_read(path));
    in_order(next, check, on_block)
}

fn could_not_read(path: &Path) -> String {
    format!("could not read {}", path.display())
}

/// Splits a plain file into blocks of whole lines.
struct LineBlocks<R> {
    file: R,
    /// First part of a line whose end has not been read.
    rest: Vec<u8>,
}

impl<R: Read> LineBlocks<R> {
    /// Reads the next block; `None` at the end. Bytes after the last newline are not a block.
    fn advance(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut block = std::mem::take(&mut self.rest);
        loop {
            let before = block.len();
            block.reserve_exact(BLOCK);
            (&mut self.file)
                .take(BLOCK as u64)
                .read_to_end(&mut block)?;
            if block.len() == before {
                return Ok(None);
            }
            if let Some(newline) = memchr::memrchr(b'\n', &block[before..]) {
                self.rest = block.split_off(before + newline + 1);
                return Ok(Some(block));
            }
        }
    }
}

/// Checks the jobs from `next` on all cores while the next jobs are read. Calls `on_block` with the results in
/// order, up to the first `None`.
fn in_order<J: Send>(
    mut next: impl FnMut() -> Result<Option<J>> + Send,
    check: impl Fn(J) -> Option<VerifiedBlock> + Sync,
    mut on_block: impl FnMut(VerifiedBlock) -> Result<()>,
) -> Result<()> {
    let jobs_at_once = rayon::current_num_threads() * 2;
    let mut read = || {
        let mut jobs = Vec::with_capacity(jobs_at_once);
        while jobs.len() < jobs_at_once {
            match next()? {
                Some(job) => jobs.push(job),
                None => break,
            }
        }
        anyhow::Ok(jobs)
    };
    let mut jobs = read()?;
    while !jobs.is_empty() {
        let (following, blocks) = rayon::join(&mut read, || {
            jobs.into_par_iter().map(&check).collect::<Vec<_>>()
        });
        for block in blocks {
            match block {
                Some(block) => on_block(block)?,
                None => return Ok(()),
            }
        }
        jobs = following?;
    }
    Ok(())
}
