//! Ends of batches, and the outcomes of their rows.

use std::time::Duration;

use tokio::time::Instant;

use super::super::{end, quietly};
use super::*;
use distill::harvest;
use distill::harvest::options::HarvestOptions;

#[tokio::test(start_paused = true)]
async fn batch_row_errors_are_retried_or_failed_and_counted() {
    // The same six positions of each batch fail.
    let script = "[batch]\nerror_rows = 6\nrequest_counts = \"all_completed\"";
    let night = night(script, 20, |config| config.retry.max_attempts = 3);
    let summary = harvest(&night).await;
    assert_eq!((summary.ok, summary.failed, summary.requests), (14, 6, 32));
    assert_eq!(parts(&summary), [("completed", 3)]);
    let classes: Vec<_> = summary.failures.keys().map(String::as_str).collect();
    assert_eq!(
        classes,
        ["http 500", "no answer in the batch", "server_error"]
    );
    assert_eq!(summary.batches.as_ref().unwrap().requeued_rows, 12);
    assert_eq!(end(&summary).0, 3);
    let failures = night.run.failures();
    assert_eq!(failures.len(), 6);
    assert!(failures.iter().all(|row| row["attempts"] == 3));
    assert_eq!(night.mock.stats().billed.answers, 14);
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
    let night = night(script, 10, |_| {});
    let summary = harvest(&night).await;
    assert_eq!((summary.ok, summary.failed), (9, 1), "{summary:?}");
    assert_eq!(summary.failures["http 400"], 1);
    assert_eq!(night.run.failures()[0]["attempts"], 1);
    assert_eq!(night.bought_twice(&night.mock.stats()), 0);
}

#[tokio::test(start_paused = true)]
async fn identical_refusals_of_all_batch_rows_stop_run() {
    let script = "[answers]\nrefuse_parameters = [\"seed\"]";
    let night = night(script, 30, |config| {
        config.sampling.seed = Some(1);
        config.batch.max_requests = 10;
        config.batch.enqueued_tokens = Some(500);
    });
    let summary = harvest(&night).await;
    let (code, message) = end(&summary);
    assert_eq!((code, summary.failed, summary.pending), (1, 10, 20));
    assert!(message.contains("refuses every request"), "{message}");
    assert!(message.contains("seed"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn expired_batch_answers_are_recorded_and_rest_retried() {
    for outcome in ["expired", "cancelled"] {
        let night = night(&format!("[batch]\noutcome = \"{outcome}\""), 10, |_| {});
        let summary = harvest(&night).await;
        // 5, 3, 2 and 1 rows remain; half of one is none: six batches.
        assert_eq!((summary.ok, summary.failed), (9, 1), "{outcome}");
        assert_eq!(parts(&summary), [(outcome, 6)]);
        assert_eq!(summary.failures[&format!("batch_{outcome}")], 1);
        assert_eq!(night.mock.stats().billed.answers, 9);
    }
}

#[tokio::test(start_paused = true)]
async fn rows_in_neither_batch_file_are_counted_and_retried() {
    for counts in ["right", "all_completed", "zero", "null"] {
        let script = format!("[batch]\nlost_rows = 2\nrequest_counts = \"{counts}\"");
        let night = night(&script, 20, |config| config.retry.max_attempts = 2);
        let summary = harvest(&night).await;
        assert_eq!((summary.ok, summary.failed), (18, 2));
        assert_eq!(summary.failures["lost in a batch"], 2);
        assert_eq!(summary.batches.as_ref().unwrap().lost, 4);
        // The last batch had neither an output nor an error file.
        assert_eq!(parts(&summary), [("completed", 2)]);
        assert_eq!(night.mock.stats().billed.answers, 18);
    }
}

#[tokio::test(start_paused = true)]
async fn incomplete_results_file_is_read_again() {
    let night = night("", 20, |_| {});
    let provider = Provider {
        halved: AtomicU32::new(3),
        ..Provider::new(&night)
    };
    let summary = harvest_over(&night, provider).await;
    assert_eq!((summary.ok, summary.failed), (20, 0));
    assert_eq!(parts(&summary), [("completed", 1)]);
    assert_eq!(night.mock.stats().billed.answers, 20);
}

pub(super) async fn harvest_over(night: &Night, provider: Provider) -> HarvestSummary {
    let (_sender, receiver) = unbounded_channel();
    let summary = night.harvest_over(provider, None, receiver).await;
    summary.unwrap().unwrap()
}

/// A night whose batch objects are changed in transit.
pub(super) async fn harvest_with_objects(
    night: &Night,
    change_object: fn(Value) -> Value,
) -> HarvestSummary {
    let provider = Provider {
        change_object,
        ..Provider::new(night)
    };
    harvest_over(night, provider).await
}

/// A night whose results files are changed in transit.
async fn harvest_changed(night: &Night, change_file: fn(Bytes) -> Bytes) -> HarvestSummary {
    let provider = Provider {
        change_file,
        ..Provider::new(night)
    };
    harvest_over(night, provider).await
}

#[tokio::test(start_paused = true)]
async fn completed_batch_without_file_stops_run() {
    let night = night("", 20, |_| {});
    let summary = harvest_with_objects(&night, |mut object| {
        object["output_file_id"] = Value::Null;
        object
    })
    .await;
    let (code, message) = end(&summary);
    assert_eq!((summary.ok, summary.pending, code), (0, 20, 1));
    assert!(message.contains("names no file"), "{message}");
    let summary = harvest(&night).await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0));
    assert_eq!(night.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn occasional_403_on_batch_call_is_retried() {
    let night = night("", 20, |_| {});
    let provider = Provider {
        forbidden: AtomicU32::new(2),
        ..Provider::new(&night)
    };
    let summary = harvest_over(&night, provider).await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0));
    let lasting = Provider {
        forbidden: AtomicU32::new(u32::MAX),
        ..Provider::new(&night)
    };
    night.run.write("prompts.txt", "one more");
    let summary = harvest_over(&night, lasting).await;
    assert_eq!((summary.pending, end(&summary).0), (1, 4));
}

#[tokio::test(start_paused = true)]
async fn batch_rows_may_span_several_lines() {
    let night = night("", 20, |_| {});
    let summary = harvest_changed(&night, |content| {
        let rows = content.split(|byte| *byte == b'\n');
        let rows = rows.filter(|row| !row.is_empty());
        let rows = rows.map(|row| serde_json::from_slice(row).unwrap());
        let rows: Vec<Value> = rows.collect();
        serde_json::to_vec_pretty(&rows).unwrap().into()
    })
    .await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0));
    assert_eq!(night.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn batch_row_with_several_lines_uses_the_answer() {
    let night = night("", 20, |_| {});
    let summary = harvest_changed(&night, |content| {
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
    assert_eq!((summary.ok, end(&summary).0), (20, 0));
    assert_eq!(night.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn unreadable_results_file_is_saved_and_stops_run() {
    let night = night("", 20, |_| {});
    let summary = harvest_changed(&night, |content| {
        let content = String::from_utf8_lossy(&content);
        content.replace("\"choices\":", "\"choices\" ").into()
    })
    .await;
    assert_eq!(
        (summary.ok, summary.quarantined, end(&summary).0),
        (0, 0, 1)
    );
    assert_eq!(night.mock.stats().billed.answers, 20);
    let kept = std::fs::read_dir(night.run.config.run_dir.join("unreadable")).unwrap();
    assert_eq!(kept.count(), 1);
    // A rerun reads the files again and buys nothing.
    let summary = harvest(&night).await;
    assert_eq!((summary.ok, end(&summary).0), (20, 0));
    assert_eq!(night.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn batch_without_answers_has_no_output_file() {
    let night = night("[batch]\nerror_rows = 100", 5, |config| {
        config.retry.max_attempts = 1;
    });
    let summary = harvest(&night).await;
    assert_eq!((summary.failed, night.mock.stats().billed.answers), (5, 0));
}

#[tokio::test(start_paused = true)]
async fn batch_with_wrong_model_stops_run_without_failed_rows() {
    let night = night("", 10, |config| config.teacher.model = "gpt".into());
    let summary = harvest(&night).await;
    let (code, message) = end(&summary);
    assert_eq!((code, summary.failed, summary.pending), (1, 0, 10));
    assert!(message.contains("teacher.model"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn unknown_batch_status_is_shown_and_polled() {
    let mut night = night("[batch]\nstatus = \"queued\"", 5, |_| {});
    night.run.config.schedule.deadline = None;
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        sleep(Duration::from_secs(200)).await;
        sender.send(2).unwrap();
        std::future::pending::<()>().await;
    });
    let summary = harvest_with(&night, Duration::ZERO, None, receiver).await;
    let summary = summary.unwrap().unwrap();
    assert_eq!(parts(&summary), [("queued", 1)]);
    assert!(
        summary.to_table().contains("  queued"),
        "{}",
        summary.to_table()
    );
    assert_eq!(harvest(&night).await.ok, 5);
}

#[tokio::test(start_paused = true)]
async fn uploaded_file_not_yet_visible_is_retried() {
    // The second file stays missing until it is uploaded again.
    for missing in [1, 45] {
        let night = night(&format!("[batch]\nmissing_s = {missing}"), 5, |_| {});
        let summary = harvest(&night).await;
        assert_eq!((summary.ok, parts(&summary)), (5, vec![("completed", 1)]));
        assert_eq!(night.mock.stats().billed.answers, 5);
    }
}

#[tokio::test(start_paused = true)]
async fn batch_creation_without_reply_is_adopted() {
    let night = night("[batch]\nlost_creates = 5", 50, |config| {
        config.batch.max_requests = 10;
    });
    let summary = harvest(&night).await;
    assert_eq!((summary.ok, summary.requests), (50, 50));
    assert_eq!(summary.batches.as_ref().unwrap().adopted, 5);
    assert_eq!(night.mock.stats().billed.answers, 50);
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
        let night = night(&script, 40, |config| config.batch.max_requests = 20);
        let summary = harvest(&night).await;
        assert_eq!(summary.ok, 40, "{kind} {path}: {summary:?}");
        assert_eq!(night.mock.stats().billed.answers, 40, "{kind} {path}");
    }
}

/// The date is compared with the clock of the run: a wait of decades would end no run.
#[tokio::test(start_paused = true)]
async fn download_waits_until_the_date_in_retry_after() {
    let script = "[[faults]]\nkind = \"http 429\"\npath = \"/content\"\nfirst = 1\n\
                  retry_after = \"date\"\nretry_after_s = 30.0";
    let night = night(script, 5, |_| {});
    let provider = Provider::new(&night);
    let downloads = Arc::clone(&provider.downloads);
    let (_sender, signals) = unbounded_channel();
    let summary = night.harvest_over(provider, None, signals).await;
    assert_eq!(summary.unwrap().unwrap().ok, 5);
    let downloads = downloads.lock().unwrap();
    let waited: Vec<_> = downloads.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // The paused clock jumps ahead while the run waits for one of its threads, so the wait may be longer.
    let (least, most) = (Duration::from_secs(29), Duration::from_secs(1_200));
    assert!(
        waited.len() == 1 && (least..most).contains(&waited[0]),
        "{waited:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn endpoint_without_batch_api_is_reported() {
    for path in ["/v1/files", "/v1/batches"] {
        let script = format!("[[faults]]\nkind = \"http 404\"\npath = \"{path}\"");
        let mut night = night(&script, 5, |_| {});
        let summary = harvest(&night).await;
        let (code, message) = end(&summary);
        assert_eq!((code, summary.pending), (1, 5), "{path}");
        assert!(message.contains("accepts no batches"), "{message}");

        night.run.config.schedule.mode = RequestMode::Realtime;
        let summary = harvest(&night).await;
        assert_eq!(summary.ok, 5, "{summary:?}");
        // The planned batch was dropped.
        night.run.config.schedule.mode = RequestMode::Batch;
        let summary = harvest(&night).await;
        assert!(summary.error.is_none(), "{summary:?}");
        assert_eq!(night.mock.stats().billed.answers, 5);
    }
}

#[tokio::test(start_paused = true)]
async fn batch_outage_is_waited_out_or_exits_resumable() {
    for (most, code) in [(7_200.0, 0), (600.0, 4)] {
        let script =
            "[[faults]]\nkind = \"http 503\"\npath = \"/v1/\"\nfrom_s = 600.0\nto_s = 4200.0";
        let night = night(script, 5, |config| {
            config.retry.max_outage = Duration::from_secs_f64(most)
        });
        let summary = harvest(&night).await;
        assert_eq!(end(&summary).0, code, "{summary:?}");
        assert_eq!(summary.ok, if code == 0 { 5 } else { 0 });
    }
}

#[tokio::test(start_paused = true)]
async fn enqueued_token_limit_is_respected_or_detected() {
    // About 20 tokens per row, as the endpoint counts.
    let script = "[batch]\nenqueued_tokens = 300";
    for known in [None, Some(500)] {
        let night = night(script, 60, |config| {
            config.batch.max_requests = 20;
            config.batch.enqueued_tokens = known;
        });
        let summary = harvest(&night).await;
        assert_eq!(summary.ok, 60, "{known:?}: {summary:?}");
        let failed = summary.batches.as_ref().unwrap().parts.get("failed");
        assert_eq!(failed.is_some(), known.is_none(), "{known:?} {failed:?}");
        assert_eq!(night.mock.stats().billed.answers, 60);
    }
}

#[tokio::test(start_paused = true)]
async fn single_row_over_enqueued_token_limit_exits_resumable() {
    let night = night("[batch]\nenqueued_tokens = 3", 4, |_| {});
    let summary = harvest(&night).await;
    let (code, message) = end(&summary);
    assert_eq!((code, summary.pending), (4, 4), "{message}");
    assert!(message.contains("enqueued tokens"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn batch_polling_does_not_spin() {
    let night = night("[batch]\nin_progress_s = 80000.0", 5, |_| {});
    let start = Instant::now();
    let summary = harvest(&night).await;
    assert_eq!(summary.ok, 5);
    let polls = start.elapsed().as_secs() / 30;
    assert!(summary.turns < 3 * polls, "{} of {polls}", summary.turns);
    assert!(night.mock.stats().requests < 2 * polls);
}

#[tokio::test(start_paused = true)]
async fn window_delays_batch_submission_only() {
    let night = night("", 5, |config| {
        config.schedule.window = Some("22:00-22:10".parse().unwrap());
    });
    let start = Instant::now();
    let summary = harvest(&night).await;
    assert_eq!(summary.ok, 5);
    // The run starts at 20:00, and the batch completes after the window has closed.
    let hours = start.elapsed().as_secs_f64() / 3_600.0;
    assert!((3.0..3.2).contains(&hours), "{hours}");
}

#[tokio::test(start_paused = true)]
async fn dry_run_shows_batches_under_way_and_to_submit() {
    let night = night("[batch]\nmax_rows = 40", 100, |config| {
        config.batch.max_requests = 40;
        config.batch.enqueued_tokens = Some(3_500);
    });
    let dry_run = async || {
        let options = HarvestOptions {
            dry_run: true,
            ..quietly()
        };
        let summary = harvest::run(&night.run.config, options).await.unwrap();
        let batches = summary.estimate.unwrap().batches.unwrap();
        (summary.pending, batches)
    };
    let (pending, before) = dry_run().await;
    assert_eq!((pending, before.batches, before.under_way), (100, 3, 0));
    assert!(before.rounds > 1, "{before:?}");

    let (_sender, receiver) = unbounded_channel();
    let life = Some(Duration::from_secs(30));
    let killed = harvest_with(&night, Duration::from_millis(200), life, receiver).await;
    assert!(killed.unwrap().is_none());
    let (pending, killed) = dry_run().await;
    assert_eq!(pending, 100);
    assert!(
        killed.under_way > 0 && killed.rows_under_way > 0,
        "{killed:?}"
    );
    assert_eq!(killed.batches + killed.under_way, 3, "{killed:?}");
}
