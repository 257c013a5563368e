//! Rows of conversation files with fields that are not supported.

use distill::config::Config;
use serde_json::json;

use super::dataset::load;
use super::templates::{CHATML, tokenizer_with_template};

/// Fields that would change the training are refused, unless their value has no effect.
#[test]
fn rows_with_unsupported_fields_are_refused_by_name() {
    let (dir, tokenizer) = tokenizer_with_template(CHATML);
    let source = dir.path().join("rows.jsonl");
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.source = Some(source.clone());
    config.data.validation_share = 0.0;
    let question = json!({"role": "user", "content": "Who?"});
    for (field, value) in [
        ("reasoning_content", json!("Hm.")),
        ("reasoning", json!("Hm.")),
        ("reasoning_details", json!([{"text": "Hm."}])),
        ("thinking", json!("Hm.")),
        ("thought", json!("Hm.")),
        ("tool_calls", json!([{"id": "1"}])),
        ("function_call", json!({"name": "f"})),
        ("functions", json!([{"name": "f"}])),
        ("tools", json!([{"type": "function"}])),
        ("weight", json!(0)),
    ] {
        let is_reasoning = value.is_string() || field == "reasoning_details";
        for is_in_row in [false, true] {
            // In some datasets such a field of a row is a flag for reasoning. It is ignored.
            if is_in_row && is_reasoning {
                continue;
            }
            let mut answer = json!({"role": "assistant", "content": "Me."});
            let mut row = json!({"messages": []});
            if is_in_row {
                row[field] = value.clone();
            } else {
                answer[field] = value.clone();
            }
            row["messages"] = json!([question, answer]);
            std::fs::write(&source, row.to_string()).unwrap();
            let error = format!("{:#}", load(&config, &tokenizer).unwrap_err());
            assert!(
                error.contains(":1: ") && error.contains(field) && error.contains("not supported"),
                "{field}: {error}"
            );
        }
    }
    let answer = json!({"role": "assistant", "content": "Me.", "weight": 1, "tool_calls": null});
    let row = json!({"messages": [question, answer], "tools": [], "other": 1, "reasoning": "off"});
    std::fs::write(&source, row.to_string()).unwrap();
    assert_eq!(load(&config, &tokenizer).unwrap().report.kept, 1);
}
