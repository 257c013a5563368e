//! Training. This file is the training loop and reads from top to bottom.
//!
//! A step processes `batch_size` examples in micro-batches. With N the number of supervised positions of the whole
//! step, and kd the weight of the soft labels (`loss.kd_weight`; 0 at positions without soft labels), it minimises
//! L = (1/N) sum \[(1 - kd) CE + kd KD\], plus the terms of chunks (see [`loss::chunk`]). N is counted over the step,
//! not over a micro-batch, so the gradient does not depend on `micro_batch_size`.
//!
//! | file | content |
//! |---|---|
//! | `step`, [`objective`], [`loss`] | one optimizer step; forward pass, loss and gradients of a batch; loss of a position |
//! | [`soft_labels`] | checks of the soft labels, and the choice of their loss terms |
//! | `local_teacher`, [`on_policy`] | a teacher with whole distributions; answers that the student generates |
//! | [`trainable`], [`optimizer`], [`ema`], `schedule`, `device` | weights, AdamW, moving average, learning rate, device |
//! | [`checkpoint`], `early_stopping`, `metrics` | save and resume; the best validation; `metrics.jsonl` |
//! | `folder`, `model_card`, [`summary`] | the student's folder; its README; start mode and result of a run |
//! | `texts` | the lines that a run prints |
//!
//! Invariants:
//! - A resumed run ends with the same bytes as an uninterrupted one.
//! - No sum depends on the number of threads.
//! - Nothing is updated unless loss and gradient are finite, and every trainable parameter has a gradient.
//! - Nothing in this room uses the network: [`TextScorer`] is the only access to a remote teacher.

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
pub(crate) mod texts;
pub mod trainable;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};

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
use crate::terminal::sanitise;
use crate::tokenizer::Tokenizer;
use checkpoint::{CheckpointState, TrainingState};
use early_stopping::EarlyStopping;
use ema::Ema;
use local_teacher::LocalTeacher;
use metrics::{MetricsLog, StepMetrics};
use objective::ModelPair;
use on_policy::{OnPolicy, RemoteTeacher};
use step::{StepBatch, Stepper};
use summary::{StartMode, TrainSummary};

/// Context of an error that stops the run after a checkpoint was written.
const RESUME: &str = "the checkpoint is written: resume with --resume";

/// Options of a training run.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    pub start: StartMode,
    /// Selection of the records of the cache to train on.
    pub selection: Selection,
    /// Warn, instead of failing, if the soft labels do not belong to their answers or do not support the loss.
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

/// Trains the student of `config` until the last step or until early stopping, and writes its folder.
///
/// # Errors
/// If another process trains in the run folder, data or student do not load, a number is not finite, a file cannot be
/// written, or a signal stops the run.
pub fn run(config: &Config, options: TrainOptions) -> Result<TrainSummary> {
    run_with_scorer(config, options, None)
}

/// Trains as [`run`] does, with `scorer`: a teacher behind an API that scores generated answers. `train.on_policy`
/// needs it unless `on_policy.judge` is "local".
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

/// The training loop. `config.train` names a device and a dtype, not "auto".
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

    // Load the models and the examples.
    let tokenizer = Tokenizer::for_student(&config.student)?;
    if config.uses_cached_soft_labels() {
        soft_labels::check_tokenizer(&tokenizer)?;
    }
    let mut training = TrainingState::initial(config, &tokenizer)?;
    // A file that the student's folder needs may be unreadable: fail before the training, not after it.
    let shape = training.student.model.config();
    folder::files(shape, "", (tokenizer.dir(), &tokenizer), "")?;
    fs::create_dir_all(&config.run_dir)?;
    let _lock = fs::FileLock::acquire(
        &config.run_dir.join("train.lock"),
        "is training in this run folder: wait until it ends, or set another `run_dir`",
    )?;
    let data_settings = config.data.within(training.models().context());
    let mut reading = ReadProgress::new("prepare", quiet);
    let data = dataset::load(
        &data_settings,
        &config.run_dir,
        &selection,
        &tokenizer,
        &mut |bytes, total_bytes| {
            reading.update(bytes, total_bytes);
            stop.check()
        },
    )?;
    drop(reading);
    let train_examples = data.train();
    let validation_examples = data.validation();

    // Choose the loss, and check that the validation can compute `train.best`.
    let soft_labels = match training.teacher {
        Some(_) => soft_labels::choose_for_local_teacher(&config.loss),
        None => soft_labels::choose(&config.loss, &data.report, tokenizer.end_of_answer(), force)?,
    };
    early_stopping::check(settings.best, validation_examples.len(), || {
        let mut examples = validation_examples.iter();
        training.teacher.is_some() || examples.any(|example| example.soft_ids().len() > 0)
    })?;

    // Resume from a checkpoint, if there is one.
    let total_steps = total_steps(settings, train_examples.len());
    let inputs = config.checkpoint_inputs(total_steps);
    let fingerprint_inputs = checkpoint::fingerprint_inputs(inputs, data.fingerprint(), &training)?;
    let example_settings = config.example_settings();
    let parameters = texts::ParameterCounts::new(&training.student);
    let checkpoints = config.run_dir.join("checkpoints");
    let mut tokens = 0;
    let mut cursor = Cursor::default();
    let mut early_stopping = EarlyStopping::default();
    if let Some(path) = checkpoint::find(&checkpoints, start)? {
        let state = checkpoint::load(&path, &mut training, &fingerprint_inputs, &example_settings)?;
        tokens = state.tokens;
        cursor = state.cursor;
        early_stopping = state.early_stopping;
    }
    let save_checkpoint =
        |training: &mut TrainingState, step, cursor, tokens, early_stopping| -> Result<()> {
            let state = CheckpointState {
                version: checkpoint::VERSION,
                step,
                cursor,
                tokens,
                early_stopping,
                fingerprint: checkpoint::fingerprint(&fingerprint_inputs),
                fingerprint_inputs: fingerprint_inputs.clone(),
                data_settings: example_settings.clone(),
                files: BTreeMap::new(),
                checksum: String::new(),
            };
            checkpoint::save(&checkpoints, training, &state, settings.keep_checkpoints)
        };
    let mut sampler = BatchSampler::new(
        train_examples.len(),
        settings.batch_size,
        settings.seed,
        cursor,
    )?;
    let earlier_steps = training.optimizer.step();
    let mut metrics = MetricsLog::open(&config.run_dir.join("metrics.jsonl"), earlier_steps)?;

    let mut progress = Progress::new("train", total_steps, quiet);
    progress.note(&texts::opening(
        parameters,
        train_examples.len(),
        total_steps,
        settings,
        earlier_steps,
    ));
    progress.note(&sanitise(&data.report.to_string()));
    let warmup_note = schedule::warmup_note(settings, total_steps);
    for note in soft_labels.notes.iter().chain(&warmup_note) {
        progress.note(note);
    }
    let session_start = Instant::now();
    let earlier_tokens = tokens;
    let needs_scorer = settings.on_policy && config.on_policy.judge != ScoredBy::Local;
    let remote = match scorer.filter(|_| needs_scorer) {
        Some(scorer) => Some(RemoteTeacher::new(
            scorer,
            Mapper::new(&tokenizer, config.data.top_logprobs),
            dataset::prompts(&config.data, &config.run_dir, &selection)?,
        )),
        None if needs_scorer => {
            bail!("internal error: `train.on_policy` without a teacher to score answers")
        }
        None => None,
    };
    let mut on_policy = settings
        .on_policy
        .then(|| OnPolicy::new(&config.on_policy, settings, &tokenizer, remote));
    let mut stepper = Stepper::new(
        settings,
        &config.loss,
        &soft_labels,
        on_policy
            .as_ref()
            .and_then(|on_policy| on_policy.divergence(&config.loss)),
        &training.student.model,
    );
    let evaluate = |training: &TrainingState, student: &Model| {
        let teacher = training.teacher_model();
        let models = ModelPair { student, teacher };
        // A validation is not interrupted: a stop takes effect after the step.
        let batch_size = settings.micro_batch_size;
        objective::evaluate(models, validation_examples, batch_size, || Ok(()))
    };

    let mut last_loss = None;
    let mut last_validation = None;
    while training.optimizer.step() < total_steps && !early_stopping.is_exhausted(settings.patience)
    {
        let step_start = Instant::now();
        let step = training.optimizer.step() + 1;
        let learning_rate = schedule::learning_rate(settings, step, total_steps);

        // Take the examples of the step. With `train.on_policy`, the student generates new answers to some of them.
        let cursor = sampler.cursor();
        let indices = sampler.next_step();
        let examples: Vec<ExampleView> = indices.iter().map(|&i| train_examples.get(i)).collect();
        let mut batch = StepBatch::from_examples(&examples);
        if let Some(on_policy) = &mut on_policy {
            let (unchanged, to_answer) = on_policy.split(&examples);
            match on_policy.generate(&training.student.model, step, to_answer, &stop) {
                Ok(generated) => {
                    batch = StepBatch {
                        examples: unchanged,
                        on_policy: generated,
                    };
                }
                Err(error) if step - 1 == earlier_steps => return Err(error),
                // The teacher cannot score, or a signal stopped the run: save the completed steps of this session.
                Err(error) => {
                    save_checkpoint(&mut training, step - 1, cursor, tokens, early_stopping)?;
                    return Err(error.context(RESUME));
                }
            }
        }

        // Update the student, the moving average and a co-trained teacher.
        let trainable = (&training.student, &mut training.optimizer);
        let local_teacher = training.teacher.as_ref();
        let teacher_model = local_teacher.map(|teacher| &teacher.trainable.model);
        let result = stepper.run(trainable, teacher_model, step, &batch, learning_rate)?;
        if let Some(ema) = &training.ema {
            ema.update(&training.student, step)?;
        }
        let teacher_result = match &mut training.teacher {
            Some(teacher) => teacher.train_step(step, &examples, learning_rate)?,
            None => None,
        };

        // Report.
        tokens += result.tokens;
        last_loss = result.loss.or(last_loss);
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
            learning_rate,
            grad_norm: result.gradient_norm,
            tokens,
            tokens_per_s: result.tokens as f64 / step_start.elapsed().as_secs_f64(),
        })?;
        progress.update(step, || {
            let elapsed = session_start.elapsed();
            let remaining =
                elapsed.div_f64((step - earlier_steps) as f64) * (total_steps - step) as u32;
            let tokens_per_s = (tokens - earlier_tokens) as f64 / elapsed.as_secs_f64();
            texts::step(result.loss, &means, learning_rate, tokens_per_s, remaining)
        });

        // Validate and save.
        let is_due = |interval: u64| interval > 0 && step.is_multiple_of(interval);
        let mut is_best = false;
        last_validation = None;
        if is_due(settings.eval_every) || step == total_steps {
            let means = evaluate(&training, training.eval_model())?;
            metrics.validation(step, &means)?;
            progress.note(&texts::validation(step, last_loss, &means));
            is_best = early_stopping.record(settings.best, step, &means);
            last_validation = Some(means);
        }
        let not_stopped = stop.check();
        let is_last = step == total_steps || early_stopping.is_exhausted(settings.patience);
        if is_due(settings.checkpoint_every) || is_best || is_last || not_stopped.is_err() {
            save_checkpoint(
                &mut training,
                step,
                sampler.cursor(),
                tokens,
                early_stopping,
            )?;
        }
        not_stopped.context(RESUME)?;
    }
    drop(progress);

    // Write the student: the weights of the best validation, or of the last step.
    let seconds = session_start.elapsed().as_secs_f64();
    let steps = training.optimizer.step();
    let (trained, validation, best_step) = match early_stopping.best {
        Some((step, _)) if step < steps => {
            let trained = checkpoint::load_weights(&checkpoints, step)?;
            let weights = training.student.with(trained.clone());
            let model = training.student.model.with_weights(&weights)?;
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
        tokens_per_s: (tokens - earlier_tokens) as f64 / seconds,
        last_loss: last_loss.unwrap_or_default(),
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
            training.teacher.as_ref().map(LocalTeacher::dir),
            settings.batch_size,
            (
                training.student.model.config(),
                training.student.initial_weights(&config.student.path),
            ),
            &tokenizer,
            &summary,
        ),
    )?;
    if let Some(teacher) = &training.teacher {
        teacher.save(
            &config.cotrained_teacher_dir(),
            config.student.save_dtype,
            &tokenizer,
        )?;
    }
    Ok(summary)
}

/// Returns the number of steps: `train.steps` or, if it is not set, the number (at least 1) that `train.epochs` needs.
fn total_steps(settings: &TrainConfig, examples: usize) -> u64 {
    settings.steps.unwrap_or_else(|| {
        let steps = settings.epochs * examples as f64 / settings.batch_size as f64;
        (steps.ceil() as u64).max(1)
    })
}
