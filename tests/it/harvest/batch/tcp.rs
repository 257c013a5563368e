//! Batch mode over real TCP, against a mock whose clock runs a day per second.

use std::time::Duration;

use distill::mock::script::Script;
use distill::mock::server::start;

use super::super::{Run, exit_of};
use super::*;

fn run(script: &str, change: impl FnOnce(&mut Config)) -> (distill::mock::server::MockServer, Run) {
    let script = format!("{script}\n[batch]\nclock = 86400.0\n");
    let script = Script::parse("batch.toml".as_ref(), &script).unwrap();
    let server = start(script, "127.0.0.1".parse().unwrap(), 0).unwrap();
    let prompts: Vec<_> = (0..40).map(|number| format!("prompt {number}")).collect();
    let prompts: Vec<_> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::at(&server.base_url(), &prompts);
    run.config.teacher.model = "mock".into();
    run.config.schedule.mode = RequestMode::Batch;
    run.config.batch.poll = Duration::from_secs_f64(0.02);
    run.config.batch.max_requests = 15;
    change(&mut run.config);
    (server, run)
}

#[tokio::test]
async fn batch_files_are_streamed_over_tcp() {
    let (server, run) = run("", |config| config.sampling.top_logprobs = 20);
    let summary = run.harvest().await;
    assert_eq!(exit_of(&summary), (0, String::new()));
    assert_eq!(
        (summary.ok, batches_by_status(&summary)),
        (40, vec![("completed", 3)])
    );
    assert!(run.records().iter().all(|record| record.logprobs.is_some()));
    assert_eq!(server.stop().billed.batch_answers, 40);
}

#[tokio::test]
async fn batch_connection_faults_are_retried_and_bought_once() {
    let script = r#"
        [[faults]]
        kind = "reset in body"
        path = "/content"
        first = 1
        [[faults]]
        kind = "short body"
        path = "/content"
        first = 2
        [[faults]]
        kind = "reset"
        path = "/v1/files"
        share = 0.3
        [[faults]]
        kind = "truncated"
        path = "/v1/batches"
        first = 1
    "#;
    let (server, run) = run(script, |_| {});
    let summary = run.harvest().await;
    assert_eq!(exit_of(&summary), (0, String::new()));
    assert_eq!(summary.ok, 40);
    assert_eq!(server.stop().billed.answers, 40);
}

#[tokio::test]
async fn batch_run_without_required_key_ends() {
    // The run sends no key, so every request gets a 401.
    let (_server, run) = run("key = \"sk-another-key-0123456789\"", |_| {});
    let summary = run.harvest().await;
    let (code, message) = exit_of(&summary);
    assert_eq!((code, summary.pending), (1, 40));
    assert!(message.contains("api_key_env"), "{message}");
}
