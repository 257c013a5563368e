//! [`OpenFile`]: detects that another program moved, removed, replaced, truncated or appended to an open file.
//!
//! Device, inode and length are compared. The content of a removed file can still be read through the open handle, so
//! it is copied to a rescue folder, and no paid answer is lost.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exit::Exit;
use crate::terminal::format_count;

/// Size in bytes of the buffer for reading a file.
const BUFFER_BYTES: usize = 1 << 20;

/// Error that another program moved or changed a file of the cache; contains the message for the user.
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
    /// The file was moved to this path.
    Moved(PathBuf),
    /// The file was deleted, or moved to an unknown path; `is_replaced` is true if another file is at its path.
    Removed { is_replaced: bool },
    /// The file was truncated to a length of `bytes`.
    Truncated { bytes: u64 },
    /// Another program has appended `bytes` bytes.
    Extended { bytes: u64 },
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

    /// Compares the file with its path and with `length`, the length in bytes that this process expects. A file whose
    /// metadata cannot be read counts as unchanged.
    ///
    /// # Errors
    /// The change, if another program made one.
    pub(crate) fn check(&self, length: u64) -> Result<(), FileChange> {
        let Ok(metadata) = self.file.metadata() else {
            return Ok(());
        };
        if !crate::fs::has_name(&self.file, &self.path) {
            let is_replaced = self.path.exists();
            let is_new_path =
                |path: &PathBuf| path.exists() && crate::fs::has_name(&self.file, path);
            let new_path = self.current_path().filter(is_new_path);
            return Err(new_path.map_or(FileChange::Removed { is_replaced }, FileChange::Moved));
        }
        let bytes = metadata.len();
        match bytes.cmp(&length) {
            Ordering::Less => Err(FileChange::Truncated { bytes }),
            Ordering::Greater => Err(FileChange::Extended {
                bytes: bytes - length,
            }),
            Ordering::Equal => Ok(()),
        }
    }

    /// Handles `change`, made to the file when it had `length` bytes. For a moved file, writes a note of the new path;
    /// after any other change, creates a rescue file, with the content of the file if it was removed.
    ///
    /// Returns the error to report, and the rescue file: `None` if appending continues in the moved file, or `Err` if
    /// the rescue file could not be written.
    pub(crate) fn handle_change(
        &self,
        change: &FileChange,
        length: u64,
    ) -> (DisplacedFile, Result<Option<RescueFile>, ()>) {
        let cache_dir = self.path.parent().unwrap_or(Path::new("."));
        let rescue_dir = rescue_dir(cache_dir);
        let displaced = describe(&self.path, change, length, &rescue_dir);
        let rescued_bytes = match change {
            FileChange::Moved(new_path) => {
                let note = format!("{}\n{}\n", self.path.display(), new_path.display());
                // Fails if the run folder was moved. The reported error names the new path in any case.
                if let Err(error) = crate::fs::write_atomic(&note_file(cache_dir), note.as_bytes())
                {
                    tracing::debug!("{error:#}");
                }
                return (displaced, Ok(None));
            }
            FileChange::Removed { .. } => length,
            // The bytes of the file stay where they are.
            FileChange::Truncated { .. } | FileChange::Extended { .. } => 0,
        };
        match rescue(self, rescued_bytes, &rescue_dir) {
            Ok(rescue_file) => (displaced, Ok(Some(rescue_file))),
            Err(error) => {
                let event = match change {
                    FileChange::Truncated { .. } => "was truncated",
                    FileChange::Extended { .. } => "was extended by another program",
                    FileChange::Moved(_) | FileChange::Removed { .. } => "was removed or replaced",
                };
                let text = format!(
                    "{} {event} during this run, and its answers could not be written to {}: {error:#}; no further \
                     request is sent",
                    self.path.display(),
                    rescue_dir.display()
                );
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

    /// Returns the current path of the open file, from `/proc`; `None` on systems without it.
    fn current_path(&self) -> Option<PathBuf> {
        #[cfg(unix)]
        {
            use std::os::fd::AsRawFd;
            std::fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd())).ok()
        }
        #[cfg(not(unix))]
        None
    }

    /// Returns a buffered reader of the byte range `bytes` of the file. It can be used after the file was moved and
    /// while lines are appended.
    pub(crate) fn read(&self, bytes: Range<u64>) -> impl Read {
        let range = FileRange {
            file: &self.file,
            bytes,
        };
        BufReader::with_capacity(BUFFER_BYTES, range)
    }
}

/// Reader of a range of a file. Appending to the file is not affected.
struct FileRange<'a> {
    file: &'a File,
    /// Byte range that has not been read yet.
    bytes: Range<u64>,
}

impl Read for FileRange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let remaining = self.bytes.end.saturating_sub(self.bytes.start);
        let length = remaining.min(buffer.len() as u64) as usize;
        let count = read_at(self.file, &mut buffer[..length], self.bytes.start)?;
        self.bytes.start += count as u64;
        Ok(count)
    }
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read(buffer)
}

/// Returns the folder for rescued records, which is beside the cache folder `dir`.
pub(crate) fn rescue_dir(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".rescued");
    dir.with_file_name(name)
}

/// Returns the path of the note about a moved file of the cache folder `dir`. The note contains two lines: the old path
/// and the new path.
fn note_file(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".moved");
    dir.with_file_name(name)
}

/// Checks that no records of an earlier run are outside the cache folder `dir`: a run would pay for them again.
///
/// # Errors
/// [`Exit::Usage`] with instructions, if there are rescued records, or a cache file was moved and has not been moved
/// back.
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

/// Removes the note about a moved file, after [`check_nothing_displaced`] has returned `Ok`.
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
    /// Length of the file in bytes.
    pub length: u64,
}

/// Durably appends the first `length` bytes of `open_file` to the file of the same name in the folder `dir`, which is
/// created if it does not exist.
///
/// # Errors
/// If the rescue file cannot be written.
fn rescue(open_file: &OpenFile, length: u64, dir: &Path) -> Result<RescueFile> {
    crate::fs::create_dir_all(dir)?;
    let path = dir.join(open_file.path.file_name().unwrap_or_default());
    let could_not_write = || format!("could not write {}", path.display());
    let mut file = super::storage::open_or_create(&path)?;
    let length_before = file.metadata().with_context(could_not_write)?.len();
    let mut copy = || -> io::Result<u64> {
        let copied = io::copy(&mut open_file.read(0..length), &mut file)?;
        file.flush()?;
        file.sync_all()?;
        Ok(copied)
    };
    let copied = copy().with_context(could_not_write)?;
    crate::fs::sync_folder(dir).with_context(could_not_write)?;
    Ok(RescueFile {
        file,
        path,
        length: length_before + copied,
    })
}

/// Builds the message about a change of the file at `path`, which had `length` bytes. The message names the place of
/// the answers and the commands to continue. `rescue_dir` is the folder of the rescue file.
fn describe(path: &Path, change: &FileChange, length: u64, rescue_dir: &Path) -> DisplacedFile {
    let file = path.display();
    let dir = path.parent().unwrap_or(Path::new("."));
    let merge = format!(
        "merge them with `distill cache merge --dir {} {rescued}`, then remove {rescued}",
        dir.display(),
        rescued = rescue_dir.display()
    );
    let text = match change {
        FileChange::Moved(new_path) => format!(
            "{file} was moved to {}: all answers are safe there, including the answers in flight; move it back \
             and rerun the command",
            new_path.display()
        ),
        FileChange::Removed { is_replaced } => format!(
            "{file} was {} during this run: its answers are safe in {}, including the answers in flight; {merge}",
            if *is_replaced { "replaced" } else { "removed" },
            rescue_dir.display()
        ),
        FileChange::Truncated { bytes } => format!(
            "{file} was truncated to {} of {} bytes during this run: the other bytes are lost unless you have a \
             copy; the answers that were in flight are safe in {}; {merge}",
            format_count(*bytes),
            format_count(length),
            rescue_dir.display()
        ),
        FileChange::Extended { bytes } => format!(
            "another program appended {} bytes to {file} during this run: check it with `distill cache verify`; \
             `distill cache repair` moves damaged lines to another file; the answers that were in flight are \
             safe in {}; {merge}",
            format_count(*bytes),
            rescue_dir.display()
        ),
    };
    DisplacedFile(format!("{text}; no further request is sent"))
}
