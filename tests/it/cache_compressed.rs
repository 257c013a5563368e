//! The compressed cache: the same records, through every crash that can part its two files.

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

/// The frame of these records.
fn frame(range: std::ops::Range<u64>) -> Vec<u8> {
    compress(&encode(records(range)), CompressionLevel::Fast).unwrap()
}

/// A cache folder with these two files.
fn folder(frames: &[u8], plain: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(compressed_file(dir.path()), frames).unwrap();
    fs::write(plain_file(dir.path()), plain).unwrap();
    dir
}

/// The lines of all whole records in a compressed file, and its ending or the damage.
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

fn lines(range: std::ops::Range<u64>) -> Vec<Vec<u8>> {
    records(range)
        .into_iter()
        .map(|record| encode([record]).strip_suffix(b"\n").unwrap().to_vec())
        .collect()
}

/// A record of so many bytes that hardly compress.
fn large(n: u64, bytes: usize) -> Record {
    let mut random = fastrand::Rng::with_seed(n);
    Record {
        answer: Answer {
            text: std::iter::repeat_with(|| random.alphanumeric())
                .take(bytes)
                .collect(),
            ..Answer::default()
        },
        ..sample(n)
    }
}

#[test]
fn older_records_are_compressed_and_stay_readable() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = (0..100).map(|n| large(n, 100_000)).collect();
    let cache = open(dir.path()).unwrap();
    for (n, record) in all.iter().enumerate() {
        cache.append(record).unwrap();
        // At each moment of the compressing.
        if n % 20 == 19 {
            assert!(read_all(dir.path()).unwrap() == all[..=n], "after {n}");
        }
    }
    assert_eq!(cache.len(), all.len());
    drop(cache);
    let text = zstd::decode_all(&fs::read(compressed_file(dir.path())).unwrap()[..]).unwrap();
    assert!(text == encode(all.clone()), "zstdcat reads the lines");
    assert_eq!(fs::read(plain_file(dir.path())).unwrap(), b"");
    assert!(read_all(dir.path()).unwrap() == all);

    // Without compression again: what is compressed stays, what comes is plain.
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
    let all: Vec<_> = (0..140).map(|n| large(n, 100_000)).collect();
    fs::write(plain_file(dir.path()), encode(all.clone())).unwrap();
    let cache = open(dir.path()).unwrap();
    assert_eq!(fs::metadata(plain_file(dir.path())).unwrap().len(), 0);
    cache.append(&sample(500)).unwrap();
    cache.stop_compressing();
    drop(cache);
    assert_eq!(
        fs::read(plain_file(dir.path())).unwrap(),
        encode([sample(500)]),
        "closing at once compresses nothing"
    );
    let with_new = [&all[..], &[sample(500)]].concat();
    assert!(read_all(dir.path()).unwrap() == with_new);
}

#[test]
fn bytes_added_by_editors_are_compressed_with_the_lines() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = (0..140).map(|n| large(n, 100_000)).collect();
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
    let frames: Vec<_> = (0..5).map(|n| frame(n * 10..n * 10 + 10)).collect();
    let file = frames.concat();
    let mut ends = vec![0];
    for frame in &frames {
        ends.push(ends[ends.len() - 1] + frame.len());
    }
    let expected = lines(0..50);
    for cut in 0..=file.len() {
        let (found, ending) = scan(&file[..cut]);
        let whole = ends.iter().rposition(|&end| end <= cut).unwrap();
        assert!(found == expected[..whole * 10], "cut at {cut}");
        match ending {
            Ok(FileEnding::Clean) => assert_eq!(cut, ends[whole]),
            Ok(FileEnding::Torn(bad)) => assert_eq!(bad.offset, ends[whole] as u64),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
    // Opened, with the lines of the torn frame in the plain file, as a crash leaves them, or not.
    for (cut, plain) in [
        (ends[3] + 1, 30..40),
        (ends[4] + 200, 40..50),
        (ends[2] - 1, 0..0),
    ] {
        let dir = folder(&file[..cut], &encode(records(plain.clone())));
        let whole = ends.iter().rposition(|&end| end <= cut).unwrap();
        let cache = Cache::open(dir.path(), &config::CacheConfig::default()).unwrap();
        let least = whole * 10 + plain.clone().count();
        assert!((least..=least + 10).contains(&cache.len()), "cut at {cut}");
        cache.append(&sample(99)).unwrap();
        drop(cache);
        let kept = fs::read(compressed_file(dir.path())).unwrap();
        assert!(kept == file[..ends[whole]]);
        let torn = fs::read(dir.path().join("responses.torn")).unwrap();
        assert!(torn == file[ends[whole]..cut]);
        let found = read_all(dir.path()).unwrap();
        assert_eq!(found.last(), Some(&sample(99)));
        assert_eq!(found[..whole * 10], records(0..whole as u64 * 10));
    }
}

#[test]
fn readable_lines_of_a_torn_frame_are_kept() {
    // Several blocks of 128 KiB, of which the last is cut.
    let all: Vec<_> = (0..40).map(|n| large(n, 20_000)).collect();
    let frame = compress(&encode(all.clone()), CompressionLevel::Fast).unwrap();
    let dir = folder(&frame[..frame.len() - 20_000], b"");
    let kept = open(dir.path()).unwrap().len();
    assert!((20..40).contains(&kept), "{kept}");
    assert!(read_all(dir.path()).unwrap() == all[..kept]);
}

#[test]
fn flipped_bits_in_frames_are_never_accepted() {
    let frames: Vec<_> = (0..4).map(|n| frame(n * 5..n * 5 + 5)).collect();
    let file = frames.concat();
    let expected = lines(0..20);
    let (mut torn, mut damaged) = (0, 0);
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
            let (found, ending) = scan(&flipped);
            let start: usize = frames
                .iter()
                .map(Vec::len)
                .scan(0, |sum, length| {
                    *sum += length;
                    Some(*sum)
                })
                .filter(|&end| end <= at)
                .max()
                .unwrap_or(0);
            match ending {
                Err(bad) => {
                    damaged += 1;
                    // Its own frame's start, or what follows a frame that is taken to be shorter.
                    assert!(
                        (start..=at + 2000).contains(&(bad.offset as usize)),
                        "byte {at}"
                    );
                }
                // The length of the last frame reaches behind the end of the file, or leaves a rest.
                Ok(FileEnding::Torn(bad)) => {
                    torn += 1;
                    let last = file.len() - frames[3].len();
                    assert_eq!(start, last, "byte {at}, bit {bit}");
                    assert!(bad.offset as usize >= last, "byte {at}, bit {bit}");
                }
                // A bit that zstd has no use for, in a frame whose lines all hold.
                Ok(ending) => {
                    assert_eq!(ending, FileEnding::Clean);
                    assert!(found == expected, "byte {at}, bit {bit}");
                }
            }
            assert!(expected.starts_with(&found), "byte {at}, bit {bit}");
        }
    }
    assert!(
        damaged > 100 && torn < damaged / 10,
        "{damaged} damaged, {torn} torn"
    );
}

#[test]
fn damaged_frame_in_the_middle_is_refused_by_offset() {
    let [one, two, three] = [frame(0..5), frame(5..10), frame(10..15)];
    let mut bad = two.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 4;
    let dir = folder(&[&one[..], &bad, &three].concat(), &encode(records(15..17)));
    let place = format!("line 6, in the frame at byte {}", one.len());
    for error in [
        open(dir.path()).map(|_| ()).unwrap_err(),
        read_all(dir.path()).map(|_| ()).unwrap_err(),
    ] {
        let message = error.to_string();
        assert!(message.contains(&place), "{message}");
        assert!(message.contains("responses.jsonl.zst"), "{message}");
        assert_eq!(Exit::code_of(&error), 5);
    }
    let findings = cache::reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!((findings.records, findings.damaged.len()), (12, 1));
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
        let findings = cache::reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
        assert!(findings.repeated.is_empty());
    }
    // Two answers to one key are no such thing: both were paid for.
    let other = Record {
        prompt_id: "other".to_owned(),
        ..sample(3)
    };
    let dir = folder(&frame(0..10), &encode([other.clone(), sample(11)]));
    drop(open(dir.path()).unwrap());
    let expected = [&records(0..10)[..], &[other, sample(11)]].concat();
    assert_eq!(read_all(dir.path()).unwrap(), expected);
}

#[test]
fn frames_of_other_writers_are_read() {
    // Without content size, checksum or a newline at the end, and an empty one.
    let mut text = encode(records(0..10));
    text.pop();
    let stream = zstd::encode_all(&text[..], 1).unwrap();
    let empty = zstd::encode_all(&b""[..], 1).unwrap();
    let dir = folder(&[&empty[..], &stream, &frame(10..20)].concat(), b"");
    assert_eq!(open(dir.path()).unwrap().len(), 20);
    assert_eq!(read_all(dir.path()).unwrap(), records(0..20));
}
