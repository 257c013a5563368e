//! The append-only file: whole lines or none, and an fsync that failed is never believed again.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::recovery::{BadLine, Ending, Scan, ScanError};
use crate::exit::Exit;

/// What the cache asks of the disk. Files do it; a test can put a failing disk in their place.
pub trait Storage: Send {
    /// Appends some of `bytes` and says how many, as `write(2)` does.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Makes everything appended so far durable.
    fn sync(&mut self) -> io::Result<()>;
    /// The same as a job for another thread, during which appending goes on. None where there is no
    /// such thing.
    fn sync_job(&self) -> Option<SyncJob> {
        None
    }
    /// Cuts the file to `length` bytes.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
}

pub type SyncJob = Box<dyn FnOnce() -> io::Result<()> + Send>;

impl Storage for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn sync_job(&self) -> Option<SyncJob> {
        let file = self.try_clone().ok()?;
        Some(Box::new(move || file.sync_data()))
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }
}

/// The file of one writer, and what of it is durable.
pub struct Journal {
    storage: Box<dyn Storage>,
    syncs_in_background: bool,
    path: PathBuf,
    /// Bytes of whole lines.
    length: u64,
    /// Lines appended since the last sync, and when the first of them was.
    unsynced: usize,
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

impl Journal {
    /// `storage` holds `length` bytes of whole lines; `path` is for messages.
    pub fn new(storage: Box<dyn Storage>, path: &Path, length: u64) -> Self {
        Self {
            syncs_in_background: storage.sync_job().is_some(),
            storage,
            path: path.to_owned(),
            length,
            unsynced: 0,
            oldest: None,
            health: Health::Good,
        }
    }

    /// Appends so many `lines`. After an error the file ends where it did before; where even that
    /// cannot be had, every later append is refused.
    pub fn append(&mut self, text: &[u8], lines: usize) -> Result<()> {
        self.check()?;
        let mut written = 0;
        while written < text.len() {
            match self.storage.write(&text[written..]) {
                Ok(0) => return Err(self.undo(written, io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.undo(written, error)),
            }
        }
        self.length += text.len() as u64;
        self.unsynced += lines;
        self.oldest.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Takes back the part of a line that was written before `error`.
    fn undo(&mut self, written: usize, error: io::Error) -> anyhow::Error {
        if written > 0 && self.storage.truncate(self.length).is_err() {
            self.health = Health::Torn;
        }
        anyhow::Error::new(error).context(format!("could not append to {}", self.path.display()))
    }

    /// Makes every line appended so far durable. An error is final.
    pub fn sync(&mut self) -> Result<()> {
        if self.health == Health::Lost {
            return self.check();
        }
        if self.unsynced == 0 {
            return Ok(());
        }
        let unsynced = self.take_unsynced();
        let result = self.storage.sync();
        self.end_sync(unsynced, result)
    }

    /// A sync of every line appended so far as a job for another thread, with their number.
    /// Hand its result to [`Journal::end_sync`].
    pub fn begin_sync(&mut self) -> Option<(usize, SyncJob)> {
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
    pub fn end_sync(&mut self, lines: usize, result: io::Result<()>) -> Result<()> {
        let Err(error) = result else {
            return Ok(());
        };
        self.health = Health::Lost;
        let lines = lines + self.take_unsynced();
        Err(error).with_context(|| {
            format!(
                "could not sync {}: its last {lines} records may not be on the disk",
                self.path.display()
            )
        })
    }

    /// Can another thread sync while lines are appended?
    pub fn syncs_in_background(&self) -> bool {
        self.syncs_in_background
    }

    /// An error where nothing may be appended any more.
    pub fn check(&self) -> Result<()> {
        let path = self.path.display();
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
    pub fn unsynced(&self) -> usize {
        self.unsynced
    }

    /// For how long the oldest of them has been waiting.
    pub fn waiting(&self) -> Option<Duration> {
        self.oldest.map(|oldest| oldest.elapsed())
    }
}

/// Opens the cache file of `path` for appending, whole: calls `on_key` for every record in it,
/// moves a torn tail to `torn`, and refuses damage. Returns the file and its length.
pub fn open(path: &Path, torn: &Path, on_key: impl FnMut(&str)) -> Result<(File, u64)> {
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("could not open {}", path.display()))?;
    let (length, ending) = scan(&file, path, on_key)?;
    let length = match ending {
        Ending::Clean => Ok(length),
        Ending::Unterminated => terminate(&mut file, length),
        Ending::Torn(bad) => {
            tracing::warn!(
                "{}: a torn record at its end ({} bytes from byte {}) is moved to {}; it will be \
                 asked again",
                path.display(),
                length - bad.offset,
                bad.offset,
                torn.display()
            );
            cut(&mut file, bad.offset, torn).map(|()| bad.offset)
        }
    };
    let length = length.with_context(|| format!("could not repair {}", path.display()))?;
    if let Some(folder) = path.parent() {
        // The names of the files that were just created.
        crate::fs::sync_folder(folder)
            .with_context(|| format!("could not sync {}", folder.display()))?;
    }
    Ok((file, length))
}

fn scan(file: &File, path: &Path, mut on_key: impl FnMut(&str)) -> Result<(u64, Ending)> {
    let mut scan = Scan::new(BufReader::with_capacity(1 << 20, file));
    while scan.advance().map_err(|error| refusal(path, error))? {
        on_key(scan.key());
    }
    Ok((scan.position(), scan.ending()))
}

/// Gives the last record its newline.
fn terminate(file: &mut File, length: u64) -> io::Result<u64> {
    file.write_all(b"\n")?;
    file.sync_data()?;
    Ok(length + 1)
}

/// Moves what follows byte `offset` to the end of `torn`.
fn cut(file: &mut File, offset: u64, torn: &Path) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let mut aside = OpenOptions::new().append(true).create(true).open(torn)?;
    io::copy(file, &mut aside)?;
    aside.sync_all()?;
    // Only now, so that these bytes are always in one of the two files.
    file.set_len(offset)?;
    file.sync_all()
}

/// What a scan of `path` that stopped short means for the program.
pub fn refusal(path: &Path, error: ScanError) -> anyhow::Error {
    match error {
        ScanError::Read(error) => {
            anyhow::Error::new(error).context(format!("could not read {}", path.display()))
        }
        ScanError::Bad(bad) => damaged(path, &bad),
    }
}

/// The refusal to go on with a damaged file.
pub fn damaged(path: &Path, bad: &BadLine) -> anyhow::Error {
    let remedy = match bad.fault {
        super::line::Fault::Newer(_) => "",
        _ => "; restore it from a backup, or delete the line to have its prompt asked again",
    };
    Exit::Damaged(format!("{}: {bad}{remedy}", path.display())).into()
}
