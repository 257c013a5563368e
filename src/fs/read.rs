//! Reading of files.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::paths::{BUFFER_BYTES, is_special};

/// Capacity of the buffer of compressed bytes.
const COMPRESSED_BUFFER_BYTES: usize = 1 << 16;

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    check_is_file(path)?;
    fs::read(path).with_context(|| format!("could not read {}", path.display()))
}

/// Refuses pipes and devices, because reading them may never end. Accepts folders and missing files: reading those
/// fails with its own message.
pub(crate) fn check_is_file(path: &Path) -> Result<()> {
    if is_special(path) {
        bail!("could not read {}: not a regular file", path.display());
    }
    Ok(())
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
