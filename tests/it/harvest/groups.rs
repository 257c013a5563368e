//! Groups of answers in a cache: only those that match the config are trained on.

use distill::config::{Config, Groups};
use distill::data::dataset::{self, Dataset};
use distill::data::groups::Selection;
use distill::exit::Exit;

use super::nights::Night;
use super::{Run, adopt, end};
use crate::data::tokenizer;
use crate::fault_server::{FaultServer, Reaction, answer, completion};

fn load(config: &Config) -> anyhow::Result<Dataset> {
    let selection = distill::plan::questions::selection(config)?;
    dataset::load(
        &config.data,
        &config.run_dir,
        &selection,
        &tokenizer("bytelevel"),
        &mut |_, _| Ok(()),
    )
}

async fn harvested(run: &mut Run) {
    run.config.data.validation_share = 0.0;
    let summary = run.harvest().await;
    assert_eq!(end(&summary).0, 0, "{:?}", end(&summary));
}

/// Number of examples, and the lines about groups.
fn kept(config: &Config) -> (u64, Vec<String>) {
    let report = load(config).unwrap().report;
    (report.kept, report.groups.lines())
}

/// Exit code and message.
fn refused(config: &Config) -> (u8, String) {
    let error = load(config).unwrap_err();
    (Exit::code_of(&error), format!("{error:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_of_other_settings_are_used_only_by_name() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    run.config.sampling.temperature = Some(1.0);
    harvested(&mut run).await;
    let (count, lines) = kept(&run.config);
    assert_eq!((count, lines.len()), (3, 1), "{lines:?}");
    assert!(lines[0].contains("m at http://localhost"), "{lines:?}");

    // No answer has these settings.
    type Change = fn(&mut Config);
    let changes: [(Change, &str); 3] = [
        (
            |config| config.sampling.temperature = Some(0.5),
            "other sampling parameters",
        ),
        (|config| config.teacher.model = "n".into(), "another model"),
        (
            |config| config.teacher.base_url = "http://127.0.0.1:1/v1".into(),
            "another endpoint",
        ),
    ];
    for (change, reason) in changes {
        let mut config = run.config.clone();
        change(&mut config);
        let (status, message) = refused(&config);
        assert_eq!(status, 2, "{message}");
        assert!(
            message.contains("3 left out") && message.contains(reason),
            "{message}"
        );
        assert!(message.contains("data.groups"), "{message}");
        config.data.groups = Groups::All;
        assert_eq!(kept(&config).0, 3, "{reason}");
    }

    run.config.sampling.temperature = Some(0.5);
    harvested(&mut run).await;
    let (count, lines) = kept(&run.config);
    assert_eq!(count, 3);
    let left_out: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("left out"))
        .collect();
    assert_eq!((lines.len(), left_out.len()), (2, 1), "{lines:?}");
    run.config.data.groups = Groups::All;
    assert_eq!(kept(&run.config).0, 6);
    // Selected by the displayed id.
    let (_, rest) = left_out[0].split_once("group ").unwrap();
    let id = rest.split(' ').next().unwrap();
    run.config.data.groups = Groups::Named(vec![id.into()]);
    assert_eq!(kept(&run.config).0, 3);
    run.config.data.groups = Groups::Named(vec!["m".into()]);
    assert_eq!(kept(&run.config).0, 6);
    // A misspelled name next to a valid one.
    run.config.data.groups = Groups::Named(vec!["m".into(), "gpt".into()]);
    let (status, message) = refused(&run.config);
    assert_eq!(status, 2);
    assert!(
        message.contains("\"gpt\"") && message.contains("no such group"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_changed_prompts_are_left_out() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    harvested(&mut run).await;
    run.write("prompts.txt", "one\nfour");
    let (count, lines) = kept(&run.config);
    assert_eq!(count, 1);
    let shown = lines.join("\n");
    assert!(
        shown.contains("1 used; 2 left out: other prompts"),
        "{shown}"
    );
    harvested(&mut run).await;
    assert_eq!(kept(&run.config).0, 2);
    // Without the prompts, the other settings decide.
    std::fs::remove_file(run.dir.path().join("prompts.txt")).unwrap();
    assert_eq!(kept(&run.config).0, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_of_another_run_is_used_if_it_has_one_group() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    harvested(&mut run).await;
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.cache = Some(run.config.own_cache());
    config.data.validation_share = 0.0;
    assert_eq!(kept(&config).0, 3);
    // With the same teachers the prompts decide, however few are shared.
    let mut other = run.config.clone();
    other.run_dir = dir.path().join("other");
    other.data.cache = Some(run.config.own_cache());
    std::fs::write(dir.path().join("prompts.txt"), "four").unwrap();
    other.prompts.source = dir.path().join("prompts.txt");
    assert!(refused(&other).1.contains("other prompts"));
    std::fs::write(dir.path().join("prompts.txt"), "four\none").unwrap();
    assert_eq!(kept(&other).0, 1);
    run.config.teacher.model = "n".into();
    harvested(&mut run).await;
    let (status, message) = refused(&config);
    assert_eq!(status, 2);
    assert!(
        message.contains("m at ") && message.contains("n at "),
        "{message}"
    );
    config.data.groups = Groups::Named(vec!["n".into()]);
    assert_eq!(kept(&config).0, 3);
}

#[tokio::test(start_paused = true)]
async fn mock_answers_are_used_only_by_name() {
    let mut night = Night::new("", 5, |config| config.data.validation_share = 0.0);
    night.harvest().await;
    let config = &mut night.run.config;
    for groups in [Groups::Asked, Groups::All] {
        config.data.groups = groups;
        let (status, message) = refused(config);
        assert_eq!(status, 2);
        assert!(
            message.contains("answers of a mock") && message.contains("`data.groups` to \"mock\""),
            "{message}"
        );
    }
    // The URL of the teacher does not select the mock's answers.
    config.data.groups = Groups::Named(vec![config.teacher.base_url.clone()]);
    assert!(refused(config).1.contains("no such group"));
    config.data.groups = Groups::Named(vec!["mock".into()]);
    assert_eq!(kept(config).0, 5);
    // Another endpoint does not adopt its answers.
    let address = std::mem::replace(&mut config.teacher.base_url, "http://other/v1".into());
    let adopted = adopt(config).unwrap();
    assert_eq!(
        (adopted.records, adopted.mocks, adopted.answered),
        (0, 5, 0)
    );
    config.teacher.base_url = address;
    // Not even as the only group of another run.
    let dir = tempfile::tempdir().unwrap();
    config.data.cache = Some(config.own_cache());
    config.run_dir = dir.path().join("run");
    config.data.groups = Groups::Asked;
    assert_eq!(refused(config).0, 2);
    let selection = distill::plan::questions::selection(config).unwrap();
    assert!(matches!(selection, Selection::Config(_)));
}

/// Training uses the answers that the harvest counts as cached.
#[tokio::test(flavor = "multi_thread")]
async fn harvested_answers_are_trained_on() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    harvested(&mut run).await;
    let config = &mut run.config;
    config.teacher.name = "mine".into();
    assert_eq!(kept(config).0, 3, "named later");
    config.teacher.name = String::new();
    config.prompts.samples = 2;
    assert_eq!(kept(config).0, 3, "more samples");
    config.prompts.samples = 1;
    config.prompts.limit = Some(2);
    assert_eq!(kept(config).0, 2, "fewer prompts");
    config.prompts.limit = None;
    config.teacher.base_url = "http://127.0.0.1:1/v1".into();
    assert!(refused(config).1.contains("distill cache adopt"));
    assert_eq!(adopt(config).unwrap().records, 3);
    assert_eq!(kept(config).0, 3, "adopted");
}

/// A run that trains on truncated answers, and a server that sends only such answers.
async fn truncated() -> (FaultServer, Run) {
    let server = FaultServer::start(|seen| {
        let mut body = completion(&format!("answer to {}", seen.prompt()), 0);
        body["choices"][0]["finish_reason"] = "length".into();
        Reaction::Reply(200, Vec::new(), body.to_string().into_bytes())
    })
    .await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    run.config.data.keep_finish_reasons = vec!["stop".into(), "length".into()];
    (server, run)
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_answers_are_used_until_max_tokens_is_raised() {
    let (_server, mut run) = truncated().await;
    harvested(&mut run).await;
    assert_eq!(kept(&run.config).0, 3);
    run.config.sampling.max_tokens = 8;
    assert_eq!(kept(&run.config).0, 3);
    run.config.sampling.max_tokens = 32;
    let (status, message) = refused(&run.config);
    assert_eq!(status, 2);
    assert!(
        message.contains("truncated at a smaller max_tokens"),
        "{message}"
    );
}

/// One answer per row is used, although the cache has several to the same question.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_answers_to_a_row_is_trained_on() {
    let (_server, mut run) = truncated().await;
    for max_tokens in [16, 32] {
        run.config.sampling.max_tokens = max_tokens;
        harvested(&mut run).await;
    }
    assert_eq!(run.records().len(), 6);
    for max_tokens in [8, 16, 32] {
        run.config.sampling.max_tokens = max_tokens;
        let (count, lines) = kept(&run.config);
        let reason = "another answer to the same question is used";
        assert_eq!(count, 3, "{lines:?}");
        assert!(lines.join("\n").contains(reason), "{lines:?}");
    }
    run.config.data.groups = Groups::All;
    assert_eq!(kept(&run.config).0, 6);
}
