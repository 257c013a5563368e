//! Compressing in the background: lines leave the plain file for frames of the compressed one.
//!
//! ```text
//! responses.jsonl       lines as they come, synced as `cache.durability` says
//! responses.jsonl.zst   frames of 8 MiB of older lines each
//! ```
//!
//! A frame is appended and synced first; then the plain file is replaced, by renaming, by one that
//! begins behind those lines. At every moment each record is in one of the two files whole, and a
//! crash between the two steps leaves some in both, which every reader knows.

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
use crate::cache::frames::{Effort, FRAME_TEXT};
use crate::cache::open_file::OpenFile;
use crate::cache::shared::{CacheState, SharedCache};
use crate::cache::storage;
use crate::cache::storage::WrapFile;
use crate::cache::{compressed_file, plain_file};

/// With more text than this waiting, frames are made fast rather than small.
const HURRY: u64 = FRAME_TEXT as u64 * 3 / 2;

/// The pause after a failure, such as a full disk.
const RETRY: Duration = Duration::from_secs(10);

/// Moves lines from the plain file of a cache to its compressed one.
pub(crate) struct Compressor {
    plain: PathBuf,
    frames: AppendLog,
    wrap: Arc<WrapFile>,
    /// Bytes of the plain file whose lines are in frames.
    sealed: u64,
}

impl Compressor {
    /// `length` is that of the compressed file, of whole frames.
    pub(crate) fn open(dir: &Path, length: u64, wrap: Arc<WrapFile>) -> Result<Compressor> {
        let path = compressed_file(dir);
        let file = storage::open_or_create(&path)?;
        crate::fs::sync_folder(dir).with_context(|| format!("could not sync {}", dir.display()))?;
        Ok(Compressor {
            plain: plain_file(dir),
            frames: AppendLog::new(wrap(file), &path, length)?,
            wrap,
            sealed: 0,
        })
    }

    /// Seals all of a plain file of `length` bytes, if it is large: that of a cache that was plain
    /// before. Returns what is left of it.
    pub(crate) fn compress_large(
        &mut self,
        length: u64,
        on_progress: OnReadProgress<'_>,
    ) -> Result<u64> {
        if length <= HURRY {
            return Ok(length);
        }
        let plain = File::open(&self.plain);
        let plain = plain.with_context(|| format!("could not read {}", self.plain.display()))?;
        let plain = OpenFile::new(&plain, &self.plain)?;
        while self.sealed < length {
            self.compress_frame(&plain, length, || true)?;
            on_progress(self.sealed, length)?;
        }
        let (_, length) = self.write_remainder(&plain, length)?;
        self.sealed = 0;
        Ok(length)
    }

    /// Makes one frame of the next lines, durably, unless there is no more time for it. The plain
    /// file has `length` bytes of whole lines.
    fn compress_frame(
        &mut self,
        plain: &OpenFile,
        length: u64,
        has_time: impl Fn() -> bool,
    ) -> Result<()> {
        let effort = match length - self.sealed > HURRY {
            true => Effort::Fast,
            false => Effort::Strong,
        };
        let text = self.next_text(plain, length)?;
        let frame = frames::compress_while(&text, effort, has_time);
        let Some(frame) = frame.context("could not compress records")? else {
            return Ok(());
        };
        self.frames.append(&frame, 1)?;
        self.frames.sync()?;
        self.sealed += text.len() as u64;
        Ok(())
    }

    /// Whole lines of the plain file that are in no frame yet, enough for one.
    fn next_text(&self, plain: &OpenFile, length: u64) -> Result<Vec<u8>> {
        let could_not_read = || format!("could not read {}", self.plain.display());
        let mut file = plain.read(self.sealed..length);
        let mut text = Vec::new();
        loop {
            let before = text.len();
            (&mut file)
                .take(FRAME_TEXT as u64)
                .read_to_end(&mut text)
                .with_context(could_not_read)?;
            if text.len() == before {
                return Ok(text);
            }
            // A line longer than a frame has one to itself.
            if let Some(newline) = memchr::memrchr(b'\n', &text[before..]) {
                text.truncate(before + newline + 1);
                return Ok(text);
            }
        }
    }

    /// Replaces the plain file by one of its lines that are in no frame.
    fn write_remainder(
        &mut self,
        plain: &OpenFile,
        length: u64,
    ) -> Result<(Box<dyn storage::Storage>, u64)> {
        let path = self.plain.clone();
        let mut file = plain.read(self.sealed..length);
        storage::replace(&path, &self.wrap, |new| {
            let mut block = vec![0; 1 << 20];
            loop {
                match file.read(&mut block)? {
                    0 => return Ok(()),
                    read => new.append(&block[..read])?,
                }
            }
        })
        .with_context(|| format!("could not shorten {}", path.display()))
    }

    /// Lets the cache know how long the compressed file is, and what has become of it.
    pub(crate) fn report_to(&self, state: &mut CacheState) {
        if let Some((_, length)) = &mut state.frames {
            *length = self.frames.length();
        }
        if let Some(displaced) = self.frames.displaced() {
            state.append_log.set_displaced(displaced.clone());
        }
    }

    /// Has the journal of the plain file go on in one without the sealed lines.
    fn drop_compressed(&mut self, append_log: &mut AppendLog) -> Result<()> {
        append_log.check_file();
        // What has its name now is not ours to replace.
        append_log.check()?;
        let (storage, length) = self.write_remainder(&append_log.reader()?, append_log.length())?;
        append_log.replace(storage, length)?;
        self.sealed = 0;
        Ok(())
    }
}

/// Starts the thread that seals what is appended, until the cache is closed.
pub(crate) fn start(shared: Arc<SharedCache>, compressor: Compressor) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("cache-seal".to_owned())
        .spawn(move || run(&shared, compressor))
        .context("could not start the thread that compresses the cache")
}

fn run(shared: &SharedCache, mut compressor: Compressor) {
    let mut state = shared.lock();
    let mut has_failed = false;
    loop {
        let length = state.append_log.length();
        state.compress_from = compressor.sealed + FRAME_TEXT as u64;
        let is_due = length >= state.compress_from || (state.closing && length > compressor.sealed);
        let is_over = state.closing && (!is_due || has_failed);
        let is_over =
            is_over || state.append_log.has_sync_failed() || state.append_log.is_displaced();
        if is_over || shared.keep_plain.load(Ordering::Relaxed) {
            return;
        }
        if !is_due {
            state = shared.wait(state);
            continue;
        }
        let plain = state.append_log.reader();
        drop(state);
        let sealed = compressor.sealed;
        let has_time = || !shared.keep_plain.load(Ordering::Relaxed);
        let mut result =
            plain.and_then(|plain| compressor.compress_frame(&plain, length, has_time));
        state = shared.lock();
        compressor.report_to(&mut state);
        state.needs_full_read |= compressor.sealed > sealed;
        // Only while little is left to be written anew.
        if result.is_ok() && state.append_log.length() - compressor.sealed <= compressor.sealed {
            state = shared.wait_while_syncing(state);
            result = compressor.drop_compressed(&mut state.append_log);
            state.needs_full_read &= result.is_err() || has_failed;
        }
        let Err(error) = result else {
            has_failed = false;
            continue;
        };
        if state.append_log.is_displaced() {
            return;
        }
        // There may be a part of a frame, too.
        state.needs_full_read = true;
        if compressor.frames.has_sync_failed() {
            tracing::error!("{error:#}");
            state.append_log.mark_lost();
            return;
        }
        // Nothing is lost: the lines stay in the plain file.
        if !has_failed {
            tracing::warn!("{error:#}: records stay uncompressed for now");
        }
        has_failed = true;
        if !state.closing {
            state = shared.wait_for(state, RETRY);
        }
    }
}
