//! The fuzz targets: properties that hold for any bytes. `cargo fuzz` runs the targets for a given time (see
//! `tests/nightly.sh`). `tests/it/fuzz.rs` runs them on the corpus and on simple mutations of it.

use std::path::Path;

use distill::cache::frames::{FrameScan, salvage};
use distill::cache::line;
use distill::cache::recovery::{FileEnding, LineScan, ScanError};
use distill::config::{self, Config};
use distill::harvest::fuzz;
use distill::model::{Model, ModelInput, SourceInput};
use distill::prompt;

/// Runs the target with this name, which is also the name of its corpus folder.
pub fn run(target: &str, bytes: &[u8]) {
    match target {
        "cache" => cache(bytes),
        "record" => record(bytes),
        "reply" => fuzz::reply(bytes),
        "limits" => fuzz::limits(bytes),
        "config" => config(bytes),
        "prompts" => prompts(bytes),
        "model" => model(bytes),
        other => panic!("there is no target {other}"),
    }
}

/// A cache file, plain or compressed.
fn cache(bytes: &[u8]) {
    let mut scan = LineScan::new(bytes);
    let mut lines = 0;
    loop {
        match scan.advance() {
            Ok(true) => {
                lines += 1;
                assert!(line::verify(scan.line()).is_ok());
                let key = line::head(scan.line()).unwrap().key.into_owned();
                assert_eq!(key, scan.key());
                assert!(line::cost_usd(scan.line()).is_ok() || line::decode(scan.line()).is_err());
            }
            Ok(false) => break,
            Err(ScanError::Bad(bad)) => assert!(bad.offset <= bytes.len() as u64),
            Err(ScanError::Read(error)) => panic!("{error}"),
        }
    }
    assert_eq!(scan.position(), bytes.len() as u64);
    if let FileEnding::Torn(bad) = scan.ending() {
        // The part before the torn tail has at least as many lines, damaged ones included.
        let mut before_tail = LineScan::new(&bytes[..bad.offset as usize]);
        let mut lines_before_tail = 0;
        while let Ok(is_more) = before_tail.advance().or_else(|error| match error {
            ScanError::Bad(_) => Ok(true),
            ScanError::Read(error) => Err(error),
        }) {
            if !is_more {
                break;
            }
            lines_before_tail += 1;
        }
        assert!(lines_before_tail >= lines);
    }

    let mut scan = FrameScan::new(bytes);
    loop {
        match scan.advance() {
            Ok(true) => assert!(line::verify(scan.line()).is_ok()),
            Ok(false) => break,
            Err(ScanError::Bad(bad)) => assert!(bad.offset <= bytes.len() as u64),
            Err(ScanError::Read(error)) => panic!("{error}"),
        }
    }
    assert_eq!(scan.position(), bytes.len() as u64);
    for line in salvage(bytes).split_inclusive(|&byte| byte == b'\n') {
        assert!(line::verify(line.strip_suffix(b"\n").unwrap()).is_ok());
    }
}

/// A record. Its checksum is not verified, because nearly no input would pass.
fn record(bytes: &[u8]) {
    let _ = (line::head(bytes), line::cost_usd(bytes));
    if let Ok(record) = line::decode(bytes) {
        let line = line::encode(&record).unwrap();
        let line = line.strip_suffix(b"\n").unwrap();
        assert!(line::verify(line).is_ok());
        assert_eq!(line::decode(line).unwrap(), record);
        assert_eq!(line::cost_usd(line), Ok(record.cost_usd.unwrap_or(0.0)));
    }
}

/// A config file: a parsed config is unchanged after it is written and parsed again.
fn config(bytes: &[u8]) {
    let path = Path::new("config.toml");
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = distill::config::load::parse(path, text) {
        let again = toml::to_string(&config).unwrap();
        let again: Config = distill::config::load::parse(path, &again).unwrap();
        assert_eq!(format!("{config:?}"), format!("{again:?}"));
    }
}

/// A byte that selects the kind of prompt file, and the file: each prompt has an id and messages.
fn prompts(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    let name = ["prompts.jsonl", "prompts.txt", "prompts.jsonl.gz"][usize::from(*kind) % 3];
    let dir = tempfile::tempdir().unwrap();
    let settings = config::PromptsConfig {
        source: dir.path().join(name),
        ..config::PromptsConfig::default()
    };
    std::fs::write(&settings.source, bytes).unwrap();
    if let Ok(prompts) = prompt::load(&settings, || Ok(())) {
        for prompt in &prompts {
            assert!(!prompt.id.is_empty() && !prompt.messages.is_empty());
        }
    }
}

/// A model folder: `config.json`, perhaps a weight index, and the weights, separated by lines `--`. A model that loads
/// computes one logit per token of its vocabulary.
fn model(bytes: &[u8]) {
    const SEPARATOR: &[u8] = b"\n--\n";
    let mut parts = Vec::new();
    let mut unsplit = bytes;
    while let Some(at) = unsplit
        .windows(SEPARATOR.len())
        .position(|window| window == SEPARATOR)
        && parts.len() < 2
    {
        parts.push(&unsplit[..at]);
        unsplit = &unsplit[at + SEPARATOR.len()..];
    }
    parts.push(unsplit);
    let names: &[&str] = match parts.len() {
        3 => &[
            "config.json",
            "model.safetensors.index.json",
            "a.safetensors",
        ],
        _ => &["config.json", "model.safetensors"],
    };
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in names.iter().zip(parts) {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let Ok(model) = Model::load(dir.path()) else {
        return;
    };
    let (vocabulary, context) = {
        let config = model.config();
        (config.vocab_size, config.max_position_embeddings)
    };
    let ids: Vec<u32> = (0..vocabulary.min(context).min(3) as u32).collect();
    let segment = 0..ids.len();
    let input = ModelInput {
        input_ids_T: &ids,
        segments_B: std::slice::from_ref(&segment),
        positions_N: &[0],
        source: SourceInput::default(),
    };
    let logits = model.map_logits(input, |_, logits| logits.len()).unwrap();
    assert_eq!(logits, [vocabulary]);
}
