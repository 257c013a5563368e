//! The compressed cache: reading, torn and damaged frames, and crashes between the writes of its two files.

use std::fs;
use std::path::Path;

use distill::cache::frames::{CompressionLevel, FrameScan, compress};
use distill::cache::record::{Answer, Record};
use distill::cache::recovery::{BadLine, FileEnding, ScanError};
use distill::cache::writer::Cache;
use distill::cache::{self, compressed_file, plain_file};
use distill::config::{self, Compression, Durability};
use distill::exit::Exit;

use crate::cache_samples::{encode, sample};

const ZSTD: config::CacheConfig = config::CacheConfig {
    durability: Durability::Batch,
    compression: Compression::Zstd,
};

fn open(dir: &Path) -> anyhow::Result<Cache> {
    Cache::open(dir, &ZSTD)
}

fn read_all(dir: &Path) -> anyhow::Result<Vec<Record>> {
    distill::cache::reader::read(dir)?.collect()
}

fn records(range: std::ops::Range<u64>) -> Vec<Record> {
    range.map(sample).collect()
}

/// Compresses the sample records of this range into a frame.
fn frame(range: std::ops::Range<u64>) -> Vec<u8> {
    compress(&encode(records(range)), CompressionLevel::Fast).unwrap()
}

/// Creates a cache folder with these contents of its compressed and its plain file.
fn folder(frames: &[u8], plain: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(compressed_file(dir.path()), frames).unwrap();
    fs::write(plain_file(dir.path()), plain).unwrap();
    dir
}

/// Returns the lines of the complete records in a compressed file up to the first damage, and the ending of the file or
/// the damage.
fn scan(file: &[u8]) -> (Vec<Vec<u8>>, Result<FileEnding, BadLine>) {
    let mut scan = FrameScan::new(file);
    let mut lines = Vec::new();
    loop {
        match scan.advance() {
            Ok(true) => lines.push(scan.line().to_vec()),
            Ok(false) => return (lines, Ok(scan.ending())),
            Err(ScanError::Bad(bad)) => return (lines, Err(bad)),
            Err(ScanError::Read(error)) => panic!("{error}"),
        }
    }
}

/// Returns the lines of the sample records of this range, without their newlines.
fn lines(range: std::ops::Range<u64>) -> Vec<Vec<u8>> {
    records(range)
        .into_iter()
        .map(|record| encode([record]).strip_suffix(b"\n").unwrap().to_vec())
        .collect()
}

/// Returns a record whose answer has `bytes` bytes that hardly compress.
fn large(number: u64, bytes: usize) -> Record {
    let mut random = fastrand::Rng::with_seed(number);
    Record {
        answer: Answer {
            text: std::iter::repeat_with(|| random.alphanumeric())
                .take(bytes)
                .collect(),
            ..Answer::default()
        },
        ..sample(number)
    }
}

#[test]
fn older_records_are_compressed_and_stay_readable() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = (0..100).map(|number| large(number, 100_000)).collect();
    let cache = open(dir.path()).unwrap();
    for (index, record) in all.iter().enumerate() {
        cache.append(record).unwrap();
        // Reads while the compressor is running.
        if index % 20 == 19 {
            let records = read_all(dir.path()).unwrap();
            assert!(records == all[..=index], "after record {index}");
        }
    }
    assert_eq!(cache.len(), all.len());
    drop(cache);
    let text = zstd::decode_all(&fs::read(compressed_file(dir.path())).unwrap()[..]).unwrap();
    assert!(
        text == encode(all.clone()),
        "zstd does not decompress the file to its lines"
    );
    assert_eq!(fs::read(plain_file(dir.path())).unwrap(), b"");
    assert!(read_all(dir.path()).unwrap() == all);

    // With compression turned off, compressed records stay compressed, and new records are plain.
    let cache = Cache::open(dir.path(), &config::CacheConfig::default()).unwrap();
    assert_eq!(cache.len(), all.len());
    assert!(cache.contains(&all[7].key) && !cache.contains(&sample(500).key));
    cache.append(&all[7]).unwrap();
    cache.append(&sample(500)).unwrap();
    drop(cache);
    assert_eq!(
        fs::read(plain_file(dir.path())).unwrap(),
        encode([sample(500)])
    );
    let with_new = [&all[..], &[sample(500)]].concat();
    assert!(read_all(dir.path()).unwrap() == with_new);
}

#[test]
fn plain_cache_can_be_compressed_later() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = (0..140).map(|number| large(number, 100_000)).collect();
    fs::write(plain_file(dir.path()), encode(all.clone())).unwrap();
    let cache = open(dir.path()).unwrap();
    assert_eq!(fs::metadata(plain_file(dir.path())).unwrap().len(), 0);
    cache.append(&sample(500)).unwrap();
    cache.stop_compressing();
    drop(cache);
    assert_eq!(
        fs::read(plain_file(dir.path())).unwrap(),
        encode([sample(500)]),
        "lines were compressed after `stop_compressing`"
    );
    let with_new = [&all[..], &[sample(500)]].concat();
    assert!(read_all(dir.path()).unwrap() == with_new);
}

#[test]
fn lines_with_bytes_added_by_editors_can_be_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = (0..140).map(|number| large(number, 100_000)).collect();
    let text = String::from_utf8(encode(all.clone())).unwrap();
    let text = format!("\u{feff}{}", text.replace('\n', "\r\n\r\n"));
    fs::write(plain_file(dir.path()), text).unwrap();
    drop(open(dir.path()).unwrap());
    assert_eq!(fs::metadata(plain_file(dir.path())).unwrap().len(), 0);
    assert!(read_all(dir.path()).unwrap() == all);
    fs::remove_file(dir.path().join("responses.index")).unwrap();
    assert_eq!(open(dir.path()).unwrap().len(), all.len());
}

#[test]
fn truncated_compressed_file_keeps_the_frames_before_the_cut() {
    let frames: Vec<_> = (0..5)
        .map(|index| frame(index * 10..index * 10 + 10))
        .collect();
    let file = frames.concat();
    let mut ends = vec![0];
    for frame in &frames {
        ends.push(ends[ends.len() - 1] + frame.len());
    }
    let expected = lines(0..50);
    for cut in 0..=file.len() {
        let (scanned, ending) = scan(&file[..cut]);
        let complete = ends.iter().rposition(|&end| end <= cut).unwrap();
        assert!(scanned == expected[..complete * 10], "cut at {cut}");
        match ending {
            Ok(FileEnding::Clean) => assert_eq!(cut, ends[complete]),
            Ok(FileEnding::Torn(bad)) => assert_eq!(bad.offset, ends[complete] as u64),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
    // Opens the truncated file. The plain file contains the lines of the torn frame, as after a crash, or nothing.
    for (cut, plain) in [
        (ends[3] + 1, 30..40),
        (ends[4] + 200, 40..50),
        (ends[2] - 1, 0..0),
    ] {
        let dir = folder(&file[..cut], &encode(records(plain.clone())));
        let complete = ends.iter().rposition(|&end| end <= cut).unwrap();
        let cache = Cache::open(dir.path(), &config::CacheConfig::default()).unwrap();
        // Lines of the torn frame may be readable.
        let min_records = complete * 10 + plain.clone().count();
        assert!(
            (min_records..=min_records + 10).contains(&cache.len()),
            "cut at {cut}"
        );
        cache.append(&sample(99)).unwrap();
        drop(cache);
        let remaining = fs::read(compressed_file(dir.path())).unwrap();
        assert!(remaining == file[..ends[complete]]);
        let torn = fs::read(dir.path().join("responses.torn")).unwrap();
        assert!(torn == file[ends[complete]..cut]);
        let read = read_all(dir.path()).unwrap();
        assert_eq!(read.last(), Some(&sample(99)));
        assert_eq!(read[..complete * 10], records(0..complete as u64 * 10));
    }
}

#[test]
fn readable_lines_of_a_torn_frame_are_kept() {
    // A frame of several blocks of 128 KiB, of which the last is truncated.
    let all: Vec<_> = (0..40).map(|number| large(number, 20_000)).collect();
    let frame = compress(&encode(all.clone()), CompressionLevel::Fast).unwrap();
    let dir = folder(&frame[..frame.len() - 20_000], b"");
    let readable = open(dir.path()).unwrap().len();
    assert!((20..40).contains(&readable), "{readable}");
    assert!(read_all(dir.path()).unwrap() == all[..readable]);
}

#[test]
fn flipped_bits_in_frames_are_never_accepted() {
    let frames: Vec<_> = (0..4)
        .map(|index| frame(index * 5..index * 5 + 5))
        .collect();
    let file = frames.concat();
    let expected = lines(0..20);
    let mut starts = vec![0];
    for frame in &frames {
        starts.push(starts[starts.len() - 1] + frame.len());
    }
    // The end of the last frame is not the start of a frame.
    starts.pop();
    let last_start = starts[starts.len() - 1];
    let mut torn = 0;
    let mut damaged = 0;
    for at in 0..file.len() {
        if !crate::nightly() && at % 2 == 1 {
            continue;
        }
        for bit in 0..8 {
            if !crate::nightly() && bit != (at / 2) % 8 {
                continue;
            }
            let mut flipped = file.clone();
            flipped[at] ^= 1 << bit;
            let (scanned, ending) = scan(&flipped);
            let start = *starts.iter().rfind(|&&start| start <= at).unwrap();
            match ending {
                Err(bad) => {
                    damaged += 1;
                    // The start of the frame, or a later offset if the flipped bit makes the frame appear shorter.
                    assert!(
                        (start..=at + 2000).contains(&(bad.offset as usize)),
                        "byte {at}"
                    );
                }
                // The last frame appears to end after the end of the file, or before it.
                Ok(FileEnding::Torn(bad)) => {
                    torn += 1;
                    assert_eq!(start, last_start, "byte {at}, bit {bit}");
                    assert!(bad.offset as usize >= last_start, "byte {at}, bit {bit}");
                }
                // zstd ignores the bit, and all lines are valid.
                Ok(ending) => {
                    assert_eq!(ending, FileEnding::Clean);
                    assert!(scanned == expected, "byte {at}, bit {bit}");
                }
            }
            assert!(expected.starts_with(&scanned), "byte {at}, bit {bit}");
        }
    }
    assert!(
        damaged > 100 && torn < damaged / 10,
        "{damaged} damaged, {torn} torn"
    );
}

#[test]
fn damaged_frame_in_the_middle_is_refused_with_its_offset() {
    let [one, mut damaged, three] = [frame(0..5), frame(5..10), frame(10..15)];
    let middle = damaged.len() / 2;
    damaged[middle] ^= 4;
    let dir = folder(
        &[&one[..], &damaged, &three].concat(),
        &encode(records(15..17)),
    );
    let location = format!("line 6, in the frame at byte {}", one.len());
    for error in [
        open(dir.path()).map(|_| ()).unwrap_err(),
        read_all(dir.path()).map(|_| ()).unwrap_err(),
    ] {
        let message = error.to_string();
        assert!(message.contains(&location), "{message}");
        assert!(message.contains("responses.jsonl.zst"), "{message}");
        assert_eq!(Exit::code_of(&error), 5);
    }
    let report = cache::reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!((report.records, report.damaged.len()), (12, 1));
}

#[test]
fn verify_lists_all_damage_of_the_plain_file_beside_a_compressed_one() {
    let plain = [
        b"oops\n",
        &encode(records(5..7))[..],
        b"oops\n",
        &encode(records(7..8)),
    ];
    let dir = folder(&frame(0..6), &plain.concat());
    let report = cache::reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    let lines: Vec<u64> = report.damaged.iter().map(|(_, bad)| bad.line).collect();
    assert_eq!((report.records, lines), (8, vec![1, 4]));
    // The record that is in both files is read once.
    assert!(report.repeated.is_empty(), "{:?}", report.repeated);
}

#[test]
fn crash_during_compression_leaves_no_repeated_records() {
    for settings in [config::CacheConfig::default(), ZSTD] {
        let dir = folder(
            &[frame(0..10), frame(10..20)].concat(),
            &encode(records(10..25)),
        );
        assert_eq!(read_all(dir.path()).unwrap(), records(0..25));
        let cache = Cache::open(dir.path(), &settings).unwrap();
        assert_eq!(cache.len(), 25);
        drop(cache);
        assert_eq!(read_all(dir.path()).unwrap(), records(0..25));
        let report = cache::reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
        assert!(report.repeated.is_empty());
    }
    // Two different answers with one key both stay, because both were paid for.
    let other_answer = Record {
        prompt_id: "other".to_owned(),
        ..sample(3)
    };
    let dir = folder(&frame(0..10), &encode([other_answer.clone(), sample(11)]));
    drop(open(dir.path()).unwrap());
    let expected = [&records(0..10)[..], &[other_answer, sample(11)]].concat();
    assert_eq!(read_all(dir.path()).unwrap(), expected);
}

#[test]
fn frames_of_other_writers_are_read() {
    // An empty frame, and a frame without content size, checksum and final newline.
    let mut text = encode(records(0..10));
    text.pop();
    let stream = zstd::encode_all(&text[..], 1).unwrap();
    let empty = zstd::encode_all(&b""[..], 1).unwrap();
    let dir = folder(&[&empty[..], &stream, &frame(10..20)].concat(), b"");
    assert_eq!(open(dir.path()).unwrap().len(), 20);
    assert_eq!(read_all(dir.path()).unwrap(), records(0..20));
}
