//! TODO

use crate::cache::compressed_file;
use crate::cache::plain_file;
use anyhow::Context;
use anyhow::Result;
use std::path::Path;

/// Told how many bytes have been read, and of how many; an error ends the reading.
pub type OnReadProgress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// Bytes of the cache in `dir`.
pub fn size(dir: &Path) -> u64 {
    let files = [plain_file(dir), compressed_file(dir)];
    files.iter().filter_map(|path| length(path).ok()).sum()
}

pub fn length(path: &Path) -> Result<u64> {
    match path.metadata() {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error).with_context(|| format!("could not open {}", path.display())),
    }
}
