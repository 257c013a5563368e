//! Row Z: the fuzz targets on their corpus, and on mutations of it. `tests/nightly.sh` runs them under
//! libFuzzer.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// One to eight small changes.
fn mutate(bytes: &[u8], others: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    const WORDS: [&[u8]; 12] = [
        b"\"",
        b"{",
        b"]",
        b",",
        b"\n",
        b"\0",
        b"null",
        b"-1",
        b"1e999",
        b"\\u0000",
        b"\xff\xfe",
        b":",
    ];
    let mut bytes = bytes.to_vec();
    for _ in 0..random.usize(1..=8) {
        let at = random.usize(..=bytes.len());
        let to = random.usize(at..=bytes.len().min(at + 40));
        match random.u8(..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(..8),
            1 => drop(bytes.splice(at..to, [])),
            2 => {
                let word = WORDS[random.usize(..WORDS.len())];
                bytes.splice(at..at, word.iter().copied());
            }
            3 => {
                let piece = bytes[at..to].to_vec();
                let place = random.usize(..=bytes.len());
                bytes.splice(place..place, piece);
            }
            4 => bytes.truncate(at),
            5 => {
                let other = &others[random.usize(..others.len())];
                let from = random.usize(..=other.len());
                bytes.splice(at..to, other[from..].iter().take(200).copied());
            }
            _ if at < bytes.len() => bytes[at] = random.u8(..),
            _ => {}
        }
    }
    bytes
}

#[test]
fn no_bytes_are_too_strange() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let targets: Vec<_> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(targets.len(), 7);
    std::thread::scope(|scope| {
        for corpus in targets {
            scope.spawn(move || {
                let name = corpus.file_name().unwrap().to_str().unwrap();
                let check = |bytes: &[u8]| targets::run(name, bytes);
                let mut paths: Vec<_> = fs::read_dir(&corpus)
                    .unwrap()
                    .map(|entry| entry.unwrap().path())
                    .collect();
                paths.sort();
                assert!(paths.len() >= 3, "{name} has hardly a corpus");
                let seeds: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
                let mut random = fastrand::Rng::with_seed(26);
                let mutants = 3_000 / seeds.len();
                for (path, seed) in paths.iter().zip(&seeds) {
                    check(seed);
                    for _ in 0..mutants {
                        let bytes = mutate(seed, &seeds, &mut random);
                        if catch_unwind(AssertUnwindSafe(|| check(&bytes))).is_err() {
                            let text = String::from_utf8_lossy(&bytes);
                            panic!("{name}, from {}: {text:?}", path.display());
                        }
                    }
                }
            });
        }
    });
}

/// The corpus is made of good files: a target that refuses everything would prove nothing.
#[test]
fn the_corpus_reaches_what_it_is_for() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let files = |name: &str| -> Vec<Vec<u8>> {
        let entries = fs::read_dir(corpus.join(name)).unwrap();
        entries
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect()
    };
    let decoded = files("record");
    assert!(
        decoded
            .iter()
            .any(|bytes| distill::cache::line::decode(bytes).is_ok())
    );
    let configs = files("config");
    let parsed = configs.iter().filter(|bytes| {
        let text = std::str::from_utf8(bytes).unwrap();
        distill::config::parse(Path::new("config.toml"), text).is_ok()
    });
    assert!(parsed.count() >= 2);
    let caches = files("cache");
    assert!(
        caches
            .iter()
            .any(|bytes| crate::cache_samples::scan(bytes).0.len() > 1)
    );
    assert!(
        caches
            .iter()
            .any(|bytes| zstd::decode_all(&bytes[..]).is_ok_and(|text| text.len() > 100))
    );
}
