//! Groups of answers in a cache: training uses only the groups that match the config.

use distill::config::{Config, Groups};
use distill::data::dataset::Dataset;
use distill::data::groups::Selection;
use distill::exit::Exit;

use super::nights::SimulatedRun;
use super::{Run, adopt, exit_of};
use crate::data::{dataset, tokenizer};
use crate::fault_server::{FaultServer, Reaction, answer, completion};

fn load(config: &Config) -> anyhow::Result<Dataset> {
    let selection = distill::plan::questions::selection(config)?;
    dataset::load_selected(config, &selection, &tokenizer("bytelevel"))
}

/// Harvests all rows, for a dataset without a validation split.
async fn harvest_all(run: &mut Run) {
    run.config.data.validation_share = 0.0;
    let summary = run.harvest().await;
    assert_eq!(exit_of(&summary), (0, String::new()));
}

/// Returns the number of examples, and the lines about groups in the report.
fn kept(config: &Config) -> (u64, Vec<String>) {
    let report = load(config).unwrap().report;
    (report.kept, report.groups.lines())
}

/// Returns the exit code and the message of an error.
fn refused(config: &Config) -> (u8, String) {
    let error = load(config).unwrap_err();
    (Exit::code_of(&error), format!("{error:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_with_other_settings_are_used_only_on_request() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    run.config.sampling.temperature = Some(1.0);
    harvest_all(&mut run).await;
    let (count, lines) = kept(&run.config);
    assert_eq!((count, lines.len()), (3, 1), "{lines:?}");
    assert!(lines[0].contains("m at http://localhost"), "{lines:?}");

    // After each of these changes, no answer matches the config.
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
    harvest_all(&mut run).await;
    let (count, lines) = kept(&run.config);
    assert_eq!(count, 3);
    let left_out: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("left out"))
        .collect();
    assert_eq!((lines.len(), left_out.len()), (2, 1), "{lines:?}");
    run.config.data.groups = Groups::All;
    assert_eq!(kept(&run.config).0, 6);
    // A group can be selected by its id in the report.
    let (_, after) = left_out[0].split_once("group ").unwrap();
    let id = after.split(' ').next().unwrap();
    run.config.data.groups = Groups::Named(vec![id.into()]);
    assert_eq!(kept(&run.config).0, 3);
    run.config.data.groups = Groups::Named(vec!["m".into()]);
    assert_eq!(kept(&run.config).0, 6);
    // One misspelled name is an error, even next to a valid one.
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
    harvest_all(&mut run).await;
    run.write("prompts.txt", "one\nfour");
    let (count, lines) = kept(&run.config);
    assert_eq!(count, 1);
    let shown = lines.join("\n");
    assert!(
        shown.contains("1 used; 2 left out: other prompts"),
        "{shown}"
    );
    harvest_all(&mut run).await;
    assert_eq!(kept(&run.config).0, 2);
    // Without a prompt source, only the other settings must match.
    std::fs::remove_file(run.dir.path().join("prompts.txt")).unwrap();
    assert_eq!(kept(&run.config).0, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_of_another_run_is_used_if_it_has_one_group() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    harvest_all(&mut run).await;
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config {
        run_dir: dir.path().join("run"),
        ..Config::default()
    };
    config.data.cache = Some(run.config.own_cache());
    config.data.validation_share = 0.0;
    assert_eq!(kept(&config).0, 3);
    // With the same teachers, only answers to the prompts of the config are used.
    let mut same_teacher = run.config.clone();
    same_teacher.run_dir = dir.path().join("other");
    same_teacher.data.cache = Some(run.config.own_cache());
    std::fs::write(dir.path().join("prompts.txt"), "four").unwrap();
    same_teacher.prompts.source = dir.path().join("prompts.txt");
    assert!(refused(&same_teacher).1.contains("other prompts"));
    std::fs::write(dir.path().join("prompts.txt"), "four\none").unwrap();
    assert_eq!(kept(&same_teacher).0, 1);
    run.config.teacher.model = "n".into();
    harvest_all(&mut run).await;
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
    let mut simulated = SimulatedRun::new("", 5, |config| config.data.validation_share = 0.0);
    simulated.harvest().await;
    let config = &mut simulated.run.config;
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
    // Another endpoint does not adopt the mock's answers.
    let address = std::mem::replace(&mut config.teacher.base_url, "http://other/v1".into());
    let adopted = adopt(config).unwrap();
    assert_eq!(
        (adopted.records, adopted.mocks, adopted.answered),
        (0, 5, 0)
    );
    config.teacher.base_url = address;
    // Another run does not use the mock's answers either, although they are the only group in its cache.
    let dir = tempfile::tempdir().unwrap();
    config.data.cache = Some(config.own_cache());
    config.run_dir = dir.path().join("run");
    config.data.groups = Groups::Asked;
    assert_eq!(refused(config).0, 2);
    let selection = distill::plan::questions::selection(config).unwrap();
    assert!(matches!(selection, Selection::Config(_)));
}

/// After a change of settings, an answer that the harvest still counts as cached is still in the dataset.
#[tokio::test(flavor = "multi_thread")]
async fn cached_answers_are_trained_on() {
    let server = FaultServer::start(answer).await;
    let mut run = Run::new(&server, &["one", "two", "three"]);
    harvest_all(&mut run).await;
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

/// Returns a server that sends only truncated answers, and a run that trains on them.
async fn truncating_teacher() -> (FaultServer, Run) {
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
    let (_server, mut run) = truncating_teacher().await;
    harvest_all(&mut run).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_answers_to_a_row_is_trained_on() {
    let (_server, mut run) = truncating_teacher().await;
    for max_tokens in [16, 32] {
        run.config.sampling.max_tokens = max_tokens;
        harvest_all(&mut run).await;
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
