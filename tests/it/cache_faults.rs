//! A plain cache on a disk of which any operation fails, once or permanently: acknowledged records stay readable.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use distill::cache::record::Record;
use distill::cache::recovery::FileEnding;
use distill::cache::storage::{Storage, WrapFile};
use distill::cache::writer::Cache;
use distill::config::{self, Durability};

use crate::cache_samples::{encode, sample, scan};
use crate::nightly;

/// Number of records that are appended: more than three groups of 64.
const RECORDS: u64 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The operation fails.
    Error(io::ErrorKind),
    /// A write writes only this number of bytes, or half of its bytes if `None`. Every second faulty operation, if it
    /// is a write, writes nothing. Operations other than writes fail.
    Short(Option<usize>),
}

/// Disk in memory.
#[derive(Debug, Default)]
struct Disk {
    /// Content that a reader sees.
    live: Vec<u8>,
    /// Content that survives a power loss.
    durable: Vec<u8>,
    operations: u64,
    has_sync_failed: bool,
}

/// File on a disk of which some operations fail.
struct FaultyStorage {
    disk: Arc<Mutex<Disk>>,
    /// Number of the first operation that fails, counted from 1.
    first: u64,
    /// Number of operations that fail.
    count: u64,
    fault: Fault,
}

impl FaultyStorage {
    /// Counts an operation; returns the fault if it fails.
    fn begin_operation(&self, disk: &mut Disk) -> Option<Fault> {
        disk.operations += 1;
        let failing = self.first..self.first.saturating_add(self.count);
        failing.contains(&disk.operations).then_some(self.fault)
    }
}

impl Storage for FaultyStorage {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut disk = self.disk.lock().unwrap();
        let length = match self.begin_operation(&mut disk) {
            None => bytes.len(),
            Some(Fault::Short(length)) if (disk.operations - self.first).is_multiple_of(2) => {
                length.unwrap_or(bytes.len() / 2).min(bytes.len())
            }
            Some(Fault::Short(_)) => 0,
            Some(Fault::Error(kind)) => return Err(kind.into()),
        };
        disk.live.extend_from_slice(&bytes[..length]);
        Ok(length)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        assert!(!disk.has_sync_failed, "a failed sync was repeated");
        if self.begin_operation(&mut disk).is_some() {
            disk.has_sync_failed = true;
            return Err(io::Error::other("sync"));
        }
        disk.durable = disk.live.clone();
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        if self.begin_operation(&mut disk).is_some() {
            return Err(io::Error::other("truncate"));
        }
        disk.live.truncate(length as usize);
        Ok(())
    }
}

/// Opens an empty cache whose plain file is `storage`.
fn open_on(dir: &Path, durability: Durability, storage: impl Storage + 'static) -> Cache {
    let settings = config::CacheConfig {
        durability,
        ..config::CacheConfig::default()
    };
    let storage = Mutex::new(Some(storage));
    let wrap: WrapFile = Box::new(move |_| Box::new(storage.lock().unwrap().take().unwrap()));
    Cache::open_with(dir, &settings, wrap, &mut |_, _| Ok(())).unwrap()
}

/// Appends `records`, each given with its line, to a disk of which `count` operations fail from operation `first` on.
/// Checks the content of the disk.
fn check(dir: &Path, records: &[(Record, Vec<u8>)], first: u64, fault: Fault, count: u64) {
    let context = format!("operation {first}, {fault:?}, {count} times");
    let disk = Arc::new(Mutex::new(Disk::default()));
    let storage = FaultyStorage {
        disk: Arc::clone(&disk),
        first,
        count,
        fault,
    };
    let cache = open_on(dir, Durability::Batch, storage);
    let mut expected = Vec::new();
    for (record, line) in records {
        let had_sync_failed = disk.lock().unwrap().has_sync_failed;
        let appended = cache.append(record);
        let disk = disk.lock().unwrap();
        assert!(
            !(had_sync_failed && appended.is_ok()),
            "{context}: appended after a failed sync"
        );
        // An append whose group could not be synced is not acknowledged, but its line is in the file.
        if appended.is_ok() || (disk.has_sync_failed && !had_sync_failed) {
            expected.push(line.strip_suffix(b"\n").unwrap().to_vec());
        }
    }
    let synced = cache.sync();
    drop(cache);

    let disk = disk.lock().unwrap();
    let (scanned, ending) = scan(&disk.live);
    assert!(
        scanned == expected,
        "{context}: {} lines instead of {}",
        scanned.len(),
        expected.len()
    );
    if count == 1 {
        assert_eq!(ending, Ok(FileEnding::Clean), "{context}");
    }
    assert!(
        matches!(ending, Ok(FileEnding::Clean | FileEnding::Torn(_))),
        "{context}: {ending:?}"
    );
    if synced.is_ok() {
        let (durable, _) = scan(&disk.durable);
        assert!(
            durable == expected,
            "{context}: `sync` succeeded, but not all records are durable"
        );
        assert!(
            !disk.has_sync_failed,
            "{context}: `sync` succeeded after a failed sync"
        );
    }
}

#[test]
fn plain_cache_survives_a_failure_of_any_operation() {
    let records: Vec<_> = (0..RECORDS)
        .map(|number| (sample(number), encode([sample(number)])))
        .collect();
    // One write per record, one sync per group of 64 records, the final sync, and one more than the cache performs.
    let operations = RECORDS + RECORDS / 64 + 2;
    let faults = [
        (Fault::Error(io::ErrorKind::StorageFull), 1),
        (Fault::Error(io::ErrorKind::Interrupted), 1),
        (Fault::Short(None), 1),
        // A short write, a write of nothing, and a failed truncation, before the disk recovers.
        (Fault::Short(None), 3),
        (Fault::Error(io::ErrorKind::Other), u64::MAX),
        (Fault::Short(None), u64::MAX),
    ];
    // In parallel, since opening a cache waits for the real disk.
    std::thread::scope(|scope| {
        for (fault, count) in faults {
            let records = &records;
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                for first in 1..=operations {
                    check(dir.path(), records, first, fault, count);
                }
            });
        }
    });
}

/// The write of a record is short, at every fifth length, or at every length in the nightly run.
#[test]
fn short_writes_of_any_length_are_handled() {
    let record_count = if nightly() { 40 } else { 3 };
    let records: Vec<_> = (0..record_count)
        .map(|number| (sample(number), encode([sample(number)])))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    for (first, (_, line)) in (1..).zip(&records) {
        // A short write and a write of nothing; with 3, the truncation fails as well.
        for count in [2, 3] {
            // Without its newline a line is still a complete record and stays, so this length is not tested.
            for length in (0..line.len() - 1).step_by(if nightly() { 1 } else { 5 }) {
                check(
                    dir.path(),
                    &records,
                    first,
                    Fault::Short(Some(length)),
                    count,
                );
            }
        }
    }
}

/// Storage that sends the time of every sync.
struct SyncReporter(Sender<Instant>);

impl Storage for SyncReporter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.send(Instant::now()).map_err(io::Error::other)
    }

    fn truncate(&mut self, _length: u64) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn groups_are_synced_by_count_and_by_age() {
    // Durability, and the numbers of appended records, of syncs during the appends, and of syncs by `Cache::sync`.
    for (durability, appended, syncs, final_syncs) in [
        (Durability::Batch, 63, 0, 1),
        (Durability::Batch, 64, 1, 0),
        (Durability::Batch, 200, 3, 1),
        (Durability::Record, 5, 5, 0),
        (Durability::None, 200, 0, 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = channel();
        let cache = open_on(dir.path(), durability, SyncReporter(sender));
        (0..appended).for_each(|number| cache.append(&sample(number)).unwrap());
        assert_eq!(
            receiver.try_iter().count(),
            syncs,
            "{durability:?}, {appended} records"
        );
        cache.sync().unwrap();
        cache.sync().unwrap();
        assert_eq!(
            receiver.try_iter().count(),
            final_syncs,
            "{durability:?}, {appended} records: `sync` must sync only unsynced records"
        );
    }

    let dir = tempfile::tempdir().unwrap();
    let (sender, receiver) = channel();
    let cache = open_on(dir.path(), Durability::Batch, SyncReporter(sender));
    // Lets the sync thread begin to wait: the append must wake it.
    std::thread::sleep(Duration::from_millis(50));
    let appended_at = Instant::now();
    cache.append(&sample(0)).unwrap();
    let synced_at = receiver.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(
        synced_at - appended_at >= Duration::from_millis(900),
        "a group that is not full was synced too early"
    );
    assert!(receiver.try_recv().is_err());
    cache.append(&sample(1)).unwrap();
    drop(cache);
    assert_eq!(
        receiver.iter().count(),
        1,
        "closing the cache must sync the remaining record"
    );
}
