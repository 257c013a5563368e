//! Evaluation of a model on held-out prompts: accuracy against true answers, and metrics against the teacher's answers.
//!
//! The accuracy needs `eval.source`, rows with their true answers. The metrics need answers of the teacher that were
//! not trained on: `eval.teacher_cache`, or the validation share of the training data.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::config::{AnswerMatching, Config, EvalConfig, TemplateDate};
use crate::data::dataset::{self, Dataset};
use crate::data::groups::Selection;
use crate::exit::Exit;
use crate::model::Model;
use crate::model::batcher::{FinishReason, GenerateOptions};
use crate::model::generate;
use crate::prompt;
use crate::prompt::Prompt;
use crate::signal::StopFlag;
use crate::terminal::progress::Progress;
use crate::tokenizer::Tokenizer;
use crate::train::local_teacher;
use crate::train::metrics::MetricMeans;
use crate::train::objective::{self, ModelPair};

/// Result of an evaluation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct EvalReport {
    /// [`VERSION`].
    pub version: u32,
    /// Folder of the evaluated model.
    pub model: PathBuf,
    /// Number of parameters of the model.
    pub parameters: usize,
    /// Accuracy on `eval.source`, if it is set.
    pub truth: Option<AccuracyReport>,
    /// Metrics on the teacher's answers, if there are held-out ones.
    pub teacher: Option<MetricMeans>,
}

/// Comparison of greedy answers with the true ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct AccuracyReport {
    pub rows: usize,
    pub correct: usize,
    /// `correct / rows`.
    pub accuracy: f64,
    /// Number of answers that are not valid JSON, with `matching = "json"`.
    pub malformed: usize,
    /// Number of answers that reached `eval.max_tokens`.
    pub cut_off: usize,
    /// Number of prompts that leave no room for an answer in the model's context. Their answers are empty.
    pub too_long: usize,
    /// Generated tokens per second, in batches of `eval.batch_size` answers.
    pub tokens_per_s: f64,
}

/// Version of the JSON object that `distill eval --json` prints.
pub(crate) const VERSION: u32 = 1;

/// Number of batches between two progress updates. Each update is followed by a check for signals.
const BATCHES_PER_UPDATE: usize = 8;

/// Evaluates `eval.model`, or the student of this run. `selection` returns the selection of the training cache's
/// records; it is called only if they are needed. `quiet` hides the progress.
///
/// # Errors
/// If the model or the rows cannot be loaded, or there are neither rows nor teacher answers to evaluate on.
/// [`Exit::Signal`] after a signal.
pub(crate) fn run(
    config: &Config,
    selection: &dyn Fn() -> Result<Selection>,
    quiet: bool,
) -> Result<EvalReport> {
    let dir = config
        .eval
        .model
        .clone()
        .unwrap_or_else(|| config.student_dir());
    if !dir.exists() {
        bail!(Exit::Usage(format!(
            "there is no model in {}: run `distill train` first, or set `eval.model`",
            dir.display()
        )));
    }
    if let Some(cache) = &config.eval.teacher_cache
        && !crate::cache::exists(cache)
    {
        bail!(Exit::Usage(format!(
            "`eval.teacher_cache` = {} holds no cache: set it to the cache folder of a harvest of held-out prompts",
            cache.display()
        )));
    }
    let model = Model::load(&dir)?;
    let mut tokenizer = Tokenizer::load(&dir)?;
    // The rows of `eval.source` have no record, so without a fixed date their prompts are dated today.
    match config.student.template_date {
        Some(date @ TemplateDate::Fixed(_)) => tokenizer.set_date(date.into()),
        Some(TemplateDate::Record) | None => tokenizer.use_clock(),
    }
    tokenizer.check_fits(model.config().vocab_size)?;
    let stop = StopFlag::watch()?;
    let truth = match &config.eval.source {
        Some(source) => {
            let rows = load_rows(source, config.prompts.template.as_deref(), &config.eval)?;
            Some(compare_with_truth(
                &model,
                &tokenizer,
                &rows,
                &config.eval,
                quiet,
                &stop,
            )?)
        }
        None => None,
    };
    // Recorded answers need the date of their record, not that of today.
    match config.student.template_date {
        Some(date) => tokenizer.set_date(date.into()),
        None => tokenizer.clear_date(),
    }
    let load_teacher = || {
        let Some(local) = &config.teacher.local else {
            return Ok(None);
        };
        let cotrained = config.cotrained_teacher_dir();
        let dir = match config.teacher.cotrain {
            true if cotrained.exists() => &cotrained,
            true => {
                tracing::warn!(
                    "{} does not exist: compared with `teacher.local` as it was before training",
                    cotrained.display()
                );
                local
            }
            false => local,
        };
        local_teacher::load_frozen(dir, &tokenizer, &config.train).map(Some)
    };
    let load_answers = |context| {
        let settings = config.data.within(context);
        match &config.eval.teacher_cache {
            Some(dir) => dataset::held_out(dir, &settings, &tokenizer)
                .with_context(|| format!("cannot use `eval.teacher_cache` {}", dir.display()))
                .map(Some),
            None if config.data.source.is_some() || config.training_cache().exists() => {
                dataset::load(
                    &settings,
                    &config.run_dir,
                    &selection()?,
                    &tokenizer,
                    &mut |_, _| stop.check(),
                )
                .map(Some)
            }
            None => Ok(None),
        }
    };
    let teacher = match compare_with_teacher(
        &model,
        load_teacher,
        load_answers,
        config.eval.batch_size,
        &stop,
    ) {
        Err(error) if truth.is_some() && matches!(error.downcast_ref(), Some(Exit::Usage(_))) => {
            tracing::warn!("cannot compare the student with its teacher: {error:#}");
            None
        }
        metrics => metrics?,
    };
    if truth.is_none() && teacher.is_none() {
        bail!(Exit::Usage(
            "there is nothing to evaluate on: set `eval.source` to held-out rows with their true answers, or \
             `eval.teacher_cache` to a cache of held-out answers, or hold out answers of the training cache with a \
             larger `data.validation_share`"
                .into()
        ));
    }
    Ok(EvalReport {
        version: VERSION,
        model: dir,
        parameters: model.config().parameter_count(),
        truth,
        teacher,
    })
}

/// Loads the first `eval.limit` held-out prompts with their true answers.
fn load_rows(
    source: &Path,
    template: Option<&Path>,
    settings: &EvalConfig,
) -> Result<Vec<(Prompt, String)>> {
    let mut rows = prompt::load_with(source, template, |id, row| {
        true_answer(id, &row, &settings.truth)
    })?;
    rows.truncate(settings.limit.unwrap_or(usize::MAX));
    Ok(rows)
}

/// Answers each row greedily and compares the answers with the true ones.
fn compare_with_truth(
    model: &Model,
    tokenizer: &Tokenizer,
    rows: &[(Prompt, String)],
    settings: &EvalConfig,
    quiet: bool,
    stop: &StopFlag,
) -> Result<AccuracyReport> {
    let prompts: Vec<Vec<u32>> = rows
        .iter()
        .map(|(prompt, _)| tokenizer.encode_prompt(&prompt.messages))
        .collect::<Result<_>>()?;
    let options = GenerateOptions {
        max_tokens: settings.max_tokens as usize,
        ..GenerateOptions::default()
    };
    let mut progress = Progress::new("eval", rows.len() as u64, quiet);
    let started = Instant::now();
    let mut answers = Vec::with_capacity(rows.len());
    for chunk in prompts.chunks(settings.batch_size * BATCHES_PER_UPDATE) {
        answers.extend(generate::batch(
            model,
            tokenizer,
            chunk,
            &options,
            settings.batch_size,
        )?);
        progress.update(answers.len() as u64, || "answers".into());
        stop.check()?;
    }
    drop(progress);
    let seconds = started.elapsed().as_secs_f64();
    let tokens: usize = answers.iter().map(|answer| answer.ids.len()).sum();
    let mut report = AccuracyReport {
        rows: rows.len(),
        correct: 0,
        accuracy: 0.0,
        malformed: 0,
        cut_off: 0,
        too_long: 0,
        tokens_per_s: tokens as f64 / seconds,
    };
    for ((answer, (_, expected)), prompt) in answers.iter().zip(rows).zip(&prompts) {
        report.correct += usize::from(is_correct(settings.matching, &answer.text, expected));
        report.malformed += usize::from(
            settings.matching == AnswerMatching::Json && parse_json(&answer.text).is_none(),
        );
        let fits = model.config().fits_prompt(prompt.len());
        report.too_long += usize::from(!fits);
        report.cut_off += usize::from(fits && answer.finish_reason == FinishReason::Length);
    }
    report.accuracy = report.correct as f64 / report.rows.max(1) as f64;
    Ok(report)
}

/// Returns the true answer of a row: a string unchanged, any other value as JSON.
fn true_answer(id: &str, row: &Value, field: &str) -> Result<String> {
    match row.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(value) => Ok(value.to_string()),
        None => bail!(Exit::Usage(format!(
            "row {id:?} has no field {field:?}: set `eval.truth` to the field that holds the true answer"
        ))),
    }
}

/// Returns true if the answer matches the true one.
fn is_correct(matching: AnswerMatching, answer: &str, truth: &str) -> bool {
    match matching {
        AnswerMatching::Exact => answer.trim() == truth.trim(),
        AnswerMatching::Json => {
            parse_json(answer).is_some_and(|value| Some(value) == parse_json(truth))
        }
    }
}

/// Parses JSON; `None` if the text is not valid JSON. The equality of [`Value`] ignores the order of keys.
fn parse_json(text: &str) -> Option<Value> {
    serde_json::from_str(text.trim()).ok()
}

/// Computes mean metrics on held-out answers of the teacher. Returns `None` if there are no such answers.
/// `load_teacher` returns the local teacher, if any. `load_answers` takes the context of the models in tokens.
fn compare_with_teacher(
    student: &Model,
    load_teacher: impl FnOnce() -> Result<Option<Model>>,
    load_answers: impl FnOnce(usize) -> Result<Option<Dataset>>,
    batch_size: usize,
    stop: &StopFlag,
) -> Result<Option<MetricMeans>> {
    let teacher = load_teacher()?;
    let models = ModelPair {
        student,
        teacher: teacher.as_ref(),
    };
    let Some(data) = load_answers(models.context())? else {
        return Ok(None);
    };
    warn_of_excluded_answers(&data);
    if data.validation().is_empty() {
        return Ok(None);
    }
    let check_stop = || stop.check();
    objective::evaluate(models, data.validation(), batch_size, check_stop).map(Some)
}

/// Warns about dropped answers, and lists the groups of answers if there are several or some are left out.
fn warn_of_excluded_answers(data: &Dataset) {
    if !data.report.dropped.is_empty() {
        let reasons = crate::data::report::by_reason(&data.report.dropped);
        tracing::warn!("excluded answers of the teacher: {reasons}");
    }
    let groups = data.report.groups.lines();
    if groups.len() > 1 || data.report.groups.advice().is_some() {
        tracing::warn!("answers of the teacher:\n{}", groups.join("\n"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_matching_compares_values_and_exact_matching_compares_text() {
        let a = r#"{"x": 1, "y": [2]}"#;
        let b = r#" {"y":[2],"x":1} "#;
        assert!(is_correct(AnswerMatching::Json, a, b));
        assert!(!is_correct(AnswerMatching::Exact, a, b));
        assert!(!is_correct(AnswerMatching::Json, "not json", "not json"));
        assert!(!is_correct(
            AnswerMatching::Json,
            r#"{"x": 1}"#,
            r#"{"x": "1"}"#
        ));
        assert!(is_correct(AnswerMatching::Exact, "yes\n", "yes"));
        assert!(!is_correct(AnswerMatching::Exact, "Yes", "yes"));
    }

    #[test]
    fn true_answer_may_be_text_or_a_json_value() {
        let answer = |row: Value| true_answer("7", &row, "answer");
        assert_eq!(answer(json!({"answer": "a b"})).unwrap(), "a b");
        assert_eq!(answer(json!({"answer": {"a": 1}})).unwrap(), r#"{"a":1}"#);
        let error = answer(json!({})).unwrap_err();
        assert!(error.to_string().contains("`eval.truth`"));
    }
}
