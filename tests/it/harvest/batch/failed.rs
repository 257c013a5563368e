//! Failed batches, with and without answers.

use super::super::end;
use super::ends::{harvest_over, harvest_with_objects};
use super::*;

#[tokio::test(start_paused = true)]
async fn answers_of_failed_batch_are_recorded() {
    let night = night("", 20, |_| {});
    let summary = harvest_with_objects(&night, |mut object| {
        if object["status"] == "completed" {
            object["status"] = "failed".into();
            object["errors"] = json!({"data": [{"code": "internal", "message": "broke"}]});
        }
        object
    })
    .await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0));
    assert_eq!(night.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn failed_batch_without_output_file_is_billed() {
    let night = night("", 5, |config| {
        priced(config);
        config.retry.max_attempts = 1;
    });
    let summary = harvest_with_objects(&night, |mut object| {
        if object["status"] == "completed" {
            object["status"] = "failed".into();
            object["output_file_id"] = Value::Null;
        }
        object
    })
    .await;
    assert_eq!((summary.failed, end(&summary).0), (5, 3), "{summary:?}");
    assert_eq!(summary.attempts_lost, 5);
    assert!(summary.run_folder_usd.unwrap() > 0.0, "{summary:?}");
}

#[tokio::test(start_paused = true)]
async fn failed_batch_fails_named_rows_and_three_stop_run() {
    let night = night("[batch]\noutcome = \"failed\"", 10, |_| {});
    let summary = harvest(&night).await;
    assert_eq!((summary.failed, summary.pending), (3, 7));
    assert_eq!(parts(&summary), [("failed", 3)]);
    let (code, message) = end(&summary);
    assert_eq!(code, 1);
    assert!(message.contains("fails every batch"), "{message}");
    assert_eq!(night.mock.stats().billed.answers, 0);
}

/// A completed batch as reported by a server that refused one row: failed, with all its lines in the error file.
fn failed_with_error_file(mut object: Value) -> Value {
    if object["status"] == "completed" {
        object["status"] = "failed".into();
        object["error_file_id"] = object["output_file_id"].take();
        object["request_counts"] = Value::Null;
    }
    object
}

#[tokio::test(start_paused = true)]
async fn answers_in_error_file_of_failed_batch_are_recorded() {
    let night = night("", 20, |_| {});
    let summary = harvest_with_objects(&night, failed_with_error_file).await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0), "{summary:?}");
    assert_eq!(night.mock.stats().billed.answers, 20);
    assert_eq!(summary.attempts_lost, 0);
}

/// A night whose batches fail, with error files changed in transit.
async fn harvest_failing(night: &Night, change_file: fn(Bytes) -> Bytes) -> HarvestSummary {
    let provider = Provider {
        change_object: failed_with_error_file,
        change_file,
        ..Provider::new(night)
    };
    harvest_over(night, provider).await
}

/// The first 15 answers of an error file, if it has 20, and lines without an answer.
fn with_errors(content: Bytes, errors: impl Fn(Value) -> Vec<Value>) -> Bytes {
    let text = String::from_utf8(content.to_vec()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() < 20 {
        return content;
    }
    let last: Value = serde_json::from_str(lines[19]).unwrap();
    let errors = errors(last["custom_id"].clone());
    let kept = lines[..15].iter().map(|line| (*line).to_owned());
    let kept = kept.chain(errors.iter().map(Value::to_string));
    kept.collect::<Vec<_>>().join("\n").into()
}

#[tokio::test(start_paused = true)]
async fn rows_named_in_error_file_fail_and_rest_is_retried() {
    let night = night("", 20, |_| {});
    let summary = harvest_failing(&night, |content| {
        with_errors(content, |id| {
            let error = json!({"code": "invalid_request", "message": "too odd"});
            vec![json!({"custom_id": id, "error": error})]
        })
    })
    .await;
    assert_eq!((summary.ok, summary.failed), (19, 1), "{summary:?}");
    assert_eq!(parts(&summary), [("failed", 2)]);
    assert_eq!(night.run.failures()[0]["class"], "invalid_request");
    // Rows that were not run keep their attempts.
    let batches = summary.batches.as_ref().unwrap();
    assert_eq!(
        (summary.attempts_lost, batches.lost, batches.requeued_rows),
        (0, 0, 4)
    );
}

#[tokio::test(start_paused = true)]
async fn rows_named_by_line_in_error_file_fail_unless_answered() {
    let night = night("", 20, |_| {});
    let summary = harvest_failing(&night, |content| {
            with_errors(content, |_| {
                let error = |line: usize| json!({"line": line, "code": "invalid_request", "message": "too odd"});
                (1..=20).map(error).collect()
            })
        })
    .await;
    assert_eq!((summary.ok, summary.failed), (15, 5), "{summary:?}");
    assert_eq!(parts(&summary), [("failed", 1)]);
    let failures = night.run.failures();
    assert!(
        failures.iter().all(|row| row["class"] == "invalid_request"),
        "{failures:?}"
    );
}

/// Unreadable answers of a failed batch are not bought again.
#[tokio::test(start_paused = true)]
async fn unreadable_error_file_is_saved_and_stops_run() {
    type Change = fn(Bytes) -> Bytes;
    let changes: [Change; 2] = [
        |content| {
            let text = String::from_utf8(content.to_vec()).unwrap();
            let lines = text.lines().map(|line| &line[..line.len() / 2]);
            lines.collect::<Vec<_>>().join("\n").into()
        },
        |content| {
            let text = String::from_utf8(content.to_vec()).unwrap();
            text.replace("\"custom_id\"", "\"customer\"").into()
        },
    ];
    for change_file in changes {
        let night = night("", 20, |_| {});
        let summary = harvest_failing(&night, change_file).await;
        let (status, message) = end(&summary);
        assert_eq!(
            (summary.ok, summary.pending, status),
            (0, 20, 1),
            "{message}"
        );
        assert_eq!(night.mock.stats().billed.answers, 20);
        let kept = std::fs::read_dir(night.run.config.run_dir.join("unreadable")).unwrap();
        assert_eq!(kept.count(), 1);
        let summary = harvest_with_objects(&night, failed_with_error_file).await;
        assert_eq!((summary.ok, end(&summary).0), (20, 0));
        assert_eq!(night.mock.stats().billed.answers, 20);
    }
}

#[tokio::test(start_paused = true)]
async fn plain_text_in_error_file_is_ignored() {
    let night = night("", 20, |_| {});
    let summary = harvest_failing(&night, |content| {
        [b"2 rows failed, see below:\n\n".as_slice(), &content]
            .concat()
            .into()
    })
    .await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0), "{summary:?}");
    assert_eq!(summary.attempts_lost, 0);
}

#[tokio::test(start_paused = true)]
async fn results_file_that_never_completes_stops_run() {
    for change_object in [failed_with_error_file, |object| object] {
        let night = night("", 20, |_| {});
        let provider = Provider {
            breaks_files: true,
            change_object,
            ..Provider::new(&night)
        };
        let summary = harvest_over(&night, provider).await;
        let (status, message) = end(&summary);
        assert_eq!((summary.ok + summary.pending, status), (20, 4));
        assert!(summary.pending > 0);
        assert!(
            message.contains("could not be read 20 times (reset)"),
            "{message}"
        );
        let summary = harvest_with_objects(&night, change_object).await;
        assert_eq!((summary.ok + summary.cached, end(&summary).0), (20, 0));
        assert_eq!(night.mock.stats().billed.answers, 20);
    }
}
