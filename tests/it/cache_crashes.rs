//! A compressed cache during power losses, and during failures of any disk operation.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use distill::cache::record::{Answer, Record};
use distill::cache::repair::repair;
use distill::cache::storage::{Storage, WrapFile};
use distill::cache::writer::Cache;
use distill::cache::{self, compressed_file, plain_file};
use distill::config::{self, Compression, Durability};
use distill::exit::Exit;

use crate::cache_samples::{encode, sample};
use crate::nightly;

/// Returns `count` records with about 10 MB of text in total, which is more than one frame and compresses fast.
fn records(count: u64) -> Vec<Record> {
    (0..count)
        .map(|number| Record {
            answer: Answer {
                text: format!("{number:03} ").repeat(2_500_000 / count as usize),
                ..Answer::default()
            },
            ..sample(number)
        })
        .collect()
}

fn settings(durability: Durability) -> config::CacheConfig {
    config::CacheConfig {
        durability,
        compression: Compression::Zstd,
    }
}

/// Returns the keys of the lines in `text`.
fn keys_in(text: &[u8]) -> Vec<String> {
    text.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| cache::line::head(line).unwrap().key.into_owned())
        .collect()
}

fn keys_of(records: impl IntoIterator<Item = Record>) -> HashSet<String> {
    records.into_iter().map(|record| record.key).collect()
}

/// Disk operation, with the number of its file. File 0 is the compressed file and file 1 the plain file; each further
/// file replaces the plain file.
#[derive(Debug)]
enum Operation {
    Write(usize, Vec<u8>),
    Sync(usize),
    Truncate(usize, u64),
}

/// Log of all disk operations of a cache.
#[derive(Clone, Default)]
struct OperationLog {
    operations: Arc<Mutex<Vec<Operation>>>,
    /// Number of files.
    files: Arc<AtomicU64>,
}

/// File whose operations are logged.
struct LoggedFile {
    file: File,
    number: usize,
    log: OperationLog,
}

impl LoggedFile {
    fn record(&self, operation: Operation) {
        self.log.operations.lock().unwrap().push(operation);
    }
}

impl Storage for LoggedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.record(Operation::Write(self.number, bytes.to_vec()));
        Storage::write(&mut self.file, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.record(Operation::Sync(self.number));
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.record(Operation::Truncate(self.number, length));
        self.file.set_len(length)
    }
}

impl OperationLog {
    fn wrap(&self) -> WrapFile {
        let log = self.clone();
        Box::new(move |file| {
            let number = log.files.fetch_add(1, Ordering::Relaxed) as usize;
            Box::new(LoggedFile {
                file,
                number,
                log: log.clone(),
            })
        })
    }
}

/// Content of a file at the moment of a crash.
#[derive(Clone, Default)]
struct Image {
    bytes: Vec<u8>,
    /// Number of bytes that have been synced.
    durable: usize,
}

impl Image {
    fn durable_bytes(&self) -> &[u8] {
        &self.bytes[..self.durable]
    }

    /// Returns content that the file may have after the power loss.
    fn after_power_loss(&self, random: &mut fastrand::Rng) -> Vec<u8> {
        let unsynced = self.bytes.len() - self.durable;
        let written = random.usize(..=unsynced);
        let mut bytes = self.bytes[..self.durable + written].to_vec();
        match random.u8(..4) {
            // Blocks that were not written read as NUL bytes ...
            0 => bytes.resize(self.bytes.len(), 0),
            // ... or contain older content of the disk.
            1 => bytes.extend((written..unsynced).map(|_| random.u8(..))),
            2 => bytes.truncate(self.durable),
            _ => {}
        }
        bytes
    }
}

/// Returns the images of all files after these operations.
fn images(operations: &[Operation]) -> Vec<Image> {
    let mut images = Vec::new();
    for operation in operations {
        let (Operation::Write(file, _) | Operation::Sync(file) | Operation::Truncate(file, _)) =
            operation;
        while images.len() <= *file {
            images.push(Image::default());
        }
        let image: &mut Image = &mut images[*file];
        match operation {
            Operation::Write(_, bytes) => image.bytes.extend_from_slice(bytes),
            Operation::Sync(_) => image.durable = image.bytes.len(),
            Operation::Truncate(_, length) => image.bytes.truncate(*length as usize),
        }
    }
    images
}

/// Returns true if the file has been synced. Only then is it renamed to the path of the plain file.
fn is_synced(operations: &[Operation], file: usize) -> bool {
    operations
        .iter()
        .any(|operation| matches!(operation, Operation::Sync(synced) if *synced == file))
}

#[test]
fn power_loss_keeps_all_synced_records() {
    let log = OperationLog::default();
    let dir = tempfile::tempdir().unwrap();
    let all = records(130);
    let settings = settings(Durability::Batch);
    let cache = Cache::open_with(dir.path(), &settings, log.wrap(), &mut |_, _| Ok(())).unwrap();
    for record in &all {
        cache.append(record).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    drop(cache);
    let operations = log.operations.lock().unwrap();
    let files = log.files.load(Ordering::Relaxed) as usize;
    assert!(files >= 4, "the plain file was never replaced");

    let mut random = fastrand::Rng::with_seed(5);
    let power_losses = if nightly() { 10_000 } else { 300 };
    let mut refused = 0;
    for _ in 0..power_losses {
        let crash = random.usize(..=operations.len());
        let done = &operations[..crash];
        let images = images(done);
        // The plain file that was renamed last. Directly after a sync, the file may not be renamed yet.
        let mut plain = (1..images.len())
            .rfind(|&file| file == 1 || is_synced(done, file))
            .unwrap_or(1);
        let is_just_synced = matches!(done.last(), Some(Operation::Sync(file)) if *file == plain);
        if plain > 1 && is_just_synced && random.bool() {
            plain -= 1;
        }
        let image = |file: usize| images.get(file).cloned().unwrap_or_default();
        let mut synced = HashSet::new();
        if !image(0).durable_bytes().is_empty() {
            let text = zstd::decode_all(image(0).durable_bytes()).unwrap();
            synced.extend(keys_in(&text));
        }
        synced.extend(keys_in(image(plain).durable_bytes()));
        // The synced records of a replaced plain file are in the compressed file or in a later plain file.
        for older in 1..=plain {
            for key in keys_in(image(older).durable_bytes()) {
                assert!(
                    synced.contains(&key),
                    "operation {crash}: no file contains a synced record"
                );
            }
        }

        let crashed = tempfile::tempdir().unwrap();
        let write = |path, image: Image, random: &mut fastrand::Rng| {
            fs::write(path, image.after_power_loss(random)).unwrap();
        };
        write(compressed_file(crashed.path()), image(0), &mut random);
        write(plain_file(crashed.path()), image(plain), &mut random);
        if let Err(error) = Cache::open(crashed.path(), &config::CacheConfig::default()) {
            // Older content of the disk can look like damage, which is reported and can be repaired.
            assert_eq!(Exit::code_of(&error), 5, "operation {crash}: {error}");
            refused += 1;
            repair(crashed.path()).unwrap();
            drop(Cache::open(crashed.path(), &config::CacheConfig::default()).unwrap());
        }
        let recovered: Vec<Record> = distill::cache::reader::read(crashed.path())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let keys = keys_of(recovered.clone());
        assert_eq!(
            keys.len(),
            recovered.len(),
            "operation {crash}: a key is repeated"
        );
        assert!(
            synced.is_subset(&keys),
            "operation {crash}: a synced record is lost"
        );
        assert!(
            recovered.iter().all(|record| all.contains(record)),
            "operation {crash}: an unknown record was read"
        );
    }
    println!("{power_losses} power losses, {refused} of them needed a repair");
}

/// Failure of consecutive disk operations.
#[derive(Clone, Copy, Debug)]
struct DiskFailure {
    /// Number of the first operation that fails, counted from 1.
    first: u64,
    /// Number of operations that fail.
    count: u64,
    kind: io::ErrorKind,
    /// True if a write that fails writes half of its bytes and reports no error.
    is_short: bool,
}

/// Disk of which some operations fail; all files of a cache share its count of operations.
#[derive(Clone)]
struct FailingDisk {
    failure: DiskFailure,
    /// Number of operations so far.
    operations: Arc<AtomicU64>,
}

struct FailingFile {
    file: File,
    disk: FailingDisk,
}

impl FailingDisk {
    /// Counts an operation; returns the error if it fails.
    fn begin_operation(&self) -> io::Result<()> {
        let number = self.operations.fetch_add(1, Ordering::Relaxed) + 1;
        let DiskFailure {
            first, count, kind, ..
        } = self.failure;
        if (first..first.saturating_add(count)).contains(&number) {
            Err(kind.into())
        } else {
            Ok(())
        }
    }
}

impl Storage for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.disk.begin_operation() {
            if self.disk.failure.is_short {
                return Storage::write(&mut self.file, &bytes[..bytes.len() / 2]);
            }
            return Err(error);
        }
        Storage::write(&mut self.file, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.begin_operation()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.disk.begin_operation()?;
        self.file.set_len(length)
    }
}

/// Appends all records to a cache on a disk with this failure. Checks that no acknowledged record is lost and that the
/// next run can append the others. Returns the number of disk operations.
fn check(dir: &Path, all: &[Record], failure: DiskFailure) -> u64 {
    let disk = FailingDisk {
        failure,
        operations: Arc::default(),
    };
    let wrap: WrapFile = {
        let disk = disk.clone();
        Box::new(move |file| {
            Box::new(FailingFile {
                file,
                disk: disk.clone(),
            })
        })
    };
    let settings = settings(Durability::None);
    let cache = Cache::open_with(dir, &settings, wrap, &mut |_, _| Ok(())).unwrap();
    let mut acknowledged = HashSet::new();
    let mut refused = 0;
    for (index, record) in all.iter().enumerate() {
        match cache.append(record) {
            Ok(()) => drop(acknowledged.insert(record.key.clone())),
            Err(_) => refused += 1,
        }
        // Lets the compressor thread run.
        if index % 15 == 14 {
            std::thread::sleep(std::time::Duration::from_millis(60));
        }
    }
    drop(cache);
    let recovered: Vec<Record> = distill::cache::reader::read(dir)
        .unwrap()
        .map(|record| record.unwrap_or_else(|error| panic!("{failure:?}: {error}")))
        .collect();
    let keys = keys_of(recovered.clone());
    assert_eq!(
        keys.len(),
        recovered.len(),
        "{failure:?}: a key is repeated"
    );
    assert!(
        acknowledged.is_subset(&keys),
        "{failure:?}: an acknowledged record is lost"
    );

    // The next run appends the missing records.
    let cache = Cache::open(dir, &settings).unwrap();
    for record in all {
        cache.append(record).unwrap();
    }
    assert_eq!(cache.len(), all.len(), "{failure:?}, {refused} refused");
    drop(cache);
    let report = cache::reader::verify_cache(dir, &mut |_, _| Ok(())).unwrap();
    assert_eq!(report.records, all.len() as u64, "{failure:?}");
    assert!(report.repeated.is_empty() && report.torn.is_empty());
    disk.operations.load(Ordering::Relaxed)
}

/// Every third operation is tested as the first that fails; in the nightly run, every operation.
#[test]
fn compressed_cache_survives_a_failure_of_any_operation() {
    let all = records(45);
    let no_failure = DiskFailure {
        first: u64::MAX,
        count: 1,
        kind: io::ErrorKind::Other,
        is_short: false,
    };
    let operations = check(tempfile::tempdir().unwrap().path(), &all, no_failure);
    assert!(operations >= all.len() as u64 + 8, "{operations}");
    let failures = [
        (io::ErrorKind::StorageFull, 1, false),
        (io::ErrorKind::StorageFull, 1, true),
        // The truncation after the short write also fails.
        (io::ErrorKind::StorageFull, 3, true),
        (io::ErrorKind::Other, u64::MAX, false),
    ];
    let step = if nightly() { 1 } else { 3 };
    std::thread::scope(|scope| {
        for (kind, count, is_short) in failures {
            let all = &all;
            scope.spawn(move || {
                for first in (1..=operations).step_by(step) {
                    let failure = DiskFailure {
                        first,
                        count,
                        kind,
                        is_short,
                    };
                    check(tempfile::tempdir().unwrap().path(), all, failure);
                }
            });
        }
    });
    assert!(encode(all).len() > 9 << 20);
}
