//! Makes large caches and times their opening; see `tests/bench/cache.sh`.
//!
//! `cache make DIR RECORDS [TOKENS [zstd]]` makes a cache of RECORDS records with answers of 60 words. With TOKENS,
//! each record has top-20 logprobs of TOKENS tokens. `cache open DIR` opens a cache and prints the time and memory as
//! JSON.

#[path = "records.rs"]
mod records;

use std::path::Path;
use std::time::Instant;

use distill::cache::record::{Logprobs, Record};
use distill::cache::writer::{Cache, EncodedRecord};
use distill::config::{self, Compression, Durability};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    // The program does the same at its start.
    distill::ops::process::configure();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["make", dir, records] => make(Path::new(dir), records.parse()?, 0, Compression::None),
        ["make", dir, records, tokens] => make(
            Path::new(dir),
            records.parse()?,
            tokens.parse()?,
            Compression::None,
        ),
        ["make", dir, records, tokens, "zstd"] => make(
            Path::new(dir),
            records.parse()?,
            tokens.parse()?,
            Compression::Zstd,
        ),
        ["open", dir] => open(Path::new(dir)),
        _ => anyhow::bail!("usage: cache make DIR RECORDS [TOKENS [zstd]] | cache open DIR"),
    }
}

fn settings(compression: Compression) -> config::CacheConfig {
    config::CacheConfig {
        durability: Durability::None,
        compression,
    }
}

fn make(dir: &Path, records: u64, tokens: usize, compression: Compression) -> anyhow::Result<()> {
    let cache = Cache::open(dir, &settings(compression))?;
    let mut random = fastrand::Rng::with_seed(1);
    let words: Vec<String> = (0..4096).map(|_| word(&mut random)).collect();
    for first in (0..records).step_by(256) {
        let group: Vec<EncodedRecord> = (first..records.min(first + 256))
            .map(|n| EncodedRecord::new(&record(n, tokens, &words, &mut random)))
            .collect::<anyhow::Result<_>>()?;
        cache.append_group(&group)?;
    }
    Ok(())
}

fn word(random: &mut fastrand::Rng) -> String {
    let length = random.usize(1..8);
    let letters = std::iter::repeat_with(|| random.lowercase()).take(length);
    format!(" {}", letters.collect::<String>())
}

fn record(n: u64, tokens: usize, words: &[String], random: &mut fastrand::Rng) -> Record {
    let text = |length: usize, random: &mut fastrand::Rng| -> String {
        let words = (0..length).map(|_| words[random.usize(..words.len())].as_str());
        words.collect()
    };
    let (question, answer) = (text(40, random), text(60, random));
    let logprobs = (tokens > 0).then(|| logprobs(tokens, words, random));
    records::record(n, question, answer, 60, logprobs)
}

fn logprobs(tokens: usize, words: &[String], random: &mut fastrand::Rng) -> Logprobs {
    let mut logprobs = Logprobs::default();
    for _ in 0..tokens {
        let mut logprob = -random.f32();
        let (mut top, mut top_logprob) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            top.push(words[random.usize(..words.len())].clone());
            top_logprob.push(Some(logprob));
            logprob -= random.f32() * 2.0;
        }
        logprobs.token.push(top[0].clone());
        logprobs.logprob.push(top_logprob[0]);
        logprobs.top.push(top);
        logprobs.top_logprob.push(top_logprob);
    }
    logprobs
}

fn open(dir: &Path) -> anyhow::Result<()> {
    let bytes = distill::cache::files::size(dir);
    let (mut read, started) = (0, Instant::now());
    let settings = settings(Compression::None);
    let cache = Cache::open_with(
        dir,
        &settings,
        distill::cache::storage::plain_storage(),
        &mut |done, _| {
            read = done;
            Ok(())
        },
    )?;
    let seconds = started.elapsed().as_secs_f64();
    let report = json!({
        "records": cache.len(), "bytes": bytes, "bytes_read": read, "seconds": seconds,
        "peak_mib": peak_mib(),
    });
    println!("{report}");
    Ok(())
}

/// Returns the peak memory of this process in MiB, if the system reports it.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}
