//! Prepared examples: written once as safetensors shards, then mapped into memory.
//!
//! ```text
//! <run_dir>/prepared/<hash>/shard-00000.safetensors …   examples, column by column
//!                           order.safetensors           the order of the examples
//!                           index.json                  sizes, checksums, the report; written last
//! ```
//!
//! | file | content |
//! |---|---|
//! | `columns` | examples in memory, and how a shard is written |
//! | `shard` | views of the examples in a shard |
//! | `order` | `order.safetensors` |
//! | `index` | `index.json`, and the version of the format |
//! | `writer` | writing on several threads |
//!
//! Invariants:
//! - The `<hash>` of the folder covers everything that the examples depend on: the bytes of the source, the tokenizers,
//!   the settings and the selection of records.
//! - A folder appears complete, by a rename, or not at all.
//! - The files contain the hash of each example's prompt, but not whether the example is for training or validation.
//!   Another `data.validation_share` therefore uses the same shards.

pub(crate) mod columns;
pub mod index;
pub(crate) mod order;
pub mod shard;
pub(crate) mod writer;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use crate::data::report::DataReport;
use crate::fs;
use crate::ops::mapped_file::MappedFile;
use index::{FileChecksum, INDEX, ORDER, PreparedIndex, VERSION};
use shard::{ExampleView, PreparedShard, ShardBytes};

/// Number of folders that are kept: the one in use, and the previous one, in case the user reverts a setting.
const KEPT_FOLDERS: usize = 2;

/// Number of bytes that [`verify`] reads at a time.
const VERIFY_BUFFER_BYTES: usize = 1 << 20;

/// Prepared examples, mapped or in memory.
#[derive(Debug)]
pub struct Prepared {
    shards: Vec<PreparedShard>,
    /// Index of the first example of each shard.
    starts: Vec<usize>,
    /// Index of each example, counted over all shards, in the order of [`Self::example`].
    places: Vec<u32>,
    prompt_hashes: Vec<u32>,
    content: String,
    report: DataReport,
}

impl Prepared {
    /// Opens the folder `dir`. Returns None if it does not exist.
    ///
    /// Verifies the checksums of all files now, because damaged examples cannot be prepared again in the middle of a
    /// training run. This reads every file once, which brings it into the page cache for the first epoch.
    ///
    /// # Errors
    /// If a file is missing or damaged, or another version of the program wrote the folder.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        if !dir.exists() {
            return Ok(None);
        }
        Self::read(&|name| std::fs::read(dir.join(name)), &|file| {
            verify(&dir.join(&file.name), file)?;
            map_shard(&dir.join(&file.name), file)
        })
        .map(Some)
    }

    /// Opens the folder `dir` without verifying its checksums. Only for a folder that this process has just written.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn open_new(dir: &Path) -> Result<Self> {
        Self::read(&|name| std::fs::read(dir.join(name)), &|file| {
            map_shard(&dir.join(&file.name), file)
        })
    }

    /// Opens files that a `PreparedWriter` made in memory.
    ///
    /// # Errors
    /// If the files are inconsistent.
    pub fn in_memory(files: BTreeMap<String, Vec<u8>>) -> Result<Self> {
        let files = Mutex::new(files);
        let take = |name: &str| {
            let mut files = files.lock().unwrap_or_else(|e| e.into_inner());
            let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
            files.remove(name).ok_or_else(missing)
        };
        Self::read(&take, &|file| Ok(ShardBytes::Memory(take(&file.name)?)))
    }

    fn read(
        read_file: &(dyn Fn(&str) -> std::io::Result<Vec<u8>> + Sync),
        open_shard: &(dyn Fn(&FileChecksum) -> Result<ShardBytes> + Sync),
    ) -> Result<Self> {
        let read = |name| read_file(name).with_context(|| format!("reading {name}"));
        let index: PreparedIndex = serde_json::from_slice(&read(INDEX)?).context(INDEX)?;
        ensure!(
            index.version == VERSION,
            "another version of the program wrote the folder"
        );
        let order = read(ORDER)?;
        ensure!(
            index.order.bytes == order.len() as u64 && index.order.crc32c == crc32c::crc32c(&order),
            "the checksum of {ORDER} does not match"
        );
        let (places, prompt_hashes) = order::read(&order).context(ORDER)?;
        let shards: Vec<PreparedShard> = index
            .shards
            .par_iter()
            .map(|shard| {
                let name = &shard.file.name;
                let open = || -> Result<PreparedShard> {
                    let opened = PreparedShard::new(open_shard(&shard.file)?)?;
                    ensure!(
                        opened.len() == shard.examples,
                        "it has another number of examples"
                    );
                    Ok(opened)
                };
                open().with_context(|| name.clone())
            })
            .collect::<Result<_>>()?;
        let mut starts = Vec::with_capacity(shards.len());
        let mut start = 0;
        for shard in &shards {
            starts.push(start);
            start += shard.len();
        }
        ensure!(
            start == index.examples
                && places.len() == start
                && prompt_hashes.len() == start
                && places.iter().all(|&place| (place as usize) < start),
            "its files do not belong together"
        );
        Ok(Self {
            shards,
            starts,
            places,
            prompt_hashes,
            content: index.content,
            report: index.report,
        })
    }

    /// B, the number of examples.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Returns example `index`, which must be less than B. Examples from a cache are in the order of their keys,
    /// examples from a file of conversations in the order of the file.
    pub fn example(&self, index: usize) -> ExampleView<'_> {
        let number = self.places[index] as usize;
        let shard = self.starts.partition_point(|&start| start <= number) - 1;
        self.shards[shard].example(number - self.starts[shard])
    }

    /// Hash of the prompt of example `index`.
    pub(crate) fn prompt_hash(&self, index: usize) -> u32 {
        self.prompt_hashes[index]
    }

    /// Hash of all examples, in their order.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// Counts of the preparation.
    pub fn report(&self) -> &DataReport {
        &self.report
    }
}

/// Verifies the size and checksum of a file. Reads the file instead of mapping it, because mapped pages count as memory
/// of this process.
fn verify(path: &Path, file: &FileChecksum) -> Result<()> {
    let mut reader = std::fs::File::open(path)?;
    let mut bytes = 0;
    let mut crc32c = 0;
    let mut buffer = vec![0; VERIFY_BUFFER_BYTES];
    loop {
        match reader.read(&mut buffer)? {
            0 => break,
            length => {
                bytes += length as u64;
                crc32c = crc32c::crc32c_append(crc32c, &buffer[..length]);
            }
        }
    }
    if (bytes, crc32c) != (file.bytes, file.crc32c) {
        bail!("its checksum does not match");
    }
    Ok(())
}

fn map_shard(path: &Path, file: &FileChecksum) -> Result<ShardBytes> {
    let map = MappedFile::new(&std::fs::File::open(path)?)?;
    ensure!(map.len() as u64 == file.bytes, "its size does not match");
    Ok(ShardBytes::Mapped(map))
}

/// Removes folders of earlier runs from `root`, except `used` and the newest other complete folder.
///
/// # Errors
/// If a folder cannot be read or removed.
pub(crate) fn remove_older(root: &Path, used: &Path) -> Result<()> {
    let could_not_read = || format!("could not read {}", root.display());
    let mut complete = Vec::new();
    for entry in std::fs::read_dir(root).with_context(could_not_read)? {
        let path = entry.with_context(could_not_read)?.path();
        if path == used || !path.is_dir() {
            continue;
        }
        // The name of a folder that is being written starts with a dot.
        let name = path.file_name().unwrap_or_default();
        let index = path.join(INDEX).metadata();
        match index.and_then(|metadata| metadata.modified()) {
            Ok(written) if !name.to_string_lossy().starts_with('.') => {
                complete.push((written, path))
            }
            _ => fs::remove_dir_all(&path)?,
        }
    }
    complete.sort();
    for (_, path) in complete.iter().rev().skip(KEPT_FOLDERS - 1) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}
