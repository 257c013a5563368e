//! Reads and writes files and folders.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | atomic files and folders, append-only text files, reading, gzip |
//! | `lock.rs` | a lock between processes |
//!
//! Invariant: a file with its final name is never half-written. Content is written to a temporary file in the same
//! folder, synced, and renamed; then the folder is synced, because a rename is not durable before that. The exceptions
//! are append-only files of lines, whose readers skip an incomplete line: [`append`], [`LogFile`] and the cache
//! (`cache::storage`).

pub(crate) mod lock;

pub use lock::FileLock;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

/// Capacity of the buffers for data files and large files.
const BUFFER_BYTES: usize = 1 << 20;

/// Capacity of the buffer of compressed bytes.
const COMPRESSED_BUFFER_BYTES: usize = 1 << 16;

/// Atomically and durably writes `bytes` to `path`: at every moment `path` is either the old file, if there was one, or
/// the complete new one.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Writes a file as [`write_atomic`] does, with the content that `fill` writes in pieces.
pub(crate) fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let folder = parent_of(path);
    replace(path, folder, fill).with_context(|| format!("could not write {}", path.display()))
}

/// Writes a temporary file in `folder` with `fill`, and renames it to `path`.
fn replace(
    path: &Path,
    folder: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut buffer = BufWriter::new(temporary_in(folder)?);
    fill(&mut buffer)?;
    let file = buffer.into_inner().map_err(|error| error.into_error())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_folder(folder)
}

/// Creates a temporary file in the folder of the target: a rename is atomic only within one file system.
fn temporary_in(folder: &Path) -> std::io::Result<NamedTempFile> {
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
/// a commit, it is removed.
pub struct AtomicFile {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl AtomicFile {
    /// Creates a file that will be renamed to `path`; its folder must exist.
    pub fn create(path: &Path) -> Result<Self> {
        let file = temporary_in(parent_of(path))
            .with_context(|| format!("could not write {}", path.display()))?;
        Ok(Self {
            file: BufWriter::with_capacity(BUFFER_BYTES, file),
            path: path.to_owned(),
        })
    }

    /// Renames the file to its path, durably. An existing file is replaced if `replace` is true, and is an error
    /// otherwise.
    pub fn commit(self, replace: bool) -> Result<()> {
        let Self { file, path } = self;
        let commit = || {
            let file = file.into_inner().map_err(|error| error.into_error())?;
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

/// Creates `path` and its missing parents, durably.
pub fn create_dir_all(path: &Path) -> Result<()> {
    create_synced(path).with_context(|| format!("could not create the folder {}", path.display()))
}

/// Creates `path` and its missing parents, and syncs the parent of each new folder.
fn create_synced(path: &Path) -> std::io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    create_synced(parent_of(path))?;
    match fs::create_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other?,
    }
    sync_folder(parent_of(path))
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

/// Makes the creation, renaming and removal of files in `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    // On other systems a folder cannot be opened as a file.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Parent folder of `path`; `.` for a bare name.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    check_is_file(path)?;
    fs::read(path).with_context(|| format!("could not read {}", path.display()))
}

/// Refuses pipes and devices, because reading them may never end. Accepts folders and missing files: reading those
/// fails with its own message.
pub(crate) fn check_is_file(path: &Path) -> Result<()> {
    let is_special = |metadata: fs::Metadata| !metadata.is_file() && !metadata.is_dir();
    if path.metadata().is_ok_and(is_special) {
        bail!("could not read {}: not a regular file", path.display());
    }
    Ok(())
}

/// Appends lines to a file, which is created if it does not exist. The lines survive a kill of this process. If an
/// earlier kill left an incomplete line at the end, a newline is inserted first, so readers must skip incomplete lines.
pub fn append(path: &Path, lines: &[u8]) -> Result<()> {
    let append = || -> std::io::Result<()> {
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path)?;
        let length = file.metadata()?.len();
        let mut last_byte = [b'\n'];
        if length > 0 {
            file.seek(SeekFrom::Start(length - 1))?;
            file.read_exact(&mut last_byte)?;
        }
        let separator: &[u8] = if last_byte == [b'\n'] { b"" } else { b"\n" };
        file.write_all(&[separator, lines].concat())
    };
    append().with_context(|| format!("could not append to {}", path.display()))
}

/// Reads a whole text file.
pub fn read_to_string(path: &Path) -> Result<String> {
    check_is_file(path)?;
    fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))
}

/// Opens a data file for reading; a file whose name ends in `.gz` is decompressed.
pub(crate) fn open_data(path: &Path) -> std::io::Result<Box<dyn BufRead + Send>> {
    let file = File::open(path)?;
    let is_gzip = |extension: &std::ffi::OsStr| extension.eq_ignore_ascii_case("gz");
    if !path.extension().is_some_and(is_gzip) {
        return Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, file)));
    }
    let compressed =
        BufReader::with_capacity(COMPRESSED_BUFFER_BYTES, CountingReader { file, bytes: 0 });
    let decompressed = LimitedDecoder {
        inner: flate2::bufread::MultiGzDecoder::new(compressed),
        bytes: 0,
    };
    Ok(Box::new(BufReader::with_capacity(
        BUFFER_BYTES,
        decompressed,
    )))
}

/// Maximum ratio of decompressed to compressed bytes. Text stays far below it; a file above it could be a decompression
/// bomb, which fills the memory.
const MAX_EXPANSION: u64 = 200;
/// Number of decompressed bytes allowed in addition, so that small files may have a higher ratio.
const ALWAYS_ALLOWED_BYTES: u64 = 16 << 20;

/// A file, and the number of bytes read from it.
struct CountingReader {
    file: File,
    bytes: u64,
}

impl Read for CountingReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

/// Decompressed stream, limited in proportion to the compressed bytes read.
struct LimitedDecoder {
    inner: flate2::bufread::MultiGzDecoder<BufReader<CountingReader>>,
    /// Number of decompressed bytes.
    bytes: u64,
}

impl Read for LimitedDecoder {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes += count as u64;
        let compressed_bytes = self.inner.get_ref().get_ref().bytes;
        if self.bytes > ALWAYS_ALLOWED_BYTES + compressed_bytes * MAX_EXPANSION {
            let message = format!("it decompresses to more than {MAX_EXPANSION} times its size");
            return Err(std::io::Error::other(message));
        }
        Ok(count)
    }
}

/// Writes a file into a folder that [`write_dir_with`] creates.
pub fn write_in(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes).with_context(|| format!("could not write {}", path.display()))
}

/// Durably writes a whole folder, which may replace an existing one. `fill` writes into a temporary folder, which is
/// removed if `fill` fails. The old folder is removed once the new one is durable. A kill between the two renames of a
/// replacement leaves the old folder under the name `.NAME.old`; the next call restores it.
pub fn write_dir_with<T>(destination: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
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

/// Copies the entries that other programs have put into the folder `from` to the folder `to`: all entries for whose
/// names `is_ours` returns false. Skips names that exist in `to`.
pub fn copy_foreign_entries(from: &Path, to: &Path, is_ours: impl Fn(&str) -> bool) -> Result<()> {
    if !from.is_dir() {
        return Ok(());
    }
    let could_not = || {
        format!(
            "could not copy the files of other programs in {}",
            from.display()
        )
    };
    for entry in fs::read_dir(from).with_context(could_not)? {
        let entry = entry.with_context(could_not)?;
        let name = entry.file_name();
        let target = to.join(&name);
        if is_ours(&name.to_string_lossy()) || target.exists() {
            continue;
        }
        copy_tree(&entry.path(), &target).with_context(could_not)?;
    }
    Ok(())
}

/// Copies a file, or a folder with its contents; skips pipes and devices.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    if from.is_file() {
        return fs::copy(from, to).map(drop);
    }
    if !from.is_dir() {
        return Ok(());
    }
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy_tree(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
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

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("could not rename {} to {}", from.display(), to.display()))
}

/// An append-only text file, such as a metrics file. A power loss may lose lines after the last sync.
pub struct LogFile {
    file: File,
    path: PathBuf,
}

impl LogFile {
    /// Removes the lines for which `keep` returns false from the file at `path`, if it exists, and opens it for
    /// appending.
    pub fn open(path: &Path, keep: impl Fn(&str) -> bool) -> Result<Self> {
        if path.exists() {
            let text = read(path)?;
            let lines = text.split_inclusive(|byte| *byte == b'\n');
            // `keep` sees invalid UTF-8 as replacement characters. An incomplete last line gets its newline.
            let mut kept_lines = Vec::with_capacity(text.len());
            for line in lines {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                if keep(String::from_utf8_lossy(line).trim_end_matches('\r')) {
                    kept_lines.extend_from_slice(line);
                    kept_lines.push(b'\n');
                }
            }
            write_atomic(path, &kept_lines)?;
        }
        let file = File::options().create(true).append(true).open(path);
        Ok(Self {
            file: file.with_context(|| format!("could not open {}", path.display()))?,
            path: path.to_owned(),
        })
    }

    /// Appends one line.
    pub fn write(&mut self, line: &str) -> Result<()> {
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("could not append to {}", self.path.display()))
    }

    /// Makes the appended lines durable.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .with_context(|| format!("could not sync {}", self.path.display()))
    }

    /// Returns true if the file still has its path: it was not moved, removed or replaced.
    pub fn is_in_place(&self) -> bool {
        has_name(&self.file, &self.path)
    }
}

/// Returns true if `path` is a path of the open file. Returns true as well if the metadata cannot be read for a reason
/// other than a missing `path`.
pub(crate) fn has_name(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(own), Ok(named)) => identity(&own) == identity(&named),
        (_, Err(error)) => !is_not_found(&error),
        (Err(_), Ok(_)) => true,
    }
}

/// Returns true if the error means that the path does not exist.
pub(crate) fn is_not_found(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

/// Returns the device and the inode number, which together identify a file.
#[cfg(unix)]
pub fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// Returns the same pair for all files, because only Unix has inode numbers.
#[cfg(not(unix))]
pub fn identity(_: &fs::Metadata) -> (u64, u64) {
    (0, 0)
}

/// Removes a file.
pub fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("could not remove {}", path.display()))
}

/// Removes the file if it exists and is empty.
pub(crate) fn remove_if_empty(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() == 0 => remove_file(path),
        _ => Ok(()),
    }
}

/// Removes a folder and its contents.
pub fn remove_dir_all(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).with_context(|| format!("could not remove {}", path.display()))
}
