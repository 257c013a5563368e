//! `cache repair` and `cache merge`: nothing that was paid for is thrown away.

use std::fs;
use std::path::Path;

use distill::cache::frames::{CompressionLevel, compress};
use distill::cache::merge::{MergeReport, merge};
use distill::cache::record::{Answer, Record, SCHEMA};
use distill::cache::repair::{RepairReport, repair};
use distill::cache::writer::Cache;
use distill::cache::{compressed_file, conflicts_file, plain_file, quarantine_file, reader};
use distill::config::{self, Compression};
use distill::exit::Exit;

use crate::cache_samples::{encode, sample};

fn folder(frames: &[u8], plain: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (file, bytes) in [
        (compressed_file(dir.path()), frames),
        (plain_file(dir.path()), plain),
    ] {
        if !bytes.is_empty() {
            fs::write(file, bytes).unwrap();
        }
    }
    dir
}

fn records(range: std::ops::Range<u64>) -> Vec<Record> {
    range.map(sample).collect()
}

fn frame(records: Vec<Record>) -> Vec<u8> {
    compress(&encode(records), CompressionLevel::Fast).unwrap()
}

fn read_all(dir: &Path) -> Vec<Record> {
    distill::cache::reader::read(dir)
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Text that hardly compresses.
fn noise(seed: u64) -> String {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.alphanumeric())
        .take(30_000)
        .collect()
}

/// Another answer to the request of the n-th sample.
fn other(n: u64) -> Record {
    Record {
        answer: Answer {
            text: "another answer".to_owned(),
            ..Answer::default()
        },
        ..sample(n)
    }
}

/// Nothing is wrong with the cache, and it holds these records.
fn assert_holds(dir: &Path, expected: &[Record]) {
    assert!(read_all(dir) == expected, "other records");
    let findings = reader::verify_cache(dir, &mut |_, _| Ok(())).unwrap();
    assert!(findings.damaged.is_empty() && findings.torn.is_empty());
    assert!(findings.repeated.is_empty());
    let opened = Cache::open(dir, &config::CacheConfig::default()).unwrap();
    assert_eq!(opened.len(), expected.len());
}

#[test]
fn repair_moves_damaged_lines_and_keeps_whole_ones() {
    let lines: Vec<_> = (0..6).map(|n| encode([sample(n)])).collect();
    let mut flipped = lines[2].clone();
    flipped[200] ^= 2;
    let torn = &lines[5][..300];
    let file = [
        &lines[0][..],
        b"not a record\n",
        &lines[1],
        &flipped,
        &[0; 4096],
        b"\n",
        &lines[3],
        &encode([other(1)]),
        b"\r\n",
        &lines[4],
        torn,
    ]
    .concat();
    let dir = folder(b"", &file);
    let done = repair(dir.path()).unwrap();
    let damage = [b"not a record\n", &flipped[..], &[0; 4096], b"\n", torn].concat();
    let expected = RepairReport {
        records: 4,
        quarantined: 4,
        quarantined_bytes: damage.len() as u64,
        rescued: 0,
        conflicts: 1,
    };
    assert_eq!(done, expected);
    assert!(fs::read(quarantine_file(dir.path())).unwrap() == damage);
    assert_eq!(
        fs::read(conflicts_file(dir.path())).unwrap(),
        encode([other(1)])
    );
    assert_holds(dir.path(), &[sample(0), sample(1), sample(3), sample(4)]);

    let again = repair(dir.path()).unwrap();
    assert!(!again.changed() && again.records == 4);
    assert!(fs::read(quarantine_file(dir.path())).unwrap() == damage);
}

#[test]
fn repair_rescues_readable_lines_of_a_damaged_frame() {
    let middle: Vec<_> = (10..30)
        .map(|n| Record {
            answer: Answer {
                text: noise(n),
                ..Answer::default()
            },
            ..sample(n)
        })
        .collect();
    let frames = [
        frame(records(0..10)),
        frame(middle.clone()),
        frame(records(30..40)),
    ];
    let mut broken = frames[1].clone();
    // In the third of four blocks.
    let at = broken.len() * 5 / 8;
    broken[at..at + 64].fill(0xff);
    let file = [&frames[0][..], &broken, &frames[2]].concat();
    let dir = folder(&file, &encode(records(35..45)));
    let done = repair(dir.path()).unwrap();
    assert!((5..20).contains(&done.rescued), "{done:?}");
    assert_eq!(done.quarantined_bytes, broken.len() as u64);
    assert!(fs::read(quarantine_file(dir.path())).unwrap() == broken);
    // Behind the break some lines are whole again.
    let found = read_all(dir.path());
    let rescued: Vec<_> = (middle
        .iter()
        .filter(|&record| found.contains(record))
        .cloned())
    .collect();
    assert_eq!(done.rescued, rescued.len() as u64);
    let expected = [&records(0..10)[..], &rescued, &records(30..45)].concat();
    assert_eq!(done.records, expected.len() as u64);
    assert_holds(dir.path(), &expected);
    // The frames that were whole are the same bytes.
    let compressed = fs::read(compressed_file(dir.path())).unwrap();
    assert!(compressed.starts_with(&frames[0]) && compressed.ends_with(&frames[2]));
}

#[test]
fn repair_accepts_bytes_added_by_editors() {
    let with_returns = |range| {
        let text = String::from_utf8(encode(records(range))).unwrap();
        format!("\u{feff}{}", text.replace('\n', "\r\n\r\n")).into_bytes()
    };
    let frames = compress(&with_returns(0..10), CompressionLevel::Fast).unwrap();
    let plain = [&with_returns(10..20)[..], b"damage\r\n"].concat();
    let dir = folder(&frames, &plain);
    let done = repair(dir.path()).unwrap();
    assert_eq!((done.records, done.quarantined), (20, 1));
    assert_eq!(
        fs::read(quarantine_file(dir.path())).unwrap(),
        b"damage\r\n"
    );
    assert_holds(dir.path(), &records(0..20));

    // And it is rescued from a broken frame.
    let dir = folder(&frames[..frames.len() - 1], b"");
    assert_eq!(repair(dir.path()).unwrap().rescued, 10);
    assert_holds(dir.path(), &records(0..10));
}

#[test]
fn repair_does_not_change_whole_or_newer_caches() {
    let newer = Record {
        v: SCHEMA + 1,
        ..sample(5)
    };
    for (plain, is_newer) in [
        (encode(records(10..15)), false),
        (
            [&encode([sample(0)])[..], b"damage\n", &encode([newer])].concat(),
            true,
        ),
    ] {
        let frames = frame(records(20..30));
        let dir = folder(&frames, &plain);
        match repair(dir.path()) {
            Ok(done) => assert!(!is_newer && !done.changed() && done.records == 15),
            Err(error) => {
                let message = format!("{error:#}");
                assert!(is_newer && message.contains("update distill"), "{message}");
            }
        }
        assert_eq!(fs::read(plain_file(dir.path())).unwrap(), plain);
        assert_eq!(fs::read(compressed_file(dir.path())).unwrap(), frames);
        assert_eq!(
            names(dir.path()),
            ["responses.jsonl", "responses.jsonl.zst", "responses.lock"]
        );
    }
    let held = folder(b"", &encode(records(0..2)));
    let _cache = Cache::open(held.path(), &config::CacheConfig::default()).unwrap();
    let error = repair(held.path()).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
}

/// Merges without progress.
fn merged(
    into: &Path,
    compression: Compression,
    sources: &[&Path],
) -> anyhow::Result<Vec<MergeReport>> {
    let settings = config::CacheConfig {
        compression,
        ..config::CacheConfig::default()
    };
    let sources: Vec<_> = sources.iter().map(|path| path.to_path_buf()).collect();
    merge(into, &settings, &sources, &mut |_, _| Ok(()))
}

#[test]
fn merge_joins_by_key_and_keeps_both_sides_of_a_conflict() {
    // A field of a later version, which must come through.
    let line = String::from_utf8(encode([sample(7)])).unwrap();
    let body = line[..line.rfind("\"crc\"").unwrap()].replacen(
        "{\"v\":2,",
        "{\"v\":2,\"mood\":\"good\",",
        1,
    );
    let crc = crc32c::crc32c(body.as_bytes());
    let future = format!("{body}\"crc\":\"{crc:08x}\"}}\n").into_bytes();
    let first = folder(b"", &[encode(records(0..7)), future.clone()].concat());
    let second = folder(&frame(records(5..10)), &encode([other(2), sample(11)]));
    let before = fs::read(plain_file(second.path())).unwrap();

    for compression in [Compression::None, Compression::Zstd] {
        let into = tempfile::tempdir().unwrap();
        let into = into.path().join("merged/cache");
        let all = merged(&into, compression, &[first.path(), second.path()]).unwrap();
        let [one, two] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!((one.records, one.added, one.conflicts), (8, 8, 0));
        assert_eq!((two.records, two.added, two.same), (7, 3, 2));
        // The seventh is not the same bytes, and so both are kept.
        assert_eq!(two.conflicts, 2);
        assert_eq!(two.keys, [sample(7).key, sample(2).key]);
        assert_eq!(
            fs::read(conflicts_file(&into)).unwrap(),
            encode([sample(7), other(2)])
        );
        let expected = [&records(0..10)[..], &[sample(11)]].concat();
        assert_holds(&into, &expected);
        let text = match compression {
            Compression::None => fs::read(plain_file(&into)).unwrap(),
            Compression::Zstd => {
                zstd::decode_all(&fs::read(compressed_file(&into)).unwrap()[..]).unwrap()
            }
        };
        assert!(memchr::memmem::find(&text, &future).is_some());

        let again = merged(&into, compression, &[second.path(), first.path()]).unwrap();
        assert!(again.iter().all(|source| source.added == 0));
        assert_eq!(again[0].conflicts, 2);
        assert_holds(&into, &expected);
        assert_eq!(
            fs::read(conflicts_file(&into)).unwrap(),
            encode([sample(7), other(2)]),
            "a conflict is told once"
        );
    }
    assert_eq!(fs::read(plain_file(second.path())).unwrap(), before);

    let clean = tempfile::tempdir().unwrap();
    merged(clean.path(), Compression::None, &[first.path()]).unwrap();
    assert!(!conflicts_file(clean.path()).exists());
}

#[test]
fn merge_refuses_damaged_or_missing_sources() {
    let good = folder(b"", &encode(records(0..5)));
    let bad = folder(
        b"",
        &[
            &encode(records(5..8))[..],
            b"damage\n",
            &encode([sample(9)]),
        ]
        .concat(),
    );
    let into = tempfile::tempdir().unwrap();
    let error = merged(into.path(), Compression::None, &[good.path(), bad.path()]).unwrap_err();
    assert_eq!(Exit::code_of(&error), 5);
    assert!(error.to_string().contains("line 4"), "{error}");
    assert!(error.to_string().contains("cache repair"), "{error}");
    assert_holds(into.path(), &records(0..8));

    for source in [into.path().to_owned(), into.path().join("nowhere")] {
        let error = merged(into.path(), Compression::None, &[&source]).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2, "{error}");
    }
    repair(bad.path()).unwrap();
    merged(into.path(), Compression::None, &[bad.path()]).unwrap();
    let expected = [&records(0..8)[..], &[sample(9)]].concat();
    assert_holds(into.path(), &expected);
}

#[test]
fn record_with_the_key_of_another_question_is_refused() {
    let foreign = Record {
        key: sample(2).key,
        ..sample(1)
    };
    let text = encode(vec![sample(0), foreign, sample(3)]);
    for (frames, plain) in [
        (vec![], text.clone()),
        (compress(&text, CompressionLevel::Fast).unwrap(), vec![]),
    ] {
        let source = folder(&frames, &plain);
        let findings = reader::verify_cache(source.path(), &mut |_, _| Ok(())).unwrap();
        assert_eq!((findings.records, findings.damaged.len()), (2, 1));
        assert!(
            findings.damaged[0]
                .1
                .to_string()
                .contains("another request")
        );
        let target = tempfile::tempdir().unwrap();
        let sources = [source.path().to_owned()];
        let settings = config::CacheConfig::default();
        let error = merge(target.path(), &settings, &sources, &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(Exit::code_of(&error), 5, "{error:#}");
        let repaired = repair(source.path()).unwrap();
        assert_eq!((repaired.records, repaired.quarantined), (2, 1));
        merge(target.path(), &settings, &sources, &mut |_, _| Ok(())).unwrap();
        assert_eq!(read_all(target.path()), [sample(0), sample(3)]);
    }
}
