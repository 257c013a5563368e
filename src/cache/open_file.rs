//! Detects that an open file was moved, removed, replaced, truncated or appended to by another program.
//!
//! Device, inode and length are compared. A file that has lost its name is still open here: its lines are
//! put into a folder of their own, and nothing that was paid for is lost.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exit::Exit;
use crate::terminal::format_count;

/// A file of the cache is not what this process made of it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct DisplacedFile(pub String);

/// An open file, and the name under which it was opened.
pub(crate) struct OpenFile {
    file: File,
    path: PathBuf,
}

/// Change of a file since this process last wrote it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FileChange {
    /// It has another name now.
    Moved(PathBuf),
    /// It has no name any more; the flag says whether another file has its old one.
    Removed { is_replaced: bool },
    /// It is shorter than this process left it.
    Cut { bytes: u64 },
    /// Somebody else appends to it.
    Longer { by: u64 },
}

impl OpenFile {
    /// # Errors
    /// Where the process has no descriptor left.
    pub(crate) fn new(file: &File, path: &Path) -> Result<OpenFile> {
        let file = file.try_clone();
        Ok(OpenFile {
            file: file.with_context(|| format!("could not hold {} open", path.display()))?,
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        })
    }

    /// Compares the file with what this process left, which has `length` bytes.
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

    /// Decides what becomes of a file that has changed in this way, and of its `length` bytes: the message,
    /// and the file in which to go on; none where it is the same one.
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
                // The folder may have been moved with it: then nothing is asked by its old name.
                if let Err(error) = crate::fs::write_atomic(&note_file(cache), note.as_bytes()) {
                    tracing::debug!("{error:#}");
                }
                return (displaced, Ok(None));
            }
            FileChange::Removed { .. } => length,
            // What is left stays where it is.
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

    /// The same once more.
    ///
    /// # Errors
    /// Where the process has no descriptor left.
    pub(crate) fn try_clone(&self) -> Result<OpenFile> {
        OpenFile::new(&self.file, &self.path)
    }

    /// Current path of the open file, from the operating system.
    fn current_path(&self) -> Option<PathBuf> {
        #[cfg(unix)]
        {
            use std::os::fd::AsRawFd;
            std::fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd())).ok()
        }
        #[cfg(not(unix))]
        None
    }

    /// Bytes of the file, wherever it is, while others append to it.
    pub(crate) fn read(&self, bytes: Range<u64>) -> impl Read {
        let part = FileRange {
            file: &self.file,
            bytes,
        };
        BufReader::with_capacity(1 << 20, part)
    }
}

/// A part of a file, read without moving the place at which it is written.
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

/// The folder beside the cache folder `dir` that has what was rescued from under its name.
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

/// Refuses to begin a cache anew in `dir` while what was moved or rescued from under an earlier run is
/// still elsewhere: it would be bought again.
///
/// # Errors
/// [`Exit::Usage`] with what to do.
pub(crate) fn check_nothing_displaced(dir: &Path) -> Result<()> {
    let rescued = rescue_dir(dir);
    if super::exists(&rescued) {
        let message = format!(
            "{rescued} holds answers that were rescued when files of the cache were moved or changed under a \
             run: take them over with `distill cache merge --dir {} {rescued}` (after `distill cache repair`, if that \
             says that the cache is damaged), and then remove {rescued}",
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
            "{from} was moved to {to} under the last run, and every answer in it would be bought again: \
             move it back; or, to begin anew, remove {}",
            note.display()
        );
        return Err(Exit::Usage(message).into());
    }
    Ok(())
}

/// Removes the note of a move that [`check_all_is_back`] has found undone.
///
/// # Errors
/// Where it cannot be removed.
pub(crate) fn remove_move_note(dir: &Path) -> Result<()> {
    let note = note_file(dir);
    if !note.exists() {
        return Ok(());
    }
    crate::fs::remove_file(&note)
}

/// A file in the rescue folder, and what it begins with.
pub(crate) struct RescueFile {
    pub file: File,
    pub path: PathBuf,
    pub length: u64,
}

/// Begins a file of the name of `open_file` in the folder `dir`, with the first `length` bytes of
/// what this process has open.
///
/// # Errors
/// Where it cannot be written.
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

/// Message about a change of the file at `path`: where its answers are, and how to continue. `rescued` is the
/// folder that received its records, or receives those still in flight.
fn describe(path: &Path, change: &FileChange, length: u64, rescued: &Path) -> DisplacedFile {
    let file = path.display();
    let dir = path.parent().unwrap_or(Path::new("."));
    let take_back = format!(
        "`distill cache merge --dir {} {rescued}` takes them over; then remove {rescued}",
        dir.display(),
        rescued = rescued.display()
    );
    let text = match change {
        FileChange::Moved(now) => format!(
            "{file} was moved to {}: every answer that it holds is safe there, also those that were on \
             their way; move it back and run the same command",
            now.display()
        ),
        FileChange::Removed { is_replaced } => format!(
            "{file} was {} while this run wrote it: every answer that it held is safe in {}, also those \
             that were on their way; {take_back}",
            if *is_replaced { "replaced" } else { "removed" },
            rescued.display()
        ),
        FileChange::Cut { bytes } => format!(
            "{file} was cut to {} of {} bytes while this run wrote it: what was cut off is lost, unless \
             you have a copy; the answers that were on their way are safe in {}; {take_back}",
            format_count(*bytes),
            format_count(length),
            rescued.display()
        ),
        FileChange::Longer { by } => format!(
            "another program has appended {} bytes to {file} while this run wrote it: `distill cache \
             verify` tells what it holds now, and `distill cache repair` moves aside what is no record; the \
             answers that were on their way are safe in {}; {take_back}",
            format_count(*by),
            rescued.display()
        ),
    };
    DisplacedFile(format!("{text}; nothing more is asked"))
}
