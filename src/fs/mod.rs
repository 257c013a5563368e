//! The one place that writes files whole.
//!
//! Nothing here leaves a half-written file under its final name: content is written beside it,
//! synced, renamed over it, and then the folder is synced, since a rename is not durable before
//! that. The cache alone writes in another way (it appends, see `cache::storage`).

pub(crate) mod lock;

pub use lock::FileLock;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

/// Writes `bytes` to `path`: after this returns the file is whole and survives a power loss, and
/// at every moment before it, the old file (or none) is there.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// As [`write_atomic`], of what `fill` writes: for files that need not be in memory at once.
pub fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let folder = parent_of(path);
    replace(path, folder, fill).with_context(|| format!("could not write {}", path.display()))
}

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

/// Beside the target: a rename is atomic only within one file system.
fn temporary_in(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The default of a temporary file is 0600; the umask still applies to this.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.prefix(".tmp-").tempfile_in(folder)
}

/// A file that is written bit by bit and has its name only once it is whole ([`Self::commit`]).
/// Dropped before that, it leaves nothing.
pub struct AtomicFile {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl AtomicFile {
    /// Begins a file that will be `path`, in a folder that exists.
    pub fn create(path: &Path) -> Result<Self> {
        let file = temporary_in(parent_of(path))
            .with_context(|| format!("could not write {}", path.display()))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_owned(),
        })
    }

    /// Gives the file its name, durably. Where another file has it, that one is replaced, or this
    /// is an error.
    pub fn commit(self, replace: bool) -> Result<()> {
        let Self { file, path } = self;
        let commit = || {
            let file = file.into_inner().map_err(|error| error.into_error())?;
            file.as_file().sync_all()?;
            match replace {
                true => file.persist(&path)?,
                false => file.persist_noclobber(&path)?,
            };
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

/// Gives the finished folder `temporary` its final name: syncs everything in it, renames it, and
/// syncs the parent. `destination` must not exist, or be an empty folder; both must lie in one
/// file system.
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

/// Makes the names in `folder` durable: those of files just created, renamed or removed in it.
pub fn sync_folder(folder: &Path) -> std::io::Result<()> {
    // Elsewhere a folder cannot be opened as a file, and the file system orders this by itself.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// The folder that holds `path`; `.` for a bare name.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Reads a file whole.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    check_is_file(path)?;
    fs::read(path).with_context(|| format!("could not read {}", path.display()))
}

/// Refuses what has a name and is no file: a pipe or a device would be read for ever.
///
/// # Errors
/// Where it is neither a file nor a folder; those say for themselves what they are.
pub fn check_is_file(path: &Path) -> Result<()> {
    let is_odd = |metadata: fs::Metadata| !metadata.is_file() && !metadata.is_dir();
    if path.metadata().is_ok_and(is_odd) {
        bail!("could not read {}: it is no file", path.display());
    }
    Ok(())
}

/// Appends lines to a file that is read leniently; it is created where there is none. They survive a kill
/// of this process, and are kept apart from a line that an earlier kill has left torn.
pub fn append(path: &Path, lines: &[u8]) -> Result<()> {
    let append = || -> std::io::Result<()> {
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path)?;
        let length = file.metadata()?.len();
        let mut last = [b'\n'];
        if length > 0 {
            file.seek(SeekFrom::Start(length - 1))?;
            file.read_exact(&mut last)?;
        }
        let separator: &[u8] = if last == [b'\n'] { b"" } else { b"\n" };
        file.write_all(&[separator, lines].concat())
    };
    append().with_context(|| format!("could not append to {}", path.display()))
}

/// Reads a text file whole.
pub fn read_to_string(path: &Path) -> Result<String> {
    check_is_file(path)?;
    fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))
}

/// Reads a data file whole; one whose name ends in `.gz` is unpacked.
pub fn read_data(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_data(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a data file to be read bit by bit, unpacked as by [`read_data`].
pub fn open_data(path: &Path) -> std::io::Result<Box<dyn BufRead + Send>> {
    let file = File::open(path)?;
    let is_packed = |extension: &std::ffi::OsStr| extension.eq_ignore_ascii_case("gz");
    if !path.extension().is_some_and(is_packed) {
        return Ok(Box::new(BufReader::with_capacity(1 << 20, file)));
    }
    let packed = BufReader::with_capacity(1 << 16, CountingReader { file, bytes: 0 });
    let unpacked = LimitedDecoder {
        inner: flate2::bufread::MultiGzDecoder::new(packed),
        bytes: 0,
    };
    Ok(Box::new(BufReader::with_capacity(1 << 20, unpacked)))
}

/// Text unpacks to at most so many times its size; what unpacks to more is made to fill the memory.
const MAX_EXPANSION: u64 = 200;
/// Whatever its size, a file may unpack to so many bytes.
const ALWAYS_ALLOWED_BYTES: u64 = 16 << 20;

/// A file, and how much was read of it.
struct CountingReader {
    file: File,
    bytes: u64,
}

impl Read for CountingReader {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(into)?;
        self.bytes += read as u64;
        Ok(read)
    }
}

/// Decompressed stream, limited in proportion to the compressed bytes read.
struct LimitedDecoder {
    inner: flate2::bufread::MultiGzDecoder<BufReader<CountingReader>>,
    bytes: u64,
}

impl Read for LimitedDecoder {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(into)?;
        self.bytes += read as u64;
        let packed = self.inner.get_ref().get_ref().bytes;
        if self.bytes > ALWAYS_ALLOWED_BYTES + packed * MAX_EXPANSION {
            let message = format!("it unpacks to more than {MAX_EXPANSION} times its size");
            return Err(std::io::Error::other(message));
        }
        Ok(read)
    }
}

/// Writes a file into a folder that [`write_dir_with`] gets filled.
pub fn write_in(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes).with_context(|| format!("could not write {}", path.display()))
}

/// Writes a folder whole, in whose place another one may stand: the old one goes only when the new
/// one is durable beside it. `fill` gets the folder that will have the name, and nothing is left of
/// it where `fill` fails.
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
    // What a run that was killed here left behind; the old folder if it fell between the renames.
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
            // The first error is the one to tell.
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

/// Takes over into the new folder `to` what somebody has put into the old one, `from`: all that `is_ours` does
/// not know by name.
pub fn copy_foreign_entries(from: &Path, to: &Path, is_ours: impl Fn(&str) -> bool) -> Result<()> {
    if !from.is_dir() {
        return Ok(());
    }
    let could_not = || format!("could not keep what others put into {}", from.display());
    for entry in fs::read_dir(from).with_context(could_not)? {
        let entry = entry.with_context(could_not)?;
        let name = entry.file_name();
        let place = to.join(&name);
        if is_ours(&name.to_string_lossy()) || place.exists() {
            continue;
        }
        copy_tree(&entry.path(), &place).with_context(could_not)?;
    }
    Ok(())
}

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

/// Begins a file in a folder that [`write_dir_with`] gets filled, which syncs it with the folder.
pub fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create_new(path);
    let file = file.with_context(|| format!("could not create {}", path.display()))?;
    Ok(BufWriter::with_capacity(1 << 20, file))
}

/// Lets a library put a file at `path`, in a folder that [`write_dir_with`] gets filled, and gives it
/// the permissions of any new file: one that goes by way of a temporary file leaves what only its
/// owner can read.
pub fn create_with(path: &Path, library: impl FnOnce() -> Result<()>) -> Result<()> {
    let usual = create(path)?.get_ref().metadata()?.permissions();
    library()?;
    fs::set_permissions(path, usual)
        .with_context(|| format!("could not set the permissions of {}", path.display()))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("could not rename {} to {}", from.display(), to.display()))
}

/// An append-only text file that may lose its last lines with the power, such as metrics.
pub struct LogFile {
    file: File,
    path: PathBuf,
}

impl LogFile {
    /// Opens `path` for appending, after dropping every line for which `keep` is false.
    pub fn open(path: &Path, keep: impl Fn(&str) -> bool) -> Result<Self> {
        if path.exists() {
            let text = read(path)?;
            let lines = text.split_inclusive(|byte| *byte == b'\n');
            // One bad byte is no reason to lose a line, and a torn end shall touch no other one.
            let mut kept = Vec::with_capacity(text.len());
            for line in lines {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                if keep(String::from_utf8_lossy(line).trim_end_matches('\r')) {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
            write_atomic(path, &kept)?;
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

    /// Makes what was appended durable.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .with_context(|| format!("could not sync {}", self.path.display()))
    }

    /// Returns true if the path still names this file.
    pub fn is_in_place(&self) -> bool {
        has_name(&self.file, &self.path)
    }
}

/// Returns true if `path` names the open file, and also if the metadata cannot be read.
pub fn has_name(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(own), Ok(named)) => identity(&own) == identity(&named),
        (_, Err(error)) => !is_not_found(&error),
        (Err(_), Ok(_)) => true,
    }
}

/// There is nothing of that name.
pub fn is_not_found(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

/// Device and inode number.
#[cfg(unix)]
pub fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
pub fn identity(_: &fs::Metadata) -> (u64, u64) {
    (0, 0)
}

/// Removes a file.
pub fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("could not remove {}", path.display()))
}

/// Removes a file that holds nothing.
pub fn remove_if_empty(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() == 0 => remove_file(path),
        _ => Ok(()),
    }
}

/// Removes a folder and all that it holds.
pub fn remove_dir_all(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).with_context(|| format!("could not remove {}", path.display()))
}
