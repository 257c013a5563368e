//! `responses.index`: a file with the keys of a cache, so that a cache of a million records opens fast.
//!
//! ```text
//! {"version":2,"files":{"responses.jsonl":{"bytes":…,…},…},"keys":…,"past":…,"repeated":…,"cost_usd":…,"crc":…}⏎
//! <16 bytes per key>
//! ```
//!
//! The index only repeats content of the cache. It is valid as long as the cache files have the sizes, times and
//! inodes that they had when the index was written. Otherwise all records are read. The writer of a cache of at least
//! 4 MiB writes a new index when it closes the cache.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::keys::KeySet;
use super::question::KeyVariants;
use crate::cache::fingerprint::Fingerprint;

/// Version of the file format. An index of another version is not used.
const VERSION: u32 = 2;

/// Maximum length of the header in bytes.
const MAX_HEADER_BYTES: u64 = 1 << 16;

/// Maximum number of keys for which memory is reserved before they are read, in case the header is damaged.
const MAX_RESERVED_KEYS: usize = 1 << 24;

/// Size in bytes of the read buffer.
const BUFFER_BYTES: usize = 1 << 20;

/// Summary of a cache, as its index stores it.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct KeyIndex {
    pub keys: KeySet,
    /// Kinds of alternative keys among the records.
    pub key_variants: KeyVariants,
    /// Number of records with the key of an earlier record.
    pub repeated: u64,
    /// Cost of all records in US dollars.
    pub cost_usd: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct IndexHeader {
    version: u32,
    files: BTreeMap<String, FileStamp>,
    /// Number of keys.
    keys: usize,
    #[serde(rename = "past")]
    key_variants: KeyVariants,
    repeated: u64,
    cost_usd: f64,
    /// CRC-32C of the keys, which follow the header.
    crc: u32,
}

/// Metadata of a file, which changes whenever the content changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FileStamp {
    bytes: u64,
    modified_ns: u64,
    /// Change time of the inode, which programs cannot set. On systems other than Unix this time and the inode are 0.
    changed_s: i64,
    changed_ns: i64,
    inode: u64,
}

impl FileStamp {
    fn from_path(path: &Path) -> Option<FileStamp> {
        let metadata = path.metadata().ok()?;
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        let (changed_s, changed_ns, inode) = change_time_and_inode(&metadata);
        Some(FileStamp {
            bytes: metadata.len(),
            modified_ns: u64::try_from(modified.as_nanos()).ok()?,
            changed_s,
            changed_ns,
            inode,
        })
    }
}

#[cfg(unix)]
fn change_time_and_inode(metadata: &std::fs::Metadata) -> (i64, i64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.ctime(), metadata.ctime_nsec(), metadata.ino())
}

#[cfg(not(unix))]
fn change_time_and_inode(_: &std::fs::Metadata) -> (i64, i64, u64) {
    (0, 0, 0)
}

/// Returns the path of the index of the cache in `dir`.
pub(crate) fn index_file(dir: &Path) -> PathBuf {
    dir.join("responses.index")
}

fn file_stamps(dir: &Path) -> BTreeMap<String, FileStamp> {
    [super::plain_file(dir), super::compressed_file(dir)]
        .iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some((name, FileStamp::from_path(path)?))
        })
        .collect()
}

/// Loads the index of the cache in `dir`; `None` if there is no valid index, or if the cache files have changed since
/// it was written.
pub(crate) fn load(dir: &Path) -> Option<KeyIndex> {
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, File::open(index_file(dir)).ok()?);
    let mut header = Vec::new();
    (&mut reader)
        .take(MAX_HEADER_BYTES)
        .read_until(b'\n', &mut header)
        .ok()?;
    let header: IndexHeader = serde_json::from_slice(&header).ok()?;
    if header.version != VERSION || header.files != file_stamps(dir) {
        return None;
    }
    let reserved_keys = header.keys.min(MAX_RESERVED_KEYS);
    let mut keys = KeySet::with_capacity_and_hasher(reserved_keys, Default::default());
    let mut key = Fingerprint::default();
    let mut crc = 0;
    for _ in 0..header.keys {
        reader.read_exact(&mut key).ok()?;
        crc = crc32c::crc32c_append(crc, &key);
        keys.insert(key);
    }
    let is_intact = crc == header.crc && keys.len() == header.keys;
    is_intact.then_some(KeyIndex {
        keys,
        key_variants: header.key_variants,
        repeated: header.repeated,
        cost_usd: header.cost_usd,
    })
}

/// Writes the index of the cache in `dir`. The caller must hold the lock of the cache.
pub(crate) fn save(
    dir: &Path,
    keys: &KeySet,
    key_variants: &KeyVariants,
    repeated: u64,
    cost_usd: f64,
) -> Result<()> {
    let crc = keys
        .iter()
        .fold(0, |crc, key| crc32c::crc32c_append(crc, key));
    let header = IndexHeader {
        version: VERSION,
        files: file_stamps(dir),
        keys: keys.len(),
        key_variants: key_variants.clone(),
        repeated,
        cost_usd,
        crc,
    };
    let header = serde_json::to_string(&header)?;
    crate::fs::write_with(&index_file(dir), |file| {
        writeln!(file, "{header}")?;
        keys.iter().try_for_each(|key| file.write_all(key))
    })
}
