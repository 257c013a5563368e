//! Failed batches, with and without answers.

use super::super::exit_of;
use super::ends::{harvest_over, harvest_with_objects};
use super::*;

#[tokio::test(start_paused = true)]
async fn answers_of_failed_batch_are_recorded() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_with_objects(&simulated, |mut object| {
        if object["status"] == "completed" {
            object["status"] = "failed".into();
            object["errors"] = json!({"data": [{"code": "internal", "message": "broke"}]});
        }
        object
    })
    .await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn failed_batch_without_output_file_is_billed() {
    let simulated = simulated_run("", 5, |config| {
        priced(config);
        config.retry.max_attempts = 1;
    });
    let summary = harvest_with_objects(&simulated, |mut object| {
        if object["status"] == "completed" {
            object["status"] = "failed".into();
            object["output_file_id"] = Value::Null;
        }
        object
    })
    .await;
    assert_eq!((summary.failed, exit_of(&summary).0), (5, 3), "{summary:?}");
    assert_eq!(summary.attempts_lost, 5);
    assert!(summary.run_folder_usd.unwrap() > 0.0, "{summary:?}");
}

#[tokio::test(start_paused = true)]
async fn failed_batch_fails_named_rows_and_three_stop_run() {
    let simulated = simulated_run("[batch]\noutcome = \"failed\"", 10, |_| {});
    let summary = harvest(&simulated).await;
    assert_eq!((summary.failed, summary.pending), (3, 7));
    assert_eq!(batches_by_status(&summary), [("failed", 3)]);
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 1);
    assert!(message.contains("fails every batch"), "{message}");
    assert_eq!(simulated.mock.stats().billed.answers, 0);
}

/// Changes a completed batch to a failed one with all its lines in the error file. Some servers report a batch like
/// this after they refused one row.
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
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_with_objects(&simulated, failed_with_error_file).await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0), "{summary:?}");
    assert_eq!(simulated.mock.stats().billed.answers, 20);
    assert_eq!(summary.attempts_lost, 0);
}

/// Harvests with batches that fail, and with error files that `change_file` changes in transit.
async fn harvest_failing(
    simulated: &SimulatedRun,
    change_file: fn(Bytes) -> Bytes,
) -> HarvestSummary {
    let teacher = SimulatedBatchTeacher {
        change_object: failed_with_error_file,
        change_file,
        ..SimulatedBatchTeacher::new(simulated)
    };
    harvest_over(simulated, teacher).await
}

/// Replaces the last 5 answers of an error file with the result of `errors`, whose argument is the `custom_id` of the
/// last line. Files with fewer than 20 lines stay unchanged.
fn with_errors(content: Bytes, errors: impl Fn(Value) -> Vec<Value>) -> Bytes {
    let text = String::from_utf8(content.to_vec()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() < 20 {
        return content;
    }
    let last: Value = serde_json::from_str(lines[19]).unwrap();
    let errors = errors(last["custom_id"].clone());
    let answers = lines[..15].iter().map(|line| (*line).to_owned());
    let new_lines = answers.chain(errors.iter().map(Value::to_string));
    new_lines.collect::<Vec<_>>().join("\n").into()
}

#[tokio::test(start_paused = true)]
async fn rows_named_in_error_file_fail_and_rest_is_retried() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_failing(&simulated, |content| {
        with_errors(content, |id| {
            let error = json!({"code": "invalid_request", "message": "too odd"});
            vec![json!({"custom_id": id, "error": error})]
        })
    })
    .await;
    assert_eq!((summary.ok, summary.failed), (19, 1), "{summary:?}");
    assert_eq!(batches_by_status(&summary), [("failed", 2)]);
    assert_eq!(simulated.run.failures()[0]["class"], "invalid_request");
    // Rows without a line in the error file are requested again, and none of their attempts counts as lost.
    let batches = summary.batches.as_ref().unwrap();
    assert_eq!(
        (summary.attempts_lost, batches.lost, batches.requeued_rows),
        (0, 0, 4)
    );
}

#[tokio::test(start_paused = true)]
async fn rows_named_by_line_in_error_file_fail_unless_answered() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_failing(&simulated, |content| {
            with_errors(content, |_| {
                let error = |line: usize| json!({"line": line, "code": "invalid_request", "message": "too odd"});
                (1..=20).map(error).collect()
            })
        })
    .await;
    assert_eq!((summary.ok, summary.failed), (15, 5), "{summary:?}");
    assert_eq!(batches_by_status(&summary), [("failed", 1)]);
    let failures = simulated.run.failures();
    assert!(
        failures.iter().all(|row| row["class"] == "invalid_request"),
        "{failures:?}"
    );
}

/// Answers in an unreadable error file are not bought again.
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
        let simulated = simulated_run("", 20, |_| {});
        let summary = harvest_failing(&simulated, change_file).await;
        let (status, message) = exit_of(&summary);
        assert_eq!(
            (summary.ok, summary.pending, status),
            (0, 20, 1),
            "{message}"
        );
        assert_eq!(simulated.mock.stats().billed.answers, 20);
        let saved = std::fs::read_dir(simulated.run.config.run_dir.join("unreadable")).unwrap();
        assert_eq!(saved.count(), 1);
        let summary = harvest_with_objects(&simulated, failed_with_error_file).await;
        assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
        assert_eq!(simulated.mock.stats().billed.answers, 20);
    }
}

#[tokio::test(start_paused = true)]
async fn plain_text_in_error_file_is_ignored() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_failing(&simulated, |content| {
        [b"2 rows failed, see below:\n\n".as_slice(), &content]
            .concat()
            .into()
    })
    .await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0), "{summary:?}");
    assert_eq!(summary.attempts_lost, 0);
}

#[tokio::test(start_paused = true)]
async fn results_file_that_never_completes_stops_run() {
    for change_object in [failed_with_error_file, |object| object] {
        let simulated = simulated_run("", 20, |_| {});
        let teacher = SimulatedBatchTeacher {
            breaks_downloads: true,
            change_object,
            ..SimulatedBatchTeacher::new(&simulated)
        };
        let summary = harvest_over(&simulated, teacher).await;
        let (status, message) = exit_of(&summary);
        assert_eq!((summary.ok + summary.pending, status), (20, 4));
        assert!(summary.pending > 0);
        assert!(
            message.contains("could not be read 20 times (reset)"),
            "{message}"
        );
        let summary = harvest_with_objects(&simulated, change_object).await;
        assert_eq!((summary.ok + summary.cached, exit_of(&summary).0), (20, 0));
        assert_eq!(simulated.mock.stats().billed.answers, 20);
    }
}
