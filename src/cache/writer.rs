//! The one writer of a cache: what is paid for, and the group commit.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use super::lock::Lock;
use super::record::Record;
use super::storage::{self, Journal, Storage};
use super::{line, lock};
use crate::config::Durability;

/// A group is synced when it has this many records ...
const GROUP_RECORDS: usize = 64;
/// ... or when its first record is this old.
const GROUP_AGE: Duration = Duration::from_secs(1);

/// A cache that is open for appending. One exists per folder, over all processes.
///
/// An appended record has been handed to the operating system, so that it survives this process;
/// it survives the machine once its group is synced. All methods may be called from any thread;
/// those that append or sync wait for the disk.
pub struct Cache {
    shared: Arc<Shared>,
    durability: Durability,
    /// Syncs the groups that stay small for too long.
    timer: Option<JoinHandle<()>>,
    /// Held for as long as this value lives.
    _lock: Lock,
}

struct Shared {
    state: Mutex<State>,
    /// A group was begun, or the cache is being closed.
    changed: Condvar,
}

struct State {
    journal: Journal,
    keys: HashSet<Fingerprint>,
    closing: bool,
}

/// The first 16 bytes of a key's hash: a million keys take some 40 MB less than their text, and
/// no two will ever meet.
type Fingerprint = [u8; 16];

fn fingerprint(key: &str) -> Fingerprint {
    let mut bytes = Fingerprint::default();
    blake3::Hasher::new()
        .update(key.as_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

impl Cache {
    /// Opens the cache in `dir`, which is created if need be. A torn tail is moved aside with a
    /// warning; damage is refused ([`crate::exit::Exit::Damaged`]), and so is a second process.
    pub fn open(dir: &Path, durability: Durability) -> Result<Cache> {
        Self::open_with(dir, durability, |file| Box::new(file))
    }

    /// As [`Cache::open`], with appends going through what `wrap` makes of the file.
    pub fn open_with(
        dir: &Path,
        durability: Durability,
        wrap: impl FnOnce(File) -> Box<dyn Storage>,
    ) -> Result<Cache> {
        crate::fs::create_dir_all(dir)?;
        let lock = lock::acquire(&dir.join("responses.lock"))?;
        let path = super::file(dir);
        let mut keys = HashSet::new();
        let mut records = 0u64;
        let (file, length) = storage::open(&path, &dir.join("responses.torn"), |key| {
            records += 1;
            keys.insert(fingerprint(key));
        })?;
        let doubles = records - keys.len() as u64;
        if doubles > 0 {
            tracing::warn!(
                "{}: {doubles} records repeat a key; `distill cache verify` lists them",
                path.display()
            );
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                journal: Journal::new(wrap(file), &path, length),
                keys,
                closing: false,
            }),
            changed: Condvar::new(),
        });
        let timer = match durability {
            Durability::Batch => Some(start_timer(Arc::clone(&shared))?),
            Durability::Record | Durability::None => None,
        };
        Ok(Cache {
            shared,
            durability,
            timer,
            _lock: lock,
        })
    }

    /// Has this key been answered, be the answer good or quarantined?
    pub fn contains(&self, key: &str) -> bool {
        self.shared.lock().keys.contains(&fingerprint(key))
    }

    /// Number of keys that have been answered.
    pub fn len(&self) -> usize {
        self.shared.lock().keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends `record`. A key that is held already is not stored twice: the first answer stays,
    /// with a warning.
    ///
    /// After an error nothing of the record is in the file. A failed write may be tried again
    /// (when there is room on the disk, say); a failed sync is final.
    pub fn append(&self, record: &Record) -> Result<()> {
        let line = line::encode(record)?;
        let fingerprint = fingerprint(&record.key);
        let mut state = self.shared.lock();
        if state.keys.contains(&fingerprint) {
            tracing::warn!(
                "{} was answered twice: the first answer is kept",
                record.key
            );
            return Ok(());
        }
        state.journal.append(&line)?;
        state.keys.insert(fingerprint);
        let unsynced = state.journal.unsynced();
        let group = match self.durability {
            Durability::Batch => GROUP_RECORDS,
            Durability::Record => 1,
            Durability::None => usize::MAX,
        };
        if unsynced >= group {
            state.journal.sync()?;
        } else if unsynced == 1 {
            self.shared.changed.notify_one();
        }
        Ok(())
    }

    /// Returns once every appended record is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.shared.lock().journal.sync()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_one();
        if let Some(timer) = self.timer.take() {
            // It ends by itself; had it panicked, its work is done below.
            let _ = timer.join();
        }
        let mut state = self.shared.lock();
        if state.journal.unsynced() > 0
            && let Err(error) = state.journal.sync()
        {
            tracing::error!("{error:#}");
        }
    }
}

impl Shared {
    /// The state, also after a panic elsewhere: it is consistent between any two statements that
    /// can panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start_timer(shared: Arc<Shared>) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("cache-sync".to_owned())
        .spawn(move || sync_old_groups(&shared))
        .context("could not start the thread that syncs the cache")
}

/// Syncs every group that reaches [`GROUP_AGE`], until the cache is closed. A failure shows in the
/// next call of the cache, too.
fn sync_old_groups(shared: &Shared) {
    let mut state = shared.lock();
    while !state.closing {
        state = match state.journal.waiting() {
            None => shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(age) if age < GROUP_AGE => {
                shared
                    .changed
                    .wait_timeout(state, GROUP_AGE - age)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
            Some(_) => {
                if let Err(error) = state.journal.sync() {
                    tracing::error!("{error:#}");
                }
                state
            }
        };
    }
}
