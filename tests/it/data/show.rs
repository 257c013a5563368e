//! `distill data show` and `distill tokenize`.

use std::path::Path;
use std::process::Command;

use distill::cache::record::{Record, Status};
use distill::config::DataConfig;
use distill::data::dataset;
use distill::data::groups::Selection;
use serde_json::{Value, json};

use super::align::same_tokenizer;
use super::dataset::{record, write_cache};
use super::templates::{OPENS_THINKING, rows, tokenizer_with_template};
use super::{ask, folder, tokenizer};

/// Runs the binary. Returns its exit status and its output.
fn distill(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(arguments)
        .current_dir(dir)
        .output()
        .unwrap();
    let printed = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code().unwrap(), printed)
}

#[test]
fn data_show_prints_examples_token_by_token() {
    let dir = tempfile::tempdir().unwrap();
    let student = tokenizer("bytelevel");
    let answer = "It is Paris.";
    let ids = student.encode_text(answer).unwrap();
    let (logprobs, soft) = same_tokenizer(&student, &ids, 3);
    let usable = Record {
        logprobs: Some(logprobs),
        ..record("good", answer)
    };
    let quarantined = Record {
        status: Status::Quarantined,
        ..record("bad", answer)
    };
    write_cache(&dir.path().join("cache"), &[quarantined, usable]);
    let config = format!(
        "[student]\npath = {:?}\n[data]\ncache = \"cache\"\ngroups = \"all\"\n",
        folder("bytelevel")
    );
    std::fs::write(dir.path().join("run.toml"), config).unwrap();
    let show = |more: &[&str]| {
        let arguments = [&["data", "show", "-c", "run.toml"], more].concat();
        distill(dir.path(), &arguments)
    };

    let (status, printed) = show(&["--json"]);
    assert_eq!(status, 0, "{printed}");
    let shown: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(shown["version"], 1);
    let examples = shown["examples"].as_array().unwrap();
    // By default, the first usable record is shown.
    assert_eq!(examples.len(), 1);
    assert_eq!(examples[0]["prompt_id"], "good");
    let tokens = examples[0]["tokens"].as_array().unwrap();
    let supervised: Vec<&Value> = tokens
        .iter()
        .filter(|token| token["is_supervised"] == true)
        .collect();
    let text: String = supervised
        .iter()
        .map(|token| token["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, format!("{answer}<|im_end|>"));
    for (token, expected) in supervised.iter().zip(&soft) {
        let labels = token["soft_labels"].as_array().unwrap();
        let ids: Vec<u64> = labels
            .iter()
            .map(|label| label["id"].as_u64().unwrap())
            .collect();
        let expected_ids: Vec<u64> = expected.ids.iter().map(|id| u64::from(*id)).collect();
        assert_eq!(ids, expected_ids);
        let listed: f64 = labels
            .iter()
            .map(|label| label["probability"].as_f64().unwrap())
            .sum();
        let tail = token["tail"].as_f64().unwrap();
        assert!((listed + tail - 1.0).abs() < 1e-6, "{token}");
    }
    assert_eq!(supervised.last().unwrap()["soft_labels"], json!([]));

    let (status, printed) = show(&["--id", "good"]);
    assert_eq!(status, 0, "{printed}");
    assert!(printed.contains(">>> I"), "{printed}");
    assert!(printed.contains("|<|im_end|> <<<"), "{printed}");
    assert!(!printed.contains('\u{1b}'), "{printed}");
    let (status, printed) = show(&["--id", "key of bad"]);
    assert!(
        status == 0 && printed.contains("left out: quarantined"),
        "{printed}"
    );
    // A prompt with several records shows all of them.
    let second_record = Record {
        key: "key of twin".into(),
        ..record("good", answer)
    };
    write_cache(&dir.path().join("cache"), &[second_record]);
    let (status, printed) = show(&["--id", "good"]);
    assert_eq!((status, printed.matches("prompt good").count()), (0, 2));
    let (_, printed) = show(&["--id", "good", "--limit", "1"]);
    assert_eq!(printed.matches("prompt good").count(), 1);
    let (status, printed) = show(&["--set", "data.keep_finish_reasons=[\"length\"]"]);
    assert!(
        status == 2 && printed.contains("finish_reason `stop` is not in"),
        "{printed}"
    );
    let (status, printed) = show(&["--id", "nobody"]);
    assert!(
        status == 2 && printed.contains("no row matches \"nobody\""),
        "{printed}"
    );
}

#[test]
fn tokenize_prints_the_tokens_of_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let model = folder("bytelevel");
    let model = model.to_str().unwrap();
    let (status, printed) = distill(
        dir.path(),
        &["tokenize", "--model", model, "--json", "a <|im_end|>"],
    );
    assert_eq!(status, 0, "{printed}");
    let shown: Value = serde_json::from_str(&printed).unwrap();
    let ids: Vec<u32> = shown["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token["id"].as_u64().unwrap() as u32)
        .collect();
    let student = tokenizer("bytelevel");
    assert_eq!(ids, student.encode_text("a <|im_end|>").unwrap());
    assert_eq!(shown["tokens"][0]["bytes"], json!(b"a"));
    let (status, printed) = distill(dir.path(), &["tokenize", "--model", model, "--chat", "a"]);
    assert_eq!(status, 0, "{printed}");
    assert!(
        printed.contains("<|im_start|>") && printed.contains("\"a\""),
        "{printed}"
    );
}

/// The records are two answers to one prompt, without logprobs.
#[test]
fn data_show_prints_labels_of_merged_samples() {
    let dir = tempfile::tempdir().unwrap();
    let answers = ["It is Paris.", "It is Lyon."];
    let records = answers.map(|answer| Record {
        key: format!("key of {answer}"),
        ..record("city", answer)
    });
    write_cache(&dir.path().join("cache"), &records);
    let config = format!(
        "[student]\npath = {:?}\n[data]\ncache = \"cache\"\ngroups = \"all\"\nsample_trie = true\n",
        folder("bytelevel")
    );
    std::fs::write(dir.path().join("run.toml"), config).unwrap();
    let (status, printed) = distill(dir.path(), &["data", "show", "-c", "run.toml"]);
    assert!(
        status == 0 && printed.matches("0.5000 \"").count() == 2,
        "{printed}"
    );
}

/// Every answer of this conversation becomes an example of its own.
#[test]
fn data_show_lists_separate_answers_in_the_order_of_their_messages() {
    let (dir, tokenizer) = tokenizer_with_template(OPENS_THINKING);
    let source = dir.path().join("rows.jsonl");
    let turns = [ask("A?", "One."), ask("B?", "Two."), ask("C?", "Three.")];
    std::fs::write(&source, rows(&[turns.concat()])).unwrap();
    let settings = DataConfig {
        source: Some(source),
        ..DataConfig::default()
    };
    let keys = |limit| -> Vec<String> {
        let all = &Selection::All;
        let shown = dataset::show(&settings, dir.path(), all, &tokenizer, None, limit).unwrap();
        shown.0.into_iter().map(|example| example.key).collect()
    };
    assert_eq!(keys(9), ["1", "1:1", "1:3"]);
    assert_eq!(keys(2), ["1", "1:1"]);
}

#[test]
fn data_show_prints_no_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    write_cache(
        &dir.path().join("cache"),
        &[record("\u{1b}[2Jprompt", "an\u{1b}[31mswer\u{9b}")],
    );
    let model = folder("bytelevel");
    let config =
        format!("[student]\npath = {model:?}\n[data]\ncache = \"cache\"\ngroups = \"all\"\n");
    std::fs::write(dir.path().join("run.toml"), config).unwrap();
    let model = model.to_str().unwrap();
    for arguments in [
        &["data", "show", "-c", "run.toml"][..],
        &["data", "show", "-c", "run.toml", "--json"],
        &["tokenize", "--model", model, "a\u{1b}[2Jb\u{9b}"],
        &["tokenize", "--model", model, "--json", "a\u{1b}[2Jb\u{9b}"],
    ] {
        let (status, printed) = distill(dir.path(), arguments);
        assert_eq!(status, 0, "{printed}");
        assert!(!printed.contains(['\u{1b}', '\u{9b}']), "{printed:?}");
    }
}
