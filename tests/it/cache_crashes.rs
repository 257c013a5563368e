//! A compressed cache whose machine loses its power, or whose disk fails, at every step.

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

/// Enough text for two frames and a rest, which compresses in no time.
fn records(count: u64) -> Vec<Record> {
    (0..count)
        .map(|n| Record {
            answer: Answer {
                text: format!("{n:03} ").repeat(2_500_000 / count as usize),
                ..Answer::default()
            },
            ..sample(n)
        })
        .collect()
}

fn settings(durability: Durability) -> config::CacheConfig {
    config::CacheConfig {
        durability,
        compression: Compression::Zstd,
    }
}

fn keys_of(records: impl IntoIterator<Item = Record>) -> HashSet<String> {
    records.into_iter().map(|record| record.key).collect()
}

/// What a disk was asked, in order. The first file is that of the frames, the second the plain one;
/// each further one replaces that.
#[derive(Debug)]
enum Step {
    Write(usize, Vec<u8>),
    Sync(usize),
    Truncate(usize, u64),
}

#[derive(Clone, Default)]
struct Log {
    steps: Arc<Mutex<Vec<Step>>>,
    files: Arc<AtomicU64>,
}

struct Logged(File, usize, Log);

impl Logged {
    fn note(&self, step: Step) {
        self.2.steps.lock().unwrap().push(step);
    }
}

impl Storage for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.note(Step::Write(self.1, bytes.to_vec()));
        Storage::write(&mut self.0, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.note(Step::Sync(self.1));
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.note(Step::Truncate(self.1, length));
        self.0.set_len(length)
    }
}

impl Log {
    fn wrap(&self) -> WrapFile {
        let log = self.clone();
        Box::new(move |file| {
            let number = log.files.fetch_add(1, Ordering::Relaxed) as usize;
            Box::new(Logged(file, number, log.clone()))
        })
    }
}

/// A file at the moment of a crash.
#[derive(Clone, Default)]
struct Image {
    bytes: Vec<u8>,
    /// So many of them are on the disk for certain.
    durable: usize,
}

impl Image {
    /// What a reader may find after the power is back.
    fn after_power_loss(&self, random: &mut fastrand::Rng) -> Vec<u8> {
        let unsynced = self.bytes.len() - self.durable;
        let kept = random.usize(..=unsynced);
        let mut bytes = self.bytes[..self.durable + kept].to_vec();
        match random.u8(..4) {
            // Blocks that were never written ...
            0 => bytes.resize(self.bytes.len(), 0),
            // ... or hold what was there before.
            1 => bytes.extend((kept..unsynced).map(|_| random.u8(..))),
            2 => bytes.truncate(self.durable),
            _ => {}
        }
        bytes
    }
}

/// The images of all files after the first `count` steps.
fn images(steps: &[Step]) -> Vec<Image> {
    let mut images = Vec::new();
    for step in steps {
        let (Step::Write(file, _) | Step::Sync(file) | Step::Truncate(file, _)) = step;
        while images.len() <= *file {
            images.push(Image::default());
        }
        let image: &mut Image = &mut images[*file];
        match step {
            Step::Write(_, bytes) => image.bytes.extend_from_slice(bytes),
            Step::Sync(_) => image.durable = image.bytes.len(),
            Step::Truncate(_, length) => image.bytes.truncate(*length as usize),
        }
    }
    images
}

/// Is the file at least once synced in these steps? Only then does it get its name.
fn is_synced(steps: &[Step], file: usize) -> bool {
    steps
        .iter()
        .any(|step| matches!(step, Step::Sync(synced) if *synced == file))
}

#[test]
fn power_loss_keeps_all_synced_records() {
    let log = Log::default();
    let dir = tempfile::tempdir().unwrap();
    let all = records(130);
    let settings = settings(Durability::Batch);
    let cache = Cache::open_with(dir.path(), &settings, log.wrap(), &mut |_, _| Ok(())).unwrap();
    for record in &all {
        cache.append(record).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    drop(cache);
    let steps = log.steps.lock().unwrap();
    let files = log.files.load(Ordering::Relaxed) as usize;
    assert!(files >= 4, "the plain file was never replaced");

    let mut random = fastrand::Rng::with_seed(5);
    let (mut refused, mut rounds) = (0, 0);
    for _ in 0..if nightly() { 10_000 } else { 300 } {
        let crash = random.usize(..=steps.len());
        let past = &steps[..crash];
        let images = images(past);
        // The newest plain file that has its name; right after its sync, perhaps the one before.
        let mut plain = (1..images.len())
            .rfind(|&file| file == 1 || is_synced(past, file))
            .unwrap_or(1);
        let is_just_synced = matches!(past.last(), Some(Step::Sync(file)) if *file == plain);
        if plain > 1 && is_just_synced && random.bool() {
            plain -= 1;
        }
        let image = |file: usize| images.get(file).cloned().unwrap_or_default();
        let promised: HashSet<String> = [image(0), image(plain)]
            .iter()
            .enumerate()
            .flat_map(|(file, image)| {
                let durable = &image.bytes[..image.durable];
                let text = match file {
                    0 if !durable.is_empty() => zstd::decode_all(durable).unwrap(),
                    _ => durable.to_vec(),
                };
                let lines: Vec<String> = text
                    .split(|&byte| byte == b'\n')
                    .filter(|line| !line.is_empty())
                    .map(|line| distill::cache::line::head(line).unwrap().key.into_owned())
                    .collect();
                lines
            })
            .collect();
        // Whatever was synced in a plain file that is gone, is in the frames or its successor.
        for older in 1..=plain {
            let image = image(older);
            for line in image.bytes[..image.durable].split(|&byte| byte == b'\n') {
                if !line.is_empty() {
                    let key = distill::cache::line::head(line).unwrap().key;
                    assert!(
                        promised.contains(&*key),
                        "step {crash}: a synced record is nowhere"
                    );
                }
            }
        }

        let crashed = tempfile::tempdir().unwrap();
        let write = |path, image: Image, random: &mut fastrand::Rng| {
            fs::write(path, image.after_power_loss(random)).unwrap();
        };
        write(compressed_file(crashed.path()), image(0), &mut random);
        write(plain_file(crashed.path()), image(plain), &mut random);
        rounds += 1;
        if let Err(error) = Cache::open(crashed.path(), &config::CacheConfig::default()) {
            // Old blocks can look like damage, which is told and repaired.
            assert_eq!(Exit::code_of(&error), 5, "step {crash}: {error}");
            refused += 1;
            repair(crashed.path()).unwrap();
            drop(Cache::open(crashed.path(), &config::CacheConfig::default()).unwrap());
        }
        let found: Vec<Record> = distill::cache::reader::read(crashed.path())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let keys = keys_of(found.clone());
        assert_eq!(
            keys.len(),
            found.len(),
            "step {crash}: something is there twice"
        );
        assert!(
            promised.is_subset(&keys),
            "step {crash}: a synced record is lost"
        );
        assert!(
            found.iter().all(|record| all.contains(record)),
            "step {crash}: something was made up"
        );
    }
    println!("{rounds} power losses, {refused} of them needed a repair");
}

/// What goes wrong with the files, and for how long.
#[derive(Clone, Copy, Debug)]
struct Mishap {
    /// The operation, from 1, that fails first, and how many fail in all.
    at: u64,
    lasts: u64,
    kind: io::ErrorKind,
    /// Some bytes are written before the failure.
    is_short: bool,
}

#[derive(Clone)]
struct Failing {
    mishap: Mishap,
    operations: Arc<AtomicU64>,
}

struct FailingFile(File, Failing);

impl Failing {
    fn strike(&self) -> io::Result<()> {
        let number = self.operations.fetch_add(1, Ordering::Relaxed) + 1;
        let Mishap {
            at, lasts, kind, ..
        } = self.mishap;
        if (at..at.saturating_add(lasts)).contains(&number) {
            Err(kind.into())
        } else {
            Ok(())
        }
    }
}

impl Storage for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.1.strike() {
            if self.1.mishap.is_short {
                return Storage::write(&mut self.0, &bytes[..bytes.len() / 2]);
            }
            return Err(error);
        }
        Storage::write(&mut self.0, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.1.strike()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.1.strike()?;
        self.0.set_len(length)
    }
}

/// Fills a cache whose disk has this mishap, and checks what is left. Returns the operations.
fn check(dir: &Path, all: &[Record], mishap: Mishap) -> u64 {
    let failing = Failing {
        mishap,
        operations: Arc::default(),
    };
    let wrap: WrapFile = {
        let failing = failing.clone();
        Box::new(move |file| Box::new(FailingFile(file, failing.clone())))
    };
    let settings = settings(Durability::None);
    let cache = Cache::open_with(dir, &settings, wrap, &mut |_, _| Ok(())).unwrap();
    let (mut acknowledged, mut refused) = (HashSet::new(), 0);
    for (n, record) in all.iter().enumerate() {
        match cache.append(record) {
            Ok(()) => drop(acknowledged.insert(record.key.clone())),
            Err(_) => refused += 1,
        }
        // The sealer gets its turn.
        if n % 15 == 14 {
            std::thread::sleep(std::time::Duration::from_millis(60));
        }
    }
    drop(cache);
    let found: Vec<Record> = distill::cache::reader::read(dir)
        .unwrap()
        .map(|record| record.unwrap_or_else(|error| panic!("{mishap:?}: {error}")))
        .collect();
    let keys = keys_of(found.clone());
    assert_eq!(
        keys.len(),
        found.len(),
        "{mishap:?}: something is there twice"
    );
    assert!(
        acknowledged.is_subset(&keys),
        "{mishap:?}: something is lost"
    );

    // The next run takes it from there.
    let cache = Cache::open(dir, &settings).unwrap();
    for record in all {
        cache.append(record).unwrap();
    }
    assert_eq!(cache.len(), all.len(), "{mishap:?}, {refused} refused");
    drop(cache);
    let findings = cache::reader::verify_cache(dir, &mut |_, _| Ok(())).unwrap();
    assert_eq!(findings.records, all.len() as u64, "{mishap:?}");
    assert!(findings.repeated.is_empty() && findings.torn.is_empty());
    failing.operations.load(Ordering::Relaxed)
}

#[test]
fn compressed_cache_survives_a_failure_of_any_operation() {
    let all = records(45);
    let quiet = Mishap {
        at: u64::MAX,
        lasts: 1,
        kind: io::ErrorKind::Other,
        is_short: false,
    };
    let operations = check(tempfile::tempdir().unwrap().path(), &all, quiet);
    assert!(operations >= all.len() as u64 + 8, "{operations}");
    let mishaps = [
        (io::ErrorKind::StorageFull, 1, false),
        (io::ErrorKind::StorageFull, 1, true),
        // What was written cannot be taken back.
        (io::ErrorKind::StorageFull, 3, true),
        (io::ErrorKind::Other, u64::MAX, false),
    ];
    let step = if nightly() { 1 } else { 3 };
    std::thread::scope(|scope| {
        for (kind, lasts, is_short) in mishaps {
            let all = &all;
            scope.spawn(move || {
                for at in (1..=operations).step_by(step) {
                    let mishap = Mishap {
                        at,
                        lasts,
                        kind,
                        is_short,
                    };
                    check(tempfile::tempdir().unwrap().path(), all, mishap);
                }
            });
        }
    });
    assert!(encode(all).len() > 9 << 20);
}
