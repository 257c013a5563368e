//! Requests with custom headers, query parameters, key headers and expiring keys.

use std::collections::BTreeMap;

use super::{Run, exit_of};
use crate::fault_server::{FaultServer, answer, error, reply};

fn table(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_headers_query_and_key_header_are_sent() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a", "b"]);
    let teacher = &mut run.config.teacher;
    teacher.base_url = format!(
        "{}/openai/deployments/m",
        server.base_url.trim_end_matches("/v1")
    );
    teacher.query = table(&[("api-version", "2024-10-21")]);
    teacher.headers = table(&[("X-Title", "distill")]);
    teacher.api_key_command = Some("echo a-key-of-azure".into());
    teacher.api_key_header = "api-key".into();
    teacher.project = "proj-1".into();
    let summary = run.harvest().await;
    assert_eq!(summary.ok, 2);
    for request in server.requests() {
        assert_eq!(
            request.path,
            "/openai/deployments/m/chat/completions?api-version=2024-10-21"
        );
        assert_eq!(request.header("api-key"), Some("a-key-of-azure"));
        assert_eq!(request.header("x-title"), Some("distill"));
        assert_eq!(request.header("openai-project"), Some("proj-1"));
        assert_eq!(request.header("authorization"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn renewal_of_expired_key_does_not_count_as_an_attempt() {
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("count");
    // Each key is valid for ten requests.
    let uses_by_key = std::sync::Mutex::new(BTreeMap::<String, u32>::new());
    let server = FaultServer::start(move |seen| {
        let key = seen.header("authorization").unwrap().to_string();
        let mut uses_by_key = uses_by_key.lock().unwrap();
        let uses = uses_by_key.entry(key).or_default();
        *uses += 1;
        if *uses > 10 {
            reply(401, error("the token has expired", "expired"))
        } else {
            answer(seen)
        }
    })
    .await;
    let prompts: Vec<String> = (0..40).map(|n| format!("prompt {n}")).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let mut run = Run::new(&server, &prompts);
    run.config.teacher.api_key_command = Some(format!(
        "echo x >> {0}; echo token-$(wc -l < {0})",
        count.display()
    ));
    run.config.retry.max_attempts = 1;
    run.config.limits.concurrency = 4;
    let summary = run.harvest().await;
    assert_eq!((exit_of(&summary), summary.ok), ((0, String::new()), 40));
    let keys_read = std::fs::read_to_string(&count).unwrap().lines().count();
    assert!((4..=8).contains(&keys_read), "{keys_read} keys");
    assert!(
        run.records()
            .iter()
            .all(|record| record.timing.attempts == 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_new_keys_end_the_run_after_few_requests() {
    let server = FaultServer::start(|_| reply(401, error("no", "invalid_api_key"))).await;
    let mut run = Run::new(&server, &["a", "b", "c"]);
    // The command prints another key at each call.
    run.config.teacher.api_key_command = Some("date +%s%N".into());
    let summary = run.harvest().await;
    let (code, message) = exit_of(&summary);
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("api_key_command"), "{message}");
    assert!(server.count() <= 4, "{} requests", server.count());
}
