//! Ends of batches, and the outcomes of their rows.

use std::time::Duration;

use tokio::time::Instant;

use super::super::{exit_of, quiet_options};
use super::*;
use distill::harvest;
use distill::harvest::options::HarvestOptions;

#[tokio::test(start_paused = true)]
async fn batch_row_errors_are_retried_or_failed_and_counted() {
    // Six rows of each batch fail. The second and third batch consist of the six rows that failed before.
    let script = "[batch]\nerror_rows = 6\nrequest_counts = \"all_completed\"";
    let simulated = simulated_run(script, 20, |config| config.retry.max_attempts = 3);
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, summary.failed, summary.requests), (14, 6, 32));
    assert_eq!(batches_by_status(&summary), [("completed", 3)]);
    let classes: Vec<_> = summary.failures.keys().map(String::as_str).collect();
    assert_eq!(
        classes,
        ["http 500", "no answer in the batch", "server_error"]
    );
    assert_eq!(summary.batches.as_ref().unwrap().requeued_rows, 12);
    assert_eq!(exit_of(&summary).0, 3);
    let failures = simulated.run.failures();
    assert_eq!(failures.len(), 6);
    assert!(failures.iter().all(|row| row["attempts"] == 3));
    assert_eq!(simulated.mock.stats().billed.answers, 14);
}

#[tokio::test(start_paused = true)]
async fn transient_batch_rows_are_retried_and_others_fail() {
    let script = r#"
        [[faults]]
        kind = "http 400"
        matching = "number 7"
        [[faults]]
        kind = "http 503"
        first = 1
        share = 0.5
        [[faults]]
        kind = "no usage"
        matching = "number 3"
    "#;
    let simulated = simulated_run(script, 10, |_| {});
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, summary.failed), (9, 1), "{summary:?}");
    assert_eq!(summary.failures["http 400"], 1);
    assert_eq!(simulated.run.failures()[0]["attempts"], 1);
    assert_eq!(simulated.bought_twice(&simulated.mock.stats()), 0);
}

#[tokio::test(start_paused = true)]
async fn identical_refusals_of_all_batch_rows_stop_run() {
    let script = "[answers]\nrefuse_parameters = [\"seed\"]";
    let simulated = simulated_run(script, 30, |config| {
        config.sampling.seed = Some(1);
        config.batch.max_requests = 10;
        config.batch.enqueued_tokens = Some(500);
    });
    let summary = harvest(&simulated).await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.failed, summary.pending), (1, 10, 20));
    assert!(message.contains("refuses every request"), "{message}");
    assert!(message.contains("seed"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn expired_batch_answers_are_recorded_and_rest_retried() {
    for outcome in ["expired", "cancelled"] {
        let simulated = simulated_run(&format!("[batch]\noutcome = \"{outcome}\""), 10, |_| {});
        let summary = harvest(&simulated).await;
        // Each batch answers half of its rows, rounded down: 10, 5, 3, 2, 1 and 1 rows are sent in six batches.
        assert_eq!((summary.ok, summary.failed), (9, 1), "{outcome}");
        assert_eq!(batches_by_status(&summary), [(outcome, 6)]);
        assert_eq!(summary.failures[&format!("batch_{outcome}")], 1);
        assert_eq!(simulated.mock.stats().billed.answers, 9);
    }
}

#[tokio::test(start_paused = true)]
async fn rows_in_neither_batch_file_are_counted_and_retried() {
    for counts in ["right", "all_completed", "zero", "null"] {
        let script = format!("[batch]\nlost_rows = 2\nrequest_counts = \"{counts}\"");
        let simulated = simulated_run(&script, 20, |config| config.retry.max_attempts = 2);
        let summary = harvest(&simulated).await;
        assert_eq!((summary.ok, summary.failed), (18, 2));
        assert_eq!(summary.failures["lost in a batch"], 2);
        assert_eq!(summary.batches.as_ref().unwrap().lost, 4);
        // The last batch had neither an output nor an error file.
        assert_eq!(batches_by_status(&summary), [("completed", 2)]);
        assert_eq!(simulated.mock.stats().billed.answers, 18);
    }
}

#[tokio::test(start_paused = true)]
async fn incomplete_results_file_is_read_again() {
    let simulated = simulated_run("", 20, |_| {});
    let teacher = SimulatedBatchTeacher {
        halved_downloads: AtomicU32::new(3),
        ..SimulatedBatchTeacher::new(&simulated)
    };
    let summary = harvest_over(&simulated, teacher).await;
    assert_eq!((summary.ok, summary.failed), (20, 0));
    assert_eq!(batches_by_status(&summary), [("completed", 1)]);
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

pub(super) async fn harvest_over(
    simulated: &SimulatedRun,
    teacher: SimulatedBatchTeacher,
) -> HarvestSummary {
    let (_sender, receiver) = unbounded_channel();
    let summary = simulated.harvest_over(teacher, None, receiver).await;
    summary.unwrap().unwrap()
}

/// Harvests with batch objects that `change_object` changes in transit.
pub(super) async fn harvest_with_objects(
    simulated: &SimulatedRun,
    change_object: fn(Value) -> Value,
) -> HarvestSummary {
    let teacher = SimulatedBatchTeacher {
        change_object,
        ..SimulatedBatchTeacher::new(simulated)
    };
    harvest_over(simulated, teacher).await
}

/// Harvests with results files that `change_file` changes in transit.
async fn harvest_with_files(
    simulated: &SimulatedRun,
    change_file: fn(Bytes) -> Bytes,
) -> HarvestSummary {
    let teacher = SimulatedBatchTeacher {
        change_file,
        ..SimulatedBatchTeacher::new(simulated)
    };
    harvest_over(simulated, teacher).await
}

#[tokio::test(start_paused = true)]
async fn completed_batch_without_file_stops_run() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_with_objects(&simulated, |mut object| {
        object["output_file_id"] = Value::Null;
        object
    })
    .await;
    let (code, message) = exit_of(&summary);
    assert_eq!((summary.ok, summary.pending, code), (0, 20, 1));
    assert!(message.contains("names no file"), "{message}");
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn occasional_403_on_batch_call_is_retried() {
    let simulated = simulated_run("", 20, |_| {});
    let teacher = SimulatedBatchTeacher {
        forbidden_calls: AtomicU32::new(2),
        ..SimulatedBatchTeacher::new(&simulated)
    };
    let summary = harvest_over(&simulated, teacher).await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
    let always_forbidden = SimulatedBatchTeacher {
        forbidden_calls: AtomicU32::new(u32::MAX),
        ..SimulatedBatchTeacher::new(&simulated)
    };
    simulated.run.write("prompts.txt", "one more");
    let summary = harvest_over(&simulated, always_forbidden).await;
    assert_eq!((summary.pending, exit_of(&summary).0), (1, 4));
}

#[tokio::test(start_paused = true)]
async fn batch_rows_may_span_several_lines() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_with_files(&simulated, |content| {
        let rows = content.split(|byte| *byte == b'\n');
        let rows = rows.filter(|row| !row.is_empty());
        let rows = rows.map(|row| serde_json::from_slice(row).unwrap());
        let rows: Vec<Value> = rows.collect();
        serde_json::to_vec_pretty(&rows).unwrap().into()
    })
    .await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn batch_row_with_several_lines_uses_the_answer() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_with_files(&simulated, |content| {
        let rows = content.split(|byte| *byte == b'\n');
        let rows = rows.filter(|row| !row.is_empty());
        let mut lines = Vec::new();
        for row in rows {
            let good: Value = serde_json::from_slice(row).unwrap();
            let mut empty = good.clone();
            empty["response"]["body"]["choices"][0]["message"]["content"] = "".into();
            lines.push(format!("{empty}\n{good}\n{empty}\n"));
        }
        lines.concat().into()
    })
    .await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn unreadable_results_file_is_saved_and_stops_run() {
    let simulated = simulated_run("", 20, |_| {});
    let summary = harvest_with_files(&simulated, |content| {
        let content = String::from_utf8_lossy(&content);
        content.replace("\"choices\":", "\"choices\" ").into()
    })
    .await;
    assert_eq!(
        (summary.ok, summary.quarantined, exit_of(&summary).0),
        (0, 0, 1)
    );
    assert_eq!(simulated.mock.stats().billed.answers, 20);
    let saved = std::fs::read_dir(simulated.run.config.run_dir.join("unreadable")).unwrap();
    assert_eq!(saved.count(), 1);
    // A rerun downloads the file again and buys nothing.
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, exit_of(&summary).0), (20, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn batch_without_output_file_fails_its_rows() {
    let simulated = simulated_run("[batch]\nerror_rows = 100", 5, |config| {
        config.retry.max_attempts = 1;
    });
    let summary = harvest(&simulated).await;
    assert_eq!(
        (summary.failed, simulated.mock.stats().billed.answers),
        (5, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn batch_with_wrong_model_stops_run_without_failed_rows() {
    let simulated = simulated_run("", 10, |config| config.teacher.model = "gpt".into());
    let summary = harvest(&simulated).await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.failed, summary.pending), (1, 0, 10));
    assert!(message.contains("teacher.model"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn unknown_batch_status_is_shown_and_polled() {
    let mut simulated = simulated_run("[batch]\nstatus = \"queued\"", 5, |_| {});
    simulated.run.config.schedule.deadline = None;
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        sleep(Duration::from_secs(200)).await;
        sender.send(2).unwrap();
        std::future::pending::<()>().await;
    });
    let summary = harvest_with(&simulated, Duration::ZERO, None, receiver).await;
    let summary = summary.unwrap().unwrap();
    assert_eq!(batches_by_status(&summary), [("queued", 1)]);
    assert!(
        summary.to_table().contains("  queued"),
        "{}",
        summary.to_table()
    );
    assert_eq!(harvest(&simulated).await.ok, 5);
}

#[tokio::test(start_paused = true)]
async fn uploaded_file_not_yet_visible_is_retried() {
    // After 1 second, a retry finds the file. In 45 seconds, six creations fail, so the run uploads the file again.
    for missing_s in [1, 45] {
        let simulated = simulated_run(&format!("[batch]\nmissing_s = {missing_s}"), 5, |_| {});
        let summary = harvest(&simulated).await;
        assert_eq!(
            (summary.ok, batches_by_status(&summary)),
            (5, vec![("completed", 1)])
        );
        assert_eq!(simulated.mock.stats().billed.answers, 5);
    }
}

#[tokio::test(start_paused = true)]
async fn batch_creation_without_reply_is_adopted() {
    let simulated = simulated_run("[batch]\nlost_creates = 5", 50, |config| {
        config.batch.max_requests = 10;
    });
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, summary.requests), (50, 50));
    assert_eq!(summary.batches.as_ref().unwrap().adopted, 5);
    assert_eq!(simulated.mock.stats().billed.answers, 50);
}

/// The endpoint ignores `after` and claims that more pages follow.
#[tokio::test(start_paused = true)]
async fn list_that_repeats_a_page_is_not_read_forever() {
    let simulated = simulated_run("[batch]\nlost_creates = 1", 5, |_| {});
    let teacher = SimulatedBatchTeacher {
        change_page: |_| json!({"data": [{"id": "batch_other"}], "has_more": true}),
        latency: Duration::from_millis(200),
        ..SimulatedBatchTeacher::new(&simulated)
    };
    let day = Duration::from_secs(86_400 * 2);
    let summary = tokio::time::timeout(day, harvest_over(&simulated, teacher)).await;
    assert_eq!(summary.expect("the run ends").ok, 5);
}

#[tokio::test(start_paused = true)]
async fn unreadable_row_of_an_expired_batch_may_be_billed() {
    let simulated = simulated_run("", 5, |config| config.retry.max_attempts = 1);
    let teacher = SimulatedBatchTeacher {
        change_object: |mut object| {
            if object["status"] == "completed" {
                object["status"] = "expired".into();
            }
            object
        },
        change_file: |content| {
            let line_end = content.iter().position(|&byte| byte == b'\n').unwrap();
            [b"not a row", &content[line_end..]].concat().into()
        },
        ..SimulatedBatchTeacher::new(&simulated)
    };
    let summary = harvest_over(&simulated, teacher).await;
    assert_eq!((summary.ok, summary.failed), (4, 1), "{summary:?}");
    assert_eq!(summary.attempts_lost, 1);
}

#[tokio::test(start_paused = true)]
async fn batch_connection_faults_lose_nothing() {
    for (kind, path) in [
        ("http 500", "/v1/files"),
        ("reset", "/v1/batches"),
        ("http 503", "/v1/batches"),
        ("http 429", "/v1/batches"),
        ("reset in body", "/content"),
        ("http 404", "/content"),
        ("refused", "/v1/"),
        ("truncated", "/v1/batches"),
    ] {
        let script = format!("[[faults]]\nkind = \"{kind}\"\npath = \"{path}\"\nfirst = 2");
        let simulated = simulated_run(&script, 40, |config| config.batch.max_requests = 20);
        let summary = harvest(&simulated).await;
        assert_eq!(summary.ok, 40, "{kind} {path}: {summary:?}");
        assert_eq!(simulated.mock.stats().billed.answers, 40, "{kind} {path}");
    }
}

/// The date is relative to the simulated wall clock of the run, not to the system clock.
#[tokio::test(start_paused = true)]
async fn download_waits_until_the_date_in_retry_after() {
    let script = "[[faults]]\nkind = \"http 429\"\npath = \"/content\"\nfirst = 1\n\
                  retry_after = \"date\"\nretry_after_s = 30.0";
    let simulated = simulated_run(script, 5, |_| {});
    let teacher = SimulatedBatchTeacher::new(&simulated);
    let downloads = Arc::clone(&teacher.downloads);
    let summary = harvest_over(&simulated, teacher).await;
    assert_eq!(summary.ok, 5);
    let downloads = downloads.lock().unwrap();
    let waits: Vec<_> = downloads.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // The paused clock jumps ahead while the run waits for one of its threads, so the wait may be longer.
    let allowed = Duration::from_secs(29)..Duration::from_secs(1_200);
    assert!(waits.len() == 1 && allowed.contains(&waits[0]), "{waits:?}");
}

#[tokio::test(start_paused = true)]
async fn endpoint_without_batch_api_is_reported() {
    for path in ["/v1/files", "/v1/batches"] {
        let script = format!("[[faults]]\nkind = \"http 404\"\npath = \"{path}\"");
        let mut simulated = simulated_run(&script, 5, |_| {});
        let summary = harvest(&simulated).await;
        let (code, message) = exit_of(&summary);
        assert_eq!((code, summary.pending), (1, 5), "{path}");
        assert!(message.contains("accepts no batches"), "{message}");

        simulated.run.config.schedule.mode = RequestMode::Realtime;
        let summary = harvest(&simulated).await;
        assert_eq!(summary.ok, 5, "{summary:?}");
        // The batch that was planned by the first run is not submitted.
        simulated.run.config.schedule.mode = RequestMode::Batch;
        let summary = harvest(&simulated).await;
        assert!(summary.error.is_none(), "{summary:?}");
        assert_eq!(simulated.mock.stats().billed.answers, 5);
    }
}

#[tokio::test(start_paused = true)]
async fn batch_outage_is_waited_out_or_exits_resumable() {
    for (max_outage_s, code) in [(7_200.0, 0), (600.0, 4)] {
        let script =
            "[[faults]]\nkind = \"http 503\"\npath = \"/v1/\"\nfrom_s = 600.0\nto_s = 4200.0";
        let simulated = simulated_run(script, 5, |config| {
            config.retry.max_outage = Duration::from_secs_f64(max_outage_s)
        });
        let summary = harvest(&simulated).await;
        assert_eq!(exit_of(&summary).0, code, "{summary:?}");
        assert_eq!(summary.ok, if code == 0 { 5 } else { 0 });
    }
}

#[tokio::test(start_paused = true)]
async fn enqueued_token_limit_is_respected_or_detected() {
    // The endpoint counts about 20 tokens per row.
    let script = "[batch]\nenqueued_tokens = 300";
    for configured in [None, Some(500)] {
        let simulated = simulated_run(script, 60, |config| {
            config.batch.max_requests = 20;
            config.batch.enqueued_tokens = configured;
        });
        let summary = harvest(&simulated).await;
        assert_eq!(summary.ok, 60, "{configured:?}: {summary:?}");
        let failed = summary.batches.as_ref().unwrap().parts.get("failed");
        assert_eq!(
            failed.is_some(),
            configured.is_none(),
            "{configured:?} {failed:?}"
        );
        assert_eq!(simulated.mock.stats().billed.answers, 60);
    }
}

#[tokio::test(start_paused = true)]
async fn single_row_over_enqueued_token_limit_exits_resumable() {
    let simulated = simulated_run("[batch]\nenqueued_tokens = 3", 4, |_| {});
    let summary = harvest(&simulated).await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.pending), (4, 4), "{message}");
    assert!(message.contains("enqueued tokens"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn batch_polling_does_not_spin() {
    let simulated = simulated_run("[batch]\nin_progress_s = 80000.0", 5, |_| {});
    let start = Instant::now();
    let summary = harvest(&simulated).await;
    assert_eq!(summary.ok, 5);
    let polls = start.elapsed().as_secs() / 30;
    assert!(
        summary.turns < 3 * polls,
        "{} turns, {polls} polls",
        summary.turns
    );
    assert!(simulated.mock.stats().requests < 2 * polls);
}

#[tokio::test(start_paused = true)]
async fn window_delays_batch_submission_only() {
    let simulated = simulated_run("", 5, |config| {
        config.schedule.window = Some("22:00-22:10".parse().unwrap());
    });
    let start = Instant::now();
    let summary = harvest(&simulated).await;
    assert_eq!(summary.ok, 5);
    // The run starts at 20:00, and the batch completes after the window has closed.
    let hours = start.elapsed().as_secs_f64() / 3_600.0;
    assert!((3.0..3.2).contains(&hours), "{hours}");
}

#[tokio::test(start_paused = true)]
async fn dry_run_shows_batches_under_way_and_to_submit() {
    let simulated = simulated_run("[batch]\nmax_rows = 40", 100, |config| {
        config.batch.max_requests = 40;
        config.batch.enqueued_tokens = Some(3_500);
    });
    let dry_run = async || {
        let options = HarvestOptions {
            dry_run: true,
            ..quiet_options()
        };
        let summary = harvest::run(&simulated.run.config, options).await.unwrap();
        let batches = summary.estimate.unwrap().batches.unwrap();
        (summary.pending, batches)
    };
    let (pending, before) = dry_run().await;
    assert_eq!((pending, before.batches, before.under_way), (100, 3, 0));
    assert!(before.rounds > 1, "{before:?}");

    let (_sender, receiver) = unbounded_channel();
    let latency = Duration::from_millis(200);
    let kill_after = Some(Duration::from_secs(30));
    let killed = harvest_with(&simulated, latency, kill_after, receiver).await;
    assert!(killed.unwrap().is_none());
    let (pending, after) = dry_run().await;
    assert_eq!(pending, 100);
    assert!(after.under_way > 0 && after.rows_under_way > 0, "{after:?}");
    assert_eq!(after.batches + after.under_way, 3, "{after:?}");
}
