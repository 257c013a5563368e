//! The append-only cache of paid answers: one JSONL file per run, one record a line.
//!
//! ```text
//! Record --line::encode--> a sealed line --writer (group commit)--> storage --> responses.jsonl
//! responses.jsonl --recovery::Scan--> whole lines --line::decode--> Record
//! ```
//!
//! `record`, `stored`, `line`, `recovery` and `stats` are pure; `storage` and `lock` alone touch the
//! disk. An acknowledged record is never rewritten or lost.

pub mod line;
mod lock;
pub mod reader;
pub mod record;
pub mod recovery;
pub mod stats;
mod storage;
mod stored;
mod writer;

use std::path::{Path, PathBuf};

pub use reader::{cost, read};
pub use storage::Storage;
pub use writer::{Cache, Sealed};

/// The file of records in the cache folder `dir` (which is `<run_dir>/cache`).
pub fn file(dir: &Path) -> PathBuf {
    dir.join("responses.jsonl")
}
