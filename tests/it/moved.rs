//! Others use the disk as well, and the terminal: files that a running harvest relies on are moved, removed
//! or changed, and signals come in other ways than Ctrl-C.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use distill::cache;

use crate::stage::{Stage, end, ignores_hang_ups, signal};

const PROMPTS: usize = 400;

const SCRIPT: &str = "[answers]\ntokens = [5, 40]\nlatency_s = [0.02, 0.12]\n";

/// A harvest that has recorded about a quarter of its answers.
fn under_way(settings: &str) -> (Stage, Child) {
    let stage = Stage::new(PROMPTS, SCRIPT, settings);
    let child = stage.start();
    while stage.billed() < PROMPTS as u64 / 4 {
        std::thread::sleep(Duration::from_millis(5));
    }
    (stage, child)
}

fn plain(stage: &Stage) -> PathBuf {
    stage.cache().join("responses.jsonl")
}

fn rescued(stage: &Stage) -> PathBuf {
    stage.folder.path().join("run/cache.rescued")
}

fn count(dir: &Path) -> u64 {
    if cache::exists(dir) {
        distill::cache::reader::read(dir).unwrap().count() as u64
    } else {
        0
    }
}

/// Takes over what was rescued, as the message says.
fn merge(stage: &Stage) {
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["cache", "merge", "--dir"])
        .args([stage.cache(), rescued(stage)])
        .status();
    assert!(status.unwrap().success());
    fs::remove_dir_all(rescued(stage)).unwrap();
}

/// Harms the files of a harvest under way, which must stop at once and say `part` of a message. `mend` does
/// what the message says; then the same command goes on, and buys nothing again but what was `lost`.
fn harmed(
    part: &str,
    harm: impl FnOnce(&Stage),
    mend: impl FnOnce(&Stage),
    lost: impl FnOnce(u64) -> bool,
) {
    let (stage, child) = under_way("");
    harm(&stage);
    let (status, errors) = end(child, Duration::from_secs(20));
    assert_eq!(status.code(), Some(1), "{part}: {errors}");
    assert!(errors.contains(part), "{part}: {errors}");
    let billed = stage.billed();
    assert!(
        billed < PROMPTS as u64 - 50,
        "{part}: {billed} asked, and it did not stop"
    );
    if stage.folder.path().join("run").exists() {
        let (status, errors) = end(stage.start(), Duration::from_secs(20));
        // Cut or appended to, the file is where it was.
        let is_in_place = plain(&stage).exists() && !rescued(&stage).exists();
        assert!(is_in_place || status.code() == Some(2), "{part}: {errors}");
        assert!(
            is_in_place || stage.billed() == billed,
            "{part}: bought again"
        );
    }
    mend(&stage);
    stage.finish();
    assert_eq!(stage.keys().len(), PROMPTS, "{part}");
    let again = stage.billed() - PROMPTS as u64;
    assert!(lost(again), "{part}: {again} bought again");
}

#[test]
fn a_cache_that_is_moved_removed_or_replaced_stops_the_run_and_loses_nothing() {
    let none = |again| again == 0;
    let elsewhere = |stage: &Stage| stage.folder.path().join("elsewhere");
    harmed(
        "was moved to",
        |stage| fs::rename(plain(stage), elsewhere(stage)).unwrap(),
        |stage| fs::rename(elsewhere(stage), plain(stage)).unwrap(),
        none,
    );
    harmed(
        "was moved to",
        |stage| fs::rename(stage.cache(), elsewhere(stage)).unwrap(),
        |stage| fs::rename(elsewhere(stage), stage.cache()).unwrap(),
        none,
    );
    // The books move along.
    let run = |stage: &Stage| stage.folder.path().join("run");
    harmed(
        "was moved to",
        |stage| fs::rename(run(stage), elsewhere(stage)).unwrap(),
        |stage| {
            let _ = fs::remove_dir_all(run(stage));
            fs::rename(elsewhere(stage), run(stage)).unwrap();
        },
        none,
    );
    harmed(
        "was removed",
        |stage| fs::remove_file(plain(stage)).unwrap(),
        merge,
        none,
    );
    harmed(
        "was removed",
        |stage| fs::remove_dir_all(stage.cache()).unwrap(),
        merge,
        none,
    );
    harmed(
        "was replaced",
        |stage| {
            fs::copy(plain(stage), elsewhere(stage)).unwrap();
            fs::rename(elsewhere(stage), plain(stage)).unwrap();
        },
        merge,
        none,
    );
}

#[test]
fn a_cache_that_is_cut_or_appended_to_stops_the_run_and_says_what_is_lost() {
    harmed(
        "was truncated to",
        |stage| {
            let file = fs::OpenOptions::new().write(true).open(plain(stage));
            file.unwrap().set_len(0).unwrap();
        },
        merge,
        // What was there is gone, and no more.
        |again| (1..PROMPTS as u64 / 2).contains(&again),
    );
    harmed(
        "another program appended",
        |stage| {
            let file = fs::OpenOptions::new().append(true).open(plain(stage));
            std::io::Write::write_all(&mut file.unwrap(), b"a line of somebody else").unwrap();
        },
        |stage| {
            let status = std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
                .args(["cache", "repair", "--dir"])
                .arg(stage.cache())
                .status();
            assert!(status.unwrap().success());
            if rescued(stage).exists() {
                merge(stage);
            }
        },
        |again| again == 0,
    );
}

#[test]
fn what_was_rescued_is_not_bought_again() {
    let (stage, child) = under_way("");
    fs::remove_file(plain(&stage)).unwrap();
    let (_, errors) = end(child, Duration::from_secs(20));
    let billed = stage.billed();
    assert_eq!(count(&rescued(&stage)), billed, "{errors}");
    let (status, errors) = end(stage.start(), Duration::from_secs(20));
    assert_eq!(status.code(), Some(2), "{errors}");
    assert!(errors.contains("cache merge"), "{errors}");
    assert_eq!(stage.billed(), billed);
}

#[test]
fn a_hang_up_drains_and_the_signals_of_one_wish_are_one() {
    for (names, code) in [(&["HUP"][..], 129), (&["TERM", "TERM", "HUP"], 143)] {
        if names == ["HUP"] && ignores_hang_ups() {
            continue;
        }
        let (stage, child) = under_way("");
        for name in names {
            signal(&child, name);
        }
        let (status, errors) = end(child, Duration::from_secs(10));
        assert_eq!(status.code(), Some(code), "{errors}");
        // What was in flight was waited for.
        assert_eq!(stage.billed(), stage.keys().len() as u64, "{names:?}");
        assert!(stage.billed() < PROMPTS as u64);
        stage.finish();
        assert_eq!(stage.billed(), PROMPTS as u64);
    }
}
