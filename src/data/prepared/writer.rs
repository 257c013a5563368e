//! Writing prepared examples, on several threads at once.
//!
//! Each thread fills a shard of its own, so that nothing is copied or waited for; which shard an
//! example lands in is left to chance, and the order file says where it is.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

use super::columns::{Columns, Example};
use super::{File, INDEX, Index, ORDER, ShardFile, VERSION, order};
use crate::data::report::Report;
use crate::fs;

/// The size of a shard. Each thread holds one in memory; files ten times as large would be read no
/// faster.
const SHARD_BYTES: usize = 32 << 20;

/// Where the files go.
#[derive(Debug)]
pub enum Sink {
    /// A folder, in which nobody looks before it is whole.
    Folder(PathBuf),
    Memory,
}

/// What all threads share.
#[derive(Debug)]
pub struct Writer {
    sink: Sink,
    /// Are token ids of 16 bits wide enough?
    narrow: bool,
    next: AtomicU32,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    /// By number, with how many examples they hold.
    shards: BTreeMap<u32, ShardFile>,
    /// The files themselves, where they go into no folder.
    memory: BTreeMap<String, Vec<u8>>,
    /// Those that are on their way to the disk, so that it does not all have to be waited for at the
    /// end.
    syncing: Vec<JoinHandle<io::Result<()>>>,
}

/// An example that has been written: where it is, and what must be known of all of them at once.
#[derive(Debug)]
pub struct Entry {
    key: Box<str>,
    source: u64,
    shard: u32,
    index: u32,
    prompt_hash: u32,
    content: blake3::Hash,
    mapped_mass: f64,
}

impl Writer {
    /// For token ids below `vocab_size`.
    pub fn new(sink: Sink, vocab_size: usize) -> Self {
        Self {
            sink,
            narrow: vocab_size <= 1 << 16,
            next: AtomicU32::new(0),
            written: Mutex::default(),
        }
    }

    /// What one thread adds.
    pub fn part(&self) -> Part<'_> {
        Part {
            writer: self,
            columns: Columns::default(),
            entries: Vec::new(),
            open: 0,
        }
    }

    fn write(
        &self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<File> {
        let mut out = match &self.sink {
            Sink::Folder(folder) => Checked::new(Out::File(fs::create(&folder.join(name))?)),
            Sink::Memory => Checked::new(Out::Memory(Vec::new())),
        };
        fill(&mut out)
            .and_then(|()| out.flush())
            .with_context(|| format!("could not write the prepared examples ({name})"))?;
        let file = File {
            name: name.into(),
            bytes: out.bytes,
            crc32c: out.crc32c,
        };
        match out.to {
            Out::Memory(bytes) => {
                self.written().memory.insert(name.into(), bytes);
            }
            Out::File(to) => {
                let to = to.into_inner().map_err(|error| error.into_error())?;
                let syncing = std::thread::spawn(move || to.sync_all());
                self.written().syncing.push(syncing);
            }
        }
        Ok(file)
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn shard(&self, columns: &Columns) -> Result<u32> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("shard-{number:05}.safetensors");
        let file = self.write(&name, |out| columns.write(self.narrow, out))?;
        let examples = columns.len();
        self.written()
            .shards
            .insert(number, ShardFile { file, examples });
        Ok(number)
    }

    /// Ends the writing, with the entries of all parts: writes the order of the examples and, last
    /// of all, the index. Returns the files, where they went into memory.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub fn finish(
        self,
        mut entries: Vec<Entry>,
        hash: &str,
        mut report: Report,
    ) -> Result<BTreeMap<String, Vec<u8>>> {
        // Answers arrive in another order each time; what is trained on must not depend on it.
        entries.sort_unstable_by(|a, b| (&a.key, a.source).cmp(&(&b.key, b.source)));
        // Nor must the rounding of a sum depend on which thread was first.
        let mapped: f64 = entries.iter().map(|entry| entry.mapped_mass).sum();
        report.mean_mapped_mass = mapped / report.soft_positions.max(1) as f64;
        let mut content = blake3::Hasher::new();
        for entry in &entries {
            content.update(entry.content.as_bytes());
        }

        let shards: Vec<ShardFile> = self.written().shards.values().cloned().collect();
        let mut starts = Vec::with_capacity(shards.len());
        let mut start = 0;
        for shard in &shards {
            starts.push(start);
            start += shard.examples as u32;
        }
        let place = |entry: &Entry| starts[entry.shard as usize] + entry.index;
        let places: Vec<u32> = entries.iter().map(place).collect();
        let prompt_hashes: Vec<u32> = entries.iter().map(|entry| entry.prompt_hash).collect();
        let order = self.write(ORDER, |out| order::write(&places, &prompt_hashes, out))?;
        let index = Index {
            version: VERSION,
            hash: hash.into(),
            content: content.finalize().to_hex().to_string(),
            examples: entries.len(),
            shards,
            order,
            report,
        };
        let index = serde_json::to_vec_pretty(&index)?;
        self.write(INDEX, |out| out.write_all(&index))?;
        let mut written = self.written();
        for syncing in written.syncing.drain(..) {
            // One that panicked has synced nothing; the folder is synced once more.
            if let Ok(synced) = syncing.join() {
                synced.context("could not sync the prepared examples")?;
            }
        }
        Ok(std::mem::take(&mut written.memory))
    }
}

/// What one thread adds.
#[derive(Debug)]
pub struct Part<'w> {
    writer: &'w Writer,
    columns: Columns,
    entries: Vec<Entry>,
    /// The first of the entries whose shard is still being filled.
    open: usize,
}

impl Part<'_> {
    /// Adds an example. All of them will be sorted by `order`, and those where it is the same by
    /// `source`, the place in the source. `mapped_mass` is summed for the report.
    ///
    /// # Errors
    /// Where a shard cannot be written.
    pub fn push(
        &mut self,
        (order, source): (&str, u64),
        prompt_hash: u32,
        mapped_mass: f64,
        example: &Example,
    ) -> Result<()> {
        let index = self.columns.len() as u32;
        let content = self.columns.push(example);
        self.entries.push(Entry {
            key: order.into(),
            source,
            shard: 0,
            index,
            prompt_hash,
            content,
            mapped_mass,
        });
        match self.columns.bytes() >= SHARD_BYTES {
            true => self.close(),
            false => Ok(()),
        }
    }

    fn close(&mut self) -> Result<()> {
        if self.columns.len() > 0 {
            let shard = self.writer.shard(&self.columns)?;
            for entry in &mut self.entries[self.open..] {
                entry.shard = shard;
            }
            self.open = self.entries.len();
            self.columns.clear();
        }
        Ok(())
    }

    /// Writes the last shard.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn finish(mut self) -> Result<Vec<Entry>> {
        self.close()?;
        Ok(self.entries)
    }
}

enum Out {
    File(BufWriter<std::fs::File>),
    Memory(Vec<u8>),
}

/// Counts what is written, and takes its checksum.
struct Checked {
    to: Out,
    bytes: u64,
    crc32c: u32,
}

impl Checked {
    fn new(to: Out) -> Self {
        Self {
            to,
            bytes: 0,
            crc32c: 0,
        }
    }
}

impl Write for Checked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.to {
            Out::File(file) => file.write_all(bytes)?,
            Out::Memory(memory) => memory.extend_from_slice(bytes),
        }
        self.bytes += bytes.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.to {
            Out::File(file) => file.flush(),
            Out::Memory(_) => Ok(()),
        }
    }
}
