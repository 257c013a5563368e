//! Prepared examples: written once, as safetensors shards, and mapped into memory afterwards.
//!
//! ```text
//! <run_dir>/prepared/<hash>/shard-00000.safetensors …   examples, column by column (`columns`)
//!                           order.safetensors           in which order they are taken (`order`)
//!                           index.json                  sizes, checksums, the report; written last
//! ```
//!
//! The hash is one of everything that the examples depend on: the bytes of the source, the
//! tokenizer, the settings. A folder appears whole, by its rename, or not at all.
//!
//! The side of the split that an example falls on is not written down, only the hash of its prompt:
//! another `data.validation_share` needs no other shards.

pub(crate) mod columns;
pub(crate) mod order;
pub mod shard;
pub(crate) mod writer;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::report::Report;
use crate::fs;
use crate::ops::mapped_file::MappedFile;
pub use columns::Example;
pub use shard::ExampleView;
use shard::{Bytes, Shard};
pub use writer::{Entry, Part, Sink, Writer};

/// Of the files, and of how records become examples: raise it where either changes.
pub const VERSION: u32 = 5;

const INDEX: &str = "index.json";
const ORDER: &str = "order.safetensors";

/// Folders that are kept: the one in use, and the one before it, to which a user who tries a
/// setting may go back.
const KEPT: usize = 2;

/// `index.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Index {
    version: u32,
    /// The name of the folder.
    hash: String,
    /// A hash of the examples themselves, in their order. The same answers in another order, or
    /// compressed, have another `hash` and the same content.
    content: String,
    examples: usize,
    shards: Vec<ShardFile>,
    order: File,
    report: Report,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ShardFile {
    #[serde(flatten)]
    file: File,
    examples: usize,
}

/// A file, and how to tell that it is as it was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct File {
    name: String,
    bytes: u64,
    crc32c: u32,
}

/// Examples, in memory or mapped.
#[derive(Debug)]
pub struct Prepared {
    shards: Vec<Shard>,
    /// The number of the first example of each shard.
    starts: Vec<usize>,
    /// The number of each example, in the order in which they are taken.
    places: Vec<u32>,
    prompt_hashes: Vec<u32>,
    content: String,
    report: Report,
}

impl Prepared {
    /// The whole folder `dir`; None where there is none.
    ///
    /// Checksums are taken here, of all files: examples that turn out damaged in the middle of a
    /// training cannot be prepared again any more. It costs one reading of the files, which the
    /// first epoch then finds in the system's memory.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        match dir.exists() {
            true => Self::read(&|name| std::fs::read(dir.join(name)), &|file| {
                verify(&dir.join(&file.name), file)?;
                map(&dir.join(&file.name), file)
            })
            .map(Some),
            false => Ok(None),
        }
    }

    /// The folder `dir`, which this process has just written.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn open_new(dir: &Path) -> Result<Self> {
        Self::read(&|name| std::fs::read(dir.join(name)), &|file| {
            map(&dir.join(&file.name), file)
        })
    }

    /// What a [`Writer`] left in memory.
    ///
    /// # Errors
    /// If it is not what a writer leaves.
    pub fn in_memory(files: BTreeMap<String, Vec<u8>>) -> Result<Self> {
        let files = Mutex::new(files);
        let take = |name: &str| {
            let mut files = files.lock().unwrap_or_else(|e| e.into_inner());
            let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
            files.remove(name).ok_or_else(missing)
        };
        Self::read(&take, &|file| Ok(Bytes::Memory(take(&file.name)?)))
    }

    fn read(
        small: &(dyn Fn(&str) -> std::io::Result<Vec<u8>> + Sync),
        large: &(dyn Fn(&File) -> Result<Bytes> + Sync),
    ) -> Result<Self> {
        let read = |name| small(name).with_context(|| format!("reading {name}"));
        let index: Index = serde_json::from_slice(&read(INDEX)?).context(INDEX)?;
        ensure!(index.version == VERSION, "another version wrote it");
        let order = read(ORDER)?;
        ensure!(
            index.order.bytes == order.len() as u64 && index.order.crc32c == crc32c::crc32c(&order),
            "{ORDER} is not what was written"
        );
        let (places, prompt_hashes) = order::read(&order).context(ORDER)?;
        let shards: Vec<Shard> = index
            .shards
            .par_iter()
            .map(|shard| {
                let name = &shard.file.name;
                let open = || -> Result<Shard> {
                    let open = Shard::new(large(&shard.file)?)?;
                    ensure!(open.len() == shard.examples, "it has other examples");
                    Ok(open)
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
            "its files do not fit each other"
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

    /// Example `at`, which is less than B: from a cache, in the order of the keys; from a file of
    /// conversations, in that of the file.
    pub fn example(&self, at: usize) -> ExampleView<'_> {
        let number = self.places[at] as usize;
        let shard = self.starts.partition_point(|&start| start <= number) - 1;
        self.shards[shard].example(number - self.starts[shard])
    }

    /// The hash of the prompt of example `at`.
    pub fn prompt_hash(&self, at: usize) -> u32 {
        self.prompt_hashes[at]
    }

    /// A hash of all examples, in their order.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// What became of the records.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

/// Checks a file by reading it; a map of it would count as this process's memory.
fn verify(path: &Path, file: &File) -> Result<()> {
    let mut reader = std::fs::File::open(path)?;
    let (mut bytes, mut crc32c) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
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
        bail!("it is not what was written");
    }
    Ok(())
}

fn map(path: &Path, file: &File) -> Result<Bytes> {
    let map = MappedFile::new(&std::fs::File::open(path)?)?;
    ensure!(map.len() as u64 == file.bytes, "it is not what was written");
    Ok(Bytes::Mapped(map))
}

/// Removes what earlier runs have left in `root`: folders that never became whole, and all whole
/// ones but the newest, of which `used` is one.
///
/// # Errors
/// Where a folder cannot be read or removed.
pub fn remove_older(root: &Path, used: &Path) -> Result<()> {
    let read = || format!("could not read {}", root.display());
    let mut whole = Vec::new();
    for entry in std::fs::read_dir(root).with_context(read)? {
        let path = entry.with_context(read)?.path();
        if path == used || !path.is_dir() {
            continue;
        }
        // What is being written has a name with a dot before it.
        let name = path.file_name().unwrap_or_default();
        let index = path.join(INDEX).metadata();
        match index.and_then(|metadata| metadata.modified()) {
            Ok(written) if !name.to_string_lossy().starts_with('.') => whole.push((written, path)),
            _ => fs::remove_dir_all(&path)?,
        }
    }
    whole.sort();
    for (_, path) in whole.iter().rev().skip(KEPT - 1) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}
