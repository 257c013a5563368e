//! Verifies the checksums of all lines on all cores when a cache is opened.
//!
//! Verification stops at the first block that contains anything but valid lines, for example damage, a blank line or a
//! carriage return. The caller then reads the file sequentially: a plain file from this block on, with a
//! [`LineScan`](crate::cache::recovery::LineScan), and a compressed file from its start.

use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::cache::frames::{self, FrameReader};
use crate::cache::keys::{self, KeyAndChecksum};
use crate::cache::line;
use crate::cache::question::KeyVariants;

/// Size in bytes of the text that one core verifies at a time.
const BLOCK_BYTES: usize = 2 << 20;

/// Contents of a block of complete lines.
#[derive(Debug, Default)]
pub(crate) struct VerifiedBlock {
    pub records: Vec<KeyAndChecksum>,
    /// Kinds of alternative keys among the records.
    pub key_variants: KeyVariants,
    /// Cost of the records in US dollars.
    pub cost_usd: f64,
    /// Size in bytes that the block has in the file.
    pub bytes: u64,
}

/// Verifies the lines in `text`; `None` if `text` contains anything but valid lines, each with its newline. The size of
/// the block is left at 0.
fn verify_lines(text: &[u8]) -> Option<VerifiedBlock> {
    let mut block = VerifiedBlock::default();
    let mut remaining = text;
    while !remaining.is_empty() {
        let end = memchr::memchr(b'\n', remaining)?;
        let line = &remaining[..end];
        remaining = &remaining[end + 1..];
        block.records.push(keys::identity(line).ok()?);
        let head = line::head(line).ok()?;
        block.key_variants.insert(head.v, head.cut_at);
        block.cost_usd += line::cost_usd(line).ok()?;
    }
    Some(block)
}

/// Verifies a plain file: calls `on_block` for the valid blocks in order, up to the first block that is not valid.
/// `path` is used in messages.
///
/// # Errors
/// If the file cannot be read, or `on_block` fails.
pub(crate) fn verify_plain(
    file: impl Read + Send,
    path: &Path,
    on_block: impl FnMut(VerifiedBlock) -> Result<()>,
) -> Result<()> {
    let mut blocks = LineBlocks {
        file,
        partial_line: Vec::new(),
    };
    let verify = |text: Vec<u8>| {
        let block = verify_lines(&text)?;
        Some(VerifiedBlock {
            bytes: text.len() as u64,
            ..block
        })
    };
    let next_block = || blocks.advance().with_context(|| could_not_read(path));
    verify_in_order(next_block, verify, on_block)
}

/// Verifies a compressed file like [`verify_plain`]; its blocks are frames.
///
/// # Errors
/// If the file cannot be read, or `on_block` fails.
pub(crate) fn verify_compressed(
    file: impl Read + Send,
    path: &Path,
    on_block: impl FnMut(VerifiedBlock) -> Result<()>,
) -> Result<()> {
    let mut frames = FrameReader::new(file);
    let verify = |frame: Vec<u8>| {
        let block = verify_lines(&frames::decompress(&frame).ok()?)?;
        Some(VerifiedBlock {
            bytes: frame.len() as u64,
            ..block
        })
    };
    let next_block = || frames.advance_raw().with_context(|| could_not_read(path));
    verify_in_order(next_block, verify, on_block)
}

fn could_not_read(path: &Path) -> String {
    format!("could not read {}", path.display())
}

/// Splits a plain file into blocks of complete lines.
struct LineBlocks<R> {
    file: R,
    /// Start of a line whose end has not been read yet.
    partial_line: Vec<u8>,
}

impl<R: Read> LineBlocks<R> {
    /// Reads the next block; `None` at the end of the file. Bytes after the last newline are not returned.
    fn advance(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut block = std::mem::take(&mut self.partial_line);
        loop {
            let length_before = block.len();
            block.reserve_exact(BLOCK_BYTES);
            (&mut self.file)
                .take(BLOCK_BYTES as u64)
                .read_to_end(&mut block)?;
            if block.len() == length_before {
                return Ok(None);
            }
            if let Some(newline) = memchr::memrchr(b'\n', &block[length_before..]) {
                self.partial_line = block.split_off(length_before + newline + 1);
                return Ok(Some(block));
            }
        }
    }
}

/// Verifies the blocks that `next_block` returns, on all cores, while the next blocks are read. Calls `on_block` with
/// the verified blocks in order, up to the first block that is not valid.
fn verify_in_order<Block: Send>(
    mut next_block: impl FnMut() -> Result<Option<Block>> + Send,
    verify: impl Fn(Block) -> Option<VerifiedBlock> + Sync,
    mut on_block: impl FnMut(VerifiedBlock) -> Result<()>,
) -> Result<()> {
    // Two blocks per core, so that fewer cores are idle at the end of a batch.
    let batch_size = rayon::current_num_threads() * 2;
    let mut read_batch = || {
        let mut batch = Vec::with_capacity(batch_size);
        while batch.len() < batch_size {
            match next_block()? {
                Some(block) => batch.push(block),
                None => break,
            }
        }
        anyhow::Ok(batch)
    };
    let mut batch = read_batch()?;
    while !batch.is_empty() {
        let (next_batch, results) = rayon::join(&mut read_batch, || {
            batch.into_par_iter().map(&verify).collect::<Vec<_>>()
        });
        for result in results {
            match result {
                Some(block) => on_block(block)?,
                None => return Ok(()),
            }
        }
        batch = next_batch?;
    }
    Ok(())
}
