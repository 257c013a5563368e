//! The real binary is killed, interrupted or started twice, at random moments.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use distill::cache;

use crate::harvest_process::{HarvestFixture, signal, wait_for_end};
use crate::nightly;

/// Tokens per answer, large enough that the cache compresses frames between the kills.
const LONG: &str = "[2000, 4000]";

/// Number of kills after which a run folder is harvested to the end.
const MAX_KILLS: u64 = 60;

/// Kills harvests of one run folder at random moments until one completes, or [`MAX_KILLS`] times. Returns the number
/// of kills.
fn kill_until_done(
    random: &mut fastrand::Rng,
    tokens: &str,
    prompts: usize,
    settings: &str,
) -> u64 {
    let script = format!("[answers]\ntokens = {tokens}\nlatency_s = [0.0, 0.05]\n");
    let fixture = HarvestFixture::new(prompts, &script, settings);
    let (mut kills, mut before) = (0, HashSet::new());
    loop {
        let mut child = fixture.start();
        std::thread::sleep(Duration::from_millis(random.u64(5..220)));
        let is_done = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        let (status, errors) = wait_for_end(child, Duration::from_secs(10));
        assert!(!is_done || status.success(), "{errors}");
        kills += u64::from(!is_done);
        let keys = fixture.keys();
        assert!(before.is_subset(&keys), "a record is lost");
        before = keys;
        if is_done || kills == MAX_KILLS {
            break;
        }
    }
    fixture.finish();
    assert_eq!(fixture.prompt_ids().len(), prompts);
    assert_eq!(fixture.keys().len(), prompts);
    if tokens == LONG {
        let frames = std::fs::metadata(cache::compressed_file(&fixture.cache())).unwrap();
        assert!(frames.len() > 0, "nothing was compressed");
    }
    let bought_twice = fixture.billed() - fixture.prompts as u64;
    assert!(
        bought_twice <= kills * fixture.concurrency,
        "{bought_twice} answers bought twice over {kills} kills"
    );
    println!(
        "{settings:?}, {tokens} tokens: {prompts} rows, {kills} kills, 0 lost, {bought_twice} bought twice"
    );
    kills
}

#[test]
fn kills_at_random_moments_lose_no_record() {
    let min_kills = if nightly() { 1000 } else { 50 };
    // Tokens per answer, prompts, and settings.
    let cases = [
        ("[5, 40]", 500, ""),
        ("[5, 40]", 500, "[cache]\ndurability = \"none\""),
        (LONG, 1500, "[cache]\ncompression = \"zstd\""),
        (
            "[5, 40]",
            400,
            "[cache]\ndurability = \"record\"\ncompression = \"zstd\"",
        ),
    ];
    let mut random = fastrand::Rng::with_seed(4);
    let mut kills = 0;
    while kills < min_kills {
        for (tokens, prompts, settings) in cases {
            kills += kill_until_done(&mut random, tokens, prompts, settings);
        }
    }
    println!("{kills} kills");
}

#[test]
fn second_process_cannot_write_the_same_cache() {
    for round in 0..if nightly() { 100 } else { 10 } {
        let script = "[answers]\ntokens = [5, 40]\nlatency_s = [0.0, 0.02]\n";
        let fixture = HarvestFixture::new(60, script, "");
        let pair = [fixture.start(), fixture.start()];
        let ends = pair.map(|child| wait_for_end(child, Duration::from_secs(30)));
        let mut refused = 0;
        for (status, errors) in &ends {
            if !status.success() {
                refused += 1;
                assert_eq!(status.code(), Some(1), "round {round}: {errors}");
                assert!(errors.contains("another process"), "{errors}");
            }
        }
        // Both succeed if one starts after the other has ended.
        assert!(refused <= 1, "round {round}: {ends:?}");
        assert_eq!(fixture.keys().len(), 60);
        assert_eq!(fixture.billed(), 60, "round {round}");
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
        let fixture = HarvestFixture::new(300, script, settings);
        let child = fixture.start();
        std::thread::sleep(Duration::from_millis(random.u64(60..900)));
        let (name, code) = [("INT", 130), ("TERM", 143)][round / 2 % 2];
        signal(&child, name);
        let (status, errors) = wait_for_end(child, Duration::from_secs(10));
        match status.code() {
            Some(actual) if actual == code => drained += 1,
            Some(0) => assert_eq!(fixture.keys().len(), 300),
            other => panic!("round {round}, {name}: {other:?}, {errors}"),
        }
        // Every billed answer is recorded.
        assert_eq!(
            fixture.billed(),
            fixture.keys().len() as u64,
            "round {round}"
        );
        fixture.finish();
        assert_eq!((fixture.billed(), fixture.keys().len()), (300, 300));
    }
    assert!(drained >= 10, "{drained}");
}

#[test]
fn second_signal_stops_immediately() {
    let script = "[answers]\ntokens = [5, 40]\nlatency_s = 30.0\n";
    let fixture = HarvestFixture::new(40, script, "");
    let child = fixture.start();
    while fixture.mock.stats().requests < fixture.concurrency {
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, "INT");
    // A signal within one second of the last one counts as a duplicate.
    std::thread::sleep(Duration::from_millis(2_500));
    let second_signal = Instant::now();
    signal(&child, "INT");
    let (status, errors) = wait_for_end(child, Duration::from_secs(10));
    assert_eq!(status.code(), Some(130), "{errors}");
    let elapsed = second_signal.elapsed();
    assert!(elapsed < Duration::from_secs(8), "{elapsed:?}");
    assert!(!fixture.cache().join("responses.torn").exists());
}
