//! The real binary dies, is stopped, and meets itself, at moments that nobody chose: rows K1, K7 and
//! K8 of the promises.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use distill::cache::{self};

use crate::nightly;
use crate::stage::{Stage, end, signal};

/// Enough text that frames are made while it is killed.
const LONG: &str = "[2000, 4000]";

/// Kills harvests of one run folder until all is done. Returns the number of kills.
fn kill_until_done(
    random: &mut fastrand::Rng,
    tokens: &str,
    prompts: usize,
    settings: &str,
) -> u64 {
    let script = format!("[answers]\ntokens = {tokens}\nlatency_s = [0.0, 0.05]\n");
    let stage = Stage::new(prompts, &script, settings);
    let (mut kills, mut before) = (0, HashSet::new());
    loop {
        let mut child = stage.start();
        std::thread::sleep(Duration::from_millis(random.u64(5..220)));
        let is_done = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        let (status, errors) = end(child, Duration::from_secs(10));
        assert!(!is_done || status.success(), "{errors}");
        kills += u64::from(!is_done);
        let keys = stage.keys();
        assert!(before.is_subset(&keys), "a record is gone");
        before = keys;
        if is_done || kills == 60 {
            break;
        }
    }
    stage.finish();
    assert_eq!(stage.prompt_ids().len(), prompts);
    assert_eq!(stage.keys().len(), prompts);
    if tokens == LONG {
        let frames = std::fs::metadata(cache::compressed_file(&stage.cache())).unwrap();
        assert!(frames.len() > 0, "nothing was compressed");
    }
    let twice = stage.billed() - stage.prompts as u64;
    assert!(
        twice <= kills * stage.concurrency,
        "{twice} answers bought twice over {kills} kills"
    );
    println!(
        "{settings:?}, {tokens} tokens: {prompts} rows, {kills} kills, 0 lost, {twice} bought twice"
    );
    kills
}

#[test]
fn kills_at_random_moments_lose_no_record() {
    let wanted = if nightly() { 1000 } else { 50 };
    let mut random = fastrand::Rng::with_seed(4);
    let mut kills = 0;
    for (round, (tokens, prompts, settings)) in [
        ("[5, 40]", 500, ""),
        ("[5, 40]", 500, "[cache]\ndurability = \"none\""),
        (LONG, 1500, "[cache]\ncompression = \"zstd\""),
        (
            "[5, 40]",
            400,
            "[cache]\ndurability = \"record\"\ncompression = \"zstd\"",
        ),
    ]
    .into_iter()
    .cycle()
    .enumerate()
    {
        if kills >= wanted && round >= 4 {
            break;
        }
        kills += kill_until_done(&mut random, tokens, prompts, settings);
    }
    println!("{kills} kills");
}

#[test]
fn second_process_cannot_write_the_same_cache() {
    for round in 0..if nightly() { 100 } else { 10 } {
        let script = "[answers]\ntokens = [5, 40]\nlatency_s = [0.0, 0.02]\n";
        let stage = Stage::new(60, script, "");
        let pair = [stage.start(), stage.start()];
        let ends = pair.map(|child| end(child, Duration::from_secs(30)));
        let mut refused = 0;
        for (status, errors) in &ends {
            if !status.success() {
                refused += 1;
                assert_eq!(status.code(), Some(1), "round {round}: {errors}");
                // With its pid, once the first one has written that.
                assert!(errors.contains("another process"), "{errors}");
            }
        }
        // Both can be in order: one after the other.
        assert!(refused <= 1, "round {round}: {ends:?}");
        assert_eq!(stage.keys().len(), 60);
        assert_eq!(stage.billed(), 60, "round {round}");
    }
}

#[test]
fn signals_drain_requests_in_flight() {
    let mut random = fastrand::Rng::with_seed(8);
    let mut drained = 0;
    for round in 0..if nightly() { 200 } else { 20 } {
        let settings = match round % 2 {
            0 => "",
            _ => "[cache]\ncompression = \"zstd\"",
        };
        let script = "[answers]\ntokens = [5, 40]\nlatency_s = [0.0, 0.08]\n";
        let stage = Stage::new(300, script, settings);
        let child = stage.start();
        std::thread::sleep(Duration::from_millis(random.u64(60..900)));
        let (name, code) = [("INT", 130), ("TERM", 143)][round / 2 % 2];
        signal(&child, name);
        let (status, errors) = end(child, Duration::from_secs(10));
        match status.code() {
            Some(found) if found == code => drained += 1,
            Some(0) => assert_eq!(stage.keys().len(), 300),
            other => panic!("round {round}, {name}: {other:?}, {errors}"),
        }
        // What was asked was answered, recorded, and bought once.
        assert_eq!(stage.billed(), stage.keys().len() as u64, "round {round}");
        stage.finish();
        assert_eq!((stage.billed(), stage.keys().len()), (300, 300));
    }
    assert!(drained >= 10, "{drained}");
}

#[test]
fn second_signal_stops_immediately() {
    let script = "[answers]\ntokens = [5, 40]\nlatency_s = 30.0\n";
    let stage = Stage::new(40, script, "");
    let child = stage.start();
    while stage.mock.stats().requests < stage.concurrency {
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, "INT");
    std::thread::sleep(Duration::from_millis(2_500));
    let second = Instant::now();
    signal(&child, "INT");
    let (status, errors) = end(child, Duration::from_secs(10));
    assert_eq!(status.code(), Some(130), "{errors}");
    assert!(
        second.elapsed() < Duration::from_secs(8),
        "{:?}",
        second.elapsed()
    );
    assert!(!Path::new(&stage.cache()).join("responses.torn").exists());
}
