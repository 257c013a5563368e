//! A running harvest whose files another program moves, removes or changes, and one that receives SIGHUP.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;
use std::{fs, io};

use distill::budget::ledger::{LedgerFiles, Spent};
use distill::cache;
use distill::cache::storage::{Storage, WrapFile};
use distill::cache::writer::Cache;
use distill::config::CacheConfig;

use crate::cache_samples::sample;
use crate::harvest_process::{HarvestFixture, ignores_hang_ups, signal, wait_for_end};

const PROMPTS: usize = 400;

const SCRIPT: &str = "[answers]\ntokens = [5, 40]\nlatency_s = [0.02, 0.12]\n";

/// Starts a harvest, and waits until a quarter of its answers are billed.
fn start_and_wait_for_quarter(settings: &str) -> (HarvestFixture, Child) {
    let fixture = HarvestFixture::new(PROMPTS, SCRIPT, settings);
    let child = fixture.start();
    while fixture.billed() < PROMPTS as u64 / 4 {
        std::thread::sleep(Duration::from_millis(5));
    }
    (fixture, child)
}

fn plain_file(fixture: &HarvestFixture) -> PathBuf {
    fixture.cache().join("responses.jsonl")
}

/// Returns the folder beside the cache to which a harvest rescues its records.
fn rescued(fixture: &HarvestFixture) -> PathBuf {
    fixture.folder.path().join("run/cache.rescued")
}

/// Returns the number of records of a cache folder, which may be missing.
fn record_count(dir: &Path) -> u64 {
    if cache::exists(dir) {
        cache::reader::read(dir).unwrap().count() as u64
    } else {
        0
    }
}

/// Returns the amounts spent, as the ledger of the run folder records them.
fn spent(fixture: &HarvestFixture) -> Spent {
    let (_, ledger, _) = LedgerFiles::open(&fixture.folder.path().join("run")).unwrap();
    ledger.spent
}

/// Merges the rescued records, as the error message advises. The ledger already contains their cost.
fn merge_rescued(fixture: &HarvestFixture) {
    let spent_before = spent(fixture);
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["cache", "merge", "--dir"])
        .args([fixture.cache(), rescued(fixture)])
        .status();
    assert!(status.unwrap().success());
    assert_eq!(spent(fixture), spent_before);
    fs::remove_dir_all(rescued(fixture)).unwrap();
}

/// Changes files of a running harvest with `change`. The harvest must stop immediately, with `part` in its error
/// message. `repair` follows the advice of the message. Then the command is rerun and completes, and
/// `may_be_bought_twice` accepts the number of answers that were bought twice.
fn check_changed_files(
    part: &str,
    change: impl FnOnce(&HarvestFixture),
    repair: impl FnOnce(&HarvestFixture),
    may_be_bought_twice: impl FnOnce(u64) -> bool,
) {
    let (fixture, child) = start_and_wait_for_quarter("");
    change(&fixture);
    let (status, errors) = wait_for_end(child, Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{part}: {errors}");
    assert!(errors.contains(part), "{part}: {errors}");
    let billed = fixture.billed();
    assert!(
        billed < PROMPTS as u64 - 50,
        "{part}: {billed} of {PROMPTS} answers were billed before the run stopped"
    );
    if fixture.folder.path().join("run").exists() {
        let (status, errors) = wait_for_end(fixture.start(), Duration::from_secs(20));
        // A truncated or extended file is still in its place.
        let is_in_place = plain_file(&fixture).exists() && !rescued(&fixture).exists();
        assert!(is_in_place || status.code() == Some(2), "{part}: {errors}");
        assert!(
            is_in_place || fixture.billed() == billed,
            "{part}: a refused run was billed"
        );
    }
    repair(&fixture);
    fixture.finish();
    assert_eq!(fixture.keys().len(), PROMPTS, "{part}");
    let bought_twice = fixture.billed() - PROMPTS as u64;
    assert!(
        may_be_bought_twice(bought_twice),
        "{part}: {bought_twice} answers bought twice"
    );
}

#[test]
fn moved_removed_or_replaced_cache_stops_run_and_loses_nothing() {
    let none = |bought_twice| bought_twice == 0;
    let elsewhere = |fixture: &HarvestFixture| fixture.folder.path().join("elsewhere");
    check_changed_files(
        "was moved to",
        |fixture| fs::rename(plain_file(fixture), elsewhere(fixture)).unwrap(),
        |fixture| fs::rename(elsewhere(fixture), plain_file(fixture)).unwrap(),
        none,
    );
    check_changed_files(
        "was moved to",
        |fixture| fs::rename(fixture.cache(), elsewhere(fixture)).unwrap(),
        |fixture| fs::rename(elsewhere(fixture), fixture.cache()).unwrap(),
        none,
    );
    // The ledger of the budget moves with the run folder.
    let run = |fixture: &HarvestFixture| fixture.folder.path().join("run");
    check_changed_files(
        "was moved to",
        |fixture| fs::rename(run(fixture), elsewhere(fixture)).unwrap(),
        |fixture| {
            let _ = fs::remove_dir_all(run(fixture));
            fs::rename(elsewhere(fixture), run(fixture)).unwrap();
        },
        none,
    );
    check_changed_files(
        "was removed",
        |fixture| fs::remove_file(plain_file(fixture)).unwrap(),
        merge_rescued,
        none,
    );
    check_changed_files(
        "was removed",
        |fixture| fs::remove_dir_all(fixture.cache()).unwrap(),
        merge_rescued,
        none,
    );
    check_changed_files(
        "was replaced",
        |fixture| {
            fs::copy(plain_file(fixture), elsewhere(fixture)).unwrap();
            fs::rename(elsewhere(fixture), plain_file(fixture)).unwrap();
        },
        merge_rescued,
        none,
    );
}

#[test]
fn truncated_or_extended_cache_stops_run_and_loses_only_truncated_records() {
    check_changed_files(
        "was truncated to",
        |fixture| {
            let file = fs::OpenOptions::new().write(true).open(plain_file(fixture));
            file.unwrap().set_len(0).unwrap();
        },
        merge_rescued,
        // Only the records before the truncation are lost.
        |bought_twice| (1..PROMPTS as u64 / 2).contains(&bought_twice),
    );
    check_changed_files(
        "another program appended",
        |fixture| {
            let file = fs::OpenOptions::new()
                .append(true)
                .open(plain_file(fixture));
            std::io::Write::write_all(&mut file.unwrap(), b"a line of another program").unwrap();
        },
        |fixture| {
            let status = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
                .args(["cache", "repair", "--dir"])
                .arg(fixture.cache())
                .status();
            assert!(status.unwrap().success());
            if rescued(fixture).exists() {
                merge_rescued(fixture);
            }
        },
        |bought_twice| bought_twice == 0,
    );
}

/// A file to which another program appends part of a line just before a write, after the cache has checked the file.
struct RacingFile {
    file: fs::File,
    /// Number of writes before the race.
    writes_before: usize,
}

impl Storage for RacingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.writes_before == 0 {
            io::Write::write_all(&mut self.file, b"a line of another program")?;
        }
        self.writes_before = self.writes_before.wrapping_sub(1);
        io::Write::write(&mut self.file, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn file(&self) -> Option<&fs::File> {
        Some(&self.file)
    }
}

#[test]
fn record_written_after_part_of_a_foreign_line_is_rescued() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let wrap: WrapFile = Box::new(|file| {
        Box::new(RacingFile {
            file,
            writes_before: 3,
        })
    });
    let settings = CacheConfig::default();
    let cache = Cache::open_with(&dir, &settings, wrap, &mut |_, _| Ok(())).unwrap();
    let appended = (0..4).map(|number| cache.append(&sample(number)));
    assert!(appended.take_while(Result::is_ok).count() >= 3);
    assert!(cache.check().is_err());
    drop(cache);
    let rescued = cache::reader::read(&folder.path().join("cache.rescued")).unwrap();
    let keys: Vec<String> = rescued.map(|record| record.unwrap().key).collect();
    assert_eq!(keys, [sample(3).key]);
}

#[test]
fn harvest_is_refused_while_rescued_answers_are_not_merged() {
    let (fixture, child) = start_and_wait_for_quarter("");
    fs::remove_file(plain_file(&fixture)).unwrap();
    let (_, errors) = wait_for_end(child, Duration::from_secs(20));
    let billed = fixture.billed();
    assert_eq!(record_count(&rescued(&fixture)), billed, "{errors}");
    let (status, errors) = wait_for_end(fixture.start(), Duration::from_secs(20));
    assert_eq!(status.code(), Some(2), "{errors}");
    assert!(errors.contains("cache merge"), "{errors}");
    assert_eq!(fixture.billed(), billed);
}

#[test]
fn hang_up_drains_and_repeated_signals_count_once() {
    for (names, code) in [(&["HUP"][..], 129), (&["TERM", "TERM", "HUP"], 143)] {
        if names == ["HUP"] && ignores_hang_ups() {
            continue;
        }
        let (fixture, child) = start_and_wait_for_quarter("");
        for name in names {
            signal(&child, name);
        }
        let (status, errors) = wait_for_end(child, Duration::from_secs(10));
        assert_eq!(status.code(), Some(code), "{errors}");
        // The run waited for the requests in flight.
        assert_eq!(fixture.billed(), fixture.keys().len() as u64, "{names:?}");
        assert!(fixture.billed() < PROMPTS as u64);
        fixture.finish();
        assert_eq!(fixture.billed(), PROMPTS as u64);
    }
}
