//! `index.json` of a folder of prepared examples.

use serde::{Deserialize, Serialize};

use crate::data::report::DataReport;

/// Version of the file format and of the conversion of records to examples. Increase it if either changes.
pub(crate) const VERSION: u32 = 6;

/// Name of the index file.
pub(super) const INDEX: &str = "index.json";
/// Name of the file with the order of the examples.
pub(super) const ORDER: &str = "order.safetensors";

/// Content of `index.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PreparedIndex {
    pub version: u32,
    /// Hash of everything that the examples depend on; also the name of the folder.
    pub hash: String,
    /// Hash of the examples, in their order. If the cache is reordered or compressed, `hash` changes and `content` does
    /// not.
    pub content: String,
    pub examples: usize,
    pub shards: Vec<ShardFile>,
    pub order: FileChecksum,
    pub report: DataReport,
}

/// A shard with its number of examples.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ShardFile {
    #[serde(flatten)]
    pub file: FileChecksum,
    pub examples: usize,
}

/// A file with its size and checksum.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FileChecksum {
    pub name: String,
    pub bytes: u64,
    pub crc32c: u32,
}
