//! Disk failures during a harvest: answers are held while the disk is full, and the number of safe answers is reported.

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

use super::nights::Night;
use super::{end, quietly};

const CONCURRENCY: u64 = 8;

/// A disk that fails during one interval of the run.
#[derive(Clone)]
struct Moody {
    kind: io::ErrorKind,
    fails_to_sync: bool,
    from: Instant,
    to: Instant,
    failures: Arc<AtomicU64>,
}

impl Moody {
    fn mood(&self) -> io::Result<()> {
        let now = Instant::now();
        if now < self.from || now >= self.to {
            return Ok(());
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        Err(self.kind.into())
    }

    fn wrap(&self) -> WrapFile {
        let moody = self.clone();
        Box::new(move |file| Box::new(MoodyFile(file, moody.clone())))
    }
}

struct MoodyFile(File, Moody);

impl Storage for MoodyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.1.fails_to_sync {
            // A full disk writes a part of the data.
            if let Err(error) = self.1.mood() {
                Storage::write(&mut self.0, &bytes[..bytes.len().min(10)])?;
                return Err(error);
            }
        }
        Storage::write(&mut self.0, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.1.fails_to_sync {
            self.1.mood()
        } else {
            Ok(())
        }
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }
}

fn night(prompts: usize) -> Night {
    let script = "[answers]\ntokens = [5, 20]\nlatency_s = [1.0, 4.0]\n";
    Night::new(script, prompts, |config| {
        config.limits.concurrency = CONCURRENCY as usize;
        config.cache.durability = Durability::Record;
    })
}

/// A disk that starts to fail after the given seconds, for the given duration.
fn moody(kind: io::ErrorKind, after: u64, seconds: u64) -> Moody {
    let from = Instant::now() + Duration::from_secs(after);
    Moody {
        kind,
        fails_to_sync: false,
        from,
        to: from + Duration::from_secs(seconds),
        failures: Arc::default(),
    }
}

async fn harvest(
    night: &Night,
    disk: &Moody,
    signals: UnboundedReceiver<u8>,
) -> anyhow::Result<HarvestSummary> {
    let world = Environment {
        transports: vec![Arc::new(night.teacher())],
        clock: night.clock.clone(),
        storage: disk.wrap(),
    };
    let signals = Signals::from_channel(signals);
    harvest::run_in(world, &night.run.config, quietly(), signals).await
}

#[tokio::test(start_paused = true)]
async fn full_disk_holds_answers_until_there_is_space() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        let night = night(600);
        let disk = moody(kind, 30, 400);
        let (_sender, receiver) = unbounded_channel();
        let summary = harvest(&night, &disk, receiver).await.unwrap();
        assert_eq!((end(&summary).0, summary.ok), (0, 600), "{summary:?}");
        // Writes were retried every five seconds, and no request was sent.
        let failures = disk.failures.load(Ordering::Relaxed);
        assert!((70..=90).contains(&failures), "{failures}");
        assert_eq!(night.mock.stats().billed.answers, 600);
        assert_eq!(night.run.records().len(), 600);
    }
}

#[tokio::test(start_paused = true)]
async fn full_disk_timeout_ends_run_with_count_of_safe_answers() {
    let night = night(600);
    let disk = moody(io::ErrorKind::StorageFull, 30, 1_000_000);
    let started = Instant::now();
    let (_sender, receiver) = unbounded_channel();
    let summary = harvest(&night, &disk, receiver).await.unwrap();
    let waited = started.elapsed().as_secs();
    assert!((630..660).contains(&waited), "{waited} s");
    let (code, message) = end(&summary);
    assert_eq!(code, 4);
    let safe = night.run.records().len() as u64;
    assert!(
        message.contains(&format!("{safe} answers are safe")),
        "{message}"
    );
    assert!(message.contains("disk has been full"), "{message}");
    // Only the answers in flight when the disk filled up are lost.
    let lost = night.mock.stats().billed.answers - safe;
    assert!((1..=CONCURRENCY).contains(&lost), "{lost}");
    assert!(
        message.contains(&format!("{lost} answers held in memory are lost")),
        "{message}"
    );
    assert_eq!(summary.attempts_lost, lost);
    assert_eq!((summary.ok, summary.pending), (safe, 600 - safe));

    let summary = night.harvest().await;
    assert_eq!((summary.cached, summary.ok), (safe, 600 - safe));
    assert_eq!(night.bought_twice(&night.mock.stats()), lost);
}

#[tokio::test(start_paused = true)]
async fn signal_ends_run_while_disk_is_full() {
    let night = night(600);
    let disk = moody(io::ErrorKind::StorageFull, 30, 1_000_000);
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let _ = sender.send(2);
        std::future::pending::<()>().await;
    });
    let started = Instant::now();
    let summary = harvest(&night, &disk, receiver).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(70));
    let (code, message) = end(&summary);
    assert_eq!(code, 130, "{message}");
    assert!(
        message.contains("lost") && !message.contains("every answer is recorded"),
        "{message}"
    );
}

#[tokio::test(start_paused = true)]
async fn disk_errors_end_run_immediately() {
    for fails_to_sync in [false, true] {
        let night = night(600);
        let disk = Moody {
            fails_to_sync,
            ..moody(io::ErrorKind::Other, 30, 1_000_000)
        };
        let started = Instant::now();
        let (_sender, receiver) = unbounded_channel();
        let error = harvest(&night, &disk, receiver).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(40));
        let message = format!("{error:#}");
        let in_file = night.run.records().len();
        let safe: usize = message
            .split_once("stopped; ")
            .and_then(|(_, rest)| rest.split_once(' '))
            .map(|(number, _)| number.parse().unwrap())
            .unwrap_or_else(|| panic!("{message}"));
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
            "never tried again"
        );

        let summary = night.harvest().await;
        assert_eq!(summary.cached + summary.ok, 600);
        assert!(night.bought_twice(&night.mock.stats()) <= CONCURRENCY);
    }
}
