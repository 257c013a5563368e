//! Creation, durability, identity and removal of files and folders.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

/// Capacity of the buffers for data files and large files.
pub(super) const BUFFER_BYTES: usize = 1 << 20;

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

/// Makes the creation, renaming and removal of files in `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    // On other systems a folder cannot be opened as a file.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Parent folder of `path`; `.` for a bare name.
pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Copies the files and folders of other programs from the folder `from` to the folder `to`. These are the entries for
/// whose names `is_ours` returns false. Skips names that exist in `to`.
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

/// Returns true if `path` is a path of the open file. Returns true as well if the metadata cannot be read for a reason
/// other than a missing `path`.
pub(crate) fn has_name(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(own), Ok(named)) => identity(&own) == identity(&named),
        (_, Err(error)) => !is_not_found(&error),
        (Err(_), Ok(_)) => true,
    }
}

/// Returns true if both paths exist and lead to the same file or folder.
pub(crate) fn is_same(first: &Path, second: &Path) -> bool {
    let canonical = |path: &Path| path.canonicalize().ok();
    canonical(first).is_some_and(|first| canonical(second) == Some(first))
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

/// Returns true if `path` exists and is neither a file nor a folder.
pub(super) fn is_special(path: &Path) -> bool {
    let is_special = |metadata: fs::Metadata| !metadata.is_file() && !metadata.is_dir();
    path.metadata().is_ok_and(is_special)
}
