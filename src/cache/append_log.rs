//! The append-only file: whole lines or none, and an fsync that failed is never believed again.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::open_file::{DisplacedFile, OpenFile};
use crate::cache::storage;
use crate::cache::storage::{Storage, SyncJob};

/// The file of one writer, and what of it is durable.
pub(crate) struct AppendLog {
    storage: Box<dyn Storage>,
    syncs_in_background: bool,
    path: PathBuf,
    /// The file and its name, to be compared.
    open_file: Option<OpenFile>,
    /// The file, or another one of the cache, is not what this process made of it.
    displaced: Option<DisplacedFile>,
    /// Bytes of whole lines.
    length: u64,
    /// Lines appended since the last sync, and when the first of them was.
    unsynced: usize,
    /// Lines that a failed sync may have lost.
    doubtful: usize,
    oldest: Option<Instant>,
    health: Health,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Good,
    /// The file ends with part of a line, so that nothing may follow it.
    Torn,
    /// A sync failed. The kernel may have dropped what it could not write, and another sync would
    /// report success all the same.
    Lost,
}

impl AppendLog {
    /// `storage` holds `length` bytes of whole lines; `path` is for messages.
    ///
    /// # Errors
    /// Where the process has no descriptor left.
    pub(crate) fn new(storage: Box<dyn Storage>, path: &Path, length: u64) -> Result<Self> {
        Ok(Self {
            syncs_in_background: storage.sync_job().is_some(),
            open_file: place_of(&*storage, path)?,
            displaced: None,
            storage,
            path: path.to_owned(),
            length,
            unsynced: 0,
            doubtful: 0,
            oldest: None,
            health: Health::Good,
        })
    }

    /// Appends so many `lines`. After an error the file ends where it did before; where even that
    /// fails, every later append is refused. If another program moved or changed the file, the lines go to the
    /// rescue file.
    pub(crate) fn append(&mut self, text: &[u8], lines: usize) -> Result<()> {
        self.check_writable()?;
        self.check_file();
        self.check_writable()?;
        if let Err(error) = storage::write_all(&mut *self.storage, text) {
            return Err(self.roll_back(error));
        }
        self.length += text.len() as u64;
        self.unsynced += lines;
        self.oldest.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Takes back what was written before `error`.
    fn roll_back(&mut self, error: io::Error) -> anyhow::Error {
        if self.storage.truncate(self.length).is_err() {
            self.health = Health::Torn;
        }
        anyhow::Error::new(error).context(format!("could not append to {}", self.path.display()))
    }

    /// Makes every line appended so far durable. An error is final.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.check_file();
        if self.health == Health::Lost {
            return self.check_writable();
        }
        if self.unsynced == 0 {
            return Ok(());
        }
        let unsynced = self.take_unsynced();
        let result = self.storage.sync();
        self.end_sync(unsynced, result)
    }

    /// A sync of every line appended so far as a job for another thread, with their number.
    /// Hand its result to [`AppendLog::end_sync`].
    pub(crate) fn begin_sync(&mut self) -> Option<(usize, SyncJob)> {
        if self.health == Health::Lost || self.unsynced == 0 {
            return None;
        }
        let job = self.storage.sync_job()?;
        Some((self.take_unsynced(), job))
    }

    fn take_unsynced(&mut self) -> usize {
        self.oldest = None;
        std::mem::take(&mut self.unsynced)
    }

    /// Takes note of how a sync of so many lines ended. An error is final.
    pub(crate) fn end_sync(&mut self, lines: usize, result: io::Result<()>) -> Result<()> {
        let Err(error) = result else {
            return Ok(());
        };
        let lines = lines + self.unsynced;
        self.doubtful += lines - self.unsynced;
        self.mark_lost();
        Err(error).with_context(|| {
            format!(
                "could not sync {}: its last {lines} records may not be on the disk",
                self.path.display()
            )
        })
    }

    /// Goes on in another file, of so many bytes, that holds on the disk whatever this one did from
    /// some line on.
    ///
    /// # Errors
    /// Where the process has no descriptor left.
    pub(crate) fn replace(&mut self, storage: Box<dyn Storage>, length: u64) -> Result<()> {
        self.open_file = place_of(&*storage, &self.path)?;
        self.storage = storage;
        self.length = length;
        self.take_unsynced();
        if self.health == Health::Torn {
            self.health = Health::Good;
        }
        Ok(())
    }

    /// Compares the file with what was written to it. Where it was moved or changed by somebody else, what
    /// follows is appended to where it is safe, and [`AppendLog::check`] says so from now on.
    pub(crate) fn check_file(&mut self) {
        // After a failed write the length is not what was written.
        if self.displaced.is_some() || self.health != Health::Good {
            return;
        }
        let Some(open_file) = &self.open_file else {
            return;
        };
        let Err(change) = open_file.check(self.length) else {
            return;
        };
        let (displaced, rescue) = open_file.handle_change(&change, self.length);
        self.set_displaced(displaced);
        match rescue {
            Ok(None) => {}
            Ok(Some(rescue)) => {
                self.path = rescue.path;
                self.length = rescue.length;
                self.storage = Box::new(rescue.file);
                self.take_unsynced();
            }
            Err(()) => self.mark_lost(),
        }
    }

    /// A file of the cache is not what this process made of it: nothing more is to be asked.
    pub(crate) fn set_displaced(&mut self, displaced: DisplacedFile) {
        self.displaced.get_or_insert(displaced);
    }

    pub(crate) fn displaced(&self) -> Option<&DisplacedFile> {
        self.displaced.as_ref()
    }

    pub(crate) fn is_displaced(&self) -> bool {
        self.displaced.is_some()
    }

    /// Bytes of the file that lines are appended to meanwhile.
    ///
    /// # Errors
    /// Where it cannot be opened.
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

    /// Nothing may be appended any more: something that it depends on could not be synced.
    pub(crate) fn mark_lost(&mut self) {
        self.doubtful += self.take_unsynced();
        self.health = Health::Lost;
    }

    /// Lines that may not be on the disk since a sync of them failed.
    pub(crate) fn possibly_lost(&self) -> usize {
        self.doubtful
    }

    /// Has a sync failed?
    pub(crate) fn has_sync_failed(&self) -> bool {
        self.health == Health::Lost
    }

    /// Bytes of whole lines.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Can another thread sync while lines are appended?
    pub(crate) fn syncs_in_background(&self) -> bool {
        self.syncs_in_background
    }

    /// An error where nothing more is to be asked for.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_writable()?;
        match &self.displaced {
            Some(displaced) => Err(displaced.clone().into()),
            None => Ok(()),
        }
    }

    /// An error where nothing can be appended any more.
    pub(crate) fn check_writable(&self) -> Result<()> {
        let path = self.path.display();
        if let (Health::Lost, Some(displaced)) = (self.health, &self.displaced) {
            return Err(displaced.clone().into());
        }
        match self.health {
            Health::Good => Ok(()),
            Health::Torn => bail!(
                "{path} ends with part of a record after a failed write: free the disk and run the \
                 same command again, which repairs it"
            ),
            Health::Lost => bail!(
                "{path} could not be synced before, so that nothing more is written to it: check \
                 the disk and run the same command again"
            ),
        }
    }

    /// Lines that a power loss may take.
    pub(crate) fn unsynced(&self) -> usize {
        self.unsynced
    }

    /// For how long the oldest of them has been waiting.
    pub(crate) fn oldest_unsynced_age(&self) -> Option<Duration> {
        self.oldest.map(|oldest| oldest.elapsed())
    }
}

fn place_of(storage: &dyn Storage, path: &Path) -> Result<Option<OpenFile>> {
    storage
        .file()
        .map(|file| OpenFile::new(file, path))
        .transpose()
}
