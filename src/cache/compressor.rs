//! [`Compressor`]: moves lines from the plain file into frames of the compressed file, in the background.
//!
//! ```text
//! responses.jsonl       new lines, synced according to `cache.durability`
//! responses.jsonl.zst   older lines, in frames of about 8 MiB of text
//! ```
//!
//! A frame is appended and synced first. Later a file without the compressed lines replaces the plain file by
//! renaming. At every moment each record is complete in at least one of the two files. A crash between the two steps
//! leaves some records in both files; readers skip the second copy.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cache::append_log::AppendLog;
use crate::cache::files::OnReadProgress;
use crate::cache::frames;
use crate::cache::frames::{CompressionLevel, FRAME_TEXT_BYTES};
use crate::cache::open_file::OpenFile;
use crate::cache::shared::{CacheState, SharedCache};
use crate::cache::storage;
use crate::cache::storage::WrapFile;
use crate::cache::{compressed_file, plain_file};

/// Bytes of uncompressed lines above which frames are compressed with [`CompressionLevel::Fast`], to catch up.
const FAST_THRESHOLD_BYTES: u64 = FRAME_TEXT_BYTES as u64 * 3 / 2;

/// Size in bytes of the blocks in which lines are copied to the new plain file.
const COPY_BLOCK_BYTES: usize = 1 << 20;

/// Pause after a failure, such as a full disk.
const RETRY_DELAY: Duration = Duration::from_secs(10);

/// Moves lines from the plain file of a cache to its compressed file.
pub(crate) struct Compressor {
    plain: PathBuf,
    frames: AppendLog,
    wrap: Arc<WrapFile>,
    /// Offset in the plain file before which all lines are in durable frames.
    compressed_to: u64,
}

impl Compressor {
    /// Opens the compressed file, whose complete frames have `length` bytes; creates it if it does not exist.
    pub(crate) fn open(dir: &Path, length: u64, wrap: Arc<WrapFile>) -> Result<Compressor> {
        let path = compressed_file(dir);
        let file = storage::open_or_create(&path)?;
        crate::fs::sync_folder(dir).with_context(|| format!("could not sync {}", dir.display()))?;
        Ok(Compressor {
            plain: plain_file(dir),
            frames: AppendLog::new(wrap(file), &path, length)?,
            wrap,
            compressed_to: 0,
        })
    }

    /// Compresses all lines of the plain file if `length`, its length in bytes, exceeds [`FAST_THRESHOLD_BYTES`], for
    /// example after compression was turned on for an existing cache. Returns the new length of the plain file.
    pub(crate) fn compress_large(
        &mut self,
        length: u64,
        on_progress: OnReadProgress<'_>,
    ) -> Result<u64> {
        if length <= FAST_THRESHOLD_BYTES {
            return Ok(length);
        }
        let plain = File::open(&self.plain);
        let plain = plain.with_context(|| format!("could not read {}", self.plain.display()))?;
        let plain = OpenFile::new(&plain, &self.plain)?;
        while self.compressed_to < length {
            self.compress_frame(&plain, length, || true)?;
            on_progress(self.compressed_to, length)?;
        }
        let (_, new_length) = self.write_remainder(&plain, length)?;
        self.compressed_to = 0;
        Ok(new_length)
    }

    /// Compresses the next lines of the plain file into one durable frame. Appends nothing if `may_continue` returns
    /// false. The plain file has `length` bytes of complete lines.
    fn compress_frame(
        &mut self,
        plain: &OpenFile,
        length: u64,
        may_continue: impl Fn() -> bool,
    ) -> Result<()> {
        let level = if length - self.compressed_to > FAST_THRESHOLD_BYTES {
            CompressionLevel::Fast
        } else {
            CompressionLevel::Strong
        };
        let text = self.next_text(plain, length)?;
        let frame = frames::compress_while(&text, level, may_continue);
        let Some(frame) = frame.context("could not compress records")? else {
            return Ok(());
        };
        self.frames.append(&frame, 1)?;
        self.frames.sync()?;
        self.compressed_to += text.len() as u64;
        Ok(())
    }

    /// Reads the complete lines of the next frame from the plain file.
    fn next_text(&self, plain: &OpenFile, length: u64) -> Result<Vec<u8>> {
        let could_not_read = || format!("could not read {}", self.plain.display());
        let mut file = plain.read(self.compressed_to..length);
        let mut text = Vec::new();
        loop {
            let length_before = text.len();
            (&mut file)
                .take(FRAME_TEXT_BYTES as u64)
                .read_to_end(&mut text)
                .with_context(could_not_read)?;
            if text.len() == length_before {
                return Ok(text);
            }
            // The text ends inside a long line: read on until it contains a line end.
            if let Some(newline) = memchr::memrchr(b'\n', &text[length_before..]) {
                text.truncate(length_before + newline + 1);
                return Ok(text);
            }
        }
    }

    /// Replaces the plain file by a file with the lines that are not compressed yet. Returns the new file and its
    /// length in bytes.
    fn write_remainder(
        &mut self,
        plain: &OpenFile,
        length: u64,
    ) -> Result<(Box<dyn storage::Storage>, u64)> {
        let path = self.plain.clone();
        let mut file = plain.read(self.compressed_to..length);
        storage::replace(&path, &self.wrap, |new| {
            let mut block = vec![0; COPY_BLOCK_BYTES];
            loop {
                match file.read(&mut block)? {
                    0 => return Ok(()),
                    count => new.append(&block[..count])?,
                }
            }
        })
        .with_context(|| format!("could not shorten {}", path.display()))
    }

    /// Copies the length of the compressed file into `state`, and its change by another program, if there is one.
    pub(crate) fn report_to(&self, state: &mut CacheState) {
        if let Some((_, length)) = &mut state.frames {
            *length = self.frames.length();
        }
        if let Some(displaced) = self.frames.displaced() {
            state.append_log.set_displaced(displaced.clone());
        }
    }

    /// Removes the compressed lines from the plain file, and switches `append_log` to the new plain file.
    fn remove_compressed_lines(&mut self, append_log: &mut AppendLog) -> Result<()> {
        append_log.check_file();
        // If another program has put its own file at the path, that file must not be replaced.
        append_log.check()?;
        let (storage, length) = self.write_remainder(&append_log.reader()?, append_log.length())?;
        append_log.replace(storage, length)?;
        self.compressed_to = 0;
        Ok(())
    }
}

/// Starts the thread that compresses appended lines until the cache is closed.
pub(crate) fn start(shared: Arc<SharedCache>, compressor: Compressor) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("cache-compress".to_owned())
        .spawn(move || run(&shared, compressor))
        .context("could not start the thread that compresses the cache")
}

/// Compresses lines until the cache is closed, compression is stopped, a sync fails, or another program moves or
/// changes a file.
fn run(shared: &SharedCache, mut compressor: Compressor) {
    let mut state = shared.lock();
    let mut has_failed = false;
    loop {
        let length = state.append_log.length();
        state.compress_from = compressor.compressed_to + FRAME_TEXT_BYTES as u64;
        let is_due =
            length >= state.compress_from || (state.closing && length > compressor.compressed_to);
        let is_finished = state.closing && (!is_due || has_failed);
        let is_broken = state.append_log.has_sync_failed() || state.append_log.is_displaced();
        if is_finished || is_broken || shared.keep_plain.load(Ordering::Relaxed) {
            return;
        }
        if !is_due {
            state = shared.wait(state);
            continue;
        }
        let plain = state.append_log.reader();
        drop(state);
        let compressed_before = compressor.compressed_to;
        let may_continue = || !shared.keep_plain.load(Ordering::Relaxed);
        let mut result =
            plain.and_then(|plain| compressor.compress_frame(&plain, length, may_continue));
        state = shared.lock();
        compressor.report_to(&mut state);
        // The lines of the new frame are in both files.
        state.needs_full_read |= compressor.compressed_to > compressed_before;
        // The plain file is rewritten only if at most half of it remains.
        if result.is_ok() && state.append_log.length() <= 2 * compressor.compressed_to {
            state = shared.wait_while_syncing(state);
            result = compressor.remove_compressed_lines(&mut state.append_log);
            // Cleared only if this attempt and the previous one succeeded.
            state.needs_full_read &= result.is_err() || has_failed;
        }
        let Err(error) = result else {
            has_failed = false;
            continue;
        };
        if state.append_log.is_displaced() {
            return;
        }
        // The compressed file may end with part of a frame.
        state.needs_full_read = true;
        if compressor.frames.has_sync_failed() {
            tracing::error!("{error:#}");
            state.append_log.mark_lost();
            return;
        }
        // No data is lost: the lines stay in the plain file.
        if !has_failed {
            tracing::warn!("{error:#}: records stay uncompressed for now");
        }
        has_failed = true;
        if !state.closing {
            state = shared.wait_for(state, RETRY_DELAY);
        }
    }
}
