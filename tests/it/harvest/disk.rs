//! Disk failures during a harvest. A run holds its answers in memory while the disk is full, and reports the number of
//! safe answers if it must stop.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use distill::cache::storage::{Storage, WrapFile};
use distill::config::Durability;
use distill::harvest::{self, Environment};
use distill::report::summary::HarvestSummary;
use distill::signal::Signals;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

use super::nights::SimulatedRun;
use super::{exit_of, quiet_options};

const CONCURRENCY: u64 = 8;

/// A disk that fails during one interval of the run.
#[derive(Clone)]
struct FailingDisk {
    kind: io::ErrorKind,
    /// Whether syncs fail instead of writes.
    fails_to_sync: bool,
    from: Instant,
    to: Instant,
    failures: Arc<AtomicU64>,
}

impl FailingDisk {
    /// Returns and counts an error during the interval.
    fn check(&self) -> io::Result<()> {
        let now = Instant::now();
        if now < self.from || now >= self.to {
            return Ok(());
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        Err(self.kind.into())
    }

    fn wrap(&self) -> WrapFile {
        let disk = self.clone();
        Box::new(move |file| {
            Box::new(FailingFile {
                file,
                disk: disk.clone(),
            })
        })
    }
}

struct FailingFile {
    file: File,
    disk: FailingDisk,
}

impl Storage for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.disk.fails_to_sync {
            // A full disk writes a part of the data.
            if let Err(error) = self.disk.check() {
                Storage::write(&mut self.file, &bytes[..bytes.len().min(10)])?;
                return Err(error);
            }
        }
        Storage::write(&mut self.file, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.disk.fails_to_sync {
            self.disk.check()
        } else {
            Ok(())
        }
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }
}

fn simulated_run(prompts: usize) -> SimulatedRun {
    let script = "[answers]\ntokens = [5, 20]\nlatency_s = [1.0, 4.0]\n";
    SimulatedRun::new(script, prompts, |config| {
        config.limits.concurrency = CONCURRENCY as usize;
        config.cache.durability = Durability::Record;
    })
}

/// Returns a disk whose writes start to fail in `after_s` seconds, and fail for `duration_s` seconds.
fn failing_disk(kind: io::ErrorKind, after_s: u64, duration_s: u64) -> FailingDisk {
    let from = Instant::now() + Duration::from_secs(after_s);
    FailingDisk {
        kind,
        fails_to_sync: false,
        from,
        to: from + Duration::from_secs(duration_s),
        failures: Arc::default(),
    }
}

async fn harvest(
    simulated: &SimulatedRun,
    disk: &FailingDisk,
    signals: UnboundedReceiver<u8>,
) -> anyhow::Result<HarvestSummary> {
    let environment = Environment {
        transports: vec![Arc::new(simulated.teacher())],
        clock: simulated.clock.clone(),
        storage: disk.wrap(),
    };
    let signals = Signals::from_channel(signals);
    harvest::run_in(environment, &simulated.run.config, quiet_options(), signals).await
}

#[tokio::test(start_paused = true)]
async fn full_disk_holds_answers_until_there_is_space() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        let simulated = simulated_run(600);
        let disk = failing_disk(kind, 30, 400);
        let (_sender, receiver) = unbounded_channel();
        let summary = harvest(&simulated, &disk, receiver).await.unwrap();
        assert_eq!((exit_of(&summary).0, summary.ok), (0, 600), "{summary:?}");
        // A write is retried every five seconds, and no answer is bought twice.
        let failures = disk.failures.load(Ordering::Relaxed);
        assert!((70..=90).contains(&failures), "{failures}");
        assert_eq!(simulated.mock.stats().billed.answers, 600);
        assert_eq!(simulated.run.records().len(), 600);
    }
}

#[tokio::test(start_paused = true)]
async fn full_disk_timeout_ends_run_with_count_of_safe_answers() {
    let simulated = simulated_run(600);
    let disk = failing_disk(io::ErrorKind::StorageFull, 30, 1_000_000);
    let started = Instant::now();
    let (_sender, receiver) = unbounded_channel();
    let summary = harvest(&simulated, &disk, receiver).await.unwrap();
    let waited = started.elapsed().as_secs();
    assert!((630..660).contains(&waited), "{waited} s");
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 4);
    let safe = simulated.run.records().len() as u64;
    assert!(
        message.contains(&format!("{safe} answers are safe")),
        "{message}"
    );
    assert!(message.contains("disk has been full"), "{message}");
    // Only the answers in flight when the disk filled up are lost.
    let lost = simulated.mock.stats().billed.answers - safe;
    assert!((1..=CONCURRENCY).contains(&lost), "{lost}");
    assert!(
        message.contains(&format!("{lost} answers held in memory are lost")),
        "{message}"
    );
    assert_eq!(summary.attempts_lost, lost);
    assert_eq!((summary.ok, summary.pending), (safe, 600 - safe));

    let summary = simulated.harvest().await;
    assert_eq!((summary.cached, summary.ok), (safe, 600 - safe));
    assert_eq!(simulated.bought_twice(&simulated.mock.stats()), lost);
}

#[tokio::test(start_paused = true)]
async fn signal_ends_run_while_disk_is_full() {
    let simulated = simulated_run(600);
    let disk = failing_disk(io::ErrorKind::StorageFull, 30, 1_000_000);
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let _ = sender.send(2);
        std::future::pending::<()>().await;
    });
    let started = Instant::now();
    let summary = harvest(&simulated, &disk, receiver).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(70));
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 130, "{message}");
    assert!(
        message.contains("lost") && !message.contains("every answer is recorded"),
        "{message}"
    );
}

#[tokio::test(start_paused = true)]
async fn disk_errors_end_run_immediately() {
    for fails_to_sync in [false, true] {
        let simulated = simulated_run(600);
        let disk = FailingDisk {
            fails_to_sync,
            ..failing_disk(io::ErrorKind::Other, 30, 1_000_000)
        };
        let started = Instant::now();
        let (_sender, receiver) = unbounded_channel();
        let error = harvest(&simulated, &disk, receiver).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(40));
        let message = format!("{error:#}");
        let in_file = simulated.run.records().len();
        let (_, after) = message.split_once("stopped; ").expect(&message);
        let safe: usize = after.split(' ').next().unwrap().parse().unwrap();
        // A record that was written but not synced is in the file, but possibly not on the disk.
        let in_doubt = if fails_to_sync {
            1..=CONCURRENCY as usize
        } else {
            0..=0
        };
        assert!(
            in_doubt.contains(&(in_file - safe)),
            "{safe} of {in_file}: {message}"
        );
        assert_eq!(
            disk.failures.load(Ordering::Relaxed),
            1,
            "the write or sync was retried"
        );

        let summary = simulated.harvest().await;
        assert_eq!(summary.cached + summary.ok, 600);
        assert!(simulated.bought_twice(&simulated.mock.stats()) <= CONCURRENCY);
    }
}
