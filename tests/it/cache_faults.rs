//! The disk fails once, or for good, at every operation: what was acknowledged stays readable.

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

const RECORDS: u64 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The operation fails.
    Error(io::ErrorKind),
    /// A write takes only some bytes, so many or else half of them; other operations fail.
    Short(Option<usize>),
}

/// A disk in memory: what a reader sees now, and what survives a power loss.
#[derive(Debug, Default)]
struct Disk {
    live: Vec<u8>,
    durable: Vec<u8>,
    operations: u64,
    sync_failed: bool,
}

struct Faulty {
    disk: Arc<Mutex<Disk>>,
    /// The operation, from 1, that fails first, and how many fail in all.
    at: u64,
    fault: Fault,
    lasts: u64,
}

impl Faulty {
    fn strike(&self, disk: &mut Disk) -> Option<Fault> {
        disk.operations += 1;
        let hit = (self.at..self.at.saturating_add(self.lasts)).contains(&disk.operations);
        hit.then_some(self.fault)
    }
}

impl Storage for Faulty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut disk = self.disk.lock().unwrap();
        let length = match self.strike(&mut disk) {
            None => bytes.len(),
            // Some of what is offered, then nothing, and so on.
            Some(Fault::Short(length)) if (disk.operations - self.at).is_multiple_of(2) => {
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
        assert!(!disk.sync_failed, "a failed sync is never tried again");
        if self.strike(&mut disk).is_some() {
            disk.sync_failed = true;
            return Err(io::Error::other("sync"));
        }
        disk.durable = disk.live.clone();
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        if self.strike(&mut disk).is_some() {
            return Err(io::Error::other("truncate"));
        }
        disk.live.truncate(length as usize);
        Ok(())
    }
}

/// An empty cache whose plain file is `storage`.
fn open_on(dir: &Path, durability: Durability, storage: impl Storage + 'static) -> Cache {
    let settings = config::CacheConfig {
        durability,
        ..config::CacheConfig::default()
    };
    let storage = Mutex::new(Some(storage));
    let wrap: WrapFile = Box::new(move |_| Box::new(storage.lock().unwrap().take().unwrap()));
    Cache::open_with(dir, &settings, wrap, &mut |_, _| Ok(())).unwrap()
}

/// Appends [`RECORDS`] records to a disk that fails, and checks what it holds then.
fn check(dir: &Path, records: &[(Record, Vec<u8>)], at: u64, fault: Fault, lasts: u64) {
    let context = format!("operation {at}, {fault:?}, {lasts} times");
    let disk = Arc::new(Mutex::new(Disk::default()));
    let storage = Faulty {
        disk: Arc::clone(&disk),
        at,
        fault,
        lasts,
    };
    let cache = open_on(dir, Durability::Batch, storage);
    let mut present = Vec::new();
    for (record, line) in records {
        let failed_before = disk.lock().unwrap().sync_failed;
        let appended = cache.append(record);
        let disk = disk.lock().unwrap();
        assert!(
            !(failed_before && appended.is_ok()),
            "{context}: appended after a failed sync"
        );
        // An append whose group could not be synced is not acknowledged, but its line is there.
        if appended.is_ok() || (disk.sync_failed && !failed_before) {
            present.push(line.strip_suffix(b"\n").unwrap().to_vec());
        }
    }
    let synced = cache.sync();
    drop(cache);

    let disk = disk.lock().unwrap();
    let (found, ending) = scan(&disk.live);
    assert!(
        found == present,
        "{context}: {} lines for {}",
        found.len(),
        present.len()
    );
    if lasts == 1 {
        assert_eq!(ending, Ok(FileEnding::Clean), "{context}");
    }
    assert!(
        matches!(ending, Ok(FileEnding::Clean | FileEnding::Torn(_))),
        "{context}: {ending:?}"
    );
    if synced.is_ok() {
        let (durable, _) = scan(&disk.durable);
        assert!(durable == present, "{context}: sync lied");
        assert!(!disk.sync_failed, "{context}: a failed sync was forgotten");
    }
}

#[test]
fn plain_cache_survives_a_failure_of_any_operation() {
    let records: Vec<_> = (0..RECORDS)
        .map(|n| (sample(n), encode([sample(n)])))
        .collect();
    let operations = RECORDS + RECORDS / 64 + 2;
    let faults = [
        (Fault::Error(io::ErrorKind::StorageFull), 1),
        (Fault::Error(io::ErrorKind::Interrupted), 1),
        (Fault::Short(None), 1),
        // A write stops short, and the cut back fails too, before the disk recovers.
        (Fault::Short(None), 3),
        (Fault::Error(io::ErrorKind::Other), u64::MAX),
        (Fault::Short(None), u64::MAX),
    ];
    // In parallel, since opening a cache waits for the real disk.
    std::thread::scope(|scope| {
        for (fault, lasts) in faults {
            let records = &records;
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                for at in 1..=operations {
                    check(dir.path(), records, at, fault, lasts);
                }
            });
        }
    });
}

/// The write of one record, cut at every length, at the beginning of a cache and later in it.
#[test]
fn short_writes_of_any_length_are_handled() {
    let count = if nightly() { 40 } else { 3 };
    let records: Vec<_> = (0..count)
        .map(|n| (sample(n), encode([sample(n)])))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    for (at, (_, line)) in (1..).zip(&records) {
        // Cut, and the rest refused; cut, and the cut back refused, too.
        for lasts in [2, 3] {
            // But for the newline it is a whole record, and stays.
            for length in (0..line.len() - 1).step_by(if nightly() { 1 } else { 5 }) {
                check(dir.path(), &records, at, Fault::Short(Some(length)), lasts);
            }
        }
    }
}

/// Reports every sync.
struct Telling(Sender<Instant>);

impl Storage for Telling {
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
    for (durability, appended, syncs) in [
        (Durability::Batch, 63, 0),
        (Durability::Batch, 64, 1),
        (Durability::Batch, 200, 3),
        (Durability::Record, 5, 5),
        (Durability::None, 200, 0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = channel();
        let cache = open_on(dir.path(), durability, Telling(sender));
        (0..appended).for_each(|n| cache.append(&sample(n)).unwrap());
        assert_eq!(
            receiver.try_iter().count(),
            syncs,
            "{durability:?}, {appended} records"
        );
        cache.sync().unwrap();
        cache.sync().unwrap();
        let rest = usize::from(syncs as u64 * if syncs == 5 { 1 } else { 64 } < appended);
        assert_eq!(
            receiver.try_iter().count(),
            rest,
            "only what is new is synced"
        );
    }

    let dir = tempfile::tempdir().unwrap();
    let (sender, receiver) = channel();
    let cache = open_on(dir.path(), Durability::Batch, Telling(sender));
    // Let the timer fall asleep: an append must wake it.
    std::thread::sleep(Duration::from_millis(50));
    let appended = Instant::now();
    cache.append(&sample(0)).unwrap();
    let synced = receiver.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(
        synced - appended >= Duration::from_millis(900),
        "a group of one waits for company"
    );
    assert!(receiver.try_recv().is_err());
    cache.append(&sample(1)).unwrap();
    drop(cache);
    assert_eq!(receiver.iter().count(), 1, "closing syncs what is left");
}
