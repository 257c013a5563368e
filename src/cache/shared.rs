//! TODO

use crate::cache::append_log::AppendLog;
use crate::cache::keys::KeySet;
use crate::cache::open_file::FileChange;
use crate::cache::open_file::OpenFile;
use crate::cache::question::KeyVariants;
use anyhow::Result;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use std::time::Instant;

pub(crate) struct SharedCache {
    pub(crate) state: Mutex<CacheState>,
    /// A group was begun or is complete, there is enough for a frame, a sync has ended, or the
    /// cache is being closed.
    pub(crate) changed: Condvar,
    /// What is in the plain file stays there.
    pub keep_plain: AtomicBool,
}

impl SharedCache {
    /// The state, also after a panic elsewhere: it is consistent between any two statements that
    /// can panic.
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

    /// Waits until no sync is going on in the background.
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
    /// After an append to `before` lines that were not synced: has a full group synced, in the
    /// background where the storage can.
    pub(crate) fn commit<'a>(
        &'a self,
        mut state: MutexGuard<'a, CacheState>,
        before: usize,
    ) -> Result<()> {
        // A disk that takes longer than a group may wait holds up the appending.
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

pub(crate) struct CacheState {
    pub append_log: AppendLog,
    pub(crate) keys: KeySet,
    pub(crate) past: KeyVariants,
    /// Of all its records.
    pub(crate) cost_usd: f64,
    /// Records that repeat a key.
    pub(crate) repeated: u64,
    /// The compressed file, where there is one, and its length.
    pub frames: Option<(OpenFile, u64)>,
    /// When the sync began that is going on in the background.
    pub(crate) syncing: Option<Instant>,
    /// The length of the plain file from which on the sealer has something to do.
    pub compress_from: u64,
    pub closing: bool,
    /// Some lines are in both files, or there is a part of a frame: when the cache is next opened it
    /// is read whole, and tidied.
    pub needs_full_read: bool,
}

impl CacheState {
    /// Compares the files with what was written to them.
    pub(crate) fn check_files(&mut self) {
        self.append_log.check_file();
        let Some((open_file, length)) = &self.frames else {
            return;
        };
        // A frame may be on its way into it.
        let Err(change) = open_file.check(*length) else {
            return;
        };
        if let FileChange::Longer { .. } = change {
            return;
        }
        // Also after the plain file: both may have been removed, and each is rescued by itself.
        let (displaced, _) = open_file.handle_change(&change, *length);
        self.append_log.set_displaced(displaced);
        self.frames = None;
    }
}

/// ... or when its first record is this old. Nor may more than what was appended in such a time
/// wait for a slow disk.
pub(crate) const GROUP_AGE: Duration = Duration::from_secs(1);

/// A group is synced when it has this many records ...
pub(crate) const GROUP_RECORDS: usize = 64;
