//! Random access to the lines of a cache by key, also while this process appends to the cache.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::keys;
use super::line::{self, LineError};
use super::reader::CacheLines;
use super::recovery::LineScan;
use super::{exists, plain_file, refusal};
use crate::cache::fingerprint::{Fingerprint, fingerprint};

/// Positions of the lines of a cache by key. The byte ranges are valid as long as the plain file is only appended to,
/// so the cache must not be compressed while a lookup is used.
pub(crate) struct Lookup {
    plain: PathBuf,
    positions: HashMap<Fingerprint, LinePosition>,
    /// Cost of all records in US dollars.
    cost_usd: f64,
    /// Offset in the plain file at which [`Lookup::refresh`] continues: the line end of the last line.
    end: u64,
}

enum LinePosition {
    /// Byte range of the line's content in the plain file.
    Plain(Range<u64>),
    /// Content of the line, which is in the compressed file.
    Compressed(Vec<u8>),
}

impl Lookup {
    /// Reads the positions of all lines of the cache in `dir`, which may not exist yet.
    ///
    /// # Errors
    /// If the cache cannot be read or is damaged.
    pub(crate) fn open(dir: &Path) -> Result<Lookup> {
        let mut lookup = Lookup {
            plain: plain_file(dir),
            positions: HashMap::new(),
            cost_usd: 0.0,
            end: 0,
        };
        if !exists(dir) {
            return Ok(lookup);
        }
        let mut lines = CacheLines::open(dir)?;
        while lines.advance().map_err(|error| lines.refuse_scan(error))? {
            lookup
                .add(lines.line(), lines.plain_content())
                .map_err(|fault| lines.refuse(fault))?;
        }
        Ok(lookup)
    }

    /// Adds the lines that have been appended since the lookup was opened or last refreshed.
    ///
    /// # Errors
    /// If the cache cannot be read or is damaged.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let read_error = || format!("could not read {}", self.plain.display());
        let mut file = File::open(&self.plain).with_context(read_error)?;
        file.seek(SeekFrom::Start(self.end))
            .with_context(read_error)?;
        let mut scan = LineScan::starting_at(BufReader::new(file), self.end, 0);
        while scan.advance().map_err(|e| refusal(&self.plain, e))? {
            self.add(scan.line(), Some(scan.content()))?;
        }
        Ok(())
    }

    /// Adds a line with the byte range of its content in the plain file; `None` for a line of the compressed file.
    fn add(&mut self, line: &[u8], plain_content: Option<Range<u64>>) -> Result<(), LineError> {
        let (fingerprint, _) = keys::identity(line)?;
        self.cost_usd += line::cost_usd(line)?;
        let position = match plain_content {
            Some(content) => {
                self.end = content.end;
                LinePosition::Plain(content)
            }
            None => LinePosition::Compressed(line.to_vec()),
        };
        // The first record of a key is the one that the cache uses.
        self.positions.entry(fingerprint).or_insert(position);
        Ok(())
    }

    /// Returns the cost of all records in US dollars, repeated keys included.
    pub(crate) fn cost_usd(&self) -> f64 {
        self.cost_usd
    }

    /// Returns the line of `key`, without its line end; `None` if the cache does not contain the key.
    ///
    /// # Errors
    /// If the line cannot be read, is damaged, or has another key than when it was added.
    pub(crate) fn line(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let wanted = fingerprint(key);
        let range = match self.positions.get(&wanted) {
            None => return Ok(None),
            Some(LinePosition::Compressed(line)) => return Ok(Some(line.clone())),
            Some(LinePosition::Plain(range)) => range,
        };
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.plain)?;
            file.seek(SeekFrom::Start(range.start))?;
            let mut line = vec![0; (range.end - range.start) as usize];
            file.read_exact(&mut line)?;
            Ok(line)
        };
        let line = read().with_context(|| format!("could not read {}", self.plain.display()))?;
        let (actual, _) = keys::identity(&line)?;
        ensure!(
            actual == wanted,
            "{} was changed by another program: rerun the command",
            self.plain.display()
        );
        Ok(Some(line))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    fn record_line(key: &str) -> String {
        let covered = format!("{{\"v\":2,\"key\":\"{key}\",\"cost_usd\":1.0,");
        let crc = crc32c::crc32c(covered.as_bytes());
        format!("{covered}\"crc\":\"{crc:08x}\"}}")
    }

    #[test]
    fn lines_are_found_beside_bytes_that_editors_add() {
        for (mark, line_end) in [("", "\n"), ("\u{feff}", "\n"), ("\u{feff}", "\r\n\r\n")] {
            let dir = tempfile::tempdir().unwrap();
            let file = plain_file(dir.path());
            let [a, b, c] = ["a", "b", "c"].map(record_line);
            fs::write(&file, format!("{mark}{a}{line_end}{b}{line_end}")).unwrap();
            let mut lookup = Lookup::open(dir.path()).unwrap();
            let mut appended = File::options().append(true).open(&file).unwrap();
            write!(appended, "{c}{line_end}").unwrap();
            lookup.refresh().unwrap();
            for (key, line) in [("a", &a), ("b", &b), ("c", &c)] {
                assert_eq!(lookup.line(key).unwrap().as_deref(), Some(line.as_bytes()));
            }
            assert_eq!(lookup.cost_usd(), 3.0);
        }
    }
}
