//! Files and folders that are written to a temporary path and renamed when they are complete.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use super::paths::{
    BUFFER_BYTES, create_dir_all, is_special, parent_of, remove_dir_all, sync_folder,
};

/// Atomically and durably writes `bytes` to `path`: at every moment `path` is either the old file, if there was one, or
/// the complete new one. A symbolic link stays, and its file is replaced.
///
/// # Errors
/// If `path` is a pipe or a device, or the file cannot be written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Writes a file as [`write_atomic`] does, with the content that `fill` writes in pieces.
pub(crate) fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    // Opening a pipe without a reader would wait.
    if is_stream(path) {
        bail!("could not write {}: not a regular file", path.display());
    }
    let mut file = AtomicFile::create(path)?;
    fill(&mut file).with_context(|| format!("could not write {}", path.display()))?;
    file.commit(true)
}

/// Creates a temporary file in the folder of the target: a rename is atomic only within one file system.
fn temporary_in(folder: &Path) -> std::io::Result<NamedTempFile> {
    if !folder.is_dir() {
        let message = format!("the folder {} does not exist", folder.display());
        return Err(std::io::Error::new(std::io::ErrorKind::NotFound, message));
    }
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The default mode of a temporary file is 0600. The umask still applies.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.prefix(".tmp-").tempfile_in(folder)
}

/// A file that is written in pieces and gets its name only when [`Self::commit`] is called. If it is dropped without
/// a commit, it is removed. A pipe or a character device, such as `/dev/stdout`, is written directly.
pub struct AtomicFile {
    file: BufWriter<Destination>,
    path: PathBuf,
}

/// Where an [`AtomicFile`] writes.
enum Destination {
    /// A temporary file, which will be renamed.
    Temporary(NamedTempFile),
    Stream(File),
}

impl AtomicFile {
    /// Creates a file that will be renamed to `path`, or to the file that the symbolic link `path` leads to; its folder
    /// must exist. Opening a pipe waits for its reader.
    pub fn create(path: &Path) -> Result<Self> {
        let could_not_write = || format!("could not write {}", path.display());
        let path = follow_link(path);
        let destination = if is_stream(&path) {
            File::options()
                .write(true)
                .open(&path)
                .map(Destination::Stream)
        } else if is_special(&path) {
            Err(std::io::Error::other("not a regular file"))
        } else {
            temporary_in(parent_of(&path)).map(Destination::Temporary)
        };
        let destination = destination.with_context(could_not_write)?;
        Ok(Self {
            file: BufWriter::with_capacity(BUFFER_BYTES, destination),
            path,
        })
    }

    /// Renames the file to its path, durably. An existing file is replaced if `replace` is true, and is an error
    /// otherwise.
    pub fn commit(self, replace: bool) -> Result<()> {
        let Self { file, path } = self;
        let commit = || {
            let destination = file.into_inner().map_err(|error| error.into_error())?;
            let Destination::Temporary(file) = destination else {
                return Ok(());
            };
            file.as_file().sync_all()?;
            if replace {
                file.persist(&path)?;
            } else {
                file.persist_noclobber(&path)?;
            }
            sync_folder(parent_of(&path))
        };
        commit().with_context(|| format!("could not write {}", path.display()))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Write for Destination {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Destination::Temporary(file) => file.write(bytes),
            Destination::Stream(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Destination::Temporary(file) => file.flush(),
            Destination::Stream(file) => file.flush(),
        }
    }
}

/// Returns the existing file or folder that the symbolic link `path` leads to, so that a rename replaces it and not the
/// link; otherwise `path`. A pipe keeps its path: `/dev/stdout` leads to a name that cannot be opened.
pub(crate) fn follow_link(path: &Path) -> PathBuf {
    let is_link = path.is_symlink() && !is_stream(path);
    let end = path.canonicalize().ok().filter(|_| is_link);
    end.unwrap_or_else(|| path.to_owned())
}

/// Returns true if `path` is a pipe or a character device.
#[cfg(unix)]
pub(crate) fn is_stream(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let kind = path.metadata().map(|metadata| metadata.file_type());
    kind.is_ok_and(|kind| kind.is_fifo() || kind.is_char_device())
}

/// Returns false, because other systems have no such paths.
#[cfg(not(unix))]
pub(crate) fn is_stream(_: &Path) -> bool {
    false
}

/// Writes a file into a folder that [`write_dir_with`] creates.
pub fn write_in(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes).with_context(|| format!("could not write {}", path.display()))
}

/// Durably writes a whole folder, which may replace an existing one. `fill` writes into a temporary folder, which is
/// removed if `fill` fails. The old folder is removed once the new one is durable. A kill between the two renames of a
/// replacement leaves the old folder under the name `.NAME.old`; the next call restores it. A symbolic link to a folder
/// stays, and its folder is replaced.
///
/// # Errors
/// If `destination` is a file, or `fill` fails, or the folder cannot be written.
pub fn write_dir_with<T>(destination: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let destination = &follow_link(destination);
    if destination.exists() && !destination.is_dir() {
        bail!(
            "could not write {}: it is not a folder",
            destination.display()
        );
    }
    let parent = parent_of(destination);
    create_dir_all(parent)?;
    let beside = |suffix: &str| {
        let mut name = std::ffi::OsString::from(".");
        name.push(destination.file_name().unwrap_or_default());
        name.push(suffix);
        parent.join(name)
    };
    let (temporary, old) = (beside(".new"), beside(".old"));
    // A kill between the two renames left only the old folder.
    if old.exists() && !destination.exists() {
        rename(&old, destination)?;
    }
    for leftover in [&temporary, &old] {
        if leftover.exists() {
            remove_dir_all(leftover)?;
        }
    }
    create_dir_all(&temporary)?;
    let filled = match fill(&temporary) {
        Ok(filled) => filled,
        Err(error) => {
            // The error of `fill` is the one to report.
            let _ = fs::remove_dir_all(&temporary);
            return Err(error);
        }
    };
    if destination.exists() {
        sync_tree(&temporary).with_context(|| format!("could not sync {}", temporary.display()))?;
        rename(destination, &old)?;
    }
    commit_dir(&temporary, destination)?;
    if old.exists() {
        remove_dir_all(&old)?;
    }
    Ok(filled)
}

/// Creates a file in a folder that [`write_dir_with`] creates and syncs.
pub fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create_new(path);
    let file = file.with_context(|| format!("could not create {}", path.display()))?;
    Ok(BufWriter::with_capacity(BUFFER_BYTES, file))
}

/// Calls `write`, which lets a library write the file at `path` in a folder that [`write_dir_with`] creates. Then gives
/// the file the default permissions: some libraries rename a temporary file, which only its owner can read.
pub(crate) fn create_with(path: &Path, write: impl FnOnce() -> Result<()>) -> Result<()> {
    let default_permissions = create(path)?.get_ref().metadata()?.permissions();
    write()?;
    fs::set_permissions(path, default_permissions)
        .with_context(|| format!("could not set the permissions of {}", path.display()))
}

/// Renames the finished folder `temporary` to `destination`, durably. `destination` must be missing or an empty
/// folder. Both must be in the same file system.
pub fn commit_dir(temporary: &Path, destination: &Path) -> Result<()> {
    sync_tree(temporary)
        .and_then(|()| fs::rename(temporary, destination))
        .and_then(|()| sync_folder(parent_of(destination)))
        .with_context(|| {
            format!(
                "could not commit {} as {}",
                temporary.display(),
                destination.display()
            )
        })
}

/// Syncs all files and folders in `folder`.
fn sync_tree(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("could not rename {} to {}", from.display(), to.display()))
}
