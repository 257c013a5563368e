//! Batch mode, killed repeatedly at random times.

use super::*;

async fn live_through(seed: u64) {
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
    let night = night(&script, 300, |config| {
        config.batch.max_requests = random.usize(20..120);
        config.batch.enqueued_tokens = random.bool().then_some(6_000);
        config.retry.max_attempts = 20;
        config.price.input = Some(1.0);
        config.price.output = Some(4.0);
        config.budget.usd = Some(1.0);
    });
    let latency = Duration::from_secs_f64(random.f64() * 3.0);
    let (mut kills, mut lives) = (0, 0);
    let last = loop {
        lives += 1;
        assert!(lives < 2_000, "seed {seed} does not come to an end");
        // Most processes are short, so that kills hit creations and downloads.
        let longest = random.choice([3_000, 30_000, 300_000]).unwrap();
        let life = (lives < 40).then(|| Duration::from_millis(random.u64(10..longest)));
        let (_sender, receiver) = unbounded_channel();
        match harvest_with(&night, latency, life, receiver).await.unwrap() {
            None => kills += 1,
            Some(summary) if summary.pending == 0 => break summary,
            Some(_) => {}
        }
    };
    let (stats, records) = (night.mock.stats(), night.run.records());
    let context = format!("seed {seed}, {kills} kills: {last:?} {stats:?}");
    let mut keys: Vec<_> = records.iter().map(|record| &record.key).collect();
    keys.sort();
    keys.dedup();
    // A batch of one row that ends halfway answers none.
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
    // No answer was lost, and the account has the cost: half of the price.
    let full =
        (stats.billed.prompt_tokens as f64 + 4.0 * stats.billed.completion_tokens as f64) / 1e6;
    let said = last.run_folder_usd.unwrap();
    assert!((said - full / 2.0).abs() < 1e-9, "{said} {full} {context}");
}

/// `DISTILL_NIGHTS=2000 cargo test batch` runs more seeds.
#[test]
fn batch_kills_lose_nothing_and_buy_nothing_twice() {
    on_paused_clocks(12, live_through);
}
