//! Opening a cache from its index, and without it if the index does not match the cache files.

use std::fs;
use std::path::Path;

use distill::cache::record::{Answer, Record};
use distill::cache::writer::Cache;
use distill::cache::{self, line};
use distill::config;
use distill::exit::Exit;

use crate::cache_samples::{encode, sample};

/// Returns a cache folder that is large enough for an index, and the content of its plain file.
fn large_cache() -> (tempfile::TempDir, Vec<u8>) {
    let records = (0..60).map(|number| Record {
        answer: Answer {
            text: "x".repeat(100_000),
            ..Answer::default()
        },
        ..sample(number)
    });
    let file = encode(records);
    let dir = tempfile::tempdir().unwrap();
    fs::write(cache::plain_file(dir.path()), &file).unwrap();
    (dir, file)
}

#[test]
fn index_is_used_to_open_the_cache_unless_files_changed() {
    let (dir, mut file) = large_cache();
    let index = dir.path().join("responses.index");
    // Opens the cache, and returns the bytes read, the number of records and their cost.
    let open_and_count = |dir: &Path| {
        let mut bytes_read = 0;
        let settings = config::CacheConfig::default();
        let cache = Cache::open_with(
            dir,
            &settings,
            distill::cache::storage::plain_storage(),
            &mut |read, _| {
                bytes_read = read;
                Ok(())
            },
        );
        cache.map(|cache| (bytes_read, cache.len(), cache.cost_when_opened()))
    };
    let size = file.len() as u64;
    let cost = 60.0 * 0.000_012_5;
    let check = |expected_bytes: u64, expected_records: usize, expected_usd: f64| {
        let (bytes_read, records, usd) = open_and_count(dir.path()).unwrap();
        assert_eq!((bytes_read, records), (expected_bytes, expected_records));
        assert!((usd - expected_usd).abs() < 1e-9, "{usd}");
    };
    check(size, 60, cost);
    check(0, 60, cost);

    // Records appended by a writer of the cache, and by another program.
    let cache = Cache::open(dir.path(), &config::CacheConfig::default()).unwrap();
    cache.append(&sample(60)).unwrap();
    assert!(cache.contains(&sample(7).key) && cache.contains(&sample(60).key));
    drop(cache);
    check(0, 61, cost + 0.000_012_5);
    file = fs::read(cache::plain_file(dir.path())).unwrap();
    file.extend(encode([sample(61)]));
    fs::write(cache::plain_file(dir.path()), &file).unwrap();
    check(file.len() as u64, 62, cost + 0.000_025);

    // Content changed, with length and modification time restored: only the change time of the inode differs.
    let modified = fs::metadata(cache::plain_file(dir.path()))
        .unwrap()
        .modified()
        .unwrap();
    file[3_000_000] ^= 1;
    fs::write(cache::plain_file(dir.path()), &file).unwrap();
    fs::File::options()
        .append(true)
        .open(cache::plain_file(dir.path()))
        .unwrap()
        .set_modified(modified)
        .unwrap();
    let error = open_and_count(dir.path()).unwrap_err();
    assert_eq!(Exit::code_of(&error), 5, "{error}");
    file[3_000_000] ^= 1;
    fs::write(cache::plain_file(dir.path()), &file).unwrap();

    // Truncated, empty and damaged indexes. The first opening writes a valid index of the restored file.
    open_and_count(dir.path()).unwrap();
    let valid = fs::read(&index).unwrap();
    for invalid in [
        &valid[..valid.len() - 1],
        &valid[..100],
        b"",
        b"{}\n",
        &[&valid[..valid.len() - 20], &[7; 20]].concat(),
    ] {
        fs::write(&index, invalid).unwrap();
        assert_eq!(open_and_count(dir.path()).unwrap().0, file.len() as u64);
    }
    fs::remove_file(&index).unwrap();
    assert_eq!(open_and_count(dir.path()).unwrap().1, 62);
}

#[test]
fn costs_are_read_in_any_field_order() {
    let cost = |text: &str| line::cost_usd(text.as_bytes());
    let crc = "\"crc\":\"00000000\"}";
    for (text, expected) in [
        (
            format!("{{\"v\":1,\"cost_usd\":0.25,\"extra\":\"{{}}\",{crc}"),
            0.25,
        ),
        (
            format!("{{\"v\":1,\"cost_usd\":1.5e-7,\"extra\":\"\",{crc}"),
            1.5e-7,
        ),
        // The field names inside a text, the fields in another order, and an unknown field.
        (
            format!("{{\"cost_usd\":0.5,\"text\":\",\\\"cost_usd\\\":9,\\\"extra\\\":\\\"\",{crc}"),
            0.5,
        ),
        (format!("{{\"extra\":\"x\",\"cost_usd\":2,{crc}"), 2.0),
        (
            format!("{{\"cost_usd\":2,\"extra\":\"\",\"more\":{{\"cost_usd\":7}},{crc}"),
            2.0,
        ),
        (format!("{{\"v\":1,{crc}"), 0.0),
    ] {
        assert_eq!(cost(&text), Ok(expected), "{text}");
    }
    assert!(cost("{\"cost_usd\":").is_err());
}

#[cfg(unix)]
#[test]
fn pipe_in_place_of_a_cache_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("mkfifo")
        .arg(cache::plain_file(dir.path()))
        .status();
    assert!(status.unwrap().success());
    let settings = distill::config::CacheConfig::default();
    let errors = [
        Cache::open(dir.path(), &settings).err(),
        distill::cache::open::peek(dir.path()).err(),
        distill::cache::reader::read(dir.path()).err(),
        distill::cache::repair::repair(dir.path()).err(),
    ];
    for error in errors {
        let error = error.unwrap();
        assert_eq!(distill::exit::Exit::code_of(&error), 2, "{error:#}");
        assert!(
            error.to_string().contains("not a regular file"),
            "{error:#}"
        );
    }
}
