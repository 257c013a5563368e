//! Batches under a budget, and the deadline after which the rest is sent at the full price.

use std::time::Duration;

use super::super::end;
use super::*;

/// By the prices of [`priced`], those of real time at the full price.
fn bill(night: &Night) -> f64 {
    let billed = night.mock.stats().billed;
    let records = night.run.records();
    let cost: f64 = records.iter().filter_map(|record| record.cost_usd).sum();
    let full = (billed.prompt_tokens as f64 + 4.0 * billed.completion_tokens as f64) / 1e6;
    assert!(cost <= full + 1e-12);
    cost
}

#[tokio::test(start_paused = true)]
async fn deadline_cancels_batches_and_sends_rest_in_real_time() {
    // At 21:20 a third of the rows are done.
    let script = "[answers]\nlatency_s = 1.0\n[batch]\nin_progress_s = 14400.0";
    let night = night(script, 90, |config| {
        priced(config);
        config.schedule.deadline = Some("21:21".parse().unwrap());
    });
    let summary = harvest(&night).await;
    assert!(summary.error.is_none(), "{summary:?}");
    assert_eq!((summary.ok, summary.pending), (90, 0));
    assert_eq!(parts(&summary), [("cancelled", 1)]);
    let stats = night.mock.stats();
    let in_batch = stats.billed.batch_answers;
    assert!((25..35).contains(&in_batch), "{in_batch}");
    assert_eq!(stats.billed.answers, 90);
    assert_eq!(summary.requests, 90 + 90 - in_batch);
    // Half the price for batch rows, the full price for the others.
    let costs: Vec<_> = night.run.records();
    let cost_of = |record: &Record| {
        let usage = record.usage.unwrap();
        let full = (usage.prompt_tokens as f64 + 4.0 * usage.completion_tokens as f64) / 1e6;
        record.cost_usd.unwrap() / full
    };
    let halves = costs.iter().filter(|record| cost_of(record) < 0.75).count();
    assert_eq!(halves as u64, in_batch);
    assert!((summary.cost_usd.unwrap() - bill(&night)).abs() < 1e-9);
    assert!(summary.seconds > 4_800.0, "{}", summary.seconds);
}

#[tokio::test(start_paused = true)]
async fn uncancellable_batch_rows_are_not_bought_twice() {
    let script = "[batch]\ncancelling_s = 90000.0\nin_progress_s = 14400.0";
    let mut night = night(script, 30, |config| {
        config.schedule.deadline = Some("2026-11-22T21:00:00Z".parse().unwrap());
    });
    // A separate run for the real-time rows.
    let summary = harvest(&night).await;
    let (code, message) = end(&summary);
    assert_eq!((code, summary.pending), (4, 30), "{message}");
    assert!(message.contains("being cancelled"), "{message}");
    tokio::time::advance(Duration::from_secs(90_000)).await;
    night.run.config.schedule.deadline = Some("2026-11-22T21:00:00Z".parse().unwrap());
    let summary = harvest(&night).await;
    assert_eq!((summary.ok + summary.cached, summary.pending), (30, 0));
    assert_eq!(night.mock.stats().billed.answers, 30);
}

#[tokio::test(start_paused = true)]
async fn failed_batch_rows_stay_failed_in_real_time() {
    let script = r#"
        [batch]
        outcome = "cancelled"
        [[faults]]
        kind = "http 400"
        matching = "number 1"
    "#;
    let night = night(script, 40, |config| {
        config.schedule.deadline = Some("20:45".parse().unwrap());
    });
    let summary = harvest(&night).await;
    // 1 and 10 to 19.
    assert_eq!((summary.ok, summary.failed), (29, 11), "{summary:?}");
    assert_eq!(night.run.failures().len(), 11);
    assert_eq!(end(&summary).0, 3);
    assert_eq!(night.mock.stats().billed.answers, 29);
}

#[tokio::test(start_paused = true)]
async fn batch_size_is_reduced_to_fit_the_budget() {
    let script = "[answers]\ntokens = 16\n[batch]\nlost_rows = 1";
    let mut night = night(script, 400, |config| {
        priced(config);
        config.budget.usd = Some(0.01);
    });
    let summary = harvest(&night).await;
    let (code, message) = end(&summary);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("budget"), "{message}");
    assert!(summary.pending > 0 && summary.ok > 20, "{summary:?}");
    let said = summary.run_folder_usd.unwrap();
    assert!(bill(&night) <= said && said <= 0.01, "{said}");
    assert!(said > 0.0095, "the budget is used: {said}");
    // Lost answers may have been billed and count.
    assert!(summary.attempts_lost > 0 && summary.estimated_usd.unwrap() > 0.0);

    night.run.config.budget.usd = Some(1.0);
    let summary = harvest(&night).await;
    assert_eq!(summary.pending, 0);
    let left = night.run.records().len() as u64 + summary.failed;
    assert_eq!(left, 400);
    assert_eq!(night.bought_twice(&night.mock.stats()), 0);
}

#[tokio::test(start_paused = true)]
async fn batch_reservation_survives_a_kill() {
    // Every answer costs its full reservation, and the budget covers thirty.
    let cap = 30.5 * 16.0 * 4.0 / 1e6 / 2.0;
    let night = night("[answers]\ntokens = 16", 20, |config| {
        priced(config);
        config.price.input = Some(0.0);
        config.budget.usd = Some(cap);
    });
    let (_sender, receiver) = unbounded_channel();
    let life = Some(Duration::from_secs(100));
    let killed = harvest_with(&night, Duration::ZERO, life, receiver).await;
    assert!(killed.unwrap().is_none());
    // More rows than the remaining budget covers while the batch is under way.
    let prompts: Vec<_> = (0..400)
        .map(|number| format!("prompt number {number}"))
        .collect();
    night.run.write("prompts.txt", &prompts.join("\n"));
    let summary = harvest(&night).await;
    assert_eq!(end(&summary).0, 4);
    assert_eq!((summary.ok, summary.pending), (30, 370));
    let said = summary.run_folder_usd.unwrap();
    assert!((said - 30.0 / 30.5 * cap).abs() < 1e-12, "{said}");
    // The batch survives the kill.
    assert_eq!(
        (summary.attempts_lost, summary.estimated_usd),
        (0, Some(0.0))
    );
    assert_eq!(night.mock.stats().billed.answers, 30);
}
