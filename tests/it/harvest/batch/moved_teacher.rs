//! Batches at an address that is no longer in the config, although `teacher.name` is the same.

use super::super::exit_of;
use super::*;

/// Starts a batch of 10 of 30 rows, then kills the run and changes the address of the teacher.
async fn move_teacher_during_batch() -> SimulatedRun {
    let mut simulated = simulated_run("", 30, |config| {
        config.teacher.name = "t".into();
        config.prompts.limit = Some(10);
    });
    let (_sender, receiver) = unbounded_channel();
    let kill_after = Some(Duration::from_secs(100));
    let killed = harvest_with(&simulated, Duration::ZERO, kill_after, receiver);
    assert!(killed.await.unwrap().is_none());
    simulated.run.config.prompts.limit = None;
    simulated.run.config.teacher.base_url = "http://localhost:2/v1".into();
    simulated
}

#[tokio::test(start_paused = true)]
async fn rows_in_batch_of_moved_teacher_stay_pending_and_exit_resumable() {
    let mut simulated = move_teacher_during_batch().await;
    for _ in 0..2 {
        let summary = harvest(&simulated).await;
        let (code, message) = exit_of(&summary);
        assert_eq!((code, summary.pending), (4, 10), "{message}");
        assert!(message.contains("`teacher.base_url`"), "{message}");
    }
    simulated.run.config.teacher.base_url = "http://localhost:1/v1".into();
    let summary = harvest(&simulated).await;
    assert_eq!(exit_of(&summary), (0, String::new()));
    assert_eq!((summary.ok, summary.cached), (10, 20));
    assert_eq!(simulated.mock.stats().billed.answers, 30);
}

#[tokio::test(start_paused = true)]
async fn rows_of_uncreated_batch_are_sent_to_moved_teacher() {
    let simulated = move_teacher_during_batch().await;
    let path = simulated.run.config.run_dir.join("batches.json");
    let mut journal: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let part = journal["parts"][0].as_object_mut().unwrap();
    part.remove("batch");
    part.insert("state".into(), "planned".into());
    std::fs::write(&path, journal.to_string()).unwrap();
    let summary = harvest(&simulated).await;
    assert_eq!(exit_of(&summary), (0, String::new()));
    assert_eq!((summary.ok, summary.pending), (30, 0));
}
