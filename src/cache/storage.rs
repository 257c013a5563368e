//! The files of a cache on the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

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
    /// The file that has the bytes, so that it can be compared with what has its name. None where there is
    /// no such thing.
    fn file(&self) -> Option<&File> {
        None
    }
}

pub type SyncJob = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// Puts a [`Storage`] in the place of each file that a cache appends to.
pub type WrapFile = Box<dyn Fn(File) -> Box<dyn Storage> + Send + Sync>;

/// The files themselves.
pub fn plain_storage() -> WrapFile {
    Box::new(|file| Box::new(file))
}

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

    fn file(&self) -> Option<&File> {
        Some(self)
    }
}

/// Opens the file at `path` for appending and reading, and creates it where there is none.
pub fn open_or_create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("could not open {}", path.display()))
}

/// Appends whole lines to `file`, durably.
pub fn append(file: &mut File, lines: &[u8]) -> io::Result<()> {
    file.write_all(lines)?;
    file.sync_data()
}

/// Moves what follows byte `offset` to the end of the file at `aside`.
pub fn cut(file: &mut File, offset: u64, aside: &Path) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let mut aside = OpenOptions::new().append(true).create(true).open(aside)?;
    io::copy(file, &mut aside)?;
    aside.sync_all()?;
    // Only now, so that these bytes are always in one of the two files.
    file.set_len(offset)?;
    file.sync_all()
}

/// Replaces the file at `path` by what `fill` appends, at once and durably, and returns it for
/// appending more, with its length.
pub fn replace(
    path: &Path,
    wrap: &WrapFile,
    fill: impl FnOnce(&mut Appender<'_>) -> Result<()>,
) -> Result<(Box<dyn Storage>, u64)> {
    let beside = replacement(path);
    let replaced = write_new(&beside, wrap, fill).and_then(|new| {
        std::fs::rename(&beside, path)?;
        Ok(new)
    });
    match &replaced {
        Ok(_) => crate::fs::sync_folder(path.parent().unwrap_or(Path::new(".")))?,
        // The disk may be full: what is of no use makes room.
        Err(_) => drop(std::fs::remove_file(&beside)),
    }
    replaced
}

fn replacement(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Removes what a killed [`replace`] has left beside `path`.
pub fn remove_leftover(path: &Path) {
    // It is of no use, and in nobody's way.
    drop(std::fs::remove_file(replacement(path)));
}

fn write_new(
    path: &Path,
    wrap: &WrapFile,
    fill: impl FnOnce(&mut Appender<'_>) -> Result<()>,
) -> Result<(Box<dyn Storage>, u64)> {
    // Read as well: what is in it is compressed later on.
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(path)?;
    // What a killed attempt may have left.
    file.set_len(0)?;
    let mut storage = wrap(file);
    let mut appender = Appender {
        storage: &mut *storage,
        buffer: Vec::new(),
        length: 0,
    };
    fill(&mut appender)?;
    let length = appender.finish()?;
    storage.sync()?;
    Ok((storage, length))
}

/// Appends in large pieces.
pub struct Appender<'a> {
    storage: &'a mut dyn Storage,
    buffer: Vec<u8>,
    length: u64,
}

impl Appender<'_> {
    const PIECE: usize = 1 << 20;

    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < Self::PIECE {
            return Ok(());
        }
        write_all(self.storage, &std::mem::take(&mut self.buffer))
    }

    fn finish(self) -> io::Result<u64> {
        write_all(self.storage, &self.buffer)?;
        Ok(self.length)
    }
}

/// Writes all of `bytes`; after an error, some of them may have been.
pub fn write_all(storage: &mut dyn Storage, bytes: &[u8]) -> io::Result<()> {
    let mut written = 0;
    while written < bytes.len() {
        match storage.write(&bytes[written..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
