//! Batch runs that are killed repeatedly, at random times.

use super::*;

/// Harvests 300 prompts in batches, with random faults and kills, and checks that every answer is bought and recorded
/// once.
async fn simulate_batches_with_kills(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    fastrand::seed(seed);
    let outcome = random
        .choice(["completed", "expired", "cancelled"])
        .unwrap();
    let script = format!(
        r#"
        seed = {seed}
        [answers]
        tokens = [5, 16]
        [batch]
        clock = {clock}
        outcome = "{outcome}"
        lost_creates = {lost_creates}
        missing_s = {missing}
        request_counts = "null"
        [[faults]]
        kind = "http 500"
        share = 0.1
        [[faults]]
        kind = "reset in body"
        path = "/content"
        share = 0.3
        [[faults]]
        kind = "http 503"
        path = "/v1/"
        share = 0.1
        "#,
        clock = random.u32(20..600),
        lost_creates = random.u32(0..20),
        missing = random.u32(0..5),
    );
    let simulated = simulated_run(&script, 300, |config| {
        config.batch.max_requests = random.usize(20..120);
        config.batch.enqueued_tokens = random.bool().then_some(6_000);
        config.retry.max_attempts = 20;
        config.price.input = Some(1.0);
        config.price.output = Some(4.0);
        config.budget.usd = Some(1.0);
    });
    let latency = Duration::from_secs_f64(random.f64() * 3.0);
    let (mut kills, mut processes) = (0, 0);
    let last = loop {
        processes += 1;
        assert!(processes < 2_000, "seed {seed} does not end");
        // Short times, so that kills hit the creation of batches and downloads. From the 40th process on, none is
        // killed.
        let max_ms = random.choice([3_000, 30_000, 300_000]).unwrap();
        let kill_after = (processes < 40).then(|| Duration::from_millis(random.u64(10..max_ms)));
        let (_sender, receiver) = unbounded_channel();
        let summary = harvest_with(&simulated, latency, kill_after, receiver).await;
        match summary.unwrap() {
            None => kills += 1,
            Some(summary) if summary.pending == 0 => break summary,
            Some(_) => {}
        }
    };
    let (stats, records) = (simulated.mock.stats(), simulated.run.records());
    let context = format!("seed {seed}, {kills} kills: {last:?} {stats:?}");
    let mut keys: Vec<_> = records.iter().map(|record| &record.key).collect();
    keys.sort();
    keys.dedup();
    // Batches that end halfway answer half of their rows, rounded down. So a row that is alone in each of its batches
    // fails.
    let answered = 300 - last.failed as usize;
    assert!(last.failed == 0 || outcome != "completed", "{context}");
    assert!(last.failed < 10, "{context}");
    assert_eq!(
        (keys.len(), records.len()),
        (answered, answered),
        "{context}"
    );
    assert_eq!(
        stats.billed.answers, answered as u64,
        "bought twice: {context}"
    );
    // The account has the cost of every answer, at half the price of real-time requests.
    let full_usd =
        (stats.billed.prompt_tokens as f64 + 4.0 * stats.billed.completion_tokens as f64) / 1e6;
    let reported_usd = last.run_folder_usd.unwrap();
    assert!(
        (reported_usd - full_usd / 2.0).abs() < 1e-9,
        "${reported_usd} reported, ${full_usd} at the full price: {context}"
    );
}

/// `NIGHTS=2000 cargo test batch` runs more seeds.
#[test]
fn batch_kills_lose_nothing_and_buy_nothing_twice() {
    for_each_seed(12, simulate_batches_with_kills);
}
