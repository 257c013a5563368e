//! The Parquet export, read with the `parquet` crate and the schema in the file.

use std::fs;

use distill::cache::record::{Logprobs, Record, Status};
use distill::config::DataConfig;
use distill::data::groups::Selection;
use distill::export::rows::ExportSettings;
use distill::export::{Format, write};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, RowAccessor};
use serde_json::{Value, json};

use super::{QUARANTINED, assert_counts, export};
use crate::cache_samples::sample;

/// Returns a row as JSON.
fn row_json(row: &parquet::record::Row) -> Value {
    fn field_json(field: &Field) -> Value {
        match field {
            Field::Null => Value::Null,
            Field::Bool(value) => json!(value),
            Field::UInt(value) => json!(value),
            Field::Long(value) => json!(value),
            Field::Float(value) => json!(value),
            Field::Double(value) => json!(value),
            Field::Str(value) => json!(value),
            Field::Group(row) => row_json(row),
            Field::ListInternal(list) => list.elements().iter().map(field_json).collect(),
            other => panic!("{other:?} is not in the schema"),
        }
    }
    let columns = row.get_column_iter();
    Value::Object(
        columns
            .map(|(name, field)| (name.clone(), field_json(field)))
            .collect(),
    )
}

#[test]
fn parquet_keeps_all_training_data() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.parquet");
    // `sample(0)` has tokens that are parts of an emoji, missing logprobs, and lists of one element.
    let mut without_top = sample(6);
    let logprobs = without_top.logprobs.as_mut().unwrap();
    logprobs.top = vec![Vec::new(); 3];
    logprobs.top_logprob = vec![Vec::new(); 3];
    logprobs.raw.clear();
    let mut without_cost = sample(4);
    without_cost.cost_usd = None;
    without_cost.sample = u32::MAX;
    let mut empty = sample(9);
    empty.logprobs = Some(Logprobs::default());
    empty.request["messages"] = json!([]);
    let records = vec![sample(0), without_cost, without_top, empty, sample(3)];
    let expected: Vec<Record> = records.iter().take(4).cloned().collect();
    assert_eq!(records[4].status, Status::Quarantined);
    let report = export(records, Format::Parquet, &out).unwrap();
    assert_counts(&report, 4, &[(QUARANTINED, 1)]);

    let reader = SerializedFileReader::new(fs::File::open(&out).unwrap()).unwrap();
    let rows: Vec<_> = reader
        .get_row_iter(None)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(rows.len(), 4);
    for (row, record) in rows.iter().zip(&expected) {
        assert_eq!(row.get_string(0).unwrap(), &record.prompt_id);
        assert_eq!(row.get_uint(1).unwrap(), record.sample);
        let written = row_json(row);
        assert_eq!(written["messages"], record.request["messages"]);
        assert_eq!(written["answer"], record.answer.text);
        assert_eq!(written["model"], record.model);
        assert_eq!(written["sent_at"], record.timing.sent_at);
        let usage = record.usage.map(|usage| usage.prompt_tokens);
        assert_eq!(written["prompt_tokens"], json!(usage));
        assert_eq!(written["cost_usd"].as_f64(), record.cost_usd);
        let Some(logprobs) = &record.logprobs else {
            assert_eq!(written["logprobs"], Value::Null);
            continue;
        };
        let mut stored = serde_json::to_value(logprobs).unwrap();
        let raw = stored["raw"].as_str().unwrap();
        stored["raw"] = raw.split_whitespace().collect();
        assert_eq!(written["logprobs"], stored);
    }
}

#[test]
fn parquet_row_groups_are_limited_in_size() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.parquet");
    let records = (0..5).map(|n| {
        let mut record = sample(n * 2);
        record.status = Status::Ok;
        // Two of these answers fill a row group.
        record.answer.text = "x".repeat(20 << 20);
        Ok(record)
    });
    let settings = ExportSettings {
        selection: &Selection::All,
        data: &DataConfig::default(),
        tokenizer: None,
        force: false,
    };
    write(records, Format::Parquet, &out, &settings).unwrap();
    let reader = SerializedFileReader::new(fs::File::open(&out).unwrap()).unwrap();
    let metadata = reader.metadata();
    let groups: Vec<_> = metadata
        .row_groups()
        .iter()
        .map(|group| group.num_rows())
        .collect();
    assert_eq!(groups, [2, 2, 1]);
}

#[test]
fn parquet_file_is_a_prompt_source() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("prompts.parquet");
    let records = vec![sample(0), sample(1)];
    let ids: Vec<String> = records
        .iter()
        .map(|record| record.prompt_id.clone())
        .collect();
    export(records, Format::Parquet, &out).unwrap();
    let template = dir.path().join("template.toml");
    fs::write(&template, "user = \"{{ prompt_id }}\"").unwrap();
    let contents = |template: Option<&std::path::Path>| -> Vec<String> {
        let prompts = distill::prompt::load_with(&out, template, |_, _| Ok(())).unwrap();
        prompts
            .into_iter()
            .map(|(prompt, ())| prompt.messages[0].content.clone())
            .collect()
    };
    assert_eq!(contents(Some(&template)), ids);
    let prompts =
        [sample(0), sample(1)].map(|record| record.request["messages"][0]["content"].clone());
    assert_eq!(json!(contents(None)), json!(prompts));
}
