//! Append-only text files.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::atomic::write_atomic;
use super::paths::has_name;
use super::read::read;

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

/// An append-only text file, such as a metrics file. A power loss may lose the lines appended after the last sync.
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
