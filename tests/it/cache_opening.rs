//! Opening a large cache: by its index, and never by one that is not of these very files.

use std::fs;
use std::path::Path;

use distill::cache::record::{Answer, Record};
use distill::cache::writer::Cache;
use distill::cache::{self, line};
use distill::config;
use distill::exit::Exit;

use crate::cache_samples::{encode, sample};

/// More than the smallest cache that gets an index.
fn large_cache() -> (tempfile::TempDir, Vec<u8>) {
    let records = (0..60).map(|n| Record {
        answer: Answer {
            text: "x".repeat(100_000),
            ..Answer::default()
        },
        ..sample(n)
    });
    let file = encode(records);
    let dir = tempfile::tempdir().unwrap();
    fs::write(cache::plain_file(dir.path()), &file).unwrap();
    (dir, file)
}

#[test]
fn index_opens_the_cache_and_is_ignored_if_files_changed() {
    let (dir, mut file) = large_cache();
    let index = dir.path().join("responses.index");
    let read = |dir: &Path| {
        let mut bytes = 0;
        let settings = config::CacheConfig::default();
        let cache = Cache::open_with(
            dir,
            &settings,
            distill::cache::storage::plain_storage(),
            &mut |done, _| {
                bytes = done;
                Ok(())
            },
        );
        cache.map(|cache| (bytes, cache.len(), cache.cost_when_opened()))
    };
    let size = file.len() as u64;
    let cost = 60.0 * 0.000_012_5;
    let close = |(bytes, records, usd): (u64, usize, f64), expected: (u64, usize, f64)| {
        assert_eq!((bytes, records), (expected.0, expected.1));
        assert!((usd - expected.2).abs() < 1e-9, "{usd}");
    };
    close(read(dir.path()).unwrap(), (size, 60, cost));
    close(read(dir.path()).unwrap(), (0, 60, cost));

    // Appended to, by us and by another.
    let cache = Cache::open(dir.path(), &config::CacheConfig::default()).unwrap();
    cache.append(&sample(60)).unwrap();
    assert!(cache.contains(&sample(7).key) && cache.contains(&sample(60).key));
    drop(cache);
    close(read(dir.path()).unwrap(), (0, 61, cost + 0.000_012_5));
    file = fs::read(cache::plain_file(dir.path())).unwrap();
    file.extend(encode([sample(61)]));
    fs::write(cache::plain_file(dir.path()), &file).unwrap();
    close(
        read(dir.path()).unwrap(),
        (file.len() as u64, 62, cost + 0.000_025),
    );

    // Of the same length and time, and not the same file.
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
    let error = read(dir.path()).unwrap_err();
    assert_eq!(Exit::code_of(&error), 5, "{error}");
    file[3_000_000] ^= 1;
    fs::write(cache::plain_file(dir.path()), &file).unwrap();

    // An index that is no index, or not all of one.
    read(dir.path()).unwrap();
    let whole = fs::read(&index).unwrap();
    for wrong in [
        &whole[..whole.len() - 1],
        &whole[..100],
        b"",
        b"{}\n",
        &[&whole[..whole.len() - 20], &[7; 20]].concat(),
    ] {
        fs::write(&index, wrong).unwrap();
        assert_eq!(read(dir.path()).unwrap().0, file.len() as u64);
    }
    fs::remove_file(&index).unwrap();
    assert_eq!(read(dir.path()).unwrap().1, 62);
}

#[test]
fn costs_are_read_whatever_the_field_order() {
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
        // The names in a text, and in another order.
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
