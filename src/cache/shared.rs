//! [`SharedCache`]: the state that the writer of a cache shares with its background threads, and the group commit.

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

/// Age of the first record of a group at which the group is synced. Appends wait for a background sync that takes
/// longer than this.
pub(crate) const GROUP_AGE: Duration = Duration::from_secs(1);

/// State of an open cache, for the writer, the sync thread and the compressor thread.
pub(crate) struct SharedCache {
    pub(crate) state: Mutex<CacheState>,
    /// Notified when a group begins or is full, a frame can be compressed, a background sync has ended, or the cache is
    /// being closed.
    pub(crate) changed: Condvar,
    /// Set to stop the compressor: lines that are not compressed yet stay in the plain file.
    pub keep_plain: AtomicBool,
}

impl SharedCache {
    /// Locks the state. A lock that another thread poisoned by a panic is used as well, because the state is consistent
    /// at every statement that can panic.
    pub(crate) fn lock(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a notification; may return without one.
    pub(crate) fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, CacheState>,
    ) -> MutexGuard<'a, CacheState> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits like [`SharedCache::wait`], for at most `timeout`.
    pub(crate) fn wait_for<'a>(
        &'a self,
        state: MutexGuard<'a, CacheState>,
        timeout: Duration,
    ) -> MutexGuard<'a, CacheState> {
        self.changed
            .wait_timeout(state, timeout)
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

    /// Commits an append to the current group: wakes the sync thread if the group has just begun or become full. If the
    /// storage cannot sync in the background, a full group is synced here. `unsynced_before` is the number of unsynced
    /// lines before the append.
    ///
    /// # Errors
    /// If a sync has failed, or nothing can be appended any more.
    pub(crate) fn commit<'a>(
        &'a self,
        mut state: MutexGuard<'a, CacheState>,
        unsynced_before: usize,
    ) -> Result<()> {
        // Limits the number of unsynced lines if the disk is slower than the appends.
        if state
            .syncing
            .is_some_and(|began| began.elapsed() >= GROUP_AGE)
        {
            state = self.wait_while_syncing(state);
        }
        let unsynced = state.append_log.unsynced();
        if unsynced_before == 0 || (unsynced_before < GROUP_RECORDS && unsynced >= GROUP_RECORDS) {
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
    /// Kinds of alternative keys among the records.
    pub(crate) key_variants: KeyVariants,
    /// Cost of all records in US dollars.
    pub(crate) cost_usd: f64,
    /// Number of records with the key of an earlier record.
    pub(crate) repeated: u64,
    /// Compressed file and its length in bytes; `None` if there is no compressed file.
    pub frames: Option<(OpenFile, u64)>,
    /// Start time of the background sync that is running.
    pub(crate) syncing: Option<Instant>,
    /// Length of the plain file in bytes at which the compressor has enough lines for a frame.
    pub compress_from: u64,
    /// Set when the cache is being closed, so that the background threads end.
    pub closing: bool,
    /// Set if some lines may be in both files, or a frame may be incomplete. No index is written then, so that the next
    /// opening reads and repairs the whole cache.
    pub needs_full_read: bool,
}

impl CacheState {
    /// Detects that another program has moved or changed the plain or the compressed file.
    pub(crate) fn check_files(&mut self) {
        self.append_log.check_file();
        let Some((open_file, length)) = &self.frames else {
            return;
        };
        let Err(change) = open_file.check(*length) else {
            return;
        };
        // The compressor may just be appending a frame.
        if let FileChange::Extended { .. } = change {
            return;
        }
        // This code also runs if the plain file has changed: both files may have been removed, and each is rescued
        // separately.
        let (displaced, _) = open_file.handle_change(&change, *length);
        self.append_log.set_displaced(displaced);
        self.frames = None;
    }
}
