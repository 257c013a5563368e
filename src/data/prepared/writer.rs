//! Writes prepared examples on several threads.
//!
//! Each thread fills its own shard, without copies or locks. The shard of an example therefore depends on timing;
//! the order file records the place of each example.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

use super::columns::{Example, ExampleColumns};
use super::index::{FileChecksum, INDEX, ORDER, PreparedIndex, ShardFile, VERSION};
use super::order;
use crate::data::report::DataReport;
use crate::fs;

/// Approximate size in bytes at which a shard is complete. Each thread holds one in memory; files ten times as large
/// are not read faster.
const SHARD_BYTES: usize = 32 << 20;

/// Destination of the files.
#[derive(Debug)]
pub(crate) enum OutputSink {
    /// A folder that no reader opens before it is complete.
    Folder(PathBuf),
    Memory,
}

/// Writer that all threads share.
#[derive(Debug)]
pub(crate) struct PreparedWriter {
    sink: OutputSink,
    /// True if token ids fit into 16 bits.
    uses_u16_ids: bool,
    /// Number of the next shard.
    next: AtomicU32,
    written: Mutex<WrittenFiles>,
}

#[derive(Debug, Default)]
struct WrittenFiles {
    /// Shards by number.
    shards: BTreeMap<u32, ShardFile>,
    /// Content of the files by name, for [`OutputSink::Memory`].
    memory: BTreeMap<String, Vec<u8>>,
    /// Threads that sync files to the disk while later files are written, so that `finish` does not wait for all data.
    syncing: Vec<JoinHandle<io::Result<()>>>,
}

/// Place of a written example, and the values that `PreparedWriter::finish` combines over all examples.
#[derive(Debug)]
pub(crate) struct ExampleEntry {
    /// Examples are sorted by `order`, then by `source_position`.
    order: Box<str>,
    source_position: u64,
    shard: u32,
    /// Index in the shard.
    index: u32,
    prompt_hash: u32,
    content: blake3::Hash,
    mapped_mass: f64,
}

impl PreparedWriter {
    /// Creates a writer for token ids below `vocab_size`.
    pub(crate) fn new(sink: OutputSink, vocab_size: usize) -> Self {
        Self {
            sink,
            uses_u16_ids: vocab_size <= 1 << 16,
            next: AtomicU32::new(0),
            written: Mutex::default(),
        }
    }

    /// Creates the writer of one thread.
    pub(crate) fn shard_writer(&self) -> ShardWriter<'_> {
        ShardWriter {
            writer: self,
            columns: ExampleColumns::default(),
            entries: Vec::new(),
            first_unwritten: 0,
        }
    }

    fn write(
        &self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<FileChecksum> {
        let mut out = match &self.sink {
            OutputSink::Folder(folder) => {
                ChecksummedOutput::new(Output::File(fs::create(&folder.join(name))?))
            }
            OutputSink::Memory => ChecksummedOutput::new(Output::Memory(Vec::new())),
        };
        fill(&mut out)
            .and_then(|()| out.flush())
            .with_context(|| format!("could not write the prepared examples ({name})"))?;
        let file = FileChecksum {
            name: name.into(),
            bytes: out.bytes,
            crc32c: out.crc32c,
        };
        match out.output {
            Output::Memory(bytes) => {
                self.written().memory.insert(name.into(), bytes);
            }
            Output::File(buffered) => {
                let file = buffered.into_inner().map_err(|error| error.into_error())?;
                let syncing = std::thread::spawn(move || file.sync_all());
                self.written().syncing.push(syncing);
            }
        }
        Ok(file)
    }

    fn written(&self) -> MutexGuard<'_, WrittenFiles> {
        self.written.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn write_shard(&self, columns: &ExampleColumns) -> Result<u32> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("shard-{number:05}.safetensors");
        let file = self.write(&name, |out| columns.write(self.uses_u16_ids, out))?;
        let examples = columns.len();
        self.written()
            .shards
            .insert(number, ShardFile { file, examples });
        Ok(number)
    }

    /// Writes the order of the examples and, last of all, the index. `entries` are the entries of all shard writers.
    /// Returns the files by name if the sink is [`OutputSink::Memory`], else nothing.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(crate) fn finish(
        self,
        mut entries: Vec<ExampleEntry>,
        hash: &str,
        mut report: DataReport,
    ) -> Result<BTreeMap<String, Vec<u8>>> {
        // Answers arrive in a different order each time, which must not affect the training.
        entries.sort_unstable_by(|a, b| {
            (&a.order, a.source_position).cmp(&(&b.order, b.source_position))
        });
        // A sum in fixed order does not depend on the timing of threads.
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
        let place = |entry: &ExampleEntry| starts[entry.shard as usize] + entry.index;
        let places: Vec<u32> = entries.iter().map(place).collect();
        let prompt_hashes: Vec<u32> = entries.iter().map(|entry| entry.prompt_hash).collect();
        let order = self.write(ORDER, |out| order::write(&places, &prompt_hashes, out))?;
        let index = PreparedIndex {
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
            // A thread that panicked has synced nothing. The folder is synced again later.
            if let Ok(synced) = syncing.join() {
                synced.context("could not sync the prepared examples")?;
            }
        }
        Ok(std::mem::take(&mut written.memory))
    }
}

/// Writer of one thread.
#[derive(Debug)]
pub(crate) struct ShardWriter<'w> {
    writer: &'w PreparedWriter,
    columns: ExampleColumns,
    entries: Vec<ExampleEntry>,
    /// Index of the first entry whose shard is not written yet.
    first_unwritten: usize,
}

impl ShardWriter<'_> {
    /// Adds an example. [`PreparedWriter::finish`] sorts the examples by `order`, then by `source_position`, and sums
    /// `mapped_mass` for the report.
    ///
    /// # Errors
    /// If a shard cannot be written.
    pub(crate) fn push(
        &mut self,
        (order, source_position): (&str, u64),
        prompt_hash: u32,
        mapped_mass: f64,
        example: &Example,
    ) -> Result<()> {
        let index = self.columns.len() as u32;
        let content = self.columns.push(example);
        self.entries.push(ExampleEntry {
            order: order.into(),
            source_position,
            shard: 0,
            index,
            prompt_hash,
            content,
            mapped_mass,
        });
        if self.columns.bytes() >= SHARD_BYTES {
            self.flush_shard()?;
        }
        Ok(())
    }

    fn flush_shard(&mut self) -> Result<()> {
        if self.columns.len() > 0 {
            let shard = self.writer.write_shard(&self.columns)?;
            for entry in &mut self.entries[self.first_unwritten..] {
                entry.shard = shard;
            }
            self.first_unwritten = self.entries.len();
            self.columns.clear();
        }
        Ok(())
    }

    /// Writes the last shard. Returns the entries of all its examples.
    ///
    /// # Errors
    /// If the shard cannot be written.
    pub(crate) fn finish(mut self) -> Result<Vec<ExampleEntry>> {
        self.flush_shard()?;
        Ok(self.entries)
    }
}

enum Output {
    File(BufWriter<std::fs::File>),
    Memory(Vec<u8>),
}

/// Counts and checksums the bytes that are written.
struct ChecksummedOutput {
    output: Output,
    bytes: u64,
    crc32c: u32,
}

impl ChecksummedOutput {
    fn new(output: Output) -> Self {
        Self {
            output,
            bytes: 0,
            crc32c: 0,
        }
    }
}

impl Write for ChecksummedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.output {
            Output::File(file) => file.write_all(bytes)?,
            Output::Memory(memory) => memory.extend_from_slice(bytes),
        }
        self.bytes += bytes.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.output {
            Output::File(file) => file.flush(),
            Output::Memory(_) => Ok(()),
        }
    }
}
