//! Cache keys: which settings identify a record, and which rows are requested again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use distill::cache;
use distill::cache::record::Record;
use distill::config::MaxTokensField;
use distill::harvest;
use distill::harvest::options::HarvestOptions;
use distill::report::summary::HarvestSummary;
use serde_json::json;

use super::{Run, adopt, exit_of, quiet_options};
use crate::cache_samples;
use crate::data::dataset::write_cache;
use crate::fault_server::{
    FaultServer, Reaction, RecordedRequest, answer, completion, error, reply,
};

/// Truncates the answers to prompts with the word `long` if `max_tokens` is below 100.
fn teacher(seen: &RecordedRequest) -> Reaction {
    let fields = ["max_tokens", "max_completion_tokens"];
    let max_tokens = fields.iter().find_map(|name| seen.body[name].as_u64());
    let is_truncated = seen.prompt().contains("long") && max_tokens.unwrap() < 100;
    let mut body = completion("some text", 0);
    body["choices"][0]["finish_reason"] = json!(if is_truncated { "length" } else { "stop" });
    Reaction::Reply(200, Vec::new(), body.to_string().into_bytes())
}

const PROMPTS: [&str; 4] = ["short one", "long one", "short two", "long two"];

/// Starts [`teacher`] on a server that sends `refusal` to `prompt` while the returned flag is set.
async fn refusing_teacher(
    prompt: &'static str,
    refusal: Reaction,
) -> (FaultServer, Arc<AtomicBool>) {
    let refuses = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&refuses);
    let server = FaultServer::start(move |seen| {
        if seen.prompt() == prompt && flag.load(Relaxed) {
            refusal.clone()
        } else {
            teacher(seen)
        }
    });
    (server.await, refuses)
}

/// Returns the second halves of the keys, which identify the question.
fn question_halves(keys: &[String]) -> Vec<&str> {
    keys.iter().map(|key| &key[32..]).collect()
}

/// Harvests without an error. Returns the number of cached rows and of requests.
async fn cached_and_requests(run: &Run) -> (u64, u64) {
    let summary = run.harvest().await;
    assert_eq!(exit_of(&summary), (0, String::new()));
    (summary.cached, summary.requests)
}

/// Runs `harvest --again` for the rows selected by `words`.
async fn harvest_again(run: &Run, words: &[&str]) -> anyhow::Result<HarvestSummary> {
    let options = HarvestOptions {
        again: words.iter().map(|word| word.to_string()).collect(),
        ..quiet_options()
    };
    let (_sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let signals = distill::signal::Signals::from_channel(receiver);
    harvest::run_until(&run.config, options, signals).await
}

#[tokio::test(flavor = "multi_thread")]
async fn raised_max_tokens_requests_only_truncated_answers() {
    let server = FaultServer::start(teacher).await;
    let mut run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    assert_eq!(cached_and_requests(&run).await, (4, 0));
    run.config.sampling.max_tokens_field = MaxTokensField::MaxTokens;
    assert_eq!(
        cached_and_requests(&run).await,
        (4, 0),
        "another name of the field"
    );
    run.config.sampling.max_tokens = 8;
    assert_eq!(cached_and_requests(&run).await, (4, 0), "a smaller limit");
    run.config.sampling.max_tokens = 64;
    assert_eq!(cached_and_requests(&run).await, (2, 2), "a larger limit");
    assert_eq!(cached_and_requests(&run).await, (4, 0));
    run.config.sampling.max_tokens = 100;
    assert_eq!(
        cached_and_requests(&run).await,
        (2, 2),
        "a sufficient limit"
    );
    run.config.sampling.max_tokens = 1_000;
    assert_eq!(cached_and_requests(&run).await, (4, 0));
    // The truncated answers are still in the cache.
    assert_eq!(run.records().len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoint_identity_is_its_name_or_normalised_url() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a", "b"]);
    assert_eq!(cached_and_requests(&run).await, (0, 2));
    let spelled = server.base_url.replace("127.0.0.1", "LOCALHOST");
    run.config.teacher.base_url = format!("{spelled}/");
    assert_eq!(cached_and_requests(&run).await, (2, 0));
    run.config.teacher.name = "mine".into();
    assert_eq!(
        cached_and_requests(&run).await,
        (2, 0),
        "the endpoint got a name"
    );
    run.write("prompts.txt", "a\nb\nc");
    assert_eq!(cached_and_requests(&run).await, (2, 1));
    // A named endpoint keeps its identity at another URL.
    let moved = FaultServer::start(answer).await;
    run.config.teacher.base_url.clone_from(&moved.base_url);
    let summary = run.harvest().await;
    assert_eq!((summary.cached, summary.requests), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_another_url_are_reported_and_adopted() {
    let server = FaultServer::start(teacher).await;
    let mut run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    let moved = FaultServer::start(teacher).await;
    run.config.teacher.base_url.clone_from(&moved.base_url);
    run.write(
        "prompts.txt",
        "short one\nlong one\nshort two\nlong two\nanother",
    );
    let dry = HarvestOptions {
        dry_run: true,
        ..quiet_options()
    };
    let summary = harvest::run(&run.config, dry.clone()).await.unwrap();
    let estimate = summary.estimate.as_ref().unwrap();
    // Truncated answers too, because `max_tokens` was not raised.
    assert_eq!(estimate.cached.adoptable.values().sum::<u64>(), 4);
    let table = summary.to_table();
    assert!(
        table.contains("cache adopt") && table.contains(&server.base_url),
        "{table}"
    );
    assert!(table.contains("\"content\": \"short one\""), "{table}");
    let adopted = adopt(&run.config).unwrap();
    assert_eq!((adopted.records, adopted.questions), (4, 5));
    assert_eq!(cached_and_requests(&run).await, (4, 1));
    run.config.sampling.max_tokens = 100;
    assert_eq!(cached_and_requests(&run).await, (3, 2));
    // The dry run counts the answers with other settings and to other prompts.
    run.config.sampling.temperature = Some(0.5);
    run.write("prompts.txt", "short one\nnew");
    let summary = harvest::run(&run.config, dry).await.unwrap();
    let cached = summary.estimate.unwrap().cached;
    assert_eq!((cached.other_settings, cached.other_prompts), (1, 6));
    assert_eq!(cached.counted_records, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn again_requests_only_named_rows_and_keeps_old_answers() {
    let server = FaultServer::start(teacher).await;
    let run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    run.write(
        "prompts.txt",
        "short one\nlong one\nshort two\nlong two\nnew",
    );
    let summary = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!((summary.total, summary.requests), (2, 2));
    let replaced = run.config.run_dir.join("cache/responses.replaced.jsonl");
    let replaced = std::fs::read_to_string(replaced).unwrap();
    assert_eq!(replaced.lines().count(), 2);
    assert_eq!(run.records().len(), 4);
    let error = harvest_again(&run, &["refusal"]).await.err().unwrap();
    assert_eq!(distill::exit::Exit::code_of(&error), 2);
    assert!(error.to_string().contains("\"length\" (2)"), "{error}");
    assert_eq!(
        cached_and_requests(&run).await,
        (4, 1),
        "other rows were requested again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn again_skips_truncated_answer_with_complete_one() {
    let server = FaultServer::start(teacher).await;
    let mut run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    run.write("prompts.txt", "short one\nlong one\nshort two");
    run.config.sampling.max_tokens = 100;
    assert_eq!(cached_and_requests(&run).await, (2, 1));
    run.write("prompts.txt", "short one\nlong one\nshort two\nlong two");
    // `long one` has a complete answer, `long two` a truncated one.
    let dry = HarvestOptions {
        dry_run: true,
        again: vec!["length".into()],
        ..quiet_options()
    };
    let summary = harvest::run(&run.config, dry).await.unwrap();
    assert_eq!((summary.cached, summary.pending), (1, 1));
    assert_eq!(run.records().len(), 5, "the dry run moved a record");
    let summary = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!((summary.total, summary.requests), (1, 1));
    let replaced = run.config.run_dir.join("cache/responses.replaced.jsonl");
    let replaced = std::fs::read_to_string(replaced).unwrap();
    assert_eq!(replaced.lines().count(), 1);
    assert_eq!(run.records().len(), 5);
    // All answers are complete, so a rerun sends nothing.
    let summary = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!((exit_of(&summary).0, summary.requests), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_answer_after_a_failure_is_not_bought_again() {
    let refusal = reply(404, error("no such thing", "not_found"));
    let (server, is_missing) = refusing_teacher("long two", refusal).await;
    is_missing.store(true, Relaxed);
    let mut run = Run::new(&server, &PROMPTS);
    run.config.limits.concurrency = 1;
    let summary = run.harvest().await;
    assert_eq!((summary.ok, summary.failed), (3, 1));
    is_missing.store(false, Relaxed);
    assert_eq!(cached_and_requests(&run).await, (3, 1));
    assert_eq!(
        cached_and_requests(&run).await,
        (4, 0),
        "the answer was bought again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn again_killed_after_its_last_answer_requests_nothing() {
    let server = FaultServer::start(teacher).await;
    let run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    let marker = run.config.run_dir.join("again.json");
    let first = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!((first.requests, marker.exists()), (2, false));
    // Restores the marker, as if the run had been killed before it removed the file.
    let keys: Vec<String> = run
        .records()
        .into_iter()
        .filter(|record| record.answer.finish_reason == "length")
        .map(|record| record.key)
        .collect();
    let content = json!({"words": ["length"], "keys": question_halves(&keys)});
    std::fs::write(&marker, content.to_string()).unwrap();
    let summary = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!(
        (exit_of(&summary).0, summary.requests, marker.exists()),
        (0, 0, false)
    );
    // Without a marker, all selected rows are requested.
    let restarted = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!(restarted.requests, 2);
}

/// The run is killed after it has moved the old answers and before it writes the marker.
#[tokio::test(flavor = "multi_thread")]
async fn again_killed_before_its_marker_requests_each_row_once() {
    let refusal = reply(401, error("Incorrect API key provided", "invalid_api_key"));
    let (server, is_locked) = refusing_teacher("long two", refusal).await;
    let run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    is_locked.store(true, Relaxed);
    let stopped = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!(exit_of(&stopped).0, 4);
    std::fs::remove_file(run.config.run_dir.join("again.json")).unwrap();
    is_locked.store(false, Relaxed);
    let pending = stopped.pending;
    assert_eq!(cached_and_requests(&run).await, (4 - pending, pending));
    assert_eq!(cached_and_requests(&run).await, (4, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn adopt_prefers_complete_answers() {
    let server = FaultServer::start(teacher).await;
    let mut run = Run::new(&server, &["long one", "long two"]);
    run.config.sampling.max_tokens = 50;
    assert_eq!(cached_and_requests(&run).await, (0, 2));
    let moved = FaultServer::start(teacher).await;
    run.config.teacher.base_url.clone_from(&moved.base_url);
    run.config.sampling.max_tokens = 1_000;
    assert_eq!(cached_and_requests(&run).await, (0, 2));
    // The cache has truncated answers of the first endpoint, and complete ones of the second.
    run.config.teacher.base_url.clone_from(&server.base_url);
    let adopted = adopt(&run.config).unwrap();
    assert_eq!((adopted.records, adopted.answered), (2, 2));
    assert_eq!(cached_and_requests(&run).await, (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn again_after_a_stop_skips_answered_rows() {
    let refusal = reply(401, error("Incorrect API key provided", "invalid_api_key"));
    let (server, is_locked) = refusing_teacher("long two", refusal).await;
    let mut run = Run::new(&server, &PROMPTS);
    run.config.limits.concurrency = 1;
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    is_locked.store(true, Relaxed);
    let stopped = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!(
        (exit_of(&stopped).0, stopped.ok, stopped.pending),
        (4, 1, 1)
    );
    let marker = run.config.run_dir.join("again.json");
    assert!(marker.exists());
    is_locked.store(false, Relaxed);
    // The new answer to `long one` is truncated too, but is not requested a second time.
    let resumed = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!(
        (exit_of(&resumed).0, resumed.requests, resumed.ok),
        (0, 1, 1)
    );
    assert!(!marker.exists());
    // Without a marker, all selected rows are requested.
    let restarted = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!(restarted.requests, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn again_with_word_failed_requests_failed_rows() {
    let broken = Reaction::ShortBody(completion("x", 0).to_string().into_bytes());
    let (server, is_broken) = refusing_teacher("bad", broken).await;
    is_broken.store(true, Relaxed);
    let mut run = Run::new(&server, &["a", "bad", "b"]);
    run.config.retry.max_attempts = 2;
    let summary = run.harvest().await;
    assert_eq!(
        (summary.ok, summary.failed),
        (2, 1),
        "{:?}",
        exit_of(&summary)
    );
    is_broken.store(false, Relaxed);
    let summary = run.harvest().await;
    // Both attempts may have been billed, so a plain rerun makes no further attempt.
    assert_eq!((summary.requests, summary.failed), (0, 1));
    let summary = harvest_again(&run, &["failed"]).await.unwrap();
    assert_eq!((summary.total, summary.ok), (1, 1));
}

/// Copies the cache of commit 31d146c, whose records have schema 1, with its prompts and settings.
fn restore_schema_1_run(run: &mut Run) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden/harvest-v1.jsonl");
    let cache = run.config.run_dir.join("cache");
    std::fs::create_dir_all(&cache).unwrap();
    std::fs::copy(golden, cache.join("responses.jsonl")).unwrap();
    let rows: Vec<String> = (0..6)
        .map(|n| format!("{{\"id\":\"row-{n}\",\"text\":\"prompt {n}\"}}"))
        .collect();
    run.write("prompts.jsonl", &rows.join("\n"));
    let config = &mut run.config;
    config.prompts.source = run.dir.path().join("prompts.jsonl");
    config.prompts.samples = 2;
    config.teacher.base_url = "http://127.0.0.1:18123/v1".into();
    config.teacher.model = "mock".into();
    config.sampling.max_tokens = 24;
    config.sampling.max_tokens_field = MaxTokensField::MaxTokens;
    config.sampling.top_logprobs = 2;
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_of_earlier_version_stays_valid() {
    let server = FaultServer::start(teacher).await;
    let mut run = Run::new(&server, &[]);
    restore_schema_1_run(&mut run);
    assert_eq!(cached_and_requests(&run).await, (12, 0));
    let before = run.records();
    // After `max_tokens` changes, records of schema 1 are unused until they are adopted.
    run.config.sampling.max_tokens = 40;
    let adopted = adopt(&run.config).unwrap();
    assert_eq!((adopted.records, adopted.questions), (12, 12));
    let after = run.records();
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.prompt_id, after.prompt_id);
        assert_eq!(before.sample, after.sample);
        assert_eq!(before.answer, after.answer);
        assert_eq!(before.logprobs, after.logprobs);
        assert_eq!(before.request, after.request);
    }
    run.config.teacher.base_url.clone_from(&server.base_url);
    // The answers come from a mock, so another endpoint does not adopt them.
    assert_eq!(adopt(&run.config).unwrap().records, 0);
    let without_mock = after.into_iter().map(|record| Record {
        fingerprint: "fp_real".into(),
        ..record
    });
    let cache = run.config.run_dir.join("cache");
    std::fs::remove_dir_all(&cache).unwrap();
    write_cache(&cache, &without_mock.collect::<Vec<_>>());
    assert_eq!(adopt(&run.config).unwrap().records, 12);
    // Eight answers are truncated at 24 tokens.
    assert_eq!(cached_and_requests(&run).await, (4, 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn again_removes_only_selected_records_and_resumes() {
    let refusal = reply(401, error("no", ""));
    let (server, is_locked) = refusing_teacher("long one", refusal).await;
    let mut run = Run::new(&server, &PROMPTS);
    assert_eq!(cached_and_requests(&run).await, (0, 4));
    let all_records = run.records();
    // With other settings, a small budget or a passed deadline, the run is refused and no record is removed.
    let valid_config = run.config.clone();
    type Change = fn(&mut distill::config::Config);
    let changes: [(Change, u8); 4] = [
        (|config| config.sampling.temperature = Some(0.5), 2),
        (|config| config.teacher.model = "other".into(), 2),
        (
            |config| {
                config.budget.usd = Some(1e-9);
                config.price.input = Some(1.0);
                config.price.output = Some(1.0);
                config.price.as_of = Some(jiff::Zoned::now().date().to_string().parse().unwrap());
            },
            2,
        ),
        (
            |config| config.schedule.deadline = Some("2020-01-01 00:00".parse().unwrap()),
            4,
        ),
    ];
    for (change, code) in changes {
        change(&mut run.config);
        let error = harvest_again(&run, &["length"]).await.err().unwrap();
        assert_eq!(distill::exit::Exit::code_of(&error), code, "{error:#}");
        assert_eq!(run.records(), all_records, "{error:#}");
        run.config = valid_config.clone();
    }
    run.write("prompts.txt", "short one\nlong one");
    is_locked.store(true, Relaxed);
    let summary = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!((exit_of(&summary).0, summary.ok), (1, 0));
    // Only the record of the requested row was removed.
    assert_eq!(run.records().len(), 3);
    is_locked.store(false, Relaxed);
    let summary = harvest_again(&run, &["length"]).await.unwrap();
    assert_eq!((summary.total, summary.requests, summary.ok), (1, 1, 1));
    assert_eq!(run.records().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn adopt_skips_answers_of_another_configured_teacher() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["a", "b", "c", "d", "e", "f"]);
    let teacher = |name: &str| distill::config::TeacherConfig {
        name: name.into(),
        ..run.config.teacher.clone()
    };
    run.config.teachers = vec![teacher("A"), teacher("B")];
    assert_eq!(cached_and_requests(&run).await, (0, 6));
    run.config.prompts.teachers = distill::config::Assignment::All;
    assert_eq!(adopt(&run.config).unwrap().records, 0);
    let dry = HarvestOptions {
        dry_run: true,
        ..quiet_options()
    };
    let summary = harvest::run(&run.config, dry).await.unwrap();
    assert_eq!((summary.cached, summary.pending), (6, 6));
    assert!(summary.estimate.unwrap().cached.adoptable.is_empty());
}

/// The number of records is limited, so that a dry run with a large cache stays fast.
#[tokio::test]
async fn dry_run_counts_unused_answers_of_the_first_20_000_records() {
    let server = FaultServer::start(teacher).await;
    let run = Run::new(&server, &PROMPTS);
    let dir = run.config.own_cache();
    std::fs::create_dir_all(&dir).unwrap();
    let records = (0..20_001).map(cache_samples::sample);
    std::fs::write(cache::plain_file(&dir), cache_samples::encode(records)).unwrap();
    let dry = HarvestOptions {
        dry_run: true,
        ..quiet_options()
    };
    let summary = harvest::run(&run.config, dry).await.unwrap();
    let cached = &summary.estimate.as_ref().unwrap().cached;
    assert_eq!(
        (cached.counted_records, cached.other_prompts),
        (Some(20_000), 20_000)
    );
    let table = summary.to_table();
    let note = "20,000 cached answers of the first 20,000 records are to other prompts";
    assert!(table.contains(note), "{table}");
}
