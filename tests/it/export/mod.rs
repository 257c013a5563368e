//! Exports of a cache in the formats of other trainers.

mod axolotl;
#[cfg(unix)]
mod destinations;
#[cfg(feature = "parquet")]
mod parquet;

use std::fs;
use std::path::{Path, PathBuf};

use distill::cache::record::Record;
use distill::config::DataConfig;
use distill::data::groups::Selection;
use distill::exit::Exit;
use distill::export::rows::{ExportReport, ExportSettings};
use distill::export::{Format, write};
use serde_json::{Value, json};

use crate::cache_samples::{encode, sample};

fn with_messages(n: u64, messages: Value) -> Record {
    let mut record = sample(n);
    record.request["messages"] = messages;
    record
}

fn finished(n: u64, finish_reason: &str) -> Record {
    let mut record = sample(n);
    record.answer.finish_reason = finish_reason.to_owned();
    record
}

/// Returns nine records. Five are usable; one of these has a message whose content is a list of parts.
fn varied() -> Vec<Record> {
    vec![
        sample(0),
        sample(1),
        sample(3), // quarantined
        finished(4, "length"),
        finished(5, "eos"),
        with_messages(
            6,
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
        ),
        with_messages(
            7,
            json!([
                {"role": "system", "content": "Be \"brief\"\u{2028}\u{0}."},
                {"role": "user", "content": [{"type": "text", "text": "日本"}, {"type": "text", "text": " é"}]},
            ]),
        ),
        with_messages(8, json!([{"role": "tool", "content": "42"}])),
        with_messages(9, json!("not a list")),
    ]
}

const QUARANTINED: &str = "quarantined";
const LENGTH: &str = "finish_reason `length` is not in `data.keep_finish_reasons`";
const NOT_TEXT: &str = "the request has messages that are not text";

fn export(records: Vec<Record>, format: Format, out: &Path) -> anyhow::Result<ExportReport> {
    let settings = ExportSettings {
        selection: &Selection::All,
        data: &DataConfig::default(),
        tokenizer: None,
        force: false,
    };
    write(records.into_iter().map(Ok), format, out, &settings)
}

fn rows(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.ends_with('\n'));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn sorted_paths(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
}

/// Checks the number of rows, and the number of records left out by reason.
#[track_caller]
fn assert_counts(report: &ExportReport, rows: u64, reasons: &[(&str, u64)]) {
    let reasons = reasons
        .iter()
        .map(|(reason, count)| ((*reason).to_owned(), *count));
    assert_eq!((report.rows, &report.left_out), (rows, &reasons.collect()));
}

#[test]
fn hf_rows_are_conversations_with_their_origin() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("dataset");
    let report = export(varied(), Format::Hf, &out).unwrap();
    assert_counts(&report, 5, &[(QUARANTINED, 1), (LENGTH, 1), (NOT_TEXT, 2)]);
    let rows = rows(&out.join("train.jsonl"));
    assert_eq!(rows.len(), 5);
    assert_eq!(
        rows[2],
        json!({
            "messages": [
                {"role": "user", "content": "what is 5 + 1?"},
                {"role": "assistant", "content": "6 🦀"},
            ],
            "prompt_id": "row-5", "sample": 0,
            "model": "teacher-1-2026-05-13", "finish_reason": "eos",
        })
    );
    assert_eq!(
        rows[3]["messages"][0]["content"],
        "Be \"brief\"\u{2028}\u{0}."
    );
    assert_eq!(rows[3]["messages"][1]["content"], "日本 é");
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    for part in [
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n",
        "5 conversations",
        "| `teacher-1-2026-05-13` | 5 |",
        "- 1: `quarantined`",
    ] {
        assert!(card.contains(part), "{card}");
    }
    assert_eq!(sorted_paths(dir.path()), [out]);
}

#[test]
fn hf_card_escapes_hostile_model_names() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("dataset");
    let mut record = sample(1);
    record.model = "a`|b\n# heading\u{1b}[2J".to_owned();
    export(vec![record], Format::Hf, &out).unwrap();
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("| `a'\\|b # heading\\u{1b}[2J` | 1 |"),
        "{card}"
    );
}

#[test]
fn openai_rows_have_only_roles_of_the_fine_tuning_api() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let mut records = varied();
    let mut empty = sample(1);
    empty.answer.text.clear();
    records.push(empty);
    let report = export(records, Format::OpenaiFt, &out).unwrap();
    let reasons = [
        (QUARANTINED, 1),
        (LENGTH, 1),
        (NOT_TEXT, 2),
        ("the fine-tuning API does not accept the role `tool`", 1),
        ("the answer is empty", 1),
    ];
    assert_counts(&report, 4, &reasons);
    let rows = rows(&out);
    assert_eq!(
        rows[1],
        json!({"messages": [
            {"role": "user", "content": "what is 1 + 1?"},
            {"role": "assistant", "content": "2 🦀"},
        ]})
    );
    assert_eq!(rows.len(), 4);
}

#[test]
fn trl_rows_separate_prompt_and_completion() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let report = export(varied(), Format::Trl, &out).unwrap();
    assert_counts(&report, 5, &[(QUARANTINED, 1), (LENGTH, 1), (NOT_TEXT, 2)]);
    assert_eq!(
        rows(&out)[0],
        json!({
            "prompt": [{"role": "user", "content": "what is 0 + 1?"}],
            "completion": [{"role": "assistant", "content": "1 🦀"}],
        })
    );
}

#[track_caller]
fn assert_usage_error(error: &anyhow::Error, parts: &[&str]) {
    assert_eq!(Exit::code_of(error), 2, "{error:#}");
    for part in parts {
        assert!(format!("{error:#}").contains(part), "{error:#}");
    }
}

#[test]
fn missing_settings_and_empty_caches_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let error = export(vec![sample(0)], Format::Axolotl, &out).unwrap_err();
    assert_usage_error(&error, &["--tokenizer DIR", "tokenizer.json"]);
    if cfg!(not(feature = "parquet")) {
        let error = export(vec![sample(0)], Format::Parquet, &out).unwrap_err();
        assert_usage_error(&error, &["install with `--features parquet`"]);
    }
    let error = export(Vec::new(), Format::Trl, &out).unwrap_err();
    assert_usage_error(&error, &["distill harvest"]);
    let error = export(vec![sample(3), sample(10)], Format::Hf, &out).unwrap_err();
    assert_usage_error(&error, &["no record to export", "2: quarantined"]);
    assert!(sorted_paths(dir.path()).is_empty());
}

/// Formats that this build writes without a tokenizer.
const FORMATS: &[Format] = &[
    Format::Hf,
    Format::OpenaiFt,
    Format::Trl,
    #[cfg(feature = "parquet")]
    Format::Parquet,
];

#[test]
fn failed_export_leaves_the_old_file() {
    for &format in FORMATS {
        for force in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            if force {
                export(vec![sample(0)], format, &out).unwrap();
            }
            let content = |file: &Path| fs::read(file).unwrap();
            let data = match format {
                Format::Hf => out.join("train.jsonl"),
                _ => out.clone(),
            };
            let before = force.then(|| content(&data));
            let records = [Ok(sample(1)), Err(anyhow::anyhow!("line 2 is damaged"))];
            let settings = ExportSettings {
                selection: &Selection::All,
                data: &DataConfig::default(),
                tokenizer: None,
                force,
            };
            let error = write(records.into_iter(), format, &out, &settings).unwrap_err();
            assert_eq!(error.to_string(), "line 2 is damaged");
            assert_eq!(
                sorted_paths(dir.path()).len(),
                usize::from(force),
                "{format:?}"
            );
            assert_eq!(before, force.then(|| content(&data)));
        }
    }
}

#[test]
fn existing_export_is_replaced_only_with_force() {
    for &format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        export(vec![sample(0)], format, &out).unwrap();
        let error = export(vec![sample(1)], format, &out).unwrap_err();
        assert_usage_error(&error, &["--force"]);
        let settings = ExportSettings {
            selection: &Selection::All,
            data: &DataConfig::default(),
            tokenizer: None,
            force: true,
        };
        let twice = [Ok(sample(1)), Ok(sample(2))];
        let report = write(twice.into_iter(), format, &out, &settings).unwrap();
        assert_eq!(report.rows, 2);
        assert_eq!(sorted_paths(dir.path()), std::slice::from_ref(&out));

        // A file or a folder that was not written by an export is not replaced, even with `force`.
        let notes = dir.path().join("notes");
        for text in ["run_dir = 1\n", "{\"messages\":[{\"role\":\"user\"}]}\n"] {
            fs::write(&notes, text).unwrap();
            let error = write([Ok(sample(1))].into_iter(), format, &notes, &settings).unwrap_err();
            assert_usage_error(&error, &["another path"]);
            assert_eq!(fs::read_to_string(&notes).unwrap(), text);
        }
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("thesis.tex"), "years of work").unwrap();
        let error = write([Ok(sample(1))].into_iter(), format, &folder, &settings).unwrap_err();
        assert_usage_error(&error, &["another path"]);
        assert_eq!(sorted_paths(&folder).len(), 1);
    }
}

#[test]
fn folder_of_the_user_with_the_names_of_an_hf_export_is_not_replaced() {
    let settings = ExportSettings {
        selection: &Selection::All,
        data: &DataConfig::default(),
        tokenizer: None,
        force: true,
    };
    for names in [
        &["README.md"][..],
        &["train.jsonl"],
        &["README.md", "train.jsonl"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(dir.path().join(name), "years of work").unwrap();
        }
        let records = [Ok(sample(1))].into_iter();
        let error = write(records, Format::Hf, dir.path(), &settings).unwrap_err();
        assert_usage_error(&error, &["another path"]);
        assert_eq!(sorted_paths(dir.path()).len(), names.len());
        for name in names {
            assert_eq!(
                fs::read_to_string(dir.path().join(name)).unwrap(),
                "years of work"
            );
        }
    }
}

/// Creates a folder with a cache of these records in the subfolder `cache`.
fn write_cache(records: Vec<Record>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("cache")).unwrap();
    fs::write(dir.path().join("cache/responses.jsonl"), encode(records)).unwrap();
    dir
}

fn run(dir: &Path, args: &[&str]) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_distill"))
        .args(["cache", "export"])
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}

#[test]
fn export_command_counts_rows_left_out() {
    let mut records = varied();
    records.push(finished(2, "\u{1b}[2Jnone"));
    let dir = write_cache(records);
    let output = run(
        dir.path(),
        &["--to", "trl", "--dir", "cache", "-o", "a.jsonl"],
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.starts_with("5 rows in a.jsonl\n"), "{text}");
    assert!(
        text.contains("left out 2: the request has messages"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "{text}");

    let config = "[data]\ncache = \"cache\"\nkeep_finish_reasons = [\"length\"]\n[loss]\nkd = \"none\"\n\
                  [student]\npath = \"model\"\n[prompts]\nsource = \"p.txt\"\n\
                  [teacher]\nbase_url = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\napi_key_env = \"\"\n";
    fs::write(dir.path().join("run.toml"), config).unwrap();
    let args = ["--to", "trl", "-c", "run.toml", "-o", "b.jsonl", "--json"];
    let output = run(dir.path(), &args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["version"], 1);
    assert_eq!(report["file"], "b.jsonl");
    assert_eq!(report["rows"], 1);
    let reasons = report["left_out"].as_object().unwrap();
    let count: u64 = reasons.values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(count, 9);
}

#[test]
fn export_command_refuses_bad_arguments_before_writing() {
    let dir = write_cache(varied());
    // Arguments, exit status, and a part of the message.
    let cases = [
        ("--to axolotl --dir cache -o x", 2, "--tokenizer"),
        ("--to trl --dir cache -o x --groups a,b", 2, "no such group"),
        (
            "--to trl --dir cache -o x --groups asked",
            2,
            "give -c FILE",
        ),
        (
            "--to trl --dir cache -o x --tokenizer t",
            2,
            "omit --tokenizer",
        ),
        (
            "--to trl --dir cache -o cache/responses.jsonl --force",
            2,
            "cache folder",
        ),
        (
            "--to hf --dir cache -o cache --force",
            2,
            "does not replace",
        ),
        ("--to trl --dir nowhere -o x", 2, "no cache"),
        (
            "--to trl --dir cache -o missing/x",
            1,
            "could not write missing/x: the folder missing does not exist",
        ),
        ("--to csv --dir cache -o x", 2, "possible values"),
    ];
    let before = fs::read(dir.path().join("cache/responses.jsonl")).unwrap();
    for (arguments, status, part) in cases {
        let words: Vec<&str> = arguments.split(' ').collect();
        let output = run(dir.path(), &words);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{arguments}: {errors}");
        assert!(errors.contains(part), "{arguments}: {errors}");
    }
    assert_eq!(sorted_paths(dir.path()), [dir.path().join("cache")]);
    assert_eq!(
        fs::read(dir.path().join("cache/responses.jsonl")).unwrap(),
        before
    );
}

#[test]
fn export_of_a_damaged_cache_exits_with_5_and_writes_nothing() {
    let dir = write_cache(vec![sample(0), sample(1), sample(2)]);
    let path = dir.path().join("cache/responses.jsonl");
    let mut bytes = fs::read(&path).unwrap();
    let second = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 20;
    bytes[second] ^= 1;
    fs::write(&path, bytes).unwrap();
    for format in ["hf", "trl"] {
        let output = run(dir.path(), &["--to", format, "--dir", "cache", "-o", "x"]);
        assert_eq!(output.status.code(), Some(5));
        assert_eq!(sorted_paths(dir.path()), [dir.path().join("cache")]);
    }
}
