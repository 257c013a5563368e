//! Training: this file is the loop, and reads from top to bottom.
//!
//! A step takes `batch_size` examples in micro-batches. With N the supervised positions of the
//! whole step and lambda = `loss.kd_weight` (see `soft_labels`) where a position has soft labels (0 elsewhere), it
//! minimises L = (1/N) sum [(1 - lambda) CE + lambda KD]: dividing by the N of the step, not of the
//! micro-batch, makes the gradient independent of how the step is cut.

pub mod checkpoint;
pub(crate) mod device;
pub(crate) mod early_stopping;
pub mod ema;
pub(crate) mod folder;
pub(crate) mod local_teacher;
pub mod loss;
pub(crate) mod metrics;
pub(crate) mod model_card;
pub mod objective;
pub mod on_policy;
pub mod optimizer;
pub(crate) mod schedule;
pub mod soft_labels;
pub(crate) mod step;
pub mod student;
pub mod summary;

use crate::train::summary::Start;
use crate::train::summary::Summary;
use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::config::Config;
use crate::data::batch::{Batches, Cursor};
use crate::data::dataset;
use crate::data::groups::Selection;
use crate::data::prepared::shard::ExampleView;
use crate::fs;
use crate::model::Model;
use crate::signal::StopFlag;
use crate::terminal::progress::{Progress, ReadProgress};
use crate::terminal::{format_count, format_duration, sanitise};
use crate::tokenizer::Tokenizer;
use crate::train::early_stopping::Best;
use checkpoint::{Parts, State};
use ema::Ema;
use metrics::{Means, Metrics, StepLine};
use objective::Models;
use on_policy::{Judge, OnPolicy};
use step::{Lesson, Stepper};
use student::Student;

const GO_ON: &str = "the checkpoint is written: go on with --resume";

/// How a run goes about it.
#[derive(Debug, Clone)]
pub struct Options {
    pub start: Start,
    /// Records of the cache to train on.
    pub selection: Selection,
    /// Train on soft labels that do not belong to their answers, too.
    pub force: bool,
    pub quiet: bool,
}

impl From<Start> for Options {
    /// Without a word.
    fn from(start: Start) -> Self {
        Self {
            start,
            selection: Selection::All,
            force: false,
            quiet: true,
        }
    }
}

/// Trains the student of `config` to the end, or to the next signal, and writes its folder.
///
/// # Errors
/// Where data or student do not load, a number stops being finite, or a file cannot be written.
pub fn run(config: &Config, options: Options) -> Result<Summary> {
    run_judged(config, options, None)
}

/// As [`run`], with the teacher behind an API that `on_policy.judge` asks for.
///
/// # Errors
/// As [`run`], and where the judge has one.
pub fn run_judged(
    config: &Config,
    options: Options,
    judge: Option<&mut dyn Judge>,
) -> Result<Summary> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.train.threads)
        .build()
        .context("cannot start the worker threads")?;
    let config = Config {
        train: device::resolved(&config.train),
        ..config.clone()
    };
    pool.install(|| train(&config, options, judge))
}

fn train(config: &Config, options: Options, judge: Option<&mut dyn Judge>) -> Result<Summary> {
    let Options {
        start,
        selection,
        force,
        quiet,
    } = options;
    let settings = &config.train;
    let stop = StopFlag::watch()?;
    let tokenizer = Tokenizer::for_student(&config.student)?;
    soft_labels::check_tokenizer(config, &tokenizer)?;
    let mut parts = Parts::initial(config, &tokenizer)?;
    // Files that cannot be written at the end are refused at the start.
    let shape = parts.student.model.config();
    folder::files(shape, "", (tokenizer.dir(), &tokenizer), "")?;
    let mut reading = ReadProgress::new("prepare", quiet);
    let fitting = Config {
        data: config.data.within(parts.models().context()),
        ..config.clone()
    };
    let data = dataset::load(&fitting, &selection, &tokenizer, &mut |done, total| {
        reading.update(done, total);
        stop.check()
    })?;
    drop(reading);
    let soft_labels = match parts.teacher {
        Some(_) => soft_labels::dense(&config.loss),
        None => soft_labels::choose(&config.loss, &data.report, tokenizer.end_of_answer(), force)?,
    };
    let (train, validation) = (data.train(), data.validation());
    let has_labels = || {
        validation
            .iter()
            .any(|example| example.soft_ids().len() > 0)
    };
    crate::train::early_stopping::check(settings.best, validation.len(), || {
        parts.teacher.is_some() || has_labels()
    })?;
    let total = total_steps(config, train.len());
    let basis = checkpoint::basis(config, data.fingerprint(), &parts, total)?;
    let choice_of_data = checkpoint::choice_of_data(config);
    let parameters = Parameters::of(&parts.student);
    let checkpoints = config.run_dir.join("checkpoints");
    let (mut tokens, mut cursor, mut best) = (0, Cursor::default(), Best::default());
    if let Some(path) = checkpoint::find(&checkpoints, start)? {
        let state = checkpoint::load(&path, &mut parts, &basis, &choice_of_data)?;
        (tokens, cursor, best) = (state.tokens, state.cursor, state.best);
    }
    let mut batches = Batches::new(train.len(), settings.batch_size, settings.seed, cursor)?;
    let first_step = parts.optimizer.step();
    fs::create_dir_all(&config.run_dir)?;
    let mut metrics = Metrics::open(&config.run_dir.join("metrics.jsonl"), first_step)?;

    let mut progress = Progress::new("train", total, quiet);
    progress.note(&opening_line(
        parameters,
        train.len(),
        total,
        config,
        first_step,
    ));
    progress.note(&sanitise(&data.report.to_string()));
    for note in soft_labels
        .notes
        .iter()
        .chain(&schedule::note(settings, total))
    {
        progress.note(note);
    }
    let (began, began_tokens) = (Instant::now(), tokens);
    // For as long as this function, not as its caller has it.
    let judge = judge.map(|judge| judge as &mut dyn Judge);
    let mut on_policy = OnPolicy::of(config, &selection, &tokenizer, judge)?;
    let judged = on_policy
        .as_ref()
        .and_then(|it| it.divergence(&config.loss));
    let mut stepper = Stepper::new(config, &soft_labels, judged, &parts.student.model);
    let evaluate = |parts: &Parts, student: &Model| {
        let models = Models {
            student,
            teacher: parts.teacher_model(),
        };
        objective::evaluate(models, validation, settings.micro_batch_size)
    };
    let state = |step, cursor, tokens, best| State {
        version: checkpoint::VERSION,
        step,
        cursor,
        tokens,
        best,
        fingerprint: checkpoint::fingerprint(&basis),
        basis: basis.clone(),
        choice_of_data: choice_of_data.clone(),
        files: BTreeMap::new(),
        checksum: String::new(),
    };
    let (mut last_loss, mut last_validation) = (0.0, None);
    while parts.optimizer.step() < total && !best.is_exhausted(settings.patience) {
        let step_began = Instant::now();
        let step = parts.optimizer.step() + 1;
        let cursor = batches.cursor();
        let examples: Vec<ExampleView> =
            batches.next_step().iter().map(|&i| train.get(i)).collect();
        let rate = schedule::learning_rate(settings, step, total);
        let mut lesson = Lesson::of(&examples);
        if let Some(on_policy) = &mut on_policy {
            let (given, prompts) = on_policy.cut(&examples);
            match on_policy.write(&parts.student.model, step, prompts, &stop) {
                Ok(written) => lesson = Lesson { given, written },
                Err(error) if step - 1 == first_step => return Err(error),
                // What has been learnt so far is not lost with the teacher.
                Err(error) => {
                    let state = state(step - 1, cursor, tokens, best);
                    checkpoint::save(&checkpoints, &mut parts, &state, settings.keep_checkpoints)?;
                    return Err(error.context(GO_ON));
                }
            }
        }
        let learner = (&parts.student, &mut parts.optimizer);
        let dense = parts.teacher.as_ref().map(|teacher| &teacher.learner.model);
        let taken = stepper.take(learner, dense, step, &lesson, rate)?;
        if let Some(ema) = &parts.ema {
            ema.update(&parts.student, step)?;
        }
        let teacher = parts.teacher.as_mut();
        let teachers = teacher.map_or(Ok(None), |teacher| teacher.learn(step, &examples, rate))?;

        tokens += taken.tokens;
        let means = taken.sums.means();
        metrics.step(&StepLine {
            step,
            split: "train",
            epoch: cursor.epoch,
            loss: taken.loss,
            ce: means.ce,
            kl: means.kl,
            kd: means.kd,
            alm: means.alm,
            on_policy_kd: taken.written.means().kd,
            teacher_ce: teachers.and_then(|taken| taken.sums.means().ce),
            learning_rate: rate,
            grad_norm: taken.gradient_norm,
            tokens,
            tokens_per_s: taken.tokens as f64 / step_began.elapsed().as_secs_f64(),
        })?;
        progress.update(step, || {
            let seconds = began.elapsed();
            let left = seconds.div_f64((step - first_step) as f64) * (total - step) as u32;
            let speed = (tokens - began_tokens) as f64 / seconds.as_secs_f64();
            let kl = means.kl.map_or(String::new(), |kl| format!(", KL {kl:.4}"));
            format!(
                "loss {:.4}, CE {:.4}{kl}, lr {rate:.1e}, {speed:.0} tokens/s, {} left",
                taken.loss,
                means.ce.unwrap_or_default(),
                format_duration(left),
            )
        });
        last_loss = taken.loss;

        let every = |interval: u64| interval > 0 && step.is_multiple_of(interval);
        let mut improved = false;
        last_validation = None;
        if every(settings.eval_every) || step == total {
            let means = evaluate(&parts, parts.averaged())?;
            metrics.validation(step, &means)?;
            progress.note(&validation_line(step, last_loss, &means));
            improved = best.is_improved_by(settings.best, step, &means);
            last_validation = Some(means);
        }
        let stopped = stop.check();
        let ends = step == total || best.is_exhausted(settings.patience);
        if every(settings.checkpoint_every) || improved || ends || stopped.is_err() {
            let state = state(step, batches.cursor(), tokens, best);
            checkpoint::save(&checkpoints, &mut parts, &state, settings.keep_checkpoints)?;
        }
        stopped.context(GO_ON)?;
    }
    drop(progress);

    let seconds = began.elapsed().as_secs_f64();
    let steps = parts.optimizer.step();
    let (trained, validation, best_step) = match best.found {
        Some((step, _)) if step < steps => {
            let trained = checkpoint::weights_of(&checkpoints, step)?;
            let all = parts.student.with(trained.clone());
            let model = parts.student.model.with_weights(&all)?;
            let means = evaluate(&parts, &model)?;
            (trained, means, Some(step))
        }
        _ => {
            let ema = parts.ema.as_ref();
            let trained = ema.map_or_else(|| parts.student.trained(), Ema::tensors)?;
            let means = last_validation.map_or_else(|| evaluate(&parts, parts.averaged()), Ok)?;
            (trained, means, None)
        }
    };
    let mut summary = Summary {
        student: config.run_dir.join("student"),
        parameters: parameters.all,
        trained_parameters: parameters.trained,
        steps,
        best_step,
        tokens,
        seconds,
        tokens_per_s: (tokens - began_tokens) as f64 / seconds,
        last_loss,
        validation,
        loss: soft_labels.loss(&data.report, parts.teacher.is_some()),
        changes: Vec::new(),
        own_answers: on_policy.as_ref().map(OnPolicy::count),
        data: data.report.clone(),
    };
    summary.changes = parts.student.save(
        &summary.student,
        &parts.student.with(trained),
        config.student.save_dtype,
        (tokenizer.dir(), &tokenizer),
        &crate::train::model_card::text(
            config,
            parts.student.model.config().model_type(),
            &summary,
        ),
    )?;
    if let Some(teacher) = &parts.teacher {
        teacher.save(config, &tokenizer)?;
    }
    Ok(summary)
}

/// How many numbers a student has.
#[derive(Clone, Copy)]
struct Parameters {
    all: usize,
    /// Those that are trained, adapters among them.
    trained: usize,
}

impl Parameters {
    fn of(student: &Student) -> Self {
        Self {
            all: student.model.config().parameter_count(),
            trained: student.vars.values().map(|var| var.elem_count()).sum(),
        }
    }
}

/// What is about to happen.
fn opening_line(
    parameters: Parameters,
    examples: usize,
    total: u64,
    config: &Config,
    first_step: u64,
) -> String {
    let from = match first_step {
        0 => String::new(),
        step => format!(", from step {step}"),
    };
    let trained = match parameters.trained == parameters.all {
        true => String::new(),
        false => format!(" ({} trained)", format_count(parameters.trained as u64)),
    };
    format!(
        "{} parameters{trained} in {}{}, {} examples, {total} steps of {} examples{from}",
        format_count(parameters.all as u64),
        device::precision(&config.train).name(),
        device::name(&config.train),
        format_count(examples as u64),
        config.train.batch_size,
    )
}

fn total_steps(config: &Config, examples: usize) -> u64 {
    let train = &config.train;
    train.steps.unwrap_or_else(|| {
        let steps = train.epochs * examples as f64 / train.batch_size as f64;
        (steps.ceil() as u64).max(1)
    })
}

fn validation_line(step: u64, loss: f64, means: &Means) -> String {
    let show = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
    format!(
        "step {step}: loss {loss:.4}; validation: CE {}, KL {}, token accuracy {}",
        show(means.ce),
        show(means.kl),
        show(means.token_accuracy)
    )
}
