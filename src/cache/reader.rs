//! Reading a cache, also while another process writes it.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::line::{self, Fault};
use super::record::Record;
use super::recovery::{BadLine, Ending, Scan, ScanError};
use super::storage::{damaged, refusal};

/// The records of the cache file at `path`, in the order they were paid for.
///
/// A torn tail is left out: a writer may be at work on it. A damaged line yields an error with its
/// number and offset ([`crate::exit::Exit::Damaged`]), after which the caller should stop.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Result<Record>> + use<>> {
    Ok(Records {
        scan: open(path)?,
        path: path.to_owned(),
        done: false,
    })
}

struct Records {
    scan: Scan<BufReader<File>>,
    path: PathBuf,
    done: bool,
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let record = match self.scan.advance() {
            Ok(true) => line::decode(self.scan.line())
                .map_err(|fault| damaged(&self.path, &self.scan.bad(fault))),
            Ok(false) => {
                self.done = true;
                if let Ending::Torn(bad) = self.scan.ending() {
                    tracing::warn!(
                        "{}: the last record, at byte {}, is not whole (a writer is at work, or \
                         was stopped) and is left out",
                        self.path.display(),
                        bad.offset
                    );
                }
                return None;
            }
            Err(error) => Err(refusal(&self.path, error)),
        };
        self.done = record.is_err();
        Some(record)
    }
}

/// What the records of the cache file at `path` cost, in US dollars.
pub fn cost(path: &Path) -> Result<f64> {
    #[derive(serde::Deserialize)]
    struct Cost {
        #[serde(default)]
        cost_usd: f64,
    }
    let mut scan = open(path)?;
    let mut sum = 0.0;
    while scan.advance().map_err(|error| refusal(path, error))? {
        let cost: Cost = serde_json::from_slice(scan.line())
            .map_err(|error| damaged(path, &scan.bad(Fault::NoRecord(error.to_string()))))?;
        sum += cost.cost_usd;
    }
    Ok(sum)
}

/// What [`examine`] found in a file.
#[derive(Debug, Default)]
pub struct Findings {
    /// Whole records, and the bytes of the file.
    pub records: u64,
    pub bytes: u64,
    /// Keys that more than one record has, with how many have them.
    pub repeated: Vec<(String, u64)>,
    pub damaged: Vec<BadLine>,
    pub torn: Option<BadLine>,
}

/// Reads the cache file at `path` whole, decodes every record, and lists all that is wrong with it.
pub fn examine(path: &Path) -> Result<Findings> {
    let mut scan = open(path)?;
    let mut findings = Findings::default();
    let mut keys = std::collections::BTreeMap::<String, u64>::new();
    loop {
        match scan.advance() {
            Ok(true) => match line::decode(scan.line()) {
                Ok(record) => {
                    findings.records += 1;
                    *keys.entry(record.key).or_default() += 1;
                }
                Err(fault) => findings.damaged.push(scan.bad(fault)),
            },
            Ok(false) => break,
            Err(ScanError::Bad(bad)) => findings.damaged.push(bad),
            Err(error) => return Err(refusal(path, error)),
        }
    }
    findings.bytes = scan.position();
    if let Ending::Torn(bad) = scan.ending() {
        findings.torn = Some(bad);
    }
    findings.repeated = keys.into_iter().filter(|(_, count)| *count > 1).collect();
    Ok(findings)
}

fn open(path: &Path) -> Result<Scan<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Scan::new(BufReader::with_capacity(1 << 20, file))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "there is no cache at {}: run `distill harvest` first",
            path.display()
        ),
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("could not open {}", path.display())))
        }
    }
}
