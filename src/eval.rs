//! A model against the truth, and against its teacher's answers to prompts that nobody trained on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::config::{AnswerMatching, Config, EvalConfig, TemplateDate};
use crate::data::dataset;
use crate::data::groups::Selection;
use crate::exit::Exit;
use crate::model::Model;
use crate::model::batcher::GenerateOptions;
use crate::model::generate;
use crate::prompt;
use crate::prompt::Prompt;
use crate::signal::StopFlag;
use crate::terminal::progress::Progress;
use crate::tokenizer::Tokenizer;
use crate::train::local_teacher;
use crate::train::metrics::Means;
use crate::train::objective;
use crate::train::objective::Models;

/// What an evaluation found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub version: u32,
    pub model: PathBuf,
    pub parameters: usize,
    /// Against `eval.source`; None without one.
    pub truth: Option<Truth>,
    /// Against the teacher's answers; None where there are none.
    pub teacher: Option<Means>,
}

/// Greedy answers beside the true ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Truth {
    pub rows: usize,
    pub correct: usize,
    /// `correct / rows`.
    pub accuracy: f64,
    /// With `matching = "json"`: answers that are no JSON at all.
    pub malformed: usize,
    /// Answers that reached `eval.max_tokens`.
    pub cut_off: usize,
    /// Generated tokens per second, `eval.batch_size` answers at a time.
    pub tokens_per_s: f64,
}

pub(crate) const VERSION: u32 = 1;

/// Evaluates `eval.model`, or the student of this run.
///
/// # Errors
/// Where the model or the rows do not load, or there is nothing to evaluate on.
pub(crate) fn run(
    config: &Config,
    selection: &dyn Fn() -> Result<Selection>,
    quiet: bool,
) -> Result<Report> {
    let dir = config
        .eval
        .model
        .clone()
        .unwrap_or_else(|| config.student_dir());
    if !dir.exists() {
        bail!(Exit::Usage(format!(
            "there is no model in {}: run `distill train` first, or set eval.model",
            dir.display()
        )));
    }
    let model = Model::load(&dir)?;
    let mut tokenizer = Tokenizer::load(&dir)?;
    match config.student.template_date {
        Some(date @ TemplateDate::Fixed(_)) => tokenizer.set_date(date.into()),
        Some(TemplateDate::Record) | None => tokenizer.use_clock(),
    }
    tokenizer.check_fits(model.config().vocab_size)?;
    let truth = match &config.eval.source {
        Some(source) => {
            let rows = rows(config, source)?;
            Some(against_truth(
                &model,
                &tokenizer,
                &rows,
                &config.eval,
                quiet,
            )?)
        }
        None => None,
    };
    if let Some(date) = config.student.template_date {
        tokenizer.set_date(date.into());
    }
    let teacher = match against_teacher(config, selection, &model, &tokenizer) {
        Err(error) if truth.is_some() && matches!(error.downcast_ref(), Some(Exit::Usage(_))) => {
            tracing::warn!("the student is not compared with its teacher: {error:#}");
            None
        }
        teacher => teacher?,
    };
    if truth.is_none() && teacher.is_none() {
        bail!(Exit::Usage(
            "there is nothing to evaluate on: set eval.source to held-out rows with their true \
             answers, or eval.teacher_cache to a cache of held-out answers"
                .into()
        ));
    }
    Ok(Report {
        version: VERSION,
        model: dir,
        parameters: model.config().parameter_count(),
        truth,
        teacher,
    })
}

/// Held-out prompts with their true answers.
fn rows(config: &Config, source: &Path) -> Result<Vec<(Prompt, String)>> {
    let template = config.prompts.template.as_deref();
    let mut rows = prompt::load_with(source, template, |id, row| {
        truth_of(id, &row, &config.eval.truth)
    })?;
    rows.truncate(config.eval.limit.unwrap_or(usize::MAX));
    Ok(rows)
}

/// Answers each row greedily and compares with its true answer.
fn against_truth(
    model: &Model,
    tokenizer: &Tokenizer,
    rows: &[(Prompt, String)],
    settings: &EvalConfig,
    quiet: bool,
) -> Result<Truth> {
    let prompts: Vec<Vec<u32>> = rows
        .iter()
        .map(|(prompt, _)| tokenizer.encode_prompt(&prompt.messages))
        .collect::<Result<_>>()?;
    let options = GenerateOptions {
        max_tokens: settings.max_tokens as usize,
        ..GenerateOptions::default()
    };
    let stop = StopFlag::watch()?;
    let mut progress = Progress::new("eval", rows.len() as u64, quiet);
    let began = Instant::now();
    let mut answers = Vec::with_capacity(rows.len());
    // In portions, so that progress can be shown and a signal seen between them.
    for prompts in prompts.chunks(settings.batch_size * 8) {
        answers.extend(generate::batch(
            model,
            tokenizer,
            prompts,
            &options,
            settings.batch_size,
        )?);
        progress.update(answers.len() as u64, || "answers".into());
        stop.check()?;
    }
    drop(progress);
    let seconds = began.elapsed().as_secs_f64();
    let tokens: usize = answers.iter().map(|answer| answer.ids.len()).sum();
    let mut truth = Truth {
        rows: rows.len(),
        correct: 0,
        accuracy: 0.0,
        malformed: 0,
        cut_off: 0,
        tokens_per_s: tokens as f64 / seconds,
    };
    for (answer, (_, expected)) in answers.iter().zip(rows) {
        truth.correct += usize::from(matches(settings.matching, &answer.text, expected));
        truth.malformed +=
            usize::from(settings.matching == AnswerMatching::Json && parse(&answer.text).is_none());
        truth.cut_off +=
            usize::from(answer.finish_reason == crate::model::batcher::FinishReason::Length);
    }
    truth.accuracy = truth.correct as f64 / truth.rows.max(1) as f64;
    Ok(truth)
}

/// The true answer of a row: a string as it stands, anything else as JSON.
fn truth_of(id: &str, row: &Value, field: &str) -> Result<String> {
    match row.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value) => Ok(value.to_string()),
        None => bail!(Exit::Usage(format!(
            "row {id:?} has no field {field:?}: set eval.truth to the field with the true answer"
        ))),
    }
}

fn matches(matching: AnswerMatching, answer: &str, truth: &str) -> bool {
    match matching {
        AnswerMatching::Exact => answer.trim() == truth.trim(),
        AnswerMatching::Json => parse(answer).is_some_and(|value| Some(value) == parse(truth)),
    }
}

/// Key order does not matter to `Value`'s equality.
fn parse(text: &str) -> Option<Value> {
    serde_json::from_str(text.trim()).ok()
}

/// Mean terms on held-out teacher answers.
fn against_teacher(
    config: &Config,
    selection: &dyn Fn() -> Result<Selection>,
    model: &Model,
    tokenizer: &Tokenizer,
) -> Result<Option<Means>> {
    let teacher = config.teacher.local.as_ref();
    let teacher = teacher.map(|dir| local_teacher::frozen(dir, tokenizer, &config.train));
    let teacher = teacher.transpose()?;
    let models = Models {
        student: model,
        teacher: teacher.as_ref(),
    };
    let fitting = Config {
        data: config.data.within(models.context()),
        ..config.clone()
    };
    let data = match &config.eval.teacher_cache {
        Some(dir) => dataset::held_out(dir, &fitting.data, tokenizer)
            .with_context(|| format!("cannot use eval.teacher_cache {}", dir.display()))?,
        None if config.data.source.is_some() || config.training_cache().exists() => {
            dataset::load(&fitting, &selection()?, tokenizer, &mut |_, _| Ok(()))?
        }
        None => return Ok(None),
    };
    if !data.report.dropped.is_empty() {
        let reasons = crate::data::report::by_reason(&data.report.dropped);
        tracing::warn!("answers of the teacher that are not compared: {reasons}");
    }
    let groups = data.report.groups.lines();
    if groups.len() > 1 || data.report.groups.advice().is_some() {
        tracing::warn!("answers of the teacher:\n{}", groups.join("\n"));
    }
    if data.validation().is_empty() {
        return Ok(None);
    }
    objective::evaluate(models, data.validation(), config.eval.batch_size).map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_matches_by_value_and_exact_by_text() {
        let (a, b) = (r#"{"x": 1, "y": [2]}"#, r#" {"y":[2],"x":1} "#);
        assert!(matches(AnswerMatching::Json, a, b) && !matches(AnswerMatching::Exact, a, b));
        assert!(!matches(AnswerMatching::Json, "not json", "not json"));
        assert!(!matches(
            AnswerMatching::Json,
            r#"{"x": 1}"#,
            r#"{"x": "1"}"#
        ));
        assert!(
            matches(AnswerMatching::Exact, "yes\n", "yes")
                && !matches(AnswerMatching::Exact, "Yes", "yes")
        );
    }

    #[test]
    fn a_truth_may_be_text_or_a_value() {
        let of = |row: Value| truth_of("7", &row, "answer");
        assert_eq!(of(json!({"answer": "a b"})).unwrap(), "a b");
        assert_eq!(of(json!({"answer": {"a": 1}})).unwrap(), r#"{"a":1}"#);
        let error = of(json!({})).unwrap_err();
        assert!(error.to_string().contains("eval.truth"));
    }
}
