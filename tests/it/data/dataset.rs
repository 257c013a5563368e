//! Examples from records and conversations.

use std::collections::HashMap;
use std::path::Path;

use distill::cache::record::{Answer, Record, Status, Timing};
use distill::cache::writer::{Cache, EncodedRecord};
use distill::config;
use distill::data::batch::Batch;
use distill::data::dataset::{self, Dataset, Examples};
use distill::data::groups::Selection;
use distill::exit::Exit;
use distill::tokenizer::Tokenizer;
use serde_json::json;

use super::align::same_tokenizer;
use super::{ask, tokenizer};

pub fn record(prompt: &str, answer: &str) -> Record {
    Record {
        v: 1,
        key: format!("key of {prompt}"),
        cut_at: 0,
        teacher: String::new(),
        prompt_id: prompt.into(),
        sample: 0,
        status: Status::Ok,
        reason: String::new(),
        endpoint: String::new(),
        probe: String::new(),
        request: json!({"messages": [
            {"role": "user", "content": "Say hello"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": prompt},
        ]}),
        answer: Answer {
            text: answer.into(),
            finish_reason: "stop".into(),
            ..Answer::default()
        },
        usage: None,
        model: String::new(),
        fingerprint: String::new(),
        logprobs: None,
        timing: Timing::default(),
        cost_usd: None,
        extra: serde_json::Map::new(),
    }
}

/// Writes a cache of `records`.
pub fn write_cache(dir: &Path, records: &[Record]) {
    let cache = Cache::open(dir, &config::CacheConfig::default()).unwrap();
    for record in records {
        let sealed = EncodedRecord::new(record).unwrap();
        cache.append_group(&[sealed]).unwrap();
    }
}

pub fn load(config: &config::Config, tokenizer: &Tokenizer) -> anyhow::Result<Dataset> {
    dataset::load(
        &config.data,
        &config.run_dir,
        &Selection::All,
        tokenizer,
        &mut |_, _| Ok(()),
    )
}

#[test]
fn examples_of_records_are_in_the_order_of_their_keys() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer("bytelevel");
    let settings = config::DataConfig {
        max_length: 120,
        keep_finish_reasons: vec!["stop".into(), "length".into()],
        ..config::DataConfig::default()
    };
    let answer = "The capital of France is Paris.";
    let ids = tokenizer.encode_text(answer).unwrap();
    let (logprobs, expected_soft) = same_tokenizer(&tokenizer, &ids, 5);
    let soft = Record {
        logprobs: Some(logprobs.clone()),
        ..record("soft", answer)
    };
    let shifted = Record {
        logprobs: Some({
            let mut logprobs = logprobs;
            logprobs.token.rotate_left(1);
            logprobs
        }),
        ..record("shifted", answer)
    };
    let mut cut = record("cut", answer);
    cut.answer.finish_reason = "length".into();
    let mut filtered = record("filtered", answer);
    filtered.answer.finish_reason = "content_filter".into();
    let mut bad = record("bad", answer);
    bad.status = Status::Quarantined;
    let long = record("long", &answer.repeat(10));
    write_cache(dir.path(), &[soft, shifted, bad, cut, filtered, long]);
    let data = dataset::held_out(dir.path(), &settings, &tokenizer).unwrap();
    let examples = data.validation();
    let report = &data.report;

    let keys: Vec<&str> = examples.iter().map(|example| example.key()).collect();
    assert_eq!(keys, ["key of cut", "key of shifted", "key of soft"]);
    assert_eq!((report.records, report.kept), (6, 3));
    assert_eq!(report.dropped.values().sum::<u64>(), 3);
    let batch = |at| Batch::new([examples.get(at)]);
    let cut = batch(0);
    let shifted = batch(1);
    let soft = batch(2);
    let end = tokenizer.stop_ids()[0];
    // The few-shot answer in the prompt is not supervised.
    assert_eq!(soft.labels, [ids.as_slice(), &[end]].concat());
    assert_eq!(
        soft.input_ids[soft.positions[0] as usize + 1..],
        soft.labels
    );
    for (at, expected) in expected_soft.iter().enumerate() {
        let range = soft.soft_offsets[at]..soft.soft_offsets[at + 1];
        assert_eq!(soft.soft_ids[range.clone()], expected.ids);
        // Logprobs are kept bit by bit.
        assert_eq!(soft.soft_logprobs[range], expected.logprobs);
    }
    assert_eq!(soft.soft_offsets.len(), ids.len() + 2);
    assert_eq!(soft.soft_offsets[ids.len() + 1], soft.soft_ids.len());
    assert!(shifted.soft_ids.is_empty());
    assert_eq!(cut.labels, ids, "a truncated answer has no end of turn");
    assert_eq!(report.soft_positions, ids.len() as u64);
    assert_eq!(report.positions, 3 * ids.len() as u64 + 2);
    let expected = HashMap::from([
        ("no logprobs".to_owned(), 1),
        ("the teacher's tokens do not spell the answer".to_owned(), 1),
    ]);
    assert_eq!(
        report
            .ce_only
            .clone()
            .into_iter()
            .collect::<HashMap<_, _>>(),
        expected
    );
    let text = report.to_string();
    assert!(
        text.starts_with("6 records, 3 kept") && text.contains("quarantined"),
        "{text}"
    );
}

#[test]
fn validation_split_is_by_prompt_and_independent_of_the_seed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.jsonl");
    let mut lines = String::new();
    for prompt in 0..200 {
        for sample in ["one", "two"] {
            let row = json!({"id": format!("p{prompt}"), "topic": 3, "messages": ask(&format!("Question {prompt}"), sample)});
            lines += &format!("{row}\n");
        }
    }
    std::fs::write(&path, &lines).unwrap();
    let mut config = config::Config::default();
    config.data.source = Some(path.clone());
    config.data.validation_share = 0.25;
    let tokenizer = tokenizer("bytelevel");
    config.run_dir = dir.path().join("run");
    let dataset = load(&config, &tokenizer).unwrap();
    config.train.seed = 7;
    let again = load(&config, &tokenizer).unwrap();
    let numbers = |examples: Examples| -> Vec<usize> {
        examples.iter().map(|e| e.key().parse().unwrap()).collect()
    };
    assert_eq!(numbers(again.train()), numbers(dataset.train()));
    let train = numbers(dataset.train());
    let validation = numbers(dataset.validation());
    assert!(train.is_sorted(), "in the order of the file");
    assert_eq!(validation.len() + train.len(), 400);
    assert!(
        (60..140).contains(&validation.len()),
        "{}",
        validation.len()
    );
    for line in &validation {
        // The other answer to its prompt.
        let other = ((line - 1) ^ 1) + 1;
        assert!(validation.contains(&other), "{line}");
    }
    let validation = validation.len();
    assert_eq!(dataset.report.validation, validation as u64);

    let cases = [
        (r#"{"messages": [{"role": "user"}]}"#, "train.jsonl:401"),
        (
            r#"{"messages": [{"role": "user", "content": "no answer"}]}"#,
            "train.jsonl:401",
        ),
        ("{", "train.jsonl:401"),
    ];
    for (line, expected) in cases {
        std::fs::write(&path, format!("{lines}{line}\n")).unwrap();
        let error = load(&config, &tokenizer).unwrap_err();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
}

#[test]
fn empty_dataset_error_names_the_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer("bytelevel");
    let mut config = config::Config {
        run_dir: dir.path().join("run"),
        ..config::Config::default()
    };
    let error = load(&config, &tokenizer).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2);
    assert!(error.to_string().contains("distill harvest"), "{error}");

    let path = dir.path().join("train.jsonl");
    let row = json!({"messages": ask("Hello", "Hello")});
    std::fs::write(&path, format!("{row}\n{row}\n")).unwrap();
    config.data.source = Some(path);
    config.data.max_length = 5;
    let error = load(&config, &tokenizer).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2);
    assert!(
        error
            .to_string()
            .contains("2 longer than 5 tokens (`data.max_length`"),
        "{error}"
    );
}

#[test]
fn answers_to_one_prompt_are_merged_into_soft_labels() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer("bytelevel");
    let answers = ["Paris is it.", "Paris is it.", "Paris is near.", "Berlin."];
    let mut records: Vec<Record> = answers
        .iter()
        .enumerate()
        .map(|(sample, answer)| Record {
            key: format!("{sample}"),
            sample: sample as u32,
            ..record("where", answer)
        })
        .collect();
    records.push(record("alone", "Paris is it."));
    // An answer with logprobs keeps them.
    let ids = tokenizer.encode_text("Berlin.").unwrap();
    let (logprobs, expected) = same_tokenizer(&tokenizer, &ids, 4);
    records.push(Record {
        key: "with logprobs".into(),
        logprobs: Some(logprobs),
        ..record("where", "Berlin.")
    });
    write_cache(&dir.path().join("cache"), &records);
    let mut config = config::Config {
        run_dir: dir.path().join("run"),
        ..config::Config::default()
    };
    config.data.cache = Some(dir.path().join("cache"));
    config.data.validation_share = 0.0;
    let without = load(&config, &tokenizer).unwrap();
    assert_eq!(without.report.soft_positions, ids.len() as u64);
    config.data.sample_trie = true;
    let data = load(&config, &tokenizer).unwrap();
    assert!(data.is_new);
    assert_eq!(data.report.ce_only["no logprobs"], 1);
    for example in data.train().iter() {
        let batch = Batch::new([example]);
        let soft = |n: usize| {
            let range = batch.soft_offsets[n]..batch.soft_offsets[n + 1];
            (&batch.soft_ids[range.clone()], &batch.soft_logprobs[range])
        };
        let (first, logprobs) = soft(0);
        match example.key() {
            "key of alone" => assert!(first.is_empty()),
            "with logprobs" => assert_eq!(first, expected[0].ids),
            sample => {
                // Three of five answers are Paris, two are Berlin.
                let paris = tokenizer.encode_text("Paris").unwrap()[0];
                let berlin = tokenizer.encode_text("Berlin.").unwrap()[0];
                assert_eq!(first, [paris, berlin], "{sample}");
                assert!((logprobs[0] - 0.6f32.ln()).abs() < 1e-6);
                assert!((logprobs[1] - 0.4f32.ln()).abs() < 1e-6);
                // The answers are equal to the end, including the end-of-turn token.
                let last = batch.labels.len() - 1;
                let (ids, logprobs) = soft(last);
                match sample {
                    "0" | "1" => assert_eq!((ids, logprobs), (&batch.labels[last..], &[0.0][..])),
                    "2" => assert!(ids.is_empty()),
                    _ => assert_eq!(ids, &batch.labels[last..]),
                }
            }
        }
    }
}
