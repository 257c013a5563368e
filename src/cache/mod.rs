//! The append-only cache of paid answers: JSON lines, one record each. Older lines are compressed if
//! `cache.compression` is set.
//!
//! ```text
//! Record --line::encode--> EncodedRecord --writer (group commit), append_log--> responses.jsonl
//!   --compressor, frames (in the background)--> responses.jsonl.zst
//! both --reader::CacheLines--> complete lines --line::decode--> Record
//!                                          --view, columns--> RecordView, borrowed, for training
//! ```
//!
//! | file | content |
//! |---|---|
//! | `record`, `stored`, `raw_token`, `usage`, `hex` | the record and how its fields are stored |
//! | `line`, `frames`, `recovery` | the line and frame formats; distinction of a torn tail from damage |
//! | `question`, `fingerprint`, `keys` | keys of records |
//! | `writer`, `shared`, `append_log`, `compressor`, `storage` | the one writer and its background threads |
//! | `open`, `index`, `verify_parallel` | opening a cache from its index, or by verifying all lines on all cores |
//! | `open_file` | detecting that another program moved or changed a file |
//! | `reader`, `lookup`, `view`, `logprobs_view`, `columns` | sequential and random access, also during writes |
//! | `repair`, `merge`, `rewrite` | moving damaged, conflicting and replaced records to other files |
//! | `stats`, `unused_answers`, `files` | counts and sizes |
//!
//! Invariants: an acknowledged record is never changed or lost. One process at a time writes a cache. Files are
//! created and replaced by `storage` alone, except for the lock, the index and the note about a moved file. `record`,
//! `stored`, `line`, `view`, `columns`, `keys`, `recovery`, `frames`, `verify_parallel` and `stats` open no files.

pub(crate) mod append_log;
pub(crate) mod columns;
pub(crate) mod compressor;
pub mod files;
pub(crate) mod fingerprint;
pub mod frames;
pub(crate) mod hex;
pub(crate) mod index;
pub(crate) mod keys;
pub mod line;
pub mod logprobs_view;
pub(crate) mod lookup;
pub mod merge;
pub mod open;
pub(crate) mod open_file;
pub mod question;
pub mod raw_token;
pub mod reader;
pub mod record;
pub mod recovery;
pub mod repair;
pub(crate) mod rewrite;
pub(crate) mod shared;
pub(crate) mod stats;
pub mod storage;
pub(crate) mod stored;
pub(crate) mod unused_answers;
pub mod usage;
pub(crate) mod verify_parallel;
pub mod view;
pub mod writer;

use std::path::{Path, PathBuf};

pub use crate::cache::files::{OnReadProgress, size};
pub use crate::cache::open::{Peek, peek};
pub use reader::read;
pub use storage::{Storage, WrapFile, plain_storage};
pub use writer::{Cache, EncodedRecord};

use crate::exit::Exit;
use recovery::{BadLine, ScanError};

/// File of uncompressed records in the cache folder `dir` (`<run_dir>/cache`); with compression, only the newest
/// records.
pub fn plain_file(dir: &Path) -> PathBuf {
    dir.join("responses.jsonl")
}

/// File of compressed records.
pub fn compressed_file(dir: &Path) -> PathBuf {
    dir.join("responses.jsonl.zst")
}

/// File to which torn tails are moved.
fn torn_file(dir: &Path) -> PathBuf {
    dir.join("responses.torn")
}

/// File to which `repair` moves damaged bytes unchanged.
pub fn quarantine_file(dir: &Path) -> PathBuf {
    dir.join("responses.quarantine")
}

/// File of records whose key was already in the cache with another answer, in the line format of the cache.
pub fn conflicts_file(dir: &Path) -> PathBuf {
    dir.join("responses.conflicts.jsonl")
}

/// Refuses pipes and devices in place of the cache files: opening a pipe would block.
fn check_files(dir: &Path) -> anyhow::Result<()> {
    for path in [plain_file(dir), compressed_file(dir)] {
        if path.exists() && !path.is_file() {
            let message = format!("{} is not a regular file: move it away", path.display());
            return Err(Exit::Usage(message).into());
        }
    }
    Ok(())
}

/// Locks the cache in `dir` for this process.
fn lock(dir: &Path) -> anyhow::Result<crate::fs::FileLock> {
    check_files(dir)?;
    let message = "is writing this cache: wait for it, or set another `run_dir`";
    crate::fs::FileLock::acquire(&dir.join("responses.lock"), message)
}

/// Returns true if there is a cache in `dir`.
pub fn exists(dir: &Path) -> bool {
    plain_file(dir).exists() || compressed_file(dir).exists()
}

/// Returns the error for a folder without a cache, which the user has named.
fn not_found(dir: &Path) -> anyhow::Error {
    Exit::Usage(format!(
        "no cache found in {}: pass the folder that contains responses.jsonl",
        dir.display()
    ))
    .into()
}

/// Converts the error of a scan of `path` into an error message for the user.
fn refusal(path: &Path, error: ScanError) -> anyhow::Error {
    match error {
        ScanError::Read(error) => {
            anyhow::Error::new(error).context(format!("could not read {}", path.display()))
        }
        ScanError::Bad(bad) => damaged(path, &bad),
    }
}

/// Returns the error for a damaged file.
fn damaged(path: &Path, bad: &BadLine) -> anyhow::Error {
    let remedy = match bad.fault {
        line::LineError::Newer(_) => "",
        _ => {
            "; restore it from a backup, or run `distill cache repair`, which moves the damaged records to \
             another file, so that their prompts are requested again"
        }
    };
    Exit::Damaged(format!("{}: {bad}{remedy}", path.display())).into()
}
