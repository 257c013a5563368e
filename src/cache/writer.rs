//! The one writer of a cache: what is paid for, and the group commit.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::lock::Lock;
use super::record::Record;
use super::storage::{self, Journal, Storage};
use super::{line, lock};
use crate::config::Durability;

/// A group is synced when it has this many records ...
const GROUP_RECORDS: usize = 64;
/// ... or when its first record is this old. Nor may more than what was appended in such a time
/// wait for a slow disk.
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
    /// A group was begun or is complete, a sync has ended, or the cache is being closed.
    changed: Condvar,
}

struct State {
    journal: Journal,
    keys: HashSet<Fingerprint>,
    /// When the sync began that is going on in the background.
    syncing: Option<Instant>,
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

/// A record as its line in the file, ready to be appended.
pub struct Sealed {
    line: Vec<u8>,
    fingerprint: Fingerprint,
}

impl Sealed {
    pub fn new(record: &Record) -> Result<Sealed> {
        Ok(Sealed {
            line: line::encode(record)?,
            fingerprint: fingerprint(&record.key),
        })
    }
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
                syncing: None,
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
        self.append_sealed(&Sealed::new(record)?)
    }

    /// As [`Cache::append`], of a record that was encoded elsewhere.
    pub fn append_sealed(&self, sealed: &Sealed) -> Result<()> {
        self.append_group([sealed])
    }

    /// As [`Cache::append_sealed`], of several records by one write: after an error none of them is
    /// in the file.
    pub fn append_group<'a>(&self, group: impl IntoIterator<Item = &'a Sealed>) -> Result<()> {
        let mut state = self.shared.lock();
        let (mut lines, mut fingerprints) = (Vec::new(), Vec::new());
        for sealed in group {
            if state.keys.contains(&sealed.fingerprint)
                || fingerprints.contains(&sealed.fingerprint)
            {
                let key = line::head(sealed.line.trim_ascii_end())?.key;
                tracing::warn!("{key} was answered twice: the first answer is kept");
                continue;
            }
            lines.extend_from_slice(&sealed.line);
            fingerprints.push(sealed.fingerprint);
        }
        if fingerprints.is_empty() {
            return Ok(());
        }
        let before = state.journal.unsynced();
        state.journal.append(&lines, fingerprints.len())?;
        state.keys.extend(fingerprints);
        match self.durability {
            Durability::Record => state.journal.sync(),
            Durability::None => Ok(()),
            Durability::Batch => self.shared.commit(state, before),
        }
    }

    /// Returns once every appended record is on the disk.
    pub fn sync(&self) -> Result<()> {
        let state = self.shared.lock();
        self.shared.wait_while_syncing(state).journal.sync()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
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

impl Shared {
    /// After an append to `before` lines that were not synced: has a full group synced, in the
    /// background where the storage can.
    fn commit<'a>(&'a self, mut state: MutexGuard<'a, State>, before: usize) -> Result<()> {
        // A disk that takes longer than a group may wait holds up the appending.
        if state
            .syncing
            .is_some_and(|began| began.elapsed() >= GROUP_AGE)
        {
            state = self.wait_while_syncing(state);
        }
        let unsynced = state.journal.unsynced();
        if before == 0 || (before < GROUP_RECORDS && unsynced >= GROUP_RECORDS) {
            self.changed.notify_all();
        }
        if unsynced >= GROUP_RECORDS && !state.journal.syncs_in_background() {
            state.journal.sync()?;
        }
        state.journal.check()
    }

    fn wait_while_syncing<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.syncing.is_some() {
            state = self.wait(state);
        }
        state
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn start_timer(shared: Arc<Shared>) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("cache-sync".to_owned())
        .spawn(move || sync_groups(&shared))
        .context("could not start the thread that syncs the cache")
}

/// Syncs every group that is full or reaches [`GROUP_AGE`], until the cache is closed. A failure
/// shows in the next call of the cache, too.
fn sync_groups(shared: &Shared) {
    let mut state = shared.lock();
    while !state.closing {
        let Some(age) = state.journal.waiting() else {
            state = shared.wait(state);
            continue;
        };
        if age < GROUP_AGE && state.journal.unsynced() < GROUP_RECORDS {
            state = shared
                .changed
                .wait_timeout(state, GROUP_AGE - age)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            continue;
        }
        let result = match state.journal.begin_sync() {
            None => state.journal.sync(),
            Some((lines, job)) => {
                state.syncing = Some(Instant::now());
                drop(state);
                let result = job();
                state = shared.lock();
                state.syncing = None;
                shared.changed.notify_all();
                state.journal.end_sync(lines, result)
            }
        };
        if let Err(error) = result {
            tracing::error!("{error:#}");
        }
    }
}
