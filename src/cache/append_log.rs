//! An append-only file, [`AppendLog`]. After a failed write, the incomplete line is truncated away. Nothing is appended
//! after a failed truncation or a failed fsync.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::open_file::{DisplacedFile, FileChange, OpenFile};
use crate::cache::storage;
use crate::cache::storage::{Storage, SyncJob};

/// File to which one writer appends, with counters of the lines that are not durable yet. In the compressed file, a
/// frame counts as one line.
pub(crate) struct AppendLog {
    storage: Box<dyn Storage>,
    /// True if the storage supports [`Storage::sync_job`].
    syncs_in_background: bool,
    path: PathBuf,
    /// Handle and path of the file, to detect that another program moved or changed it. `None` if the storage is not
    /// a file.
    open_file: Option<OpenFile>,
    /// Set once another program has moved or changed a file of the cache.
    displaced: Option<DisplacedFile>,
    /// Number of bytes in complete lines.
    length: u64,
    /// Number of lines appended since the last sync began.
    unsynced: usize,
    /// Number of lines that may not be on the disk because a sync or a rescue failed.
    possibly_lost: usize,
    /// Time at which the first unsynced line was appended.
    oldest_unsynced: Option<Instant>,
    health: LogHealth,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LogHealth {
    Good,
    /// The file ends with part of a line: appending would corrupt the next line.
    Torn,
    /// A sync or a rescue failed. After a failed sync the kernel may have dropped the pages that it could not write,
    /// and a second sync would report success.
    SyncFailed,
}

impl AppendLog {
    /// Wraps `storage`, which contains `length` bytes of complete lines. `path` is used in messages and to detect
    /// changes by another program.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub(crate) fn new(storage: Box<dyn Storage>, path: &Path, length: u64) -> Result<Self> {
        Ok(Self {
            syncs_in_background: storage.sync_job().is_some(),
            open_file: open_file_of(&*storage, path)?,
            displaced: None,
            storage,
            path: path.to_owned(),
            length,
            unsynced: 0,
            possibly_lost: 0,
            oldest_unsynced: None,
            health: LogHealth::Good,
        })
    }

    /// Appends `text`, which consists of `lines` complete lines. A file that another program has moved stays in use;
    /// after any other change by another program, the lines are appended to a rescue file.
    ///
    /// # Errors
    /// If the write fails. The file is then truncated to its previous length; if truncating fails as well, every later
    /// append is refused. Also if an earlier sync or rescue has failed.
    pub(crate) fn append(&mut self, text: &[u8], lines: usize) -> Result<()> {
        self.check_writable()?;
        self.check_file();
        self.check_writable()?;
        self.write(text, lines)?;
        // Another program may have appended after the check: the lines then continue its last line.
        if self.check_file() {
            self.write(text, lines)?;
        }
        Ok(())
    }

    fn write(&mut self, text: &[u8], lines: usize) -> Result<()> {
        if let Err(error) = storage::write_all(&mut *self.storage, text) {
            return Err(self.roll_back(error));
        }
        self.length += text.len() as u64;
        self.unsynced += lines;
        self.oldest_unsynced.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Truncates the file to its complete lines after a failed write, and returns `error` with context.
    fn roll_back(&mut self, error: io::Error) -> anyhow::Error {
        if self.storage.truncate(self.length).is_err() {
            self.health = LogHealth::Torn;
        }
        anyhow::Error::new(error).context(format!("could not append to {}", self.path.display()))
    }

    /// Makes every line appended so far durable, except for lines whose background sync is still running. After an
    /// error nothing more can be appended.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.check_file();
        if self.health == LogHealth::SyncFailed {
            return self.check_writable();
        }
        if self.unsynced == 0 {
            return Ok(());
        }
        let unsynced = self.take_unsynced();
        let result = self.storage.sync();
        self.end_sync(unsynced, result)
    }

    /// Returns the number of unsynced lines, and a job that syncs them on another thread. Pass this number and the
    /// job's result to [`AppendLog::end_sync`]. `None` if there is nothing to sync, an earlier sync failed, or the
    /// storage cannot sync on another thread.
    pub(crate) fn begin_sync(&mut self) -> Option<(usize, SyncJob)> {
        if self.health == LogHealth::SyncFailed || self.unsynced == 0 {
            return None;
        }
        let job = self.storage.sync_job()?;
        Some((self.take_unsynced(), job))
    }

    fn take_unsynced(&mut self) -> usize {
        self.oldest_unsynced = None;
        std::mem::take(&mut self.unsynced)
    }

    /// Records the result of a sync of `lines` lines. After an error nothing more can be appended.
    pub(crate) fn end_sync(&mut self, lines: usize, result: io::Result<()>) -> Result<()> {
        let Err(error) = result else {
            return Ok(());
        };
        let lost_lines = lines + self.unsynced;
        self.possibly_lost += lines;
        self.mark_lost();
        Err(error).with_context(|| {
            format!(
                "could not sync {}: its last {lost_lines} records may not be on the disk",
                self.path.display()
            )
        })
    }

    /// Switches to another file of `length` bytes, which durably contains the lines of this file that are not in the
    /// compressed file.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub(crate) fn replace(&mut self, storage: Box<dyn Storage>, length: u64) -> Result<()> {
        self.open_file = open_file_of(&*storage, &self.path)?;
        self.storage = storage;
        self.length = length;
        self.take_unsynced();
        Ok(())
    }

    /// Detects that another program has moved or changed the file. Lines can still be appended, to the moved file or to
    /// a rescue file, but [`AppendLog::check`] fails from then on. If the rescue fails, appends are refused as well.
    ///
    /// Returns true if the file has changed now, and the rescue file does not contain its lines.
    pub(crate) fn check_file(&mut self) -> bool {
        // After a failed write the length of the file may differ from `self.length`.
        if self.displaced.is_some() || self.health != LogHealth::Good {
            return false;
        }
        let Some(open_file) = &self.open_file else {
            return false;
        };
        let Err(change) = open_file.check(self.length) else {
            return false;
        };
        let (displaced, rescue) = open_file.handle_change(&change, self.length);
        self.set_displaced(displaced);
        match rescue {
            Ok(None) => false,
            Ok(Some(rescue)) => {
                self.path = rescue.path;
                self.length = rescue.length;
                self.storage = Box::new(rescue.file);
                self.take_unsynced();
                matches!(
                    change,
                    FileChange::Truncated { .. } | FileChange::Extended { .. }
                )
            }
            Err(()) => {
                self.mark_lost();
                false
            }
        }
    }

    /// Records that another program has moved or changed a file of the cache, so that no further request is sent. The
    /// first such change is kept.
    pub(crate) fn set_displaced(&mut self, displaced: DisplacedFile) {
        self.displaced.get_or_insert(displaced);
    }

    pub(crate) fn displaced(&self) -> Option<&DisplacedFile> {
        self.displaced.as_ref()
    }

    pub(crate) fn is_displaced(&self) -> bool {
        self.displaced.is_some()
    }

    /// Returns a handle with which the file can be read while lines are appended to it.
    ///
    /// # Errors
    /// If the file cannot be opened, or the process has no file descriptor left.
    pub(crate) fn reader(&self) -> Result<OpenFile> {
        match &self.open_file {
            Some(open_file) => open_file.try_clone(),
            None => {
                let file = std::fs::File::open(&self.path);
                let file =
                    file.with_context(|| format!("could not read {}", self.path.display()))?;
                OpenFile::new(&file, &self.path)
            }
        }
    }

    /// Counts the unsynced lines as possibly lost and refuses all later appends, after a sync or a rescue has failed.
    pub(crate) fn mark_lost(&mut self) {
        self.possibly_lost += self.take_unsynced();
        self.health = LogHealth::SyncFailed;
    }

    /// Number of lines that may not be on the disk because a sync or a rescue failed.
    pub(crate) fn possibly_lost(&self) -> usize {
        self.possibly_lost
    }

    /// Returns true if a sync or a rescue has failed.
    pub(crate) fn has_sync_failed(&self) -> bool {
        self.health == LogHealth::SyncFailed
    }

    /// Length of the complete lines in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Returns true if another thread can sync while lines are appended.
    pub(crate) fn syncs_in_background(&self) -> bool {
        self.syncs_in_background
    }

    /// Fails if no further request may be sent, because its answer might not be stored in this cache.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_writable()?;
        match &self.displaced {
            Some(displaced) => Err(displaced.clone().into()),
            None => Ok(()),
        }
    }

    /// Fails if nothing can be appended any more.
    pub(crate) fn check_writable(&self) -> Result<()> {
        let path = self.path.display();
        // The change by another program is the cause, so it is reported instead of the failed rescue or sync.
        if let (LogHealth::SyncFailed, Some(displaced)) = (self.health, &self.displaced) {
            return Err(displaced.clone().into());
        }
        match self.health {
            LogHealth::Good => Ok(()),
            LogHealth::Torn => bail!(
                "{path} ends with part of a record after a failed write: free disk space and rerun the \
                 command, which repairs the file"
            ),
            LogHealth::SyncFailed => bail!(
                "an earlier sync of {path} failed, so nothing more is written to it: check the disk and \
                 rerun the command"
            ),
        }
    }

    /// Number of lines appended since the last sync began. A power loss could lose them, and the lines whose background
    /// sync is still running.
    pub(crate) fn unsynced(&self) -> usize {
        self.unsynced
    }

    /// Age of the oldest line appended since the last sync began; `None` if there is no such line.
    pub(crate) fn oldest_unsynced_age(&self) -> Option<Duration> {
        self.oldest_unsynced.map(|oldest| oldest.elapsed())
    }
}

fn open_file_of(storage: &dyn Storage, path: &Path) -> Result<Option<OpenFile>> {
    storage
        .file()
        .map(|file| OpenFile::new(file, path))
        .transpose()
}
