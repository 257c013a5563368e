//! The one writer of a cache: what is paid for, and the group commit.

use crate::cache::shared::CacheState;
use crate::cache::shared::GROUP_AGE;
use crate::cache::shared::GROUP_RECORDS;
use crate::cache::shared::SharedCache;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result};

use super::keys::{self};
use super::open_file::OpenFile;
use super::question::KeyVariants;
use super::record::Record;
use super::storage::{self, WrapFile};
use super::{compressed_file, index, line, plain_file};
use crate::cache::append_log::AppendLog;
use crate::cache::compressor;
use crate::cache::compressor::Compressor;
use crate::cache::files::OnReadProgress;
use crate::cache::fingerprint::Fingerprint;
use crate::cache::open;
use crate::config::{self, Compression, Durability};

/// A smaller cache is read faster than its index is worth.
const WORTH_AN_INDEX: u64 = 4 << 20;

/// A cache that is open for appending. One exists per folder, over all processes.
///
/// An appended record has been handed to the operating system, so that it survives this process;
/// it survives the machine once its group is synced. All methods may be called from any thread;
/// those that append or sync wait for the disk.
pub struct Cache {
    shared: Arc<SharedCache>,
    durability: Durability,
    dir: PathBuf,
    /// Dollars of the records that it held when it was opened.
    cost_usd: f64,
    /// Syncs the groups that stay small for too long.
    timer: Option<JoinHandle<()>>,
    /// Compresses what has been appended.
    compressor: Option<JoinHandle<()>>,
    /// Held for as long as this value lives.
    _lock: crate::fs::FileLock,
}

/// A record as its line in the file, ready to be appended.
pub struct EncodedRecord {
    line: Vec<u8>,
    fingerprint: Fingerprint,
    /// Its schema, and where it was cut off.
    head: (u32, u32),
    cost_usd: f64,
}

impl EncodedRecord {
    pub fn new(record: &Record) -> Result<EncodedRecord> {
        Ok(EncodedRecord {
            line: line::encode(record)?,
            fingerprint: crate::cache::fingerprint::fingerprint(&record.key),
            head: (record.v, record.cut_at),
            cost_usd: record.cost_usd.unwrap_or(0.0),
        })
    }

    /// A whole line of another cache, without its line end, with whatever fields it has.
    pub fn from_line(line: &[u8]) -> Result<EncodedRecord, line::LineError> {
        let (fingerprint, _) = keys::identity(line)?;
        let head = line::head(line)?;
        Ok(EncodedRecord {
            line: [line, b"\n"].concat(),
            fingerprint,
            head: (head.v, head.cut_at),
            cost_usd: line::cost_usd(line)?,
        })
    }

    /// Is it the record of this key?
    pub fn has_fingerprint(&self, fingerprint: &Fingerprint) -> bool {
        self.fingerprint == *fingerprint
    }
}

impl Cache {
    /// Opens the cache in `dir`, which is created if need be. A torn tail is moved aside with a
    /// warning; damage is refused ([`crate::exit::Exit::Damaged`]), and so is a second process.
    pub fn open(dir: &Path, settings: &config::Cache) -> Result<Cache> {
        Self::open_with(dir, settings, storage::plain_storage(), &mut |_, _| Ok(()))
    }

    /// As [`Cache::open`], with appends going through what `wrap` makes of each file, and telling
    /// `on_progress` how many bytes of how many have been read.
    pub fn open_with(
        dir: &Path,
        settings: &config::Cache,
        wrap: WrapFile,
        on_progress: OnReadProgress<'_>,
    ) -> Result<Cache> {
        crate::fs::create_dir_all(dir)?;
        let lock = super::lock(dir)?;
        let mut contents = open::open(dir, &wrap, on_progress)?;
        let path = plain_file(dir);
        if contents.repeated > 0 {
            tracing::warn!(
                "{}: {} records repeat a key; `distill cache verify` lists them, `distill cache \
                 repair` moves them aside",
                dir.display(),
                contents.repeated
            );
        }
        let wrap = Arc::new(wrap);
        let mut compressor = None;
        if settings.compression == Compression::Zstd {
            let mut new = Compressor::open(dir, contents.compressed, Arc::clone(&wrap))?;
            contents.plain = new.compress_large(contents.plain, on_progress)?;
            compressor = Some(new);
        }
        let plain = wrap(storage::open_or_create(&path)?);
        let frames = compressed_file(dir);
        let frames = match std::fs::File::open(&frames) {
            Ok(file) => Some((
                OpenFile::new(&file, &frames)?,
                crate::cache::files::length(&frames)?,
            )),
            Err(error) if crate::fs::is_not_found(&error) => None,
            Err(error) => {
                let could_not = || format!("could not open {}", frames.display());
                return Err(error).with_context(could_not);
            }
        };
        let shared = Arc::new(SharedCache {
            state: Mutex::new(CacheState {
                append_log: AppendLog::new(plain, &path, contents.plain)?,
                frames,
                keys: contents.keys,
                past: contents.past,
                cost_usd: contents.cost_usd,
                repeated: contents.repeated,
                syncing: None,
                compress_from: u64::MAX,
                closing: false,
                needs_full_read: false,
            }),
            changed: Condvar::new(),
            keep_plain: AtomicBool::new(false),
        });
        let timer = match settings.durability {
            Durability::Batch => Some(start_timer(Arc::clone(&shared))?),
            Durability::Record | Durability::None => None,
        };
        let compressor =
            compressor.map(|compressor| compressor::start(Arc::clone(&shared), compressor));
        Ok(Cache {
            shared,
            durability: settings.durability,
            dir: dir.to_owned(),
            cost_usd: contents.cost_usd,
            timer,
            compressor: compressor.transpose()?,
            _lock: lock,
        })
    }

    /// Has this key been answered, be the answer good or quarantined?
    pub fn contains(&self, key: &str) -> bool {
        self.contains_fingerprint(&crate::cache::fingerprint::fingerprint(key))
    }

    /// As [`Cache::contains`].
    pub fn contains_fingerprint(&self, fingerprint: &Fingerprint) -> bool {
        self.shared.lock().keys.contains(fingerprint)
    }

    /// Alternative keys that occur in this cache.
    pub fn past(&self) -> KeyVariants {
        self.shared.lock().past.clone()
    }

    /// Number of keys that have been answered.
    pub fn len(&self) -> usize {
        self.shared.lock().keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of keys whose records are whole in the file, without those that a failed sync may
    /// have lost.
    pub fn safe_len(&self) -> usize {
        let state = self.shared.lock();
        state
            .keys
            .len()
            .saturating_sub(state.append_log.possibly_lost())
    }

    /// Compares the files with what this process wrote.
    ///
    /// # Errors
    /// If no further request may be sent; [`DisplacedFile`](super::open_file::Displaced) if another program moved or
    /// changed a file.
    pub fn check(&self) -> Result<()> {
        let mut state = self.shared.lock();
        state.check_files();
        state.append_log.check()
    }

    /// What the records cost, in US dollars, that it held when it was opened.
    pub fn cost_when_opened(&self) -> f64 {
        self.cost_usd
    }

    /// Has what is not compressed yet stay as it is: closing takes no longer than a sync.
    pub fn stop_compressing(&self) {
        self.shared.keep_plain.store(true, Ordering::Relaxed);
    }

    /// Appends `record`. A key that is held already is not stored twice: the first answer stays,
    /// with a warning.
    ///
    /// After an error nothing of the record is in the file. A failed write may be tried again
    /// (when there is room on the disk, say); a failed sync is final.
    pub fn append(&self, record: &Record) -> Result<()> {
        self.append_encoded(&EncodedRecord::new(record)?)
    }

    /// As [`Cache::append`], of a record that was encoded elsewhere.
    pub fn append_encoded(&self, sealed: &EncodedRecord) -> Result<()> {
        self.append_group([sealed])
    }

    /// As [`Cache::append_encoded`], of several records by one write: after an error none of them is
    /// in the file.
    pub fn append_group<'a>(
        &self,
        group: impl IntoIterator<Item = &'a EncodedRecord>,
    ) -> Result<()> {
        let mut state = self.shared.lock();
        let (mut lines, mut fingerprints, mut cost_usd) = (Vec::new(), Vec::new(), 0.0);
        let mut past = KeyVariants::default();
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
            past.note(sealed.head.0, sealed.head.1);
            cost_usd += sealed.cost_usd;
        }
        if fingerprints.is_empty() {
            return Ok(());
        }
        let before = state.append_log.unsynced();
        state.append_log.append(&lines, fingerprints.len())?;
        state.keys.extend(fingerprints);
        state.past.add(&past);
        state.cost_usd += cost_usd;
        if state.append_log.length() >= state.compress_from {
            self.shared.changed.notify_all();
        }
        match self.durability {
            Durability::Record => state.append_log.sync(),
            Durability::None => Ok(()),
            Durability::Batch => self.shared.commit(state, before),
        }
    }

    /// Returns once every appended record is on the disk.
    pub fn sync(&self) -> Result<()> {
        let state = self.shared.lock();
        self.shared.wait_while_syncing(state).append_log.sync()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        // They end by themselves; had one panicked, its work is done below, or was not needed.
        for thread in [self.timer.take(), self.compressor.take()] {
            let _ = thread.map(JoinHandle::join);
        }
        let mut state = self.shared.lock();
        if state.append_log.unsynced() > 0
            && let Err(error) = state.append_log.sync()
        {
            tracing::error!("{error:#}");
        }
        // Where it cannot be written, the next run reads the cache whole.
        if state.append_log.check().is_ok()
            && !state.needs_full_read
            && crate::cache::files::size(&self.dir) >= WORTH_AN_INDEX
            && let Err(error) = index::save(
                &self.dir,
                &state.keys,
                &state.past,
                state.repeated,
                state.cost_usd,
            )
        {
            tracing::warn!("{error:#}");
        }
    }
}

fn start_timer(shared: Arc<SharedCache>) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("cache-sync".to_owned())
        .spawn(move || sync_groups(&shared))
        .context("could not start the thread that syncs the cache")
}

/// Syncs every group that is full or reaches [`GROUP_AGE`], until the cache is closed. A failure
/// shows in the next call of the cache, too.
fn sync_groups(shared: &SharedCache) {
    let mut state = shared.lock();
    while !state.closing {
        let Some(age) = state.append_log.oldest_unsynced_age() else {
            state = shared.wait(state);
            continue;
        };
        if age < GROUP_AGE && state.append_log.unsynced() < GROUP_RECORDS {
            state = shared.wait_for(state, GROUP_AGE - age);
            continue;
        }
        let result = match state.append_log.begin_sync() {
            None => state.append_log.sync(),
            Some((lines, job)) => {
                state.syncing = Some(Instant::now());
                drop(state);
                let result = job();
                state = shared.lock();
                state.syncing = None;
                shared.changed.notify_all();
                state.append_log.end_sync(lines, result)
            }
        };
        if let Err(error) = result {
            tracing::error!("{error:#}");
        }
    }
}
