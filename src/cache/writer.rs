//! The only writer of a cache, [`Cache`], with its sync thread and its compressor thread.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result};

use super::append_log::AppendLog;
use super::compressor::{self, Compressor};
use super::files::OnReadProgress;
use super::fingerprint::Fingerprint;
use super::open_file::OpenFile;
use super::question::KeyVariants;
use super::record::Record;
use super::shared::{CacheState, GROUP_AGE, GROUP_RECORDS, SharedCache};
use super::storage::{self, WrapFile};
use super::{compressed_file, index, keys, line, open, plain_file};
use crate::config::{self, Compression, Durability};

/// Minimum size in bytes of a cache for which an index is written: a smaller cache opens fast without one.
const MIN_INDEXED_BYTES: u64 = 4 << 20;

/// A cache that is open for appending. At most one exists per folder, over all processes.
///
/// An appended record survives the end of this process, because the write has reached the operating system. It survives
/// a power loss once it is synced. With `durability = "batch"`, records appended within a short time form a group and
/// are synced together. All methods may be called from any thread; those that append or sync may wait for the disk.
pub struct Cache {
    shared: Arc<SharedCache>,
    durability: Durability,
    dir: PathBuf,
    /// Cost in US dollars of the records that the cache contained when it was opened.
    cost_usd: f64,
    /// Syncs groups that are full or old enough.
    sync_thread: Option<JoinHandle<()>>,
    /// Compresses appended lines.
    compressor: Option<JoinHandle<()>>,
    /// Held as long as this value lives.
    _lock: crate::fs::FileLock,
}

/// A record encoded as a line, ready to be appended.
pub struct EncodedRecord {
    line: Vec<u8>,
    fingerprint: Fingerprint,
    /// Schema version of the record.
    schema: u32,
    /// See [`Record::cut_at`].
    cut_at: u32,
    cost_usd: f64,
}

impl EncodedRecord {
    /// Encodes `record`.
    pub fn new(record: &Record) -> Result<EncodedRecord> {
        Ok(EncodedRecord {
            line: line::encode(record)?,
            fingerprint: crate::cache::fingerprint::fingerprint(&record.key),
            schema: record.v,
            cut_at: record.cut_at,
            cost_usd: record.cost_usd.unwrap_or(0.0),
        })
    }

    /// Copies a complete line of another cache (without its line end), with all its fields.
    pub fn from_line(line: &[u8]) -> Result<EncodedRecord, line::LineError> {
        let (fingerprint, _) = keys::identity(line)?;
        let head = line::head(line)?;
        Ok(EncodedRecord {
            line: [line, b"\n"].concat(),
            fingerprint,
            schema: head.v,
            cut_at: head.cut_at,
            cost_usd: line::cost_usd(line)?,
        })
    }

    /// Returns true if the record's key has this fingerprint.
    pub(crate) fn has_fingerprint(&self, fingerprint: &Fingerprint) -> bool {
        self.fingerprint == *fingerprint
    }
}

impl Cache {
    /// Opens the cache in `dir`, which is created if it does not exist. A torn tail is moved to another file with a
    /// warning.
    ///
    /// # Errors
    /// If the cache is damaged ([`crate::exit::Exit::Damaged`]), or another process has it open.
    pub fn open(dir: &Path, settings: &config::CacheConfig) -> Result<Cache> {
        Self::open_with(dir, settings, storage::plain_storage(), &mut |_, _| Ok(()))
    }

    /// Opens a cache like [`Cache::open`]; `wrap` creates the storage of each file, and `on_progress` is called while
    /// the cache is read.
    pub fn open_with(
        dir: &Path,
        settings: &config::CacheConfig,
        wrap: WrapFile,
        on_progress: OnReadProgress<'_>,
    ) -> Result<Cache> {
        crate::fs::create_dir_all(dir)?;
        let lock = super::lock(dir)?;
        let mut contents = open::open(dir, &wrap, on_progress)?;
        let path = plain_file(dir);
        if contents.repeated > 0 {
            tracing::warn!(
                "{}: {} records repeat a key: list them with `distill cache verify`, or move them to another file \
                 with `distill cache repair`",
                dir.display(),
                contents.repeated
            );
        }
        let wrap = Arc::new(wrap);
        let mut compressor = None;
        if settings.compression == Compression::Zstd {
            let mut opened = Compressor::open(dir, contents.compressed, Arc::clone(&wrap))?;
            contents.plain = opened.compress_large(contents.plain, on_progress)?;
            compressor = Some(opened);
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
                let context = || format!("could not open {}", frames.display());
                return Err(error).with_context(context);
            }
        };
        let shared = Arc::new(SharedCache {
            state: Mutex::new(CacheState {
                append_log: AppendLog::new(plain, &path, contents.plain)?,
                frames,
                keys: contents.keys,
                key_variants: contents.key_variants,
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
        let sync_thread = match settings.durability {
            Durability::Batch => Some(start_sync_thread(Arc::clone(&shared))?),
            Durability::Record | Durability::None => None,
        };
        let compressor =
            compressor.map(|compressor| compressor::start(Arc::clone(&shared), compressor));
        Ok(Cache {
            shared,
            durability: settings.durability,
            dir: dir.to_owned(),
            cost_usd: contents.cost_usd,
            sync_thread,
            compressor: compressor.transpose()?,
            _lock: lock,
        })
    }

    /// Returns true if the cache has a record of this key, with status `ok` or `quarantined`.
    pub fn contains(&self, key: &str) -> bool {
        self.contains_fingerprint(&crate::cache::fingerprint::fingerprint(key))
    }

    /// Returns true if the cache has a record whose key has this fingerprint.
    pub(crate) fn contains_fingerprint(&self, fingerprint: &Fingerprint) -> bool {
        self.shared.lock().keys.contains(fingerprint)
    }

    /// Schema versions and truncation limits of the stored records, which determine the alternative keys of a request.
    pub(crate) fn key_variants(&self) -> KeyVariants {
        self.shared.lock().key_variants.clone()
    }

    /// Number of keys with a record.
    pub fn len(&self) -> usize {
        self.shared.lock().keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of keys with a record, minus the records that a failed sync may have lost.
    pub(crate) fn intact_len(&self) -> usize {
        let state = self.shared.lock();
        state
            .keys
            .len()
            .saturating_sub(state.append_log.possibly_lost())
    }

    /// Detects that another program has moved or changed a file.
    ///
    /// # Errors
    /// If nothing more can be appended, because an earlier sync or truncation failed; `DisplacedFile` if another
    /// program moved or changed a file.
    pub fn check(&self) -> Result<()> {
        let mut state = self.shared.lock();
        state.check_files();
        state.append_log.check()
    }

    /// Returns the cost in US dollars of the records that the cache contained when it was opened.
    pub fn cost_when_opened(&self) -> f64 {
        self.cost_usd
    }

    /// Stops the compressor, so that closing the cache does not wait for it. The remaining lines stay uncompressed.
    pub fn stop_compressing(&self) {
        self.shared.keep_plain.store(true, Ordering::Relaxed);
    }

    /// Appends `record`. If the cache has a record of its key already, the first record stays, and a warning is
    /// logged.
    ///
    /// # Errors
    /// After a failed write, the file is truncated to its previous length, and the call may be repeated, for example
    /// once the disk has space again. After a failed sync, the record may be lost. After a failed sync or truncation,
    /// nothing more can be appended.
    pub fn append(&self, record: &Record) -> Result<()> {
        self.append_encoded(&EncodedRecord::new(record)?)
    }

    /// Appends a record like [`Cache::append`]; the record is already encoded.
    pub(crate) fn append_encoded(&self, record: &EncodedRecord) -> Result<()> {
        self.append_group([record])
    }

    /// Appends several encoded records in one write. After a failed write none of them is in the file.
    pub fn append_group<'a>(
        &self,
        group: impl IntoIterator<Item = &'a EncodedRecord>,
    ) -> Result<()> {
        let mut state = self.shared.lock();
        let mut lines = Vec::new();
        let mut fingerprints = Vec::new();
        let mut cost_usd = 0.0;
        let mut key_variants = KeyVariants::default();
        for record in group {
            if state.keys.contains(&record.fingerprint)
                || fingerprints.contains(&record.fingerprint)
            {
                let key = line::head(record.line.trim_ascii_end())?.key;
                tracing::warn!("the request {key} has two answers: the first one is kept");
                continue;
            }
            lines.extend_from_slice(&record.line);
            fingerprints.push(record.fingerprint);
            key_variants.insert(record.schema, record.cut_at);
            cost_usd += record.cost_usd;
        }
        if fingerprints.is_empty() {
            return Ok(());
        }
        let unsynced_before = state.append_log.unsynced();
        state.append_log.append(&lines, fingerprints.len())?;
        state.keys.extend(fingerprints);
        state.key_variants.add(&key_variants);
        state.cost_usd += cost_usd;
        if state.append_log.length() >= state.compress_from {
            self.shared.changed.notify_all();
        }
        match self.durability {
            Durability::Record => state.append_log.sync(),
            Durability::None => Ok(()),
            Durability::Batch => self.shared.commit(state, unsynced_before),
        }
    }

    /// Waits until every appended record is on the disk.
    pub fn sync(&self) -> Result<()> {
        let state = self.shared.lock();
        self.shared.wait_while_syncing(state).append_log.sync()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        // The threads end because `closing` is set. If the sync thread has panicked, the sync below replaces it.
        for thread in [self.sync_thread.take(), self.compressor.take()] {
            let _ = thread.map(JoinHandle::join);
        }
        let mut state = self.shared.lock();
        if state.append_log.unsynced() > 0
            && let Err(error) = state.append_log.sync()
        {
            tracing::error!("{error:#}");
        }
        // If no index is written, the next run reads the whole cache.
        if state.append_log.check().is_ok()
            && !state.needs_full_read
            && crate::cache::files::size(&self.dir) >= MIN_INDEXED_BYTES
            && let Err(error) = index::save(
                &self.dir,
                &state.keys,
                &state.key_variants,
                state.repeated,
                state.cost_usd,
            )
        {
            tracing::warn!("{error:#}");
        }
    }
}

fn start_sync_thread(shared: Arc<SharedCache>) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("cache-sync".to_owned())
        .spawn(move || sync_groups(&shared))
        .context("could not start the thread that syncs the cache")
}

/// Syncs every group that is full or reaches [`GROUP_AGE`], until the cache is closed. The error of a failed sync is
/// logged here, and returned by the next `append`, `sync` or `check`.
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
