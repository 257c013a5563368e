//! From records and conversations to examples.

use std::collections::HashMap;

use distill::cache::record::{Answer, Record, Status, Timing};
use distill::config;
use distill::data::dataset;
use distill::exit::Exit;
use serde_json::json;

use super::align::same_tokenizer;
use super::{ask, tokenizer};

pub fn record(prompt: &str, answer: &str) -> Record {
    Record {
        v: 1,
        key: format!("key of {prompt}"),
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

#[test]
fn records_become_examples_in_their_order() {
    let tokenizer = tokenizer("bytelevel");
    let settings = config::Data {
        max_length: 120,
        keep_finish_reasons: vec!["stop".into(), "length".into()],
        ..config::Data::default()
    };
    let answer = "The capital of France is Paris.";
    let ids = tokenizer.encode_text(answer).unwrap();
    let soft = Record {
        logprobs: Some(same_tokenizer(&tokenizer, &ids, 5).0),
        ..record("soft", answer)
    };
    let shifted = Record {
        logprobs: Some({
            let mut logprobs = same_tokenizer(&tokenizer, &ids, 5).0;
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
    let records = [soft, shifted, bad, cut, filtered, long].map(Ok);
    let (examples, report) =
        dataset::examples_of_records(records.into_iter(), &settings, &tokenizer).unwrap();

    let keys: Vec<&str> = examples
        .iter()
        .map(|example| example.prompt_id.as_str())
        .collect();
    assert_eq!(keys, ["soft", "shifted", "cut"]);
    assert_eq!((report.records, report.kept), (6, 3));
    assert_eq!(report.dropped.values().sum::<u64>(), 3);
    let labels: Vec<u32> = examples[0]
        .targets
        .iter()
        .map(|target| target.label)
        .collect();
    let end = tokenizer.stop_ids()[0];
    // The few-shot answer in the prompt is not learnt.
    assert_eq!(labels, [ids.as_slice(), &[end]].concat());
    for example in &examples {
        for target in &example.targets {
            assert_eq!(example.input_ids[target.position + 1], target.label);
        }
    }
    let soft: Vec<bool> = examples[0]
        .targets
        .iter()
        .map(|t| t.soft.is_some())
        .collect();
    assert!(soft[..ids.len()].iter().all(|&soft| soft) && !soft[ids.len()]);
    assert!(
        examples[1]
            .targets
            .iter()
            .all(|target| target.soft.is_none())
    );
    let cut: Vec<u32> = examples[2]
        .targets
        .iter()
        .map(|target| target.label)
        .collect();
    assert_eq!(cut, ids, "an answer that was cut off does not end");
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
fn conversations_are_split_by_prompt_whatever_the_seed() {
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
    let dataset = dataset::load(&config, &tokenizer).unwrap();
    config.train.seed = 7;
    assert_eq!(
        dataset::load(&config, &tokenizer).unwrap().train,
        dataset.train
    );
    let validation = dataset.validation.len();
    assert_eq!(validation + dataset.train.len(), 400);
    assert!((60..140).contains(&validation), "{validation}");
    for example in &dataset.validation {
        assert!(
            dataset
                .train
                .iter()
                .all(|other| other.prompt_id != example.prompt_id)
        );
    }
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
        let error = dataset::load(&config, &tokenizer).unwrap_err();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
}

#[test]
fn no_example_at_all_is_an_error_that_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer("bytelevel");
    let mut config = config::Config {
        run_dir: dir.path().join("run"),
        ..config::Config::default()
    };
    let error = dataset::load(&config, &tokenizer).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2);
    assert!(error.to_string().contains("distill harvest"), "{error}");

    let path = dir.path().join("train.jsonl");
    let row = json!({"messages": ask("Hello", "Hello")});
    std::fs::write(&path, format!("{row}\n{row}\n")).unwrap();
    config.data.source = Some(path);
    config.data.max_length = 5;
    let error = dataset::load(&config, &tokenizer).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2);
    assert!(
        error
            .to_string()
            .contains("2 longer than `data.max_length`"),
        "{error}"
    );
}
