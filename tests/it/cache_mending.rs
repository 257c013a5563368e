//! `cache repair` and `cache merge`: no paid answer is lost.

use std::fs;
use std::path::Path;

use distill::cache::frames::{CompressionLevel, compress};
use distill::cache::merge::{MergeReport, merge, merge_all};
use distill::cache::record::{Answer, Record, SCHEMA};
use distill::cache::repair::{RepairReport, repair};
use distill::cache::writer::Cache;
use distill::cache::{compressed_file, conflicts_file, plain_file, quarantine_file, reader};
use distill::config::{self, Compression};
use distill::exit::Exit;

use crate::cache_samples::{encode, sample};

/// Creates a cache folder with these contents of its compressed and its plain file; an empty file is not created.
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

/// Returns the sorted names of the files in `dir`.
fn file_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Returns text that hardly compresses.
fn random_text(seed: u64) -> String {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.alphanumeric())
        .take(30_000)
        .collect()
}

/// Returns another answer to the request of this sample record.
fn other_answer(number: u64) -> Record {
    Record {
        answer: Answer {
            text: "another answer".to_owned(),
            ..Answer::default()
        },
        ..sample(number)
    }
}

/// Asserts that the cache is valid and contains exactly these records.
#[track_caller]
fn assert_contains(dir: &Path, expected: &[Record]) {
    assert!(read_all(dir) == expected, "the records differ");
    let report = reader::verify_cache(dir, &mut |_, _| Ok(())).unwrap();
    assert!(report.damaged.is_empty() && report.torn.is_empty());
    assert!(report.repeated.is_empty());
    let opened = Cache::open(dir, &config::CacheConfig::default()).unwrap();
    assert_eq!(opened.len(), expected.len());
}

#[test]
fn repair_moves_damaged_and_conflicting_lines_and_keeps_the_others() {
    let lines: Vec<_> = (0..6).map(|number| encode([sample(number)])).collect();
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
        &encode([other_answer(1)]),
        b"\r\n",
        &lines[4],
        torn,
    ]
    .concat();
    let dir = folder(b"", &file);
    let report = repair(dir.path()).unwrap();
    let damage = [b"not a record\n", &flipped[..], &[0; 4096], b"\n", torn].concat();
    let expected = RepairReport {
        records: 4,
        quarantined: 4,
        quarantined_bytes: damage.len() as u64,
        rescued: 0,
        conflicts: 1,
    };
    assert_eq!(report, expected);
    assert!(fs::read(quarantine_file(dir.path())).unwrap() == damage);
    assert_eq!(
        fs::read(conflicts_file(dir.path())).unwrap(),
        encode([other_answer(1)])
    );
    assert_contains(dir.path(), &[sample(0), sample(1), sample(3), sample(4)]);

    let second_report = repair(dir.path()).unwrap();
    assert!(!second_report.changed() && second_report.records == 4);
    assert!(fs::read(quarantine_file(dir.path())).unwrap() == damage);
}

#[test]
fn repair_rescues_readable_lines_of_a_damaged_frame() {
    let middle: Vec<_> = (10..30)
        .map(|number| Record {
            answer: Answer {
                text: random_text(number),
                ..Answer::default()
            },
            ..sample(number)
        })
        .collect();
    let frames = [
        frame(records(0..10)),
        frame(middle.clone()),
        frame(records(30..40)),
    ];
    let mut broken = frames[1].clone();
    // The damage is after the middle of the frame, so the first blocks stay readable.
    let damage_start = broken.len() * 5 / 8;
    broken[damage_start..damage_start + 64].fill(0xff);
    let file = [&frames[0][..], &broken, &frames[2]].concat();
    let dir = folder(&file, &encode(records(35..45)));
    let report = repair(dir.path()).unwrap();
    assert!((5..20).contains(&report.rescued), "{report:?}");
    assert_eq!(report.quarantined_bytes, broken.len() as u64);
    assert!(fs::read(quarantine_file(dir.path())).unwrap() == broken);
    let read = read_all(dir.path());
    let rescued: Vec<_> = (middle
        .iter()
        .filter(|&record| read.contains(record))
        .cloned())
    .collect();
    assert_eq!(report.rescued, rescued.len() as u64);
    let expected = [&records(0..10)[..], &rescued, &records(30..45)].concat();
    assert_eq!(report.records, expected.len() as u64);
    assert_contains(dir.path(), &expected);
    // Undamaged frames are copied unchanged.
    let compressed = fs::read(compressed_file(dir.path())).unwrap();
    assert!(compressed.starts_with(&frames[0]) && compressed.ends_with(&frames[2]));
}

#[test]
fn repair_keeps_records_with_bytes_added_by_editors() {
    let edited_lines = |range| {
        let text = String::from_utf8(encode(records(range))).unwrap();
        format!("\u{feff}{}", text.replace('\n', "\r\n\r\n")).into_bytes()
    };
    let frames = compress(&edited_lines(0..10), CompressionLevel::Fast).unwrap();
    let plain = [&edited_lines(10..20)[..], b"damage\r\n"].concat();
    let dir = folder(&frames, &plain);
    let report = repair(dir.path()).unwrap();
    assert_eq!((report.records, report.quarantined), (20, 1));
    assert_eq!(
        fs::read(quarantine_file(dir.path())).unwrap(),
        b"damage\r\n"
    );
    assert_contains(dir.path(), &records(0..20));

    // Such records are also rescued from a damaged frame.
    let dir = folder(&frames[..frames.len() - 1], b"");
    assert_eq!(repair(dir.path()).unwrap().rescued, 10);
    assert_contains(dir.path(), &records(0..10));
}

#[test]
fn repair_does_not_change_valid_newer_or_locked_caches() {
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
            Ok(report) => assert!(!is_newer && !report.changed() && report.records == 15),
            Err(error) => {
                let message = format!("{error:#}");
                assert!(is_newer && message.contains("update distill"), "{message}");
            }
        }
        assert_eq!(fs::read(plain_file(dir.path())).unwrap(), plain);
        assert_eq!(fs::read(compressed_file(dir.path())).unwrap(), frames);
        assert_eq!(
            file_names(dir.path()),
            ["responses.jsonl", "responses.jsonl.zst", "responses.lock"]
        );
    }
    let locked = folder(b"", &encode(records(0..2)));
    let _cache = Cache::open(locked.path(), &config::CacheConfig::default()).unwrap();
    let error = repair(locked.path()).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
}

/// Merges `sources` into the cache in `into`.
fn merge_caches(
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
fn merge_adds_new_keys_and_keeps_both_answers_of_a_conflict() {
    // A record with a field of a later version, which must not be lost.
    let line = String::from_utf8(encode([sample(7)])).unwrap();
    let body = line[..line.rfind("\"crc\"").unwrap()].replacen(
        "{\"v\":2,",
        "{\"v\":2,\"mood\":\"good\",",
        1,
    );
    let crc = crc32c::crc32c(body.as_bytes());
    let future = format!("{body}\"crc\":\"{crc:08x}\"}}\n").into_bytes();
    let first = folder(b"", &[encode(records(0..7)), future.clone()].concat());
    let second = folder(
        &frame(records(5..10)),
        &encode([other_answer(2), sample(11)]),
    );
    let before = fs::read(plain_file(second.path())).unwrap();

    for compression in [Compression::None, Compression::Zstd] {
        let into = tempfile::tempdir().unwrap();
        let into = into.path().join("merged/cache");
        let reports = merge_caches(&into, compression, &[first.path(), second.path()]).unwrap();
        let [first_report, second_report] = &reports[..] else {
            panic!("{reports:?}")
        };
        assert_eq!((first_report.records, first_report.added), (8, 8));
        assert_eq!(first_report.conflicts, 0);
        assert_eq!((second_report.records, second_report.added), (7, 3));
        assert_eq!(second_report.same, 2);
        // The lines of sample 7 differ in the unknown field, so both are kept.
        assert_eq!(second_report.conflicts, 2);
        assert_eq!(second_report.keys, [sample(7).key, sample(2).key]);
        assert_eq!(
            fs::read(conflicts_file(&into)).unwrap(),
            encode([sample(7), other_answer(2)])
        );
        let expected = [&records(0..10)[..], &[sample(11)]].concat();
        assert_contains(&into, &expected);
        let text = match compression {
            Compression::None => fs::read(plain_file(&into)).unwrap(),
            Compression::Zstd => {
                zstd::decode_all(&fs::read(compressed_file(&into)).unwrap()[..]).unwrap()
            }
        };
        assert!(memchr::memmem::find(&text, &future).is_some());

        let reports = merge_caches(&into, compression, &[second.path(), first.path()]).unwrap();
        assert!(reports.iter().all(|report| report.added == 0));
        assert_eq!(reports[0].conflicts, 2);
        assert_contains(&into, &expected);
        assert_eq!(
            fs::read(conflicts_file(&into)).unwrap(),
            encode([sample(7), other_answer(2)]),
            "a conflict must be stored only once"
        );
    }
    assert_eq!(fs::read(plain_file(second.path())).unwrap(), before);

    let clean = tempfile::tempdir().unwrap();
    merge_caches(clean.path(), Compression::None, &[first.path()]).unwrap();
    assert!(!conflicts_file(clean.path()).exists());
}

#[test]
fn merge_refuses_damaged_or_missing_sources() {
    let valid = folder(b"", &encode(records(0..5)));
    let damaged = folder(
        b"",
        &[
            &encode(records(5..8))[..],
            b"damage\n",
            &encode([sample(9)]),
        ]
        .concat(),
    );
    let into = tempfile::tempdir().unwrap();
    let error = merge_caches(
        into.path(),
        Compression::None,
        &[valid.path(), damaged.path()],
    )
    .unwrap_err();
    assert_eq!(Exit::code_of(&error), 5);
    assert!(error.to_string().contains("line 4"), "{error}");
    assert!(error.to_string().contains("cache repair"), "{error}");
    assert_contains(into.path(), &records(0..8));

    for source in [into.path().to_owned(), into.path().join("nowhere")] {
        let error = merge_caches(into.path(), Compression::None, &[&source]).unwrap_err();
        assert_eq!(Exit::code_of(&error), 2, "{error}");
    }
    repair(damaged.path()).unwrap();
    merge_caches(into.path(), Compression::None, &[damaged.path()]).unwrap();
    let expected = [&records(0..8)[..], &[sample(9)]].concat();
    assert_contains(into.path(), &expected);
}

#[test]
fn merge_appends_and_counts_the_records_before_an_invalid_one() {
    let foreign = Record {
        key: sample(7).key,
        ..sample(6)
    };
    let source = folder(b"", &encode([sample(0), sample(1), foreign, sample(3)]));
    let into = tempfile::tempdir().unwrap();
    let mut reports = Vec::new();
    let error = merge_all(
        into.path(),
        &config::CacheConfig::default(),
        &[source.path().to_owned()],
        &mut reports,
        &mut |_, _| Ok(()),
    )
    .unwrap_err();
    assert_eq!(Exit::code_of(&error), 5);
    assert_contains(into.path(), &records(0..2));
    assert_eq!((reports[0].records, reports[0].added), (3, 2));
    let cost = |number: u64| sample(number).cost_usd.unwrap_or(0.0);
    assert!((reports[0].cost_usd - cost(0) - cost(1)).abs() < 1e-12);
}

#[test]
fn merge_appends_conflicts_after_a_torn_one() {
    let source = folder(b"", &encode([other_answer(2)]));
    let whole = encode([other_answer(1)]);
    for (length, complete_conflicts) in [(whole.len() / 2, 0), (whole.len() - 1, 1)] {
        let into = folder(b"", &encode(records(0..5)));
        fs::write(conflicts_file(into.path()), &whole[..length]).unwrap();
        merge_caches(into.path(), Compression::None, &[source.path()]).unwrap();
        let expected: Vec<_> = [other_answer(1)]
            .into_iter()
            .take(complete_conflicts)
            .chain([other_answer(2)])
            .collect();
        assert_eq!(
            fs::read(conflicts_file(into.path())).unwrap(),
            encode(expected)
        );
    }
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
        let report = reader::verify_cache(source.path(), &mut |_, _| Ok(())).unwrap();
        assert_eq!((report.records, report.damaged.len()), (2, 1));
        let (_, bad_line) = &report.damaged[0];
        assert!(bad_line.to_string().contains("another request"));
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
