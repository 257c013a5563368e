//! Training: this file is the loop, and reads from top to bottom.
//!
//! A step takes `batch_size` examples in micro-batches. With N the supervised positions of the
//! whole step and lambda = `loss.kd_weight` where a position has soft labels (0 elsewhere), it
//! minimises L = (1/N) sum [(1 - lambda) CE + lambda KD]: dividing by the N of the step, not of the
//! micro-batch, makes the gradient independent of how the step is cut.

pub mod card;
pub mod checkpoint;
pub mod loss;
pub mod metrics;
pub mod objective;
pub mod optimizer;
pub mod schedule;
pub mod student;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::config::{Config, Kd};
use crate::data::batch::{Batch, Batches, Cursor, micro_batches};
use crate::data::dataset;
use crate::data::prepared::ExampleView;
use crate::data::tokenizer::Tokenizer;
use crate::fs;
use crate::model::tape::Memory;
use crate::signal::StopFlag;
use crate::terminal::{Progress, Reading, format_count, format_duration};
use checkpoint::State;
use metrics::{Means, Metrics, StepLine, Sums};
use objective::Weights;
use optimizer::Optimizer;
use student::Student;

/// What to do with checkpoints that are already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Refuse to choose.
    Ask,
    /// Go on from the newest.
    Resume,
    /// Remove them.
    Fresh,
}

/// What a finished run reports.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub student: PathBuf,
    pub parameters: usize,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub tokens_per_s: f64,
    /// Means over the last step.
    pub last_loss: f64,
    pub validation: Means,
    pub data: dataset::Report,
}

/// Trains the student of `config` to the end, or to the next signal, and writes its folder.
///
/// # Errors
/// Where data or student do not load, a number stops being finite, or a file cannot be written.
pub fn run(config: &Config, start: Start, quiet: bool) -> Result<Summary> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.train.threads)
        .build()
        .context("cannot start the worker threads")?;
    pool.install(|| train(config, start, quiet))
}

fn train(config: &Config, start: Start, quiet: bool) -> Result<Summary> {
    let settings = &config.train;
    let stop = StopFlag::watch()?;
    let tokenizer = Tokenizer::load(&config.student.path)?;
    let student = Student::initial(&config.student, &tokenizer, settings.seed)?;
    let mut reading = Reading::new("prepare", quiet);
    let data = dataset::load(config, &tokenizer, &mut |done, total| {
        reading.update(done, total);
        stop.check()
    })?;
    drop(reading);
    let (train, validation) = (data.train(), data.validation());
    let total = total_steps(config, train.len());
    let fingerprint = checkpoint::fingerprint(config, data.fingerprint(), total)?;
    let kd_weight = match config.loss.kd {
        Kd::None => 0.0,
        Kd::Tail => config.loss.kd_weight as f32,
    };

    let checkpoints = config.run_dir.join("checkpoints");
    let memory = Memory::Record;
    let mut optimizer = Optimizer::new(&student.vars);
    let mut gradients = student.model.gradients();
    let mut tokens = 0;
    let mut cursor = Cursor::default();
    if let Some(path) = checkpoint::find(&checkpoints, start)? {
        let state = checkpoint::load(&path, &student, &mut optimizer, &fingerprint)?;
        cursor = state.cursor;
        tokens = state.tokens;
    }
    let mut batches = Batches::new(train.len(), settings.batch_size, settings.seed, cursor)?;
    let first_step = optimizer.step();
    fs::create_dir_all(&config.run_dir)?;
    let mut metrics = Metrics::open(&config.run_dir.join("metrics.jsonl"), first_step)?;

    let parameters = student.vars.values().map(|var| var.elem_count()).sum();
    let mut progress = Progress::new("train", total, quiet);
    progress.note(&format!(
        "{} parameters, {} examples, {total} steps of {} examples{}",
        format_count(parameters as u64),
        format_count(train.len() as u64),
        settings.batch_size,
        if first_step > 0 {
            format!(", from step {first_step}")
        } else {
            String::new()
        },
    ));
    let (began, began_tokens) = (Instant::now(), tokens);
    let mut last_loss = 0.0;
    let mut last_validation = Means::default();
    while optimizer.step() < total {
        let step_began = Instant::now();
        let step = optimizer.step() + 1;
        let epoch = batches.cursor().epoch;
        let examples: Vec<ExampleView> =
            batches.next_step().iter().map(|&i| train.get(i)).collect();
        let positions: usize = examples.iter().map(|e| e.supervised()).sum();
        let mut sums = Sums::default();
        let mut loss = 0.0;
        let mut step_tokens = 0;
        for micro in micro_batches(&examples, settings) {
            let batch = Batch::new(micro);
            step_tokens += batch.input_ids.len() as u64;
            let weights = Weights {
                kd: kd_weight,
                scale: 1.0 / positions as f32,
            };
            let (part, rows) =
                objective::gradients(&student.model, &batch, weights, memory, &mut gradients)?;
            if !part.is_finite() {
                bail!(not_finite("loss", step, &batch.keys));
            }
            loss += part;
            sums.add(&rows);
        }
        let norm = optimizer.gradient_norm(&gradients)?;
        if !norm.is_finite() {
            let keys: Vec<String> = examples.iter().map(|e| e.key().to_owned()).collect();
            bail!(not_finite("gradient", step, &keys));
        }
        let rate = schedule::learning_rate(settings, step, total);
        optimizer.update(settings, rate, norm, &gradients)?;
        gradients.clear();

        tokens += step_tokens;
        let means = sums.means();
        let speed = (tokens - began_tokens) as f64 / began.elapsed().as_secs_f64();
        metrics.step(&StepLine {
            step,
            split: "train",
            epoch,
            loss,
            ce: means.ce,
            kl: means.kl,
            learning_rate: rate,
            grad_norm: norm,
            tokens,
            tokens_per_s: step_tokens as f64 / step_began.elapsed().as_secs_f64(),
        })?;
        progress.update(step, || {
            let left = began.elapsed().div_f64((step - first_step) as f64) * (total - step) as u32;
            let kl = means.kl.map_or(String::new(), |kl| format!(", KL {kl:.4}"));
            format!(
                "loss {loss:.4}, CE {:.4}{kl}, lr {rate:.1e}, {speed:.0} tokens/s, {} left",
                means.ce.unwrap_or_default(),
                format_duration(left),
            )
        });
        last_loss = loss;
        let every = |interval: u64| interval > 0 && step.is_multiple_of(interval);
        if every(settings.eval_every) || step == total {
            last_validation =
                objective::evaluate(&student.model, validation, settings.micro_batch_size)?;
            metrics.validation(step, &last_validation)?;
            progress.note(&validation_line(step, loss, &last_validation));
        }
        let stopped = stop.check();
        if every(settings.checkpoint_every) || step == total || stopped.is_err() {
            let state = State {
                version: checkpoint::VERSION,
                step,
                cursor: batches.cursor(),
                tokens,
                fingerprint: fingerprint.clone(),
            };
            let keep = settings.keep_checkpoints;
            checkpoint::save(&checkpoints, &student, &optimizer, &state, keep)?;
        }
        stopped.context("the checkpoint is written: go on with --resume")?;
    }
    drop(progress);

    let seconds = began.elapsed().as_secs_f64();
    if first_step == total {
        last_validation =
            objective::evaluate(&student.model, validation, settings.micro_batch_size)?;
    }
    let summary = Summary {
        student: config.run_dir.join("student"),
        parameters,
        steps: total,
        tokens,
        seconds,
        tokens_per_s: (tokens - began_tokens) as f64 / seconds,
        last_loss,
        validation: last_validation,
        data: data.report.clone(),
    };
    student.save(
        &summary.student,
        config.student.save_dtype,
        &config.student.path,
        tokenizer.stop_ids(),
        &card::text(config, &summary),
    )?;
    Ok(summary)
}

fn total_steps(config: &Config, examples: usize) -> u64 {
    let train = &config.train;
    train.steps.unwrap_or_else(|| {
        let steps = train.epochs * examples as f64 / train.batch_size as f64;
        (steps.ceil() as u64).max(1)
    })
}

fn not_finite(what: &str, step: u64, keys: &[String]) -> String {
    format!(
        "the {what} of step {step} is not finite; nothing was updated. Lower train.learning_rate, \
         or look at these examples: {}",
        keys.join(", ")
    )
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
