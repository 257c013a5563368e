//! Batches under a budget, and the deadline after which the remaining rows are sent in real time at the full price.

use std::time::Duration;

use super::super::exit_of;
use super::*;

/// Returns the sum of the costs of all records, in dollars. Checks that it is not above the full price of all billed
/// answers, at the prices of [`priced`].
fn recorded_usd(simulated: &SimulatedRun) -> f64 {
    let billed = simulated.mock.stats().billed;
    let records = simulated.run.records();
    let recorded_usd: f64 = records.iter().filter_map(|record| record.cost_usd).sum();
    let full_usd = (billed.prompt_tokens as f64 + 4.0 * billed.completion_tokens as f64) / 1e6;
    assert!(recorded_usd <= full_usd + 1e-12);
    recorded_usd
}

#[tokio::test(start_paused = true)]
async fn deadline_cancels_batches_and_sends_rest_in_real_time() {
    // At the deadline, about a third of the rows of the batch are answered.
    let script = "[answers]\nlatency_s = 1.0\n[batch]\nin_progress_s = 14400.0";
    let simulated = simulated_run(script, 90, |config| {
        priced(config);
        config.schedule.deadline = Some("21:21".parse().unwrap());
    });
    let summary = harvest(&simulated).await;
    assert!(summary.error.is_none(), "{summary:?}");
    assert_eq!((summary.ok, summary.pending), (90, 0));
    assert_eq!(batches_by_status(&summary), [("cancelled", 1)]);
    let stats = simulated.mock.stats();
    let in_batch = stats.billed.batch_answers;
    assert!((25..35).contains(&in_batch), "{in_batch}");
    assert_eq!(stats.billed.answers, 90);
    assert_eq!(summary.requests, 90 + 90 - in_batch);
    // A row costs half the price in a batch, and the full price in real time.
    let share_of_full_price = |record: &Record| {
        let usage = record.usage.unwrap();
        let full_usd = (usage.prompt_tokens as f64 + 4.0 * usage.completion_tokens as f64) / 1e6;
        record.cost_usd.unwrap() / full_usd
    };
    let records = simulated.run.records();
    let half_price = records
        .iter()
        .filter(|record| share_of_full_price(record) < 0.75);
    assert_eq!(half_price.count() as u64, in_batch);
    assert!((summary.cost_usd.unwrap() - recorded_usd(&simulated)).abs() < 1e-9);
    assert!(summary.seconds > 4_800.0, "{}", summary.seconds);
}

#[tokio::test(start_paused = true)]
async fn uncancellable_batch_rows_are_not_bought_twice() {
    let script = "[batch]\ncancelling_s = 90000.0\nin_progress_s = 14400.0";
    let mut simulated = simulated_run(script, 30, |config| {
        config.schedule.deadline = Some("2026-11-22T21:00:00Z".parse().unwrap());
    });
    let summary = harvest(&simulated).await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.pending), (4, 30), "{message}");
    assert!(message.contains("being cancelled"), "{message}");
    tokio::time::advance(Duration::from_secs(90_000)).await;
    simulated.run.config.schedule.deadline = Some("2026-11-22T21:00:00Z".parse().unwrap());
    let summary = harvest(&simulated).await;
    assert_eq!((summary.ok + summary.cached, summary.pending), (30, 0));
    assert_eq!(simulated.mock.stats().billed.answers, 30);
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
    let simulated = simulated_run(script, 40, |config| {
        config.schedule.deadline = Some("20:45".parse().unwrap());
    });
    let summary = harvest(&simulated).await;
    // The fault matches the prompts 1 and 10 to 19.
    assert_eq!((summary.ok, summary.failed), (29, 11), "{summary:?}");
    assert_eq!(simulated.run.failures().len(), 11);
    assert_eq!(exit_of(&summary).0, 3);
    assert_eq!(simulated.mock.stats().billed.answers, 29);
}

#[tokio::test(start_paused = true)]
async fn batch_size_is_reduced_to_fit_the_budget() {
    let script = "[answers]\ntokens = 16\n[batch]\nlost_rows = 1";
    let mut simulated = simulated_run(script, 400, |config| {
        priced(config);
        config.budget.usd = Some(0.01);
    });
    let summary = harvest(&simulated).await;
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("budget"), "{message}");
    assert!(summary.pending > 0 && summary.ok > 20, "{summary:?}");
    let reported_usd = summary.run_folder_usd.unwrap();
    assert!(
        recorded_usd(&simulated) <= reported_usd && reported_usd <= 0.01,
        "{reported_usd}"
    );
    assert!(
        reported_usd > 0.0095,
        "the budget is not used: ${reported_usd} spent"
    );
    // Lost answers may have been billed, so their estimated cost counts.
    assert!(summary.attempts_lost > 0 && summary.estimated_usd.unwrap() > 0.0);

    simulated.run.config.budget.usd = Some(1.0);
    let summary = harvest(&simulated).await;
    assert_eq!(summary.pending, 0);
    let answered_or_failed = simulated.run.records().len() as u64 + summary.failed;
    assert_eq!(answered_or_failed, 400);
    assert_eq!(simulated.bought_twice(&simulated.mock.stats()), 0);
}

#[tokio::test(start_paused = true)]
async fn lost_journal_of_a_batch_under_way_stops_the_run() {
    let mut simulated = simulated_run("[answers]\ntokens = 16", 20, priced);
    let (_sender, receiver) = unbounded_channel();
    let kill_after = Some(Duration::from_secs(100));
    let killed = harvest_with(&simulated, Duration::ZERO, kill_after, receiver).await;
    assert!(killed.unwrap().is_none());
    let run_dir = simulated.run.config.run_dir.clone();
    let journal = run_dir.join("batches.json");
    let content = std::fs::read(&journal).unwrap();
    std::fs::remove_file(&journal).unwrap();
    for mode in [RequestMode::Batch, RequestMode::Realtime] {
        simulated.run.config.schedule.mode = mode;
        let (_sender, receiver) = unbounded_channel();
        let result = harvest_with(&simulated, Duration::ZERO, None, receiver).await;
        let error = result.unwrap_err();
        assert_eq!(distill::exit::Exit::code_of(&error), 5, "{error}");
        assert!(
            error.to_string().contains("batches.json is missing"),
            "{error}"
        );
    }
    std::fs::write(&journal, content).unwrap();
    simulated.run.config.schedule.mode = RequestMode::Batch;
    assert_eq!(harvest(&simulated).await.ok, 20);
    assert_eq!(simulated.mock.stats().billed.answers, 20);
}

#[tokio::test(start_paused = true)]
async fn batch_reservation_survives_a_kill() {
    // Every answer costs as much as is reserved for it, and the budget covers 30 answers.
    let budget_usd = 30.5 * 16.0 * 4.0 / 1e6 / 2.0;
    let simulated = simulated_run("[answers]\ntokens = 16", 20, |config| {
        priced(config);
        config.price.input = Some(0.0);
        config.budget.usd = Some(budget_usd);
    });
    let (_sender, receiver) = unbounded_channel();
    let kill_after = Some(Duration::from_secs(100));
    let killed = harvest_with(&simulated, Duration::ZERO, kill_after, receiver).await;
    assert!(killed.unwrap().is_none());
    // While the batch is under way, more rows are added than the remaining budget covers.
    let prompts: Vec<_> = (0..400)
        .map(|number| format!("prompt number {number}"))
        .collect();
    simulated.run.write("prompts.txt", &prompts.join("\n"));
    let summary = harvest(&simulated).await;
    assert_eq!(exit_of(&summary).0, 4);
    assert_eq!((summary.ok, summary.pending), (30, 370));
    let reported_usd = summary.run_folder_usd.unwrap();
    assert!(
        (reported_usd - 30.0 / 30.5 * budget_usd).abs() < 1e-12,
        "{reported_usd}"
    );
    // The next process collects the batch, so no attempt is lost.
    assert_eq!(
        (summary.attempts_lost, summary.estimated_usd),
        (0, Some(0.0))
    );
    assert_eq!(simulated.mock.stats().billed.answers, 30);
}
