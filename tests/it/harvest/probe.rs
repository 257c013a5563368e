//! `distill probe` against different teachers, and how `harvest` uses its findings.

use distill::config::MaxTokensField;
use distill::exit::Exit;
use distill::harvest::options::HarvestOptions;
use distill::mock::script::Script;
use distill::mock::server::MockServer;
use distill::probe::findings::{Finding, LogprobsKind, ProbedEndpoint, TokenBytes};

use super::{Run, quiet_options};

fn teacher(script: &str) -> (MockServer, Run) {
    let script = Script::parse("teacher.toml".as_ref(), script).unwrap();
    let server = distill::mock::server::start(script, [127, 0, 0, 1].into(), 0).unwrap();
    let mut run = Run::at(&server.base_url(), &["a", "b"]);
    run.config.teacher.model = "mock".into();
    (server, run)
}

/// Probes the only endpoint of a run.
async fn probe(run: &Run) -> ProbedEndpoint {
    let findings = distill::harvest::probe(&run.config).await.unwrap();
    assert!(run.config.run_dir.join("endpoint.json").exists());
    findings.endpoints[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_detects_all_features() {
    let (_server, run) = teacher(
        "[answers]\ntoken = \"bytes\"\n[limits]\nrequests_per_minute = 6000\ntokens_per_minute = 60000",
    );
    let endpoint = probe(&run).await;
    assert!((14..=25).contains(&endpoint.requests), "{endpoint:?}");
    assert_eq!(endpoint.logprobs.largest_k, 20);
    assert_eq!(endpoint.logprobs.bytes, TokenBytes::Right);
    assert_eq!(endpoint.logprobs.kind, LogprobsKind::Raw);
    assert_eq!(
        endpoint.max_tokens_field,
        Some(MaxTokensField::MaxCompletionTokens)
    );
    assert!(endpoint.reports_usage && !endpoint.thinks && endpoint.refused.is_empty());
    // The mock echoes the prompt, which is not JSON.
    assert_eq!(endpoint.structured, Finding::Ignored);
    assert_eq!(endpoint.prompt_logprobs, Finding::Ignored);
    assert_eq!(endpoint.limits, ["requests 6000/min", "tokens 60000/min"]);
    assert!(
        endpoint.error_shape.contains("error object"),
        "{}",
        endpoint.error_shape
    );

    // Every record has the hash of the findings.
    run.harvest().await;
    let hash = endpoint.hash().unwrap();
    assert!(run.records().iter().all(|record| record.probe == hash));
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_detects_tempered_logprobs() {
    let (server, mut run) = teacher("[answers]\ntempered = true\ntop_logprobs = 5");
    let endpoint = probe(&run).await;
    assert_eq!(endpoint.logprobs.kind, LogprobsKind::Tempered);
    assert_eq!(endpoint.logprobs.largest_k, 5);
    let before = server.mock().stats().requests;

    run.config.sampling.temperature = Some(0.2);
    let error = run.harvest_error().await;
    assert_eq!(Exit::code_of(&error), 2);
    assert!(
        error.to_string().contains("`sampling.temperature` = 1.0"),
        "{error}"
    );
    assert_eq!(server.mock().stats().requests, before, "a request was sent");
    // A dry run makes the same check.
    let options = HarvestOptions {
        dry_run: true,
        ..quiet_options()
    };
    let dry_run = distill::harvest::run(&run.config, options).await;
    assert_eq!(Exit::code_of(&dry_run.unwrap_err()), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_detects_refused_parameters() {
    let (_server, mut run) = teacher(
        "[answers]\nrefuse_parameters = [\"logprobs\", \"seed\", \"temperature\"]\n\
         max_tokens_field = \"max_tokens\"\nreasoning_tokens = 8",
    );
    let endpoint = probe(&run).await;
    assert_eq!(endpoint.max_tokens_field, Some(MaxTokensField::MaxTokens));
    assert_eq!(
        (endpoint.logprobs.largest_k, endpoint.seed),
        (0, Finding::Refused)
    );
    assert!(endpoint.thinks);
    let refused: Vec<_> = endpoint.refused.keys().map(String::as_str).collect();
    assert_eq!(
        refused,
        ["logprobs", "max_completion_tokens", "seed", "temperature"]
    );

    // A config without the refused features works.
    run.config.sampling.reasoning = true;
    run.config.sampling.max_tokens_field = MaxTokensField::MaxTokens;
    assert_eq!(run.harvest().await.ok, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_without_key_or_of_unreachable_endpoint_is_an_error() {
    let (server, mut run) = teacher("key = \"sk-right\"");
    let error = distill::harvest::probe(&run.config).await.unwrap_err();
    assert!(error.to_string().contains("requires a key"), "{error}");
    run.config.teacher.model = "other".into();
    server.stop();
    let error = distill::harvest::probe(&run.config).await.unwrap_err();
    assert!(error.to_string().contains("does not answer"), "{error}");
}
