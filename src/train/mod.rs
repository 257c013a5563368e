//! Training. This file is the training loop and reads from top to bottom.
//!
//! A step processes `batch_size` examples in micro-batches. With N the supervised positions of the whole step, and
//! lambda = `loss.kd_weight` at positions with soft labels and 0 elsewhere, it minimises
//! L = (1/N) sum \[(1 - lambda) CE + lambda KD\]. N is counted over the step, not over a micro-batch, so the gradient does
//! not depend on `micro_batch_size`.
//!
//! | file | content |
//! |---|---|
//! | `step`, `objective`, [`loss`] | an optimizer step; forward pass and loss of a batch; loss of a position |
//! | [`soft_labels`] | checks of the soft labels, and the choice of their loss terms |
//! | `local_teacher`, [`on_policy`] | a teacher with whole distributions; answers that the student generates |
//! | [`trainable`], [`optimizer`], [`ema`], `schedule`, `device` | weights, AdamW, moving average, learning rate, device |
//! | [`checkpoint`], `early_stopping`, `metrics` | save and resume; the best validation; `metrics.jsonl` |
//! | `folder`, `model_card`, [`summary`] | the student's folder; its README; start mode and result of a run |
//!
//! Invariants:
//! - A resumed run ends with the same bytes as an uninterrupted one.
//! - No sum depends on the number of threads.
//! - Nothing is updated unless loss and gradient are finite, and every trainable parameter has a gradient.
//! - A remote teacher is reached through [`TextScorer`] alone; nothing here uses the network.

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
pub mod summary;
pub mod trainable;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::config::{Config, ScoredBy, TrainConfig};
use crate::data::align::Mapper;
use crate::data::batch::{BatchSampler, Cursor};
use crate::data::dataset;
use crate::data::groups::Selection;
use crate::data::prepared::shard::ExampleView;
use crate::data::text_scorer::TextScorer;
use crate::fs;
use crate::model::Model;
use crate::signal::StopFlag;
use crate::terminal::progress::{Progress, ReadProgress};
use crate::terminal::{format_count, format_duration, sanitise};
use crate::tokenizer::Tokenizer;
use checkpoint::{CheckpointState, TrainingState};
use early_stopping::EarlyStopping;
use ema::Ema;
use metrics::{MetricMeans, MetricsLog, StepMetrics};
use objective::ModelPair;
use on_policy::{OnPolicy, RemoteTeacher};
use step::{StepBatch, Stepper};
use summary::{StartMode, TrainSummary};
use trainable::TrainableModel;

const RESUME: &str = "the checkpoint is written: resume with --resume";

/// Options of a training run.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    pub start: StartMode,
    /// Records of the cache to train on.
    pub selection: Selection,
    /// Train on soft labels even if they do not belong to their answers.
    pub force: bool,
    pub quiet: bool,
}

impl From<StartMode> for TrainOptions {
    /// A quiet run on the whole cache.
    fn from(start: StartMode) -> Self {
        Self {
            start,
            selection: Selection::All,
            force: false,
            quiet: true,
        }
    }
}

/// Trains the student of `config` until the last step or a signal, and writes its folder.
///
/// # Errors
/// If data or student do not load, a number is not finite, or a file cannot be written.
pub fn run(config: &Config, options: TrainOptions) -> Result<TrainSummary> {
    run_with_scorer(config, options, None)
}

/// As [`run`], with the teacher behind an API that `on_policy.judge` needs.
///
/// # Errors
/// As [`run`], and if `scorer` fails.
pub fn run_with_scorer(
    config: &Config,
    options: TrainOptions,
    scorer: Option<&mut dyn TextScorer>,
) -> Result<TrainSummary> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.train.threads)
        .build()
        .context("cannot start the worker threads")?;
    let config = Config {
        train: device::resolved(&config.train),
        ..config.clone()
    };
    pool.install(|| train(&config, options, scorer))
}

fn train(
    config: &Config,
    options: TrainOptions,
    scorer: Option<&mut dyn TextScorer>,
) -> Result<TrainSummary> {
    let TrainOptions {
        start,
        selection,
        force,
        quiet,
    } = options;
    let settings = &config.train;
    let stop = StopFlag::watch()?;
    let tokenizer = Tokenizer::for_student(&config.student)?;
    if config.uses_cached_soft_labels() {
        soft_labels::check_tokenizer(&tokenizer)?;
    }
    let mut training = TrainingState::initial(config, &tokenizer)?;
    // Detects files that could not be written at the end of the run.
    let shape = training.student.model.config();
    folder::files(shape, "", (tokenizer.dir(), &tokenizer), "")?;
    let mut reading = ReadProgress::new("prepare", quiet);
    let data_settings = config.data.within(training.models().context());
    let data = dataset::load(
        &data_settings,
        &config.run_dir,
        &selection,
        &tokenizer,
        &mut |done, total| {
            reading.update(done, total);
            stop.check()
        },
    )?;
    drop(reading);
    let soft_labels = match training.teacher {
        Some(_) => soft_labels::choose_for_local_teacher(&config.loss),
        None => soft_labels::choose(&config.loss, &data.report, tokenizer.end_of_answer(), force)?,
    };
    let train = data.train();
    let validation = data.validation();
    let has_labels = || {
        validation
            .iter()
            .any(|example| example.soft_ids().len() > 0)
    };
    early_stopping::check(settings.best, validation.len(), || {
        training.teacher.is_some() || has_labels()
    })?;
    let total = total_steps(settings, train.len());
    let mut inputs = config.clone();
    inputs.train.steps = Some(total);
    let inputs = inputs.checkpoint_inputs();
    let fingerprint_inputs = checkpoint::fingerprint_inputs(inputs, data.fingerprint(), &training)?;
    let data_settings = config.example_settings();
    let parameters = ParameterCounts::new(&training.student);
    let checkpoints = config.run_dir.join("checkpoints");
    let mut tokens = 0;
    let mut cursor = Cursor::default();
    let mut early_stopping = EarlyStopping::default();
    if let Some(path) = checkpoint::find(&checkpoints, start)? {
        let state = checkpoint::load(&path, &mut training, &fingerprint_inputs, &data_settings)?;
        tokens = state.tokens;
        cursor = state.cursor;
        early_stopping = state.early_stopping;
    }
    let mut batches = BatchSampler::new(train.len(), settings.batch_size, settings.seed, cursor)?;
    let first_step = training.optimizer.step();
    fs::create_dir_all(&config.run_dir)?;
    let mut metrics = MetricsLog::open(&config.run_dir.join("metrics.jsonl"), first_step)?;

    let mut progress = Progress::new("train", total, quiet);
    progress.note(&opening_line(
        parameters,
        train.len(),
        total,
        settings,
        first_step,
    ));
    progress.note(&sanitise(&data.report.to_string()));
    for note in soft_labels
        .notes
        .iter()
        .chain(&schedule::warmup_note(settings, total))
    {
        progress.note(note);
    }
    let session_start = Instant::now();
    let first_tokens = tokens;
    // Shortens the lifetime of the trait object to this function.
    let scorer = scorer.map(|scorer| scorer as &mut dyn TextScorer);
    let is_scored_remotely = settings.on_policy && config.on_policy.judge != ScoredBy::Local;
    let remote = if is_scored_remotely {
        Some(RemoteTeacher {
            scorer: scorer
                .context("internal error: train.on_policy without a teacher to score answers")?,
            mapper: Mapper::new(&tokenizer, config.data.top_logprobs),
            prompts: dataset::prompts(&config.data, &config.run_dir, &selection)?,
        })
    } else {
        None
    };
    let on_policy = OnPolicy::new(&config.on_policy, settings, &tokenizer, remote);
    let mut on_policy = settings.on_policy.then_some(on_policy);
    let on_policy_divergence = on_policy
        .as_ref()
        .and_then(|on_policy| on_policy.divergence(&config.loss));
    let mut stepper = Stepper::new(
        settings,
        &config.loss,
        &soft_labels,
        on_policy_divergence,
        &training.student.model,
    );
    let evaluate = |training: &TrainingState, student: &Model| {
        let models = ModelPair {
            student,
            teacher: training.teacher_model(),
        };
        objective::evaluate(models, validation, settings.micro_batch_size)
    };
    let checkpoint_state = |step, cursor, tokens, early_stopping| CheckpointState {
        version: checkpoint::VERSION,
        step,
        cursor,
        tokens,
        early_stopping,
        fingerprint: checkpoint::fingerprint(&fingerprint_inputs),
        fingerprint_inputs: fingerprint_inputs.clone(),
        data_settings: data_settings.clone(),
        files: BTreeMap::new(),
        checksum: String::new(),
    };
    let mut last_loss = 0.0;
    let mut last_validation = None;
    while training.optimizer.step() < total && !early_stopping.is_exhausted(settings.patience) {
        let step_start = Instant::now();
        let step = training.optimizer.step() + 1;
        let cursor = batches.cursor();
        let examples: Vec<ExampleView> =
            batches.next_step().iter().map(|&i| train.get(i)).collect();
        let rate = schedule::learning_rate(settings, step, total);
        let mut batch = StepBatch::from_examples(&examples);
        if let Some(on_policy) = &mut on_policy {
            let (unchanged, answered) = on_policy.split(&examples);
            match on_policy.generate(&training.student.model, step, answered, &stop) {
                Ok(on_policy) => {
                    batch = StepBatch {
                        examples: unchanged,
                        on_policy,
                    };
                }
                Err(error) if step - 1 == first_step => return Err(error),
                // The teacher is gone: save the progress of this session.
                Err(error) => {
                    let state = checkpoint_state(step - 1, cursor, tokens, early_stopping);
                    checkpoint::save(
                        &checkpoints,
                        &mut training,
                        &state,
                        settings.keep_checkpoints,
                    )?;
                    return Err(error.context(RESUME));
                }
            }
        }
        let trainable = (&training.student, &mut training.optimizer);
        let local_teacher = training.teacher.as_ref();
        let teacher_model = local_teacher.map(|teacher| &teacher.trainable.model);
        let result = stepper.run(trainable, teacher_model, step, &batch, rate)?;
        if let Some(ema) = &training.ema {
            ema.update(&training.student, step)?;
        }
        let teacher = training.teacher.as_mut();
        let teacher_result = teacher.map_or(Ok(None), |teacher| {
            teacher.train_step(step, &examples, rate)
        })?;

        tokens += result.tokens;
        let means = result.sums.means();
        metrics.step(&StepMetrics {
            step,
            split: "train",
            epoch: cursor.epoch,
            loss: result.loss,
            ce: means.ce,
            kl: means.kl,
            kd: means.kd,
            alm: means.alm,
            on_policy_kd: result.on_policy_sums.means().kd,
            teacher_ce: teacher_result.and_then(|result| result.sums.means().ce),
            learning_rate: rate,
            grad_norm: result.gradient_norm,
            tokens,
            tokens_per_s: result.tokens as f64 / step_start.elapsed().as_secs_f64(),
        })?;
        progress.update(step, || {
            let seconds = session_start.elapsed();
            let left = seconds.div_f64((step - first_step) as f64) * (total - step) as u32;
            let speed = (tokens - first_tokens) as f64 / seconds.as_secs_f64();
            let kl = means.kl.map_or(String::new(), |kl| format!(", KL {kl:.4}"));
            format!(
                "loss {:.4}, CE {:.4}{kl}, lr {rate:.1e}, {speed:.0} tokens/s, {} left",
                result.loss,
                means.ce.unwrap_or_default(),
                format_duration(left),
            )
        });
        last_loss = result.loss;

        let every = |interval: u64| interval > 0 && step.is_multiple_of(interval);
        let mut improved = false;
        last_validation = None;
        if every(settings.eval_every) || step == total {
            let means = evaluate(&training, training.eval_model())?;
            metrics.validation(step, &means)?;
            progress.note(&validation_line(step, last_loss, &means));
            improved = early_stopping.record(settings.best, step, &means);
            last_validation = Some(means);
        }
        let stopped = stop.check();
        let ends = step == total || early_stopping.is_exhausted(settings.patience);
        if every(settings.checkpoint_every) || improved || ends || stopped.is_err() {
            let state = checkpoint_state(step, batches.cursor(), tokens, early_stopping);
            checkpoint::save(
                &checkpoints,
                &mut training,
                &state,
                settings.keep_checkpoints,
            )?;
        }
        stopped.context(RESUME)?;
    }
    drop(progress);

    let seconds = session_start.elapsed().as_secs_f64();
    let steps = training.optimizer.step();
    let (trained, validation, best_step) = match early_stopping.best {
        Some((step, _)) if step < steps => {
            let trained = checkpoint::load_weights(&checkpoints, step)?;
            let all = training.student.with(trained.clone());
            let model = training.student.model.with_weights(&all)?;
            let means = evaluate(&training, &model)?;
            (trained, means, Some(step))
        }
        _ => {
            let ema = training.ema.as_ref();
            let trained = ema.map_or_else(|| training.student.trained(), Ema::tensors)?;
            let means =
                last_validation.map_or_else(|| evaluate(&training, training.eval_model()), Ok)?;
            (trained, means, None)
        }
    };
    let mut summary = TrainSummary {
        student: config.run_dir.join("student"),
        parameters: parameters.all,
        trained_parameters: parameters.trained,
        steps,
        best_step,
        tokens,
        seconds,
        tokens_per_s: (tokens - first_tokens) as f64 / seconds,
        last_loss,
        validation,
        loss: soft_labels.describe(&data.report, training.teacher.is_some()),
        changes: Vec::new(),
        own_answers: on_policy.as_ref().map(OnPolicy::counts),
        data: data.report.clone(),
    };
    summary.changes = training.student.save(
        &summary.student,
        &training.student.with(trained),
        config.student.save_dtype,
        (tokenizer.dir(), &tokenizer),
        &model_card::student_card(
            config.teacher.local.as_deref(),
            settings.batch_size,
            training.student.model.config().model_type(),
            &summary,
        ),
    )?;
    if let Some(teacher) = &training.teacher {
        teacher.save(&config.run_dir, config.student.save_dtype, &tokenizer)?;
    }
    Ok(summary)
}

/// Number of parameters of a student.
#[derive(Clone, Copy)]
struct ParameterCounts {
    all: usize,
    /// Trained parameters, including adapters.
    trained: usize,
}

impl ParameterCounts {
    fn new(student: &TrainableModel) -> Self {
        Self {
            all: student.model.config().parameter_count(),
            trained: student.vars.values().map(|var| var.elem_count()).sum(),
        }
    }
}

/// Line that describes the run at its start.
fn opening_line(
    parameters: ParameterCounts,
    examples: usize,
    total: u64,
    settings: &TrainConfig,
    first_step: u64,
) -> String {
    let from = match first_step {
        0 => String::new(),
        step => format!(", from step {step}"),
    };
    let trained = if parameters.trained == parameters.all {
        String::new()
    } else {
        format!(" ({} trained)", format_count(parameters.trained as u64))
    };
    format!(
        "{} parameters{trained} in {}{}, {} examples, {total} steps of {} examples{from}",
        format_count(parameters.all as u64),
        device::precision(settings).name(),
        device::label(settings),
        format_count(examples as u64),
        settings.batch_size,
    )
}

fn total_steps(settings: &TrainConfig, examples: usize) -> u64 {
    settings.steps.unwrap_or_else(|| {
        let steps = settings.epochs * examples as f64 / settings.batch_size as f64;
        (steps.ceil() as u64).max(1)
    })
}

fn validation_line(step: u64, loss: f64, means: &MetricMeans) -> String {
    let show = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
    format!(
        "step {step}: loss {loss:.4}; validation: CE {}, KL {}, token accuracy {}",
        show(means.ce),
        show(means.kl),
        show(means.token_accuracy)
    )
}
