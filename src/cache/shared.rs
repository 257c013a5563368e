//! State that the writer of a cache shares with its background threads, and the group commit.

use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cache::append_log::AppendLog;
use crate::cache::keys::KeySet;
use crate::cache::open_file::{FileChange, OpenFile};
use crate::cache::question::KeyVariants;

/// Number of records after which a group is synced.
pub(crate) const GROUP_RECORDS: usize = 64;

/// Age of its first record at which a group is synced. On a slow disk, appends wait once a sync takes longer than
/// this.
pub(crate) const GROUP_AGE: Duration = Duration::from_secs(1);

/// State of an open cache, for the writer, the sync thread and the compressor thread.
pub(crate) struct SharedCache {
    pub(crate) state: Mutex<CacheState>,
    /// Notified when a group begins or is full, a frame can be compressed, a sync has ended, or the cache is being
    /// closed.
    pub(crate) changed: Condvar,
    /// Set to stop compressing: the lines of the plain file stay there.
    pub keep_plain: AtomicBool,
}

impl SharedCache {
    /// Locks the state, also after another thread panicked: the state is consistent between any two statements
    /// that can panic.
    pub(crate) fn lock(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change.
    pub(crate) fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, CacheState>,
    ) -> MutexGuard<'a, CacheState> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, but not for longer than `time`.
    pub(crate) fn wait_for<'a>(
        &'a self,
        state: MutexGuard<'a, CacheState>,
        time: Duration,
    ) -> MutexGuard<'a, CacheState> {
        self.changed
            .wait_timeout(state, time)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Waits until no background sync is running.
    pub(crate) fn wait_while_syncing<'a>(
        &'a self,
        mut state: MutexGuard<'a, CacheState>,
    ) -> MutexGuard<'a, CacheState> {
        while state.syncing.is_some() {
            state = self.wait(state);
        }
        state
    }
}

impl SharedCache {
    /// Starts a sync if the group is full, in the background if the storage can. `before` is the number of unsynced
    /// lines before the last append.
    pub(crate) fn commit<'a>(
        &'a self,
        mut state: MutexGuard<'a, CacheState>,
        before: usize,
    ) -> Result<()> {
        // If the disk is slower than groups are appended, the append waits.
        if state
            .syncing
            .is_some_and(|began| began.elapsed() >= GROUP_AGE)
        {
            state = self.wait_while_syncing(state);
        }
        let unsynced = state.append_log.unsynced();
        if before == 0 || (before < GROUP_RECORDS && unsynced >= GROUP_RECORDS) {
            self.changed.notify_all();
        }
        if unsynced >= GROUP_RECORDS && !state.append_log.syncs_in_background() {
            state.append_log.sync()?;
        }
        state.append_log.check_writable()
    }
}

/// Files and keys of an open cache.
pub(crate) struct CacheState {
    pub append_log: AppendLog,
    pub(crate) keys: KeySet,
    pub(crate) key_variants: KeyVariants,
    /// Cost of all records in US dollars.
    pub(crate) cost_usd: f64,
    /// Records that repeat a key.
    pub(crate) repeated: u64,
    /// Compressed file and its length, if there is one.
    pub frames: Option<(OpenFile, u64)>,
    /// Start of the running background sync.
    pub(crate) syncing: Option<Instant>,
    /// Length of the plain file at which the compressor has enough lines for a frame.
    pub compress_from: u64,
    pub closing: bool,
    /// Set if lines are in both files or a frame is incomplete: no index is written, so that the next opening
    /// reads and repairs the whole cache.
    pub needs_full_read: bool,
}

impl CacheState {
    /// Detects that another program has moved or changed a file.
    pub(crate) fn check_files(&mut self) {
        self.append_log.check_file();
        let Some((open_file, length)) = &self.frames else {
            return;
        };
        // The compressor may be appending a frame, so a longer file is no change.
        let Err(change) = open_file.check(*length) else {
            return;
        };
        if let FileChange::Longer { .. } = change {
            return;
        }
        // Checked also if the plain file has changed: both may have been removed, and each is rescued separately.
        let (displaced, _) = open_file.handle_change(&change, *length);
        self.append_log.set_displaced(displaced);
        self.frames = None;
    }
}
