//! The append-only cache of paid answers: JSON lines, one record each, and older ones compressed if
//! the config says so.
//!
//! ```text
//! Record --line::encode--> a sealed line --writer (group commit), journal--> responses.jsonl
//!   --seal, frames (in the background, `cache.compression`)--> responses.jsonl.zst
//! both --reader::Lines--> whole lines --line::decode--> Record
//!                                     --view, columns--> RecordView, borrowed, for training
//! ```
//!
//! A cache is opened for writing by `opening`: by its `index`, or else whole, on all cores (`sweep`).
//! Where a line or a frame is not as it should be, `recovery::LineScan` and `frames::FrameScan` tell a
//! torn tail from damage.
//!
//! `reader` walks both files, also while they are written, and `lookup` finds single lines; `repair`
//! and `merge` move what does not fit aside, `rewrite` what is to be asked again. `question` names records;
//! `unused_answers` counts those that answer something else; `place` knows whether a file is still where it was. `record`, `stored`, `line`, `view`, `columns`, `keys`, `recovery`, `frames`, `sweep` and
//! `stats` are pure: bytes in, verdicts out. Files are created and replaced by `storage` alone (the
//! lock's pid apart). An acknowledged record is never changed or lost.

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

/// The file of records in the cache folder `dir` (which is `<run_dir>/cache`); with compression, of
/// the newest ones.
pub fn plain_file(dir: &Path) -> PathBuf {
    dir.join("responses.jsonl")
}

/// The file of the compressed records.
pub fn compressed_file(dir: &Path) -> PathBuf {
    dir.join("responses.jsonl.zst")
}

/// Where torn tails are moved.
fn torn_file(dir: &Path) -> PathBuf {
    dir.join("responses.torn")
}

/// Where `repair` moves what is damaged, as it is.
pub fn quarantine_file(dir: &Path) -> PathBuf {
    dir.join("responses.quarantine")
}

/// Where further records of a key go: whole lines, as in a cache.
pub fn conflicts_file(dir: &Path) -> PathBuf {
    dir.join("responses.conflicts.jsonl")
}

/// Refuses pipes and devices in place of the cache files: opening a pipe waits for ever.
fn check_files(dir: &Path) -> anyhow::Result<()> {
    for path in [plain_file(dir), compressed_file(dir)] {
        if path.exists() && !path.is_file() {
            let message = format!("{} is not a regular file: move it away", path.display());
            return Err(Exit::Usage(message).into());
        }
    }
    Ok(())
}

/// Takes the cache in `dir` for this process.
fn lock(dir: &Path) -> anyhow::Result<crate::fs::FileLock> {
    check_files(dir)?;
    let holds = "writes this cache: wait for it, or set another `run_dir`";
    crate::fs::FileLock::acquire(&dir.join("responses.lock"), holds)
}

/// Is there a cache in `dir`?
pub fn exists(dir: &Path) -> bool {
    plain_file(dir).exists() || compressed_file(dir).exists()
}

/// What a scan of `path` that stopped short means for the program.
fn refusal(path: &Path, error: ScanError) -> anyhow::Error {
    match error {
        ScanError::Read(error) => {
            anyhow::Error::new(error).context(format!("could not read {}", path.display()))
        }
        ScanError::Bad(bad) => damaged(path, &bad),
    }
}

/// The refusal to go on with a damaged file.
fn damaged(path: &Path, bad: &BadLine) -> anyhow::Error {
    let remedy = match bad.fault {
        line::LineError::Newer(_) => "",
        _ => {
            "; restore it from a backup, or run `distill cache repair`, which moves the damage \
             aside to have its prompts asked again"
        }
    };
    Exit::Damaged(format!("{}: {bad}{remedy}", path.display())).into()
}
