//! The fuzz targets on their corpus, and on mutations of it. `tests/nightly.sh` runs them under libFuzzer.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Applies up to eight random changes.
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
        let start = random.usize(..=bytes.len());
        let end = random.usize(start..=bytes.len().min(start + 40));
        match random.u8(..7) {
            0 if start < bytes.len() => bytes[start] ^= 1 << random.u8(..8),
            1 => drop(bytes.splice(start..end, [])),
            2 => {
                let word = WORDS[random.usize(..WORDS.len())];
                bytes.splice(start..start, word.iter().copied());
            }
            3 => {
                let piece = bytes[start..end].to_vec();
                let target = random.usize(..=bytes.len());
                bytes.splice(target..target, piece);
            }
            4 => bytes.truncate(start),
            5 => {
                let other = &others[random.usize(..others.len())];
                let from = random.usize(..=other.len());
                bytes.splice(start..end, other[from..].iter().take(200).copied());
            }
            _ if start < bytes.len() => bytes[start] = random.u8(..),
            _ => {}
        }
    }
    bytes
}

#[test]
fn fuzz_targets_survive_their_corpus_and_mutations() {
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
                assert!(paths.len() >= 3, "the corpus of {name} is too small");
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

/// A corpus of inputs that are all refused would test only the first check of a target.
#[test]
fn record_config_and_cache_corpora_contain_valid_inputs() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let files = |name: &str| -> Vec<Vec<u8>> {
        let entries = fs::read_dir(corpus.join(name)).unwrap();
        entries
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect()
    };
    let records = files("record");
    assert!(
        records
            .iter()
            .any(|bytes| distill::cache::line::decode(bytes).is_ok())
    );
    let configs = files("config");
    let valid_configs = configs.iter().filter(|bytes| {
        let text = std::str::from_utf8(bytes).unwrap();
        distill::config::parse(Path::new("config.toml"), text).is_ok()
    });
    assert!(valid_configs.count() >= 2);
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
