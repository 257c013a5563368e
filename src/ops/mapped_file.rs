//! A memory-mapped file.

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A read-only memory-mapped file. The system reads its pages on first access and may drop them
/// again when memory is short.
#[derive(Debug)]
pub(crate) struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps a file that is never changed in place or truncated. Replacing it by a rename or removing
    /// it is safe.
    ///
    /// # Errors
    /// If the system cannot map it.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the bytes behind the slice must not change. Our own files are replaced by renames
        // (`crate::fs`); for the model folders of others, this relies on no program overwriting them
        // in place meanwhile. If another program truncates the file, this process is terminated by
        // a signal, as with any program that maps files.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
