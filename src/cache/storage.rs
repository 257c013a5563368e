//! Creates, appends to and replaces the files of a cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Operations on a file that a cache appends to. Tests implement them to inject faults.
pub trait Storage: Send {
    /// Appends some of `bytes` and returns their number, as `write(2)` does.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Makes everything appended so far durable.
    fn sync(&mut self) -> io::Result<()>;
    /// Returns a job that syncs on another thread while lines are appended; `None` if not supported.
    fn sync_job(&self) -> Option<SyncJob> {
        None
    }
    /// Truncates the file to `length` bytes.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
    /// Returns the file, to detect changes by another program; `None` if there is no file.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// Sync that can run on another thread.
pub(crate) type SyncJob = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// Creates the [`Storage`] for a file that a cache appends to.
pub type WrapFile = Box<dyn Fn(File) -> Box<dyn Storage> + Send + Sync>;

/// Uses the files themselves as storage.
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

/// Opens the file at `path` for appending and reading; creates it if it does not exist.
pub(crate) fn open_or_create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("could not open {}", path.display()))
}

/// Appends complete lines to `file`, durably.
pub fn append(file: &mut File, lines: &[u8]) -> io::Result<()> {
    file.write_all(lines)?;
    file.sync_data()
}

/// Moves the bytes after `offset` to the end of the file at `aside`.
pub fn cut(file: &mut File, offset: u64, aside: &Path) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let mut aside = OpenOptions::new().append(true).create(true).open(aside)?;
    io::copy(file, &mut aside)?;
    aside.sync_all()?;
    // Truncated last, so that the bytes are always in at least one of the two files.
    file.set_len(offset)?;
    file.sync_all()
}

/// Atomically and durably replaces the file at `path` by the bytes that `fill` appends. Returns the new file, open
/// for appending, and its length.
pub fn replace(
    path: &Path,
    wrap: &WrapFile,
    fill: impl FnOnce(&mut BufferedAppender<'_>) -> Result<()>,
) -> Result<(Box<dyn Storage>, u64)> {
    let new_path = replacement_path(path);
    let replaced = write_new(&new_path, wrap, fill).and_then(|new| {
        std::fs::rename(&new_path, path)?;
        Ok(new)
    });
    match &replaced {
        Ok(_) => crate::fs::sync_folder(path.parent().unwrap_or(Path::new(".")))?,
        // Frees the space of the partial file, since the disk may be full.
        Err(_) => drop(std::fs::remove_file(&new_path)),
    }
    replaced
}

fn replacement_path(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Removes the file that a killed [`replace`] left beside `path`.
pub(crate) fn remove_leftover(path: &Path) {
    // A failure is harmless: the next `replace` truncates the file.
    drop(std::fs::remove_file(replacement_path(path)));
}

fn write_new(
    path: &Path,
    wrap: &WrapFile,
    fill: impl FnOnce(&mut BufferedAppender<'_>) -> Result<()>,
) -> Result<(Box<dyn Storage>, u64)> {
    // Opened for reading as well, because the compressor reads the lines later.
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(path)?;
    // An interrupted attempt may have left a partial file.
    file.set_len(0)?;
    let mut storage = wrap(file);
    let mut appender = BufferedAppender {
        storage: &mut *storage,
        buffer: Vec::new(),
        length: 0,
    };
    fill(&mut appender)?;
    let length = appender.finish()?;
    storage.sync()?;
    Ok((storage, length))
}

/// Buffered appends to a storage.
pub struct BufferedAppender<'a> {
    storage: &'a mut dyn Storage,
    buffer: Vec<u8>,
    length: u64,
}

impl BufferedAppender<'_> {
    /// Number of buffered bytes that are written at once.
    const BUFFER_BYTES: usize = 1 << 20;

    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < Self::BUFFER_BYTES {
            return Ok(());
        }
        write_all(self.storage, &std::mem::take(&mut self.buffer))
    }

    fn finish(self) -> io::Result<u64> {
        write_all(self.storage, &self.buffer)?;
        Ok(self.length)
    }
}

/// Writes all of `bytes`; after an error, some of them may be written.
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
