//! Sizes of the cache files, and the type of the callback that reports the progress of reading them.

use std::path::Path;

use anyhow::{Context, Result};

use crate::cache::{compressed_file, plain_file};

/// Callback with the number of bytes read and the total number of bytes; an error ends the reading.
pub type OnReadProgress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// Returns the size in bytes of the cache in `dir`. A file whose size cannot be read counts as 0.
pub fn size(dir: &Path) -> u64 {
    let files = [plain_file(dir), compressed_file(dir)];
    files.iter().filter_map(|path| length(path).ok()).sum()
}

/// Returns the length in bytes of the file at `path`; 0 if it does not exist.
///
/// # Errors
/// If the metadata of an existing file cannot be read.
pub fn length(path: &Path) -> Result<u64> {
    match path.metadata() {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => {
            Err(error).with_context(|| format!("could not read the size of {}", path.display()))
        }
    }
}
