//! The uncompressed cache: torn tails, damage, unusual files, schema versions, and concurrent access.

use std::fs;
use std::path::Path;

use distill::cache::record::{Answer, Record, SCHEMA};
use distill::cache::recovery::{FileEnding, LineScan, ScanError};
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

/// Creates a cache folder whose plain file contains `file`.
fn folder(file: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(cache::plain_file(dir.path()), file).unwrap();
    dir
}

#[test]
fn truncated_file_keeps_the_records_before_the_cut() {
    let records: Vec<_> = (0..50).map(sample).collect();
    let file = encode(records.clone());
    let newlines: Vec<_> = memchr::memchr_iter(b'\n', &file).collect();
    for cut in 0..=file.len() {
        let (lines, ending) = scan(&file[..cut]);
        // A record without its newline is also complete.
        let complete = newlines.iter().filter(|&&end| end <= cut).count();
        assert_eq!(lines.len(), complete, "cut at {cut}");
        let after_newline = cut == 0 || file[cut - 1] == b'\n';
        let expected = if after_newline {
            FileEnding::Clean
        } else if newlines.contains(&cut) {
            FileEnding::Unterminated
        } else {
            let start = newlines[..complete].last().map_or(0, |end| end + 1);
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
    // Inside the second line, before and after its newline, and inside the third line.
    for cut in [
        second + 1,
        second + 100,
        third - 1,
        third,
        third + 17,
        file.len() - 2,
    ] {
        let dir = folder(&file[..cut]);
        let complete = if cut < third - 1 { 1 } else { 2 };
        let cache = open(dir.path()).unwrap();
        assert_eq!(cache.len(), complete, "cut at {cut}");
        assert!(cache.contains(&sample(0).key) && !cache.contains(&sample(2).key));
        cache.append(&sample(2)).unwrap();
        drop(cache);

        let mut expected: Vec<_> = (0..complete as u64).map(sample).collect();
        expected.push(sample(2));
        assert_eq!(read_all(dir.path()).unwrap(), expected, "cut at {cut}");
        let torn_start = [second, third][complete - 1].min(cut);
        let torn = fs::read(dir.path().join("responses.torn")).unwrap_or_default();
        assert_eq!(torn, &file[torn_start..cut], "cut at {cut}");
    }
}

#[test]
fn flipped_bits_are_damage_and_not_a_torn_tail() {
    let file = encode((0..20).map(sample));
    let lines: Vec<&[u8]> = file.split_inclusive(|&byte| byte == b'\n').collect();
    let mut start = 0;
    for (index, original) in lines.iter().enumerate() {
        let is_last = index + 1 == lines.len();
        let flips: Vec<(usize, usize)> = if nightly() {
            let bytes = 0..original.len();
            bytes
                .flat_map(|at| (0..8).map(move |bit| (at, bit)))
                .collect()
        } else {
            // One bit of every second byte, and of the last byte.
            let bytes = (0..original.len()).step_by(2).chain([original.len() - 1]);
            bytes.map(|at| (at, (at / 2 + index) % 8)).collect()
        };
        for (at, bit) in flips {
            let mut flipped = file.clone();
            flipped[start + at] ^= 1 << bit;
            let (scanned, ending) = scan(&flipped);
            assert_eq!(scanned.len(), index, "line {index}, byte {at}");
            for (scanned_line, line) in scanned.iter().zip(&lines) {
                assert_eq!(scanned_line, line.strip_suffix(b"\n").unwrap());
            }
            // A last line without its newline, or with a NUL byte, looks like a torn tail.
            let is_torn = is_last && (at + 1 == original.len() || flipped[start + at] == 0);
            let bad = match ending {
                Ok(FileEnding::Torn(bad)) if is_torn => bad,
                Err(bad) if !is_torn => bad,
                other => panic!("line {index}, byte {at}: {other:?}"),
            };
            assert_eq!((bad.line, bad.offset), (index as u64 + 1, start as u64));
        }
        start += original.len();
    }
}

#[test]
fn each_damaged_line_is_reported() {
    let [one, two] = [0, 1].map(|number| encode([sample(number)]));
    let file = [&one[..], &[0; 64], b"\n", &[0; 9], b"\n", &two].concat();
    let mut lines = LineScan::new(&file[..]);
    let mut damaged = Vec::new();
    let mut records = 0;
    loop {
        match lines.advance() {
            Ok(true) => records += 1,
            Ok(false) => break,
            Err(ScanError::Bad(bad)) => damaged.push(bad.line),
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!((damaged, records), (vec![2, 3], 2));
}

#[test]
fn unusual_files_are_read_or_refused() {
    let [one, two, three] = [0, 1, 2].map(|number| encode([sample(number)]));
    let without_newline = |line: &[u8]| line.strip_suffix(b"\n").unwrap().to_vec();
    let crlf = |line: &[u8]| [&without_newline(line)[..], b"\r\n"].concat();
    let with_checksum = |body: &str| {
        let body = format!("{body},");
        format!(
            "{body}\"crc\":\"{:08x}\"}}\n",
            crc32c::crc32c(body.as_bytes())
        )
        .into_bytes()
    };
    // A field that only a later writer of this schema writes, before all other fields.
    let text = String::from_utf8(without_newline(&one)).unwrap();
    let body = text[..text.rfind(",\"crc\"").unwrap()].strip_prefix('{');
    let future = with_checksum(&format!("{{\"mood\":{{\"good\":true}},{}", body.unwrap()));
    let edited = {
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

    // Name of the case, content of the file, and the number of records or a part of the error message.
    let cases: [(&str, Vec<u8>, Result<usize, &str>); 14] = [
        ("empty", vec![], Ok(0)),
        (
            "no final newline",
            [&one[..], &without_newline(&two)].concat(),
            Ok(2),
        ),
        ("CRLF", [crlf(&one), crlf(&two)].concat(), Ok(2)),
        (
            "byte order mark",
            [b"\xef\xbb\xbf", &one[..], &two].concat(),
            Ok(2),
        ),
        ("blank lines", [&one[..], b"\n\r\n", &two].concat(), Ok(2)),
        ("NULs at the end", [&one[..], &[0; 4096]].concat(), Ok(1)),
        (
            "NULs and parts of lines at the end",
            [&one[..], &[0; 4096], &two[60..], &three[..9]].concat(),
            Ok(1),
        ),
        (
            "garbage at the end",
            [&one[..], b"\xff\x00\xfe"].concat(),
            Ok(1),
        ),
        ("future field", [&future[..], &two].concat(), Ok(2)),
        ("huge line", [&huge[..], &two].concat(), Ok(2)),
        (
            "NULs between records",
            [&one[..], &[0; 64], b"\n", &two].concat(),
            Err("line 2, at byte"),
        ),
        (
            "edited last line",
            [&one[..], &edited].concat(),
            Err("line 2, at byte"),
        ),
        (
            "truncated line between records",
            [&one[..], &two[..50], &three].concat(),
            Err("line 2, at byte"),
        ),
        (
            "other format",
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
                (Ok(records), Ok(expected)) => assert_eq!(records, expected, "{name}"),
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
fn newer_schema_is_refused_with_advice_to_update() {
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

/// The first release wrote the golden file. It must not be regenerated: a new schema gets its own file beside it.
#[test]
fn v1_file_stays_readable() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/cache-v1.jsonl");
    let dir = folder(&fs::read(path).unwrap());
    let expected = golden_records().into_iter().zip([0u64, 1, 3, 4]);
    let expected = expected.map(|(record, number)| Record {
        v: 1,
        key: blake3::hash(&number.to_le_bytes()).to_hex().to_string(),
        ..record
    });
    assert_eq!(read_all(dir.path()).unwrap(), expected.collect::<Vec<_>>());
}

/// Returns the records in `golden/cache-v1.jsonl`, except for their schema and keys.
fn golden_records() -> Vec<Record> {
    let all_fields = Record {
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
    let content_parts = Record {
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
    vec![all_fields, content_parts, quarantined, sample(4)]
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
fn reader_reads_records_while_a_writer_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir.path().join("run/cache")).unwrap();
    assert!(cache.is_empty());
    for number in 0..3 {
        cache.append(&sample(number)).unwrap();
        assert!(cache.contains(&sample(number).key));
        assert_eq!(
            read_all(&dir.path().join("run/cache")).unwrap().len(),
            number as usize + 1
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
fn missing_cache_is_a_usage_error() {
    let dir = tempfile::tempdir().unwrap();
    let settings = config::CacheConfig::default();
    let sources = [dir.path().join("missing")];
    let into = dir.path().join("into");
    for error in [
        reader::read(dir.path()).err().unwrap(),
        cache::repair::repair(dir.path()).err().unwrap(),
        cache::merge::merge(&into, &settings, &sources, &mut |_, _| Ok(()))
            .err()
            .unwrap(),
    ] {
        assert!(error.to_string().contains("no cache found"), "{error}");
        assert_eq!(Exit::code_of(&error), 2, "{error}");
    }
}

#[test]
fn show_with_limit_0_does_not_claim_that_a_record_is_missing() {
    let dir = folder(&encode([sample(0)]));
    let key = sample(0).key;
    for limit in [0, 1] {
        commands::cache::show(dir.path(), Some(&key), limit, true).unwrap();
    }
    let error = commands::cache::show(dir.path(), Some("zz"), 1, true).unwrap_err();
    assert!(error.to_string().contains("no record"), "{error}");
}

#[test]
fn verify_lists_damage_and_repeated_keys() {
    let valid = encode([sample(0), sample(1), sample(0)]);
    let dir = folder(&valid);
    let report = reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(report.records, 3);
    assert_eq!(report.repeated, [(sample(0).key, 2)]);
    let error = commands::cache::verify(dir.path(), false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("keys with more than one record: 1"),
        "{error}"
    );

    // Two damaged lines, three valid lines, a damaged line, and a torn tail.
    let file = [b"oops\n\0\0\n", &valid[..], b"oops\n\0\n", &valid[..20]].concat();
    let dir = folder(&file);
    let report = reader::verify_cache(dir.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(report.records, 3);
    let offset = valid.len() as u64 + 8;
    let locations: Vec<_> = report
        .damaged
        .iter()
        .map(|(_, bad)| (bad.line, bad.offset))
        .collect();
    assert_eq!(locations, [(1, 0), (2, 5), (6, offset)]);
    let torn: Vec<_> = report.torn.iter().map(|(_, bad)| bad.offset).collect();
    assert_eq!(torn, [offset + 5]);
    let error = commands::cache::verify(dir.path(), true).unwrap_err();
    assert_eq!(Exit::code_of(&error), 5);

    let dir = folder(&encode([sample(0)]));
    commands::cache::verify(dir.path(), false).unwrap();
}
