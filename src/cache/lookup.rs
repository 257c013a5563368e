//! Lines of a cache by their keys, for a cache that this process appends to and reads here and there.

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
use crate::cache::fingerprint::Fingerprint;

/// Where the lines of a cache are. Its plain file must only ever grow: it is one that is not compressed.
pub(crate) struct Lookup {
    plain: PathBuf,
    places: HashMap<Fingerprint, LinePosition>,
    cost_usd: f64,
    /// Bytes of the plain file that have been read.
    end: u64,
}

enum LinePosition {
    /// Bytes of the plain file.
    At(Range<u64>),
    /// A line that is compressed.
    Held(Vec<u8>),
}

impl Lookup {
    /// Of the cache in `dir`, which need not be there.
    ///
    /// # Errors
    /// Where it cannot be read or is damaged.
    pub(crate) fn open(dir: &Path) -> Result<Lookup> {
        let mut lookup = Lookup {
            plain: plain_file(dir),
            places: HashMap::new(),
            cost_usd: 0.0,
            end: 0,
        };
        if !exists(dir) {
            return Ok(lookup);
        }
        let mut lines = CacheLines::open(dir)?;
        while lines.advance().map_err(|error| lines.refuse_scan(error))? {
            let start = lines.place().offset();
            lookup
                .add(lines.line(), start)
                .map_err(|fault| lines.refuse(fault))?;
        }
        Ok(lookup)
    }

    /// Learns of what has been appended since.
    ///
    /// # Errors
    /// Where it cannot be read or is damaged.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let could_not_read = || format!("could not read {}", self.plain.display());
        let mut file = File::open(&self.plain).with_context(could_not_read)?;
        file.seek(SeekFrom::Start(self.end))
            .with_context(could_not_read)?;
        let mut scan = LineScan::starting_at(BufReader::new(file), self.end, 0);
        while scan.advance().map_err(|e| refusal(&self.plain, e))? {
            let start = scan.bad(LineError::Unsealed).offset;
            self.add(scan.line(), Some(start))?;
        }
        Ok(())
    }

    /// A line of the plain file that begins at `start`, or one that is compressed.
    fn add(&mut self, line: &[u8], start: Option<u64>) -> Result<(), LineError> {
        let (fingerprint, _) = keys::identity(line)?;
        self.cost_usd += line::cost_usd(line)?;
        let place = match start {
            Some(start) => {
                self.end = start + line.len() as u64 + 1;
                LinePosition::At(start..start + line.len() as u64)
            }
            None => LinePosition::Held(line.to_vec()),
        };
        // The first record of a key is the one that counts.
        self.places.entry(fingerprint).or_insert(place);
        Ok(())
    }

    /// What the records cost, in US dollars.
    pub(crate) fn cost_usd(&self) -> f64 {
        self.cost_usd
    }

    /// The line of this key, without its line end, if there is one.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(crate) fn line(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let range = match self
            .places
            .get(&crate::cache::fingerprint::fingerprint(key))
        {
            None => return Ok(None),
            Some(LinePosition::Held(line)) => return Ok(Some(line.clone())),
            Some(LinePosition::At(range)) => range,
        };
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.plain)?;
            file.seek(SeekFrom::Start(range.start))?;
            let mut line = vec![0; (range.end - range.start) as usize];
            file.read_exact(&mut line)?;
            Ok(line)
        };
        let line = read().with_context(|| format!("could not read {}", self.plain.display()))?;
        let (found, _) = keys::identity(&line)?;
        ensure!(
            found == crate::cache::fingerprint::fingerprint(key),
            "{} was changed meanwhile",
            self.plain.display()
        );
        Ok(Some(line))
    }
}
