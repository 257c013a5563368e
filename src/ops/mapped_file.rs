//! A file as memory.

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A file whose bytes are read when they are looked at, and which the system may drop again when
/// memory is short.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps a file that nobody writes any more: one that is replaced whole or removed, but never
    /// changed in place or cut.
    ///
    /// # Errors
    /// If the system cannot map it.
    pub fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the bytes behind the slice do not change, because our own files are written
        // beside their name and renamed (`crate::fs`). Another program that cuts the file ends us
        // by a signal, as it would with any program that maps files.
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
