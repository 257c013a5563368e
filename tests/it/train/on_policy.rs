//! On-policy training with a judge behind an API.

use std::path::Path;

use anyhow::{Result, bail};
use distill::cache::logprobs_view::LogprobsView;
use distill::cache::record::Logprobs;
use distill::config::{ComputeDtype, Config, KdMode, ScoredBy, StudentInit, TeacherConfig};
use distill::data::text_scorer::TextScorer;
use distill::exit::Exit;
use distill::harvest;
use distill::harvest::options::HarvestOptions;
use distill::harvest::scorer::{EndpointScorer, ScoringStats};
use distill::model::{Model, ModelInput, SourceInput};
use distill::prompt::Prompt;
use distill::prompt::message::Message;
use distill::serve::{self, ServeOptions, Server};
use distill::signal::StopFlag;
use distill::tokenizer::Tokenizer;
use distill::train;
use distill::train::summary::{StartMode, TrainSummary};

use super::local_teacher::log_softmax;
use super::{metrics, run_folder, weights};

/// Serves the model in `teacher`, and configures it as the judge.
fn serve_judge(config: &mut Config, teacher: &Path, scored_by: ScoredBy) -> Server {
    let options = ServeOptions {
        port: 0,
        model_name: Some("teacher".into()),
        ..ServeOptions::default()
    };
    let server = serve::start(teacher, options).unwrap();
    config.teacher = TeacherConfig {
        base_url: server.base_url(),
        model: "teacher".into(),
        api_key_env: String::new(),
        ..TeacherConfig::default()
    };
    config.loss.kd = KdMode::Tail;
    config.train.on_policy = true;
    config.on_policy.max_tokens = 8;
    config.on_policy.share = 1.0;
    config.on_policy.judge = scored_by;
    config.on_policy.tokenizer = Some(teacher.into());
    server
}

/// The judge of the config, which fails at one of its calls.
struct FailingScorer {
    judge: EndpointScorer,
    calls: usize,
    /// Number of the call that fails; 0 for none.
    failing_call: usize,
}

impl TextScorer for FailingScorer {
    fn score(
        &mut self,
        texts: Vec<Prompt>,
        stop: &StopFlag,
    ) -> Result<Vec<Option<LogprobsView<'static>>>> {
        self.calls += 1;
        if self.calls == self.failing_call {
            bail!("the teacher is gone");
        }
        self.judge.score(texts, stop)
    }
}

/// Trains with a judge whose call with the number `failing_call` fails; 0 for none.
fn run(
    config: &Config,
    start: StartMode,
    failing_call: usize,
) -> (Result<TrainSummary>, ScoringStats) {
    let mut scorer = FailingScorer {
        judge: EndpointScorer::new(config, true).unwrap().unwrap(),
        calls: 0,
        failing_call,
    };
    let summary = train::run_with_scorer(config, start.into(), Some(&mut scorer));
    (summary, scorer.judge.stats().clone())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Returns the divergence between student and judge at each step with scored answers.
fn judged_kd(config: &Config) -> Vec<f64> {
    let lines = metrics(config);
    lines
        .iter()
        .filter_map(|line| line["on_policy_kd"].as_f64())
        .collect()
}

#[test]
fn on_policy_training_with_a_remote_judge_lowers_the_divergence() {
    let (_dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    let _server = serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs);
    config.train.steps = Some(150);
    let (summary, stats) = run(&config, StartMode::New, 0);
    let summary = summary.unwrap();
    let own = summary.own_answers.unwrap();
    assert!(own.scored > 300 && own.scored <= own.generated, "{own:?}");
    assert!(own.generated == 6 * 150 && summary.last_loss.is_finite());
    let kd = judged_kd(&config);
    let first = mean(&kd[..5]);
    let last = mean(&kd[kd.len() - 20..]);
    assert!(last < 0.85 * first, "from {first} to {last}");
    assert!(
        stats.texts > 300 && stats.failed + stats.unusable == 0,
        "{stats:?}"
    );
    assert_eq!(stats.requests + stats.cached, stats.texts, "{stats:?}");
}

/// Trains a student that can write text, and configures it as the pretrained student.
fn start_with_trained_student(config: &mut Config) {
    let mut first = config.clone();
    first.run_dir = config.run_dir.with_file_name("pretrained");
    first.loss.kd = KdMode::None;
    first.train.steps = Some(60);
    train::run(&first, StartMode::New.into()).unwrap();
    config.student.init = StudentInit::Pretrained;
    config.student.path = first.student_dir();
}

/// With the teacher's tokenizer, both dialects give the divergence of the two models. Without it, the divergence is a
/// little smaller.
#[test]
fn judge_dialects_agree_with_each_other_and_with_the_models() {
    let (_dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    config.train.steps = Some(1);
    config.train.dtype = ComputeDtype::F32;
    config.train.batch_size = 12;
    start_with_trained_student(&mut config);
    let mut divergences = Vec::new();
    for (scored_by, has_tokenizer) in [
        (ScoredBy::PromptLogprobs, false),
        (ScoredBy::PromptLogprobs, true),
        (ScoredBy::Echo, true),
    ] {
        let _server = serve_judge(&mut config, &teacher, scored_by);
        if !has_tokenizer {
            config.on_policy.tokenizer = None;
        }
        let (summary, stats) = run(&config, StartMode::Fresh, 0);
        summary.unwrap();
        assert!(
            stats.texts >= 3 && stats.failed + stats.unusable == 0,
            "{scored_by:?}: {stats:?}"
        );
        let divergence = judged_kd(&config)[0];
        divergences.push(divergence);
        if scored_by == ScoredBy::PromptLogprobs {
            let expected = expected_kd(&config, &teacher);
            let is_as_expected = if has_tokenizer {
                (divergence - expected).abs() < 1e-5 * expected
            } else {
                // Without a tokenizer, tokens that are parts of characters count in the tail.
                divergence < expected && divergence > 0.9 * expected
            };
            assert!(is_as_expected, "{divergence} instead of {expected}");
        }
        std::fs::remove_dir_all(distill::config::scores_dir(&config.run_dir)).unwrap();
    }
    assert!(
        (divergences[1] - divergences[2]).abs() < 1e-5,
        "{divergences:?}"
    );
}

/// Computes the mean reverse KL divergence over the tokens of the judged texts, on the teacher's 20 most likely tokens,
/// the token of the text, and the tail.
fn expected_kd(config: &Config, teacher: &Path) -> f64 {
    let tokenizer = Tokenizer::load(teacher).unwrap();
    let [teacher, student] = [teacher, &config.student.path].map(|dir| Model::load(dir).unwrap());
    let vocabulary = tokenizer.vocab_size();
    let mut sum = 0.0;
    let mut count = 0;
    for record in
        distill::cache::read(&distill::config::scores_dir(&config.run_dir).join("cache")).unwrap()
    {
        let record = record.unwrap();
        let messages: Vec<Message> =
            serde_json::from_value(record.request["messages"].clone()).unwrap();
        assert_eq!(messages.last().unwrap().content, record.answer.text);
        let (ids, answer) = tokenizer.encode_continued(&messages).unwrap();
        let positions: Vec<u32> = answer.clone().map(|at| at as u32 - 1).collect();
        let segment = 0..ids.len();
        let input = ModelInput {
            input_ids_T: &ids,
            segments_B: std::slice::from_ref(&segment),
            positions_N: &positions,
            source: SourceInput::default(),
        };
        let logprobs =
            |model: &Model| model.map_logits(input, |_, row| log_softmax(&row[..vocabulary]));
        let teachers = logprobs(&teacher).unwrap();
        let students = logprobs(&student).unwrap();
        for ((p, q), at) in teachers.iter().zip(&students).zip(answer) {
            let mut candidates: Vec<usize> = (0..vocabulary).collect();
            candidates.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            candidates.truncate(20);
            if !candidates.contains(&(ids[at] as usize)) {
                candidates.push(ids[at] as usize);
            }
            let tail_mass = |logprobs: &[f64]| {
                1.0 - candidates.iter().map(|&id| logprobs[id].exp()).sum::<f64>()
            };
            let tail_term = tail_mass(q) * (tail_mass(q) / tail_mass(p)).ln();
            let terms = candidates.iter().map(|&id| q[id].exp() * (q[id] - p[id]));
            sum += tail_term + terms.sum::<f64>();
            count += 1;
        }
    }
    sum / f64::from(count)
}

#[test]
fn interrupted_on_policy_run_repeats_no_request_and_ends_with_the_same_bytes() {
    let (dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    let _server = serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs);
    config.on_policy.share = 0.5;
    config.train.checkpoint_every = 4;
    let (summary, uninterrupted) = run(&config, StartMode::New, 0);
    summary.unwrap();
    assert_eq!(uninterrupted.cached, 0);
    let expected = (weights(&config), metrics(&config));

    config.run_dir = dir.path().join("cut");
    let (summary, first) = run(&config, StartMode::New, 8);
    let error = format!("{:#}", summary.unwrap_err());
    assert!(
        error.contains("gone") && error.contains("--resume"),
        "{error}"
    );
    // Simulates a kill at step 8, after the checkpoint of step 4.
    let checkpoints = config.run_dir.join("checkpoints");
    std::fs::remove_dir_all(checkpoints.join("step-000007")).unwrap();
    assert!(checkpoints.join("step-000004").exists());
    let (summary, second) = run(&config, StartMode::Resume, 0);
    summary.unwrap();
    assert_eq!((weights(&config), metrics(&config)), expected);
    assert!(second.cached > 0, "{second:?}");
    assert_eq!(first.requests + second.requests, uninterrupted.requests);

    // A run with another teacher cannot be resumed.
    config.teacher.model = "another".into();
    let (summary, _) = run(&config, StartMode::Resume, 0);
    let error = format!("{:#}", summary.unwrap_err());
    assert!(error.contains("have changed"), "{error}");
}

#[test]
fn judging_spends_the_run_budget_and_stops_with_a_checkpoint() {
    let (_dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    let _server = serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs);
    config.price.input = Some(100.0);
    config.price.output = Some(100.0);
    config.budget.usd = Some(0.05);
    let (summary, stats) = run(&config, StartMode::New, 0);
    let error = summary.unwrap_err();
    assert_eq!(Exit::code_of(&error), 4, "{error:#}");
    assert!(format!("{error:#}").contains("--resume"), "{error:#}");
    assert!(config.run_dir.join("checkpoints").exists());
    let spent = stats.cost_usd.unwrap();
    assert!(spent > 0.02 && spent <= 0.05, "{stats:?}");

    // A harvest may spend the rest of the budget.
    let prompts = config.run_dir.join("prompts.jsonl");
    let rows: String = (0..200)
        .map(|i| format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"number {i}\"}}]}}\n"))
        .collect();
    std::fs::write(&prompts, rows).unwrap();
    config.prompts.source = prompts;
    config.sampling.max_tokens = 8;
    let options = HarvestOptions {
        quiet: true,
        ..HarvestOptions::default()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let summary = runtime.block_on(harvest::run(&config, options)).unwrap();
    let total = summary.run_folder_usd.unwrap();
    assert!(summary.pending > 0 && total <= 0.05, "{total}");
    let harvested = summary.cost_usd.unwrap();
    assert!(
        (total - spent - harvested).abs() < 1e-9,
        "{total} is not the sum of {spent} and {harvested}"
    );
}

#[test]
fn endpoint_without_prompt_logprobs_is_refused_at_the_first_batch() {
    let (_dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    let server = serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs);
    drop(server);
    let script =
        distill::mock::script::Script::parse(std::path::Path::new("script.toml"), "").unwrap();
    let mock =
        distill::mock::server::start(script, std::net::Ipv4Addr::LOCALHOST.into(), 0).unwrap();
    config.teacher.base_url = mock.base_url();
    config.teacher.model = "mock".into();
    let (summary, stats) = run(&config, StartMode::New, 0);
    let error = summary.unwrap_err();
    assert_eq!(Exit::code_of(&error), 2, "{error:#}");
    assert!(
        format!("{error:#}").contains("prompt_logprobs"),
        "{error:#}"
    );
    assert!(stats.requests <= 2 * stats.texts, "{stats:?}");
    assert!(!config.run_dir.join("checkpoints").exists());

    // After a probe, the endpoint is refused before any request.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(distill::harvest::probe(&config)).unwrap();
    let error = EndpointScorer::new(&config, true).err().unwrap();
    assert_eq!(Exit::code_of(&error), 2, "{error:#}");
    assert!(format!("{error:#}").contains("distill probe"), "{error:#}");
    config.teacher.model = "teacher".into();
    let teacher = config.student.path.clone();
    let _server = serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs);
    runtime.block_on(distill::harvest::probe(&config)).unwrap();
    assert!(EndpointScorer::new(&config, true).is_ok());
}

/// A judge whose tokens never spell the text.
struct MismatchingScorer {
    scored: usize,
}

impl TextScorer for MismatchingScorer {
    fn score(
        &mut self,
        texts: Vec<Prompt>,
        _: &StopFlag,
    ) -> Result<Vec<Option<LogprobsView<'static>>>> {
        self.scored += texts.len();
        let logprobs = Logprobs {
            token: vec!["another text".into()],
            logprob: vec![Some(-0.5)],
            top: vec![Vec::new()],
            top_logprob: vec![Vec::new()],
            ..Logprobs::default()
        };
        let view = LogprobsView::from(&logprobs).into_owned();
        Ok(texts.iter().map(|_| Some(view.clone())).collect())
    }
}

#[test]
fn judge_whose_tokens_never_match_stops_the_training() {
    let (_dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    // The settings of a judge; the scorer below replaces the server.
    drop(serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs));
    config.train.steps = Some(150);
    let mut scorer = MismatchingScorer { scored: 0 };
    let start = StartMode::New.into();
    let error = train::run_with_scorer(&config, start, Some(&mut scorer)).unwrap_err();
    assert_eq!(Exit::code_of(&error), 2, "{error:#}");
    assert!(
        format!("{error:#}").contains("`on_policy.tokenizer`"),
        "{error:#}"
    );
    // Training stops in the first step that reaches 32 answers. A step has 6 answers.
    assert!((32..38).contains(&scorer.scored), "{}", scorer.scored);
}

#[test]
fn judge_with_another_tokenizer_lowers_the_divergence() {
    let (dir, mut config) = run_folder();
    let teacher = config.student.path.clone();
    let _server = serve_judge(&mut config, &teacher, ScoredBy::PromptLogprobs);
    let student = dir.path().join("student");
    std::fs::create_dir(&student).unwrap();
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(config.student.path.join(name), student.join(name)).unwrap();
    }
    // Without merges every token is a byte.
    let path = student.join("tokenizer.json");
    let mut tokenizer: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    tokenizer["model"]["merges"] = serde_json::json!([]);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    config.student.path = student;
    config.student.init = StudentInit::Random;
    config.train.steps = Some(100);
    let (summary, stats) = run(&config, StartMode::New, 0);
    summary.unwrap();
    let kd = judged_kd(&config);
    let first = mean(&kd[..5]);
    let last = mean(&kd[kd.len() - 10..]);
    assert!(
        kd.len() > 90 && last < 0.9 * first,
        "from {first} to {last}"
    );
    assert!(stats.texts > 200 && stats.unusable == 0, "{stats:?}");
}
