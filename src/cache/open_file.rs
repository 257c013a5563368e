//! [`OpenFile`]: detects that another program moved, removed, replaced, truncated or appended to an open file.
//!
//! Device, inode and length are compared. A removed file is still open, so its lines are copied to a rescue
//! folder, and no paid answer is lost.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exit::Exit;
use crate::terminal::format_count;

/// Error: another program moved or changed a file of the cache.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct DisplacedFile(pub String);

/// Open file with the path at which it was opened.
pub(crate) struct OpenFile {
    file: File,
    path: PathBuf,
}

/// Change that another program made to a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FileChange {
    /// The file is at this path now.
    Moved(PathBuf),
    /// The file was deleted; `is_replaced` if another file has its path.
    Removed { is_replaced: bool },
    /// The file was truncated to `bytes`.
    Cut { bytes: u64 },
    /// Another program has appended `by` bytes.
    Longer { by: u64 },
}

impl OpenFile {
    /// Duplicates the handle of `file`, which was opened at `path`.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub(crate) fn new(file: &File, path: &Path) -> Result<OpenFile> {
        let file = file.try_clone();
        Ok(OpenFile {
            file: file.with_context(|| format!("could not hold {} open", path.display()))?,
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        })
    }

    /// Detects a change of the file, to which this process has written `length` bytes.
    pub(crate) fn check(&self, length: u64) -> Result<(), FileChange> {
        let Ok(own) = self.file.metadata() else {
            return Ok(());
        };
        if !crate::fs::has_name(&self.file, &self.path) {
            let is_replaced = self.path.exists();
            let moved = self.current_path();
            let moved = moved.filter(|now| now.exists() && crate::fs::has_name(&self.file, now));
            return Err(moved.map_or(FileChange::Removed { is_replaced }, FileChange::Moved));
        }
        match own.len() {
            now if now < length => Err(FileChange::Cut { bytes: now }),
            now if now > length => Err(FileChange::Longer { by: now - length }),
            _ => Ok(()),
        }
    }

    /// Saves the `length` bytes of a file that has changed. Returns the error to report, and the file to continue
    /// in: `None` for the same file, or an error if the bytes could not be saved.
    pub(crate) fn handle_change(
        &self,
        change: &FileChange,
        length: u64,
    ) -> (DisplacedFile, Result<Option<RescueFile>, ()>) {
        let cache = self.path.parent().unwrap_or(Path::new("."));
        let dir = rescue_dir(cache);
        let displaced = describe(&self.path, change, length, &dir);
        let kept = match change {
            FileChange::Moved(now) => {
                let note = format!("{}\n{}\n", self.path.display(), now.display());
                // Fails if the folder was moved as well. Then no later run finds a cache there.
                if let Err(error) = crate::fs::write_atomic(&note_file(cache), note.as_bytes()) {
                    tracing::debug!("{error:#}");
                }
                return (displaced, Ok(None));
            }
            FileChange::Removed { .. } => length,
            // The remaining bytes stay in the file.
            FileChange::Cut { .. } | FileChange::Longer { .. } => 0,
        };
        match rescue(self, kept, &dir) {
            Ok(rescue) => (displaced, Ok(Some(rescue))),
            Err(error) => {
                let text = format!("{displaced}; but that failed: {error:#}");
                (DisplacedFile(text), Err(()))
            }
        }
    }

    /// Duplicates the handle.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub(crate) fn try_clone(&self) -> Result<OpenFile> {
        OpenFile::new(&self.file, &self.path)
    }

    /// Asks the operating system for the current path of the file.
    fn current_path(&self) -> Option<PathBuf> {
        #[cfg(unix)]
        {
            use std::os::fd::AsRawFd;
            std::fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd())).ok()
        }
        #[cfg(not(unix))]
        None
    }

    /// Reads a range of the file, also after it was moved and while it grows.
    pub(crate) fn read(&self, bytes: Range<u64>) -> impl Read {
        let part = FileRange {
            file: &self.file,
            bytes,
        };
        BufReader::with_capacity(1 << 20, part)
    }
}

/// Reader of a range of a file. The file's write position does not change.
struct FileRange<'a> {
    file: &'a File,
    bytes: Range<u64>,
}

impl Read for FileRange<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.end.saturating_sub(self.bytes.start);
        let most = usize::try_from(left).map_or(into.len(), |left| left.min(into.len()));
        let read = read_at(self.file, &mut into[..most], self.bytes.start)?;
        self.bytes.start += read as u64;
        Ok(read)
    }
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, at)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read(into)
}

/// Folder beside the cache folder `dir` for rescued records.
pub(crate) fn rescue_dir(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".rescued");
    dir.with_file_name(name)
}

/// Path of the note that records where a file of the cache folder `dir` was moved to.
fn note_file(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".moved");
    dir.with_file_name(name)
}

/// Refuses to start a new cache in `dir` while records of an earlier run are in another place: the run would pay
/// for them again.
///
/// # Errors
/// [`Exit::Usage`], with instructions, if there are rescued records or a moved file.
pub(crate) fn check_nothing_displaced(dir: &Path) -> Result<()> {
    let rescued = rescue_dir(dir);
    if super::exists(&rescued) {
        let message = format!(
            "{rescued} holds answers that were rescued when another program moved or changed cache files during \
             a run: merge them with `distill cache merge --dir {} {rescued}` (run `distill cache repair` first if \
             the cache is damaged), then remove {rescued}",
            dir.display(),
            rescued = rescued.display()
        );
        return Err(Exit::Usage(message).into());
    }
    let note = note_file(dir);
    let Ok(text) = crate::fs::read_to_string(&note) else {
        return Ok(());
    };
    let mut lines = text.lines();
    if let (Some(from), Some(to)) = (lines.next(), lines.next())
        && !Path::new(from).exists()
    {
        let message = format!(
            "{from} was moved to {to} during the last run, and its answers would be paid for again: \
             move it back; to start a new cache instead, remove {}",
            note.display()
        );
        return Err(Exit::Usage(message).into());
    }
    Ok(())
}

/// Removes the note about a moved file, once [`check_nothing_displaced`] has passed.
///
/// # Errors
/// If the note cannot be removed.
pub(crate) fn remove_move_note(dir: &Path) -> Result<()> {
    let note = note_file(dir);
    if !note.exists() {
        return Ok(());
    }
    crate::fs::remove_file(&note)
}

/// File in the rescue folder.
pub(crate) struct RescueFile {
    pub file: File,
    pub path: PathBuf,
    pub length: u64,
}

/// Copies the first `length` bytes of `open_file` to a file of the same name in the folder `dir`.
///
/// # Errors
/// If the copy cannot be written.
fn rescue(open_file: &OpenFile, length: u64, dir: &Path) -> Result<RescueFile> {
    crate::fs::create_dir_all(dir)?;
    let path = dir.join(open_file.path.file_name().unwrap_or_default());
    let could_not = || format!("could not write {}", path.display());
    let mut file = super::storage::open_or_create(&path)?;
    let before = file.metadata().with_context(could_not)?.len();
    let mut copy = || -> io::Result<u64> {
        let copied = io::copy(&mut open_file.read(0..length), &mut file)?;
        file.flush()?;
        file.sync_all()?;
        Ok(copied)
    };
    let copied = copy().with_context(could_not)?;
    crate::fs::sync_folder(dir).with_context(could_not)?;
    Ok(RescueFile {
        file,
        path,
        length: before + copied,
    })
}

/// Builds the message about a change of the file at `path`: where its answers are, and how to continue.
/// `rescued` is the folder for its records, or for the answers still in flight.
fn describe(path: &Path, change: &FileChange, length: u64, rescued: &Path) -> DisplacedFile {
    let file = path.display();
    let dir = path.parent().unwrap_or(Path::new("."));
    let merge = format!(
        "merge them with `distill cache merge --dir {} {rescued}`, then remove {rescued}",
        dir.display(),
        rescued = rescued.display()
    );
    let text = match change {
        FileChange::Moved(now) => format!(
            "{file} was moved to {}: all answers are safe there, also those that were in flight; move it back \
             and rerun the command",
            now.display()
        ),
        FileChange::Removed { is_replaced } => format!(
            "{file} was {} during this run: its answers are safe in {}, also those that were in flight; {merge}",
            if *is_replaced { "replaced" } else { "removed" },
            rescued.display()
        ),
        FileChange::Cut { bytes } => format!(
            "{file} was truncated to {} of {} bytes during this run: the other bytes are lost unless you have a \
             copy; the answers that were in flight are safe in {}; {merge}",
            format_count(*bytes),
            format_count(length),
            rescued.display()
        ),
        FileChange::Longer { by } => format!(
            "another program appended {} bytes to {file} during this run: check it with `distill cache verify`; \
             `distill cache repair` moves damaged lines to another file; the answers that were in flight are \
             safe in {}; {merge}",
            format_count(*by),
            rescued.display()
        ),
    };
    DisplacedFile(format!("{text}; no further request is sent"))
}
