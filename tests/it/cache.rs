//! The cache keeps every acknowledged record, and says so when it cannot.

use std::fs;
use std::path::Path;

use distill::cache::record::{Answer, Record, SCHEMA};
use distill::cache::recovery::FileEnding;
use distill::cache::usage::Usage;
use distill::cache::writer::Cache;
use distill::cache::{self, line, reader};
use distill::commands;
use distill::config;
use distill::exit::Exit;
use serde_json::json;

use crate::cache_samples::{encode, sample, scan};
use crate::nightly;

fn open(dir: &Path) -> anyhow::Result<Cache> {
    Cache::open(dir, &config::CacheConfig::default())
}

fn read_all(dir: &Path) -> anyhow::Result<Vec<Record>> {
    distill::cache::reader::read(dir)?.collect()
}

/// A cache folder that holds `file`.
fn folder(file: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(cache::plain_file(dir.path()), file).unwrap();
    dir
}

#[test]
fn truncated_file_keeps_the_records_before_the_cut() {
    let records: Vec<_> = (0..50).map(sample).collect();
    let file = encode(records.clone());
    let ends: Vec<_> = file
        .iter()
        .enumerate()
        .filter_map(|(at, &byte)| (byte == b'\n').then_some(at))
        .collect();
    for cut in 0..=file.len() {
        let (lines, ending) = scan(&file[..cut]);
        // A record is whole without its newline, too.
        let whole = ends.iter().filter(|&&end| end <= cut).count();
        assert_eq!(lines.len(), whole, "cut at {cut}");
        let after_newline = cut == 0 || file[cut - 1] == b'\n';
        let expected = if after_newline {
            FileEnding::Clean
        } else if ends.contains(&cut) {
            FileEnding::Unterminated
        } else {
            let start = ends[..whole].last().map_or(0, |end| end + 1);
            match ending {
                Ok(FileEnding::Torn(ref bad)) => assert_eq!(bad.offset, start as u64),
                ref other => panic!("cut at {cut}: {other:?}"),
            }
            continue;
        };
        assert_eq!(ending, Ok(expected), "cut at {cut}");
    }
    let (lines, _) = scan(&file);
    let decoded: Vec<_> = lines
        .iter()
        .map(|line| line::decode(line).unwrap())
        .collect();
    assert_eq!(decoded, records);
}

#[test]
fn torn_tail_is_moved_to_another_file_and_appending_works() {
    let file = encode((0..3).map(sample));
    let second = encode((0..1).map(sample)).len();
    let third = encode((0..2).map(sample)).len();
    // Inside the second line, at its start, before its newline, and inside the third.
    for cut in [
        second + 1,
        second + 100,
        third - 1,
        third,
        third + 17,
        file.len() - 2,
    ] {
        let dir = folder(&file[..cut]);
        let whole = if cut < third - 1 { 1 } else { 2 };
        let cache = open(dir.path()).unwrap();
        assert_eq!(cache.len(), whole, "cut at {cut}");
        assert!(cache.contains(&sample(0).key) && !cache.contains(&sample(2).key));
        cache.append(&sample(2)).unwrap();
        drop(cache);

        let mut expected: Vec<_> = (0..whole as u64).map(sample).collect();
        expected.push(sample(2));
        assert_eq!(read_all(dir.path()).unwrap(), expected, "cut at {cut}");
        let kept = [second, third][whole - 1];
        let torn = fs::read(dir.path().join("responses.torn")).unwrap_or_default();
        assert_eq!(torn, &file[kept.min(cut)..cut], "cut at {cut}");
    }
}

#[test]
fn flipped_bits_are_damage_and_not_a_torn_tail() {
    let file = encode((0..20).map(sample));
    let lines: Vec<&[u8]> = file.split_inclusive(|&byte| byte == b'\n').collect();
    let mut start = 0;
    for (index, original) in lines.iter().enumerate() {
        let last = index + 1 == lines.len();
        // One bit of every second byte, a sixteenth of all; or each bit of each byte.
        let some = (0..original.len()).step_by(2).chain([original.len() - 1]);
        let some = some.map(|at| (at, (at / 2 + index) % 8));
        let every = (0..original.len()).flat_map(|at| (0..8).map(move |bit| (at, bit)));
        let flips: Vec<_> = if nightly() {
            every.collect()
        } else {
            some.collect()
        };
        for (at, bit) in flips {
            let mut flipped = file.clone();
            flipped[start + at] ^= 1 << bit;
            let (kept, ending) = scan(&flipped);
            assert_eq!(kept.len(), index, "line {index}, byte {at}");
            for (kept, line) in kept.iter().zip(&lines) {
                assert_eq!(kept, line.strip_suffix(b"\n").unwrap());
            }
            let torn = last && (at + 1 == original.len() || flipped[start + at] == 0);
            let bad = match ending {
                Ok(FileEnding::Torn(bad)) if torn => bad,
                Err(bad) if !torn => bad,
                other => panic!("line {index}, byte {at}: {other:?}"),
            };
            assert_eq!((bad.line, bad.offset), (index as u64 + 1, start as u64));
        }
        start += original.len();
    }
}

#[test]
fn unusual_files_are_read_or_refused() {
    let [one, two, three] = [0, 1, 2].map(|n| encode([sample(n)]));
    let bare = |line: &[u8]| line.strip_suffix(b"\n").unwrap().to_vec();
    let crlf = |line: &[u8]| [&bare(line)[..], b"\r\n"].concat();
    let sealed = |body: &str| {
        let body = format!("{body},");
        format!(
            "{body}\"crc\":\"{:08x}\"}}\n",
            crc32c::crc32c(body.as_bytes())
        )
        .into_bytes()
    };
    // A field that only a later writer of this schema knows, in front of everything else.
    let text = String::from_utf8(bare(&one)).unwrap();
    let future = sealed(&text[..text.rfind(",\"crc\"").unwrap()].replacen(
        "{\"v\":1,",
        "{\"mood\":{\"good\":true},\"v\":1,",
        1,
    ));
    let wrong = {
        let mut line = two.clone();
        line[30] ^= 1;
        line
    };
    let huge = encode([Record {
        answer: Answer {
            text: "x".repeat(8 << 20),
            ..Answer::default()
        },
        ..sample(0)
    }]);

    // What the file is, its bytes, and the records in it or a part of the refusal.
    let cases: [(&str, Vec<u8>, Result<usize, &str>); 14] = [
        ("empty", vec![], Ok(0)),
        ("no final newline", [&one[..], &bare(&two)].concat(), Ok(2)),
        ("CRLF", [crlf(&one), crlf(&two)].concat(), Ok(2)),
        (
            "byte order mark",
            [b"\xef\xbb\xbf", &one[..], &two].concat(),
            Ok(2),
        ),
        ("blank lines", [&one[..], b"\n\r\n", &two].concat(), Ok(2)),
        ("NULs behind", [&one[..], &[0; 4096]].concat(), Ok(1)),
        (
            "NULs and half a line",
            [&one[..], &[0; 4096], &two[60..], &three[..9]].concat(),
            Ok(1),
        ),
        (
            "garbage behind",
            [&one[..], b"\xff\x00\xfe"].concat(),
            Ok(1),
        ),
        ("future field", [&future[..], &two].concat(), Ok(2)),
        ("huge line", [&huge[..], &two].concat(), Ok(2)),
        (
            "NULs between",
            [&one[..], &[0; 64], b"\n", &two].concat(),
            Err("line 2, at byte"),
        ),
        (
            "an edited last line",
            [&one[..], &wrong].concat(),
            Err("line 2, at byte"),
        ),
        (
            "a line that was cut",
            [&one[..], &two[..50], &three].concat(),
            Err("line 2, at byte"),
        ),
        (
            "another format",
            b"{\"text\":\"hello\"}\n".to_vec(),
            Err("no checksum"),
        ),
    ];
    for (name, file, expected) in cases {
        let dir = folder(&file);
        let read = read_all(dir.path()).map(|records| records.len());
        let opened = open(dir.path()).map(|cache| cache.len());
        for result in [read, opened] {
            match (result, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{name}"),
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{name}: {error}");
                    assert_eq!(Exit::code_of(&error), 5, "{name}");
                    assert_eq!(
                        fs::read(cache::plain_file(dir.path())).unwrap(),
                        file,
                        "{name}"
                    );
                }
                (result, _) => panic!("{name}: {result:?}"),
            }
        }
        if expected.is_ok() {
            let cache = open(dir.path()).unwrap();
            cache.append(&sample(99)).unwrap();
            drop(cache);
            assert_eq!(
                read_all(dir.path()).unwrap().last(),
                Some(&sample(99)),
                "{name}"
            );
        }
    }
}

#[test]
fn newer_schema_is_refused_with_advice() {
    let newer = encode([Record {
        v: SCHEMA + 1,
        ..sample(1)
    }]);
    let dir = folder(&[&encode([sample(0)])[..], &newer].concat());
    for error in [
        read_all(dir.path()).unwrap_err(),
        open(dir.path()).map(|_| ()).unwrap_err(),
    ] {
        assert!(error.to_string().contains("line 2"), "{error}");
        assert!(error.to_string().contains("update distill"), "{error}");
        assert_eq!(Exit::code_of(&error), 5);
    }
}

/// The file was written by the first release. It is never written again: a new schema gets a file
/// of its own beside it.
#[test]
fn v1_file_stays_readable() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/cache-v1.jsonl");
    let dir = folder(&fs::read(path).unwrap());
    let expected = golden().into_iter().zip([0u64, 1, 3, 4]);
    let expected = expected.map(|(record, number)| Record {
        v: 1,
        key: blake3::hash(&number.to_le_bytes()).to_hex().to_string(),
        ..record
    });
    assert_eq!(read_all(dir.path()).unwrap(), expected.collect::<Vec<_>>());
}

fn golden() -> Vec<Record> {
    let full = Record {
        request: json!({
            "model": "teacher-1",
            "messages": [
                {"role": "system", "content": "Answer in one line.\n<|im_end|>"},
                {"role": "user", "content": "«Was kostet das?» \u{2028} \"quoted\" \\ / \u{7}"},
            ],
            "temperature": 1.0, "top_p": 1.0, "max_completion_tokens": 512,
            "logprobs": true, "top_logprobs": 20, "stop": ["\n\n"], "seed": 7,
        }),
        answer: Answer {
            text: "1 🦀".to_owned(),
            finish_reason: "length".to_owned(),
            refusal: String::new(),
            reasoning: "two hands, one crab".to_owned(),
        },
        usage: Some(Usage {
            prompt_tokens: 1200,
            completion_tokens: 512,
            cached_tokens: 1024,
            reasoning_tokens: 500,
        }),
        fingerprint: "fp_44709d6fcb".to_owned(),
        extra: json!({"service_tier": "default", "provider": {"name": "x", "cost": 1.5e-7}})
            .as_object()
            .unwrap()
            .clone(),
        ..sample(0)
    };
    let parts = Record {
        request: json!({
            "model": "teacher-1",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        }),
        ..sample(1)
    };
    let quarantined = Record {
        reason: "content_filter".to_owned(),
        answer: Answer {
            refusal: "I cannot help with that.".to_owned(),
            ..Answer::default()
        },
        cost_usd: None,
        usage: None,
        ..sample(3)
    };
    vec![full, parts, quarantined, sample(4)]
}

#[test]
fn request_round_trips_through_a_record() {
    for request in [
        json!({"model": "m", "messages": [{"role": "user", "content": "a", "name": "bob"}]}),
        json!({"model": "m", "messages": [{"role": "user", "content": null}]}),
        json!({"model": "m", "messages": [{"role": "user", "text": "a"}], "seed": 1}),
        json!({"model": "", "messages": [], "stop": null}),
        json!({"prompt": "once upon", "temperature": 0.1}),
        json!(null),
    ] {
        let record = Record {
            request,
            ..sample(1)
        };
        let line = line::encode(&record).unwrap();
        assert_eq!(line::decode(&line).unwrap(), record);
    }
}

#[test]
fn second_writer_is_refused_with_the_pid_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).unwrap();
    let error = open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(
        error.contains(&format!("(pid {})", std::process::id())),
        "{error}"
    );
    assert!(
        error.contains("another process") && error.contains("run_dir"),
        "{error}"
    );
    drop(first);
    open(dir.path()).unwrap();
}

#[test]
fn reader_sees_records_of_a_live_writer() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir.path().join("run/cache")).unwrap();
    assert!(cache.is_empty());
    for n in 0..3 {
        cache.append(&sample(n)).unwrap();
        assert!(cache.contains(&sample(n).key));
        assert_eq!(
            read_all(&dir.path().join("run/cache")).unwrap().len(),
            n as usize + 1
        );
    }
    cache.sync().unwrap();
}

#[test]
fn repeated_key_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path()).unwrap();
    cache.append(&sample(1)).unwrap();
    cache
        .append(&Record {
            prompt_id: "again".to_owned(),
            ..sample(1)
        })
        .unwrap();
    assert_eq!(cache.len(), 1);
    drop(cache);
    assert_eq!(read_all(dir.path()).unwrap(), [sample(1)]);
}

#[test]
fn verify_lists_all_damage() {
    let good = encode([sample(0), sample(1), sample(0)]);
    let dir = folder(&good);
    let findings = reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(findings.records, 3);
    assert_eq!(findings.repeated, [(sample(0).key, 2)]);
    let error = commands::cache::verify(dir.path(), false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("keys with more than one record: 1"),
        "{error}"
    );

    // Damage, NULs, two good lines, damage, and a torn tail: everything is named.
    let file = [b"oops\n\0\0\n", &good[..], b"oops\n\0\n", &good[..20]].concat();
    let dir = folder(&file);
    let findings = reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(findings.records, 3);
    let at = good.len() as u64 + 8;
    let places: Vec<_> = findings
        .damaged
        .iter()
        .map(|(_, bad)| (bad.line, bad.offset))
        .collect();
    assert_eq!(places, [(1, 0), (2, 5), (6, at)]);
    let torn: Vec<_> = findings.torn.iter().map(|(_, bad)| bad.offset).collect();
    assert_eq!(torn, [at + 5]);
    let error = commands::cache::verify(dir.path(), true).unwrap_err();
    assert_eq!(Exit::code_of(&error), 5);

    let dir = folder(&encode([sample(0)]));
    commands::cache::verify(dir.path(), false).unwrap();
}
