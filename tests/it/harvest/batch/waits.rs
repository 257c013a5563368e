//! Waits of a run in batch mode: waits that the endpoint requests, the request window and the deadline.

use super::super::exit_of;
use super::*;

#[tokio::test(start_paused = true)]
async fn requested_wait_of_any_length_is_at_most_an_hour() {
    let script = "[[faults]]\nkind = \"http 429\"\npath = \"/content\"\nfirst = 1\n\
                  body = '{\"error\":{\"message\":\"m\",\"retry_after\":9223372036854775807}}'";
    let mut hours = Vec::new();
    for script in ["", script] {
        let simulated = simulated_run(script, 5, |_| {});
        let start = Instant::now();
        let summary = harvest(&simulated).await;
        assert_eq!((summary.ok, exit_of(&summary).0), (5, 0), "{summary:?}");
        hours.push(start.elapsed().as_secs_f64() / 3_600.0);
    }
    assert!((0.5..1.5).contains(&(hours[1] - hours[0])), "{hours:?}");
}

#[tokio::test(start_paused = true)]
async fn deadline_ends_a_requested_wait() {
    let script = "[[faults]]\nkind = \"http 429\"\npath = \"/v1/files\"\n\
                  retry_after = \"seconds\"\nretry_after_s = 3600.0";
    let simulated = simulated_run(script, 5, |config| {
        config.schedule.deadline = Some("2026-11-22 20:30".parse().unwrap());
    });
    let start = Instant::now();
    let summary = harvest(&simulated).await;
    // The rows are sent in real time as soon as the deadline has passed.
    assert_eq!((summary.ok, exit_of(&summary).0), (5, 0), "{summary:?}");
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    assert!((30.0..45.0).contains(&minutes), "{minutes}");
}

#[tokio::test(start_paused = true)]
async fn time_outside_the_window_does_not_count_as_batch_outage() {
    // The window opens two hours after the start. Uploads fail in the whole first night, and for five minutes of the
    // second one.
    let script =
        "[[faults]]\nkind = \"http 503\"\npath = \"/v1/files\"\nfrom_s = 0.0\nto_s = 93900.0";
    let simulated = simulated_run(script, 5, |config| {
        config.retry.max_outage = Duration::from_secs(5_400);
        config.schedule.window = Some("22:00-23:00".parse().unwrap());
    });
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok, exit_of(&summary).0), (5, 0), "{summary:?}");
}

#[tokio::test(start_paused = true)]
async fn rows_over_the_file_size_fail_without_a_wait() {
    let simulated = simulated_run("", 50, |config| config.batch.max_megabytes = 0.0001);
    let start = Instant::now();
    let summary = harvest(&simulated).await;
    assert_eq!((summary.failed, summary.requests), (50, 0), "{summary:?}");
    assert!(start.elapsed() < Duration::from_secs(60));
}
