//! Reads and writes files and folders.
//!
//! | file | content |
//! |---|---|
//! | `atomic.rs` | files and folders that are written completely or not at all |
//! | `lines.rs` | append-only text files |
//! | `read.rs` | reading, gzip |
//! | `lock.rs` | a lock between processes |
//! | `paths.rs` | creation, durability, identity and removal |
//!
//! Invariant: a file with its final name is never half-written. Content is written to a temporary file in the same
//! folder, synced, and renamed; then the folder is synced, because a rename is not durable before that. The exceptions
//! are append-only files of lines, whose readers skip an incomplete line ([`append`], [`LogFile`], and the cache in
//! `cache::storage`), and pipes that a user gives as output ([`AtomicFile`]).

mod atomic;
mod lines;
mod lock;
mod paths;
mod read;

pub use atomic::{AtomicFile, commit_dir, create, write_atomic, write_dir_with, write_in};
pub(crate) use atomic::{create_with, follow_link, is_stream, write_with};
pub use lines::{LogFile, append};
pub use lock::FileLock;
pub use paths::{copy_foreign_entries, create_dir_all, identity, remove_dir_all, remove_file};
pub(crate) use paths::{has_name, is_not_found, is_same, remove_if_empty, sync_folder};
pub(crate) use read::{check_is_file, open_data};
pub use read::{read, read_to_string};
