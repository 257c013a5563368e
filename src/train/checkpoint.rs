//! Checkpoints: `checkpoints/step-000500/{model.safetensors, optimizer.safetensors, state.json}`, and
//! `ema.safetensors` where there is a running average; `teacher.safetensors` and
//! `teacher_optimizer.safetensors` where a teacher is trained along. Weights that are not trained are not in it;
//! their hash is part of the fingerprint.
//!
//! A checkpoint appears whole, by the rename of its folder, or not at all. The newest one is found
//! by looking, so no pointer can be stale.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ema::Ema;
use super::objective::Models;
use super::optimizer::Optimizer;
use super::student::{self, Student};
use crate::config::{self, Config, KdMode, ScoredBy, TrainConfig};
use crate::data::batch::Cursor;
use crate::exit::Exit;
use crate::fs;
use crate::model::Model;
use crate::model::weights::{self, Tensors};
use crate::tokenizer::Tokenizer;
use crate::train::early_stopping::Best;
use crate::train::local_teacher::Teacher;
use crate::train::summary::Start;

const MODEL: &str = "model.safetensors";
const EMA: &str = "ema.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const TEACHER: &str = "teacher.safetensors";
const TEACHER_OPTIMIZER: &str = "teacher_optimizer.safetensors";

/// What a run changes.
pub struct Parts {
    pub student: Student,
    pub optimizer: Optimizer,
    pub ema: Option<Ema>,
    /// One on this machine.
    pub teacher: Option<Teacher>,
}

impl Parts {
    /// Those that the config describes, before the first step.
    ///
    /// # Errors
    /// Where a model does not load, or a pattern is none.
    pub fn initial(config: &Config, tokenizer: &Tokenizer) -> Result<Self> {
        let train = &config.train;
        let student = Student::initial(config, tokenizer)?;
        let averaged = train.ema_decay > 0.0;
        Ok(Self {
            optimizer: Optimizer::new(&student, &student::patterns(&train.no_decay)?)?,
            ema: averaged
                .then(|| Ema::new(&student, train.ema_decay))
                .transpose()?,
            teacher: match config.loss.kd {
                KdMode::None if !config.teacher.cotrain => None,
                _ => Teacher::of(config, tokenizer)?,
            },
            student,
        })
    }

    /// The student as it is evaluated: the running average, where there is one.
    pub fn averaged(&self) -> &Model {
        let average = self.ema.as_ref().map(|ema| &ema.model);
        average.unwrap_or(&self.student.model)
    }

    /// Who learns, and from whom.
    pub fn models(&self) -> Models<'_> {
        Models {
            student: &self.student.model,
            teacher: self.teacher_model(),
        }
    }

    /// The model of a teacher on this machine.
    pub fn teacher_model(&self) -> Option<&Model> {
        let teacher = self.teacher.as_ref()?;
        Some(&teacher.learner.model)
    }

    /// A teacher that is trained along.
    fn trained_teacher(&mut self) -> Option<(&Student, &mut Optimizer)> {
        let teacher = self.teacher.as_mut()?;
        let training = teacher.training.as_mut()?;
        Some((&teacher.learner, &mut training.optimizer))
    }
}

/// What a run needs besides weights and moments to go on as if it had not stopped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this file.
    pub version: u32,
    /// Updates done.
    pub step: u64,
    /// Where the next batch starts.
    pub cursor: Cursor,
    /// Tokens trained on so far.
    pub tokens: u64,
    pub best: Best,
    /// Hash of the settings and data that the numbers depend on.
    pub fingerprint: String,
    /// The hashed settings and data, to name what has changed; null in checkpoints of earlier versions.
    #[serde(default)]
    pub basis: Value,
    /// See [`choice_of_data`].
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub choice_of_data: Value,
    /// Hashes of the other files by name, set by [`save`]; empty in checkpoints of earlier versions.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Hash of all other fields, set by [`save`].
    #[serde(default)]
    pub checksum: String,
}

impl State {
    fn hash(&self) -> Result<String> {
        let state = State {
            checksum: String::new(),
            ..self.clone()
        };
        let hash = blake3::hash(serde_json::to_string(&state)?.as_bytes());
        Ok(hash.to_hex().to_string())
    }
}

pub const VERSION: u32 = 2;

/// Writes a checkpoint, then removes the oldest beyond `keep`, but never the best.
///
/// # Errors
/// Where it cannot be written; earlier checkpoints are untouched then.
pub fn save(dir: &Path, parts: &mut Parts, state: &State, keep: usize) -> Result<()> {
    fs::write_dir_with(&folder(dir, state.step), |folder| {
        let write = |name, tensors: &Tensors| {
            weights::write(&folder.join(name), weights::entries(tensors, DType::F32)?)
        };
        write(MODEL, &parts.student.trained()?)?;
        if let Some(ema) = &parts.ema {
            write(EMA, &ema.tensors()?)?;
        }
        weights::write(&folder.join(OPTIMIZER), parts.optimizer.state()?)?;
        if let Some((teacher, optimizer)) = parts.trained_teacher() {
            write(TEACHER, &teacher.trained()?)?;
            weights::write(&folder.join(TEACHER_OPTIMIZER), optimizer.state()?)?;
        }
        let mut state = State {
            files: hashes(folder)?,
            ..state.clone()
        };
        state.checksum = state.hash()?;
        fs::write_in(folder, STATE, &serde_json::to_vec_pretty(&state)?)
    })?;
    let best = state.best.found.map(|(step, _)| step);
    let steps = list(dir)?;
    let old = steps.len().saturating_sub(keep.max(1));
    for (_, path) in steps[..old].iter().filter(|(step, _)| Some(*step) != best) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

fn folder(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:06}"))
}

/// The trained weights that the checkpoint after `step` would make the student: the running average where
/// there is one.
///
/// # Errors
/// [`Exit::Damaged`] where the checkpoint is gone or damaged.
pub fn weights_of(dir: &Path, step: u64) -> Result<Tensors> {
    let folder = folder(dir, step);
    let load = || {
        check_files(&folder, &read_state(&folder)?.files)?;
        let average = folder.join(EMA);
        let path = if average.exists() {
            average
        } else {
            folder.join(MODEL)
        };
        weights::load_file(&path)
    };
    load().map_err(|error| damaged(&folder, &error))
}

/// The newest checkpoint in `dir`, if there is one.
///
/// # Errors
/// Where the folder cannot be read.
pub fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(dir)?.pop().map(|(_, path)| path))
}

/// Brings the parts to the state of the checkpoint at `path`.
///
/// # Errors
/// Where a file is damaged ([`Exit::Damaged`]), or it has another `basis` ([`Exit::Usage`]), which `data`, of
/// [`choice_of_data`], may explain.
pub fn load(path: &Path, parts: &mut Parts, basis: &Value, data: &Value) -> Result<State> {
    let state = read_state(path).map_err(|error| damaged(path, &error))?;
    if state.basis.is_null() {
        bail!(Exit::Usage(format!(
            "an earlier version of distill wrote {}, and its settings cannot be compared: start over with --fresh",
            path.display()
        )));
    }
    if state.fingerprint != fingerprint(basis) {
        let mut changes = changes(&state.basis, basis);
        if state.basis["data"] != basis["data"] && !state.choice_of_data.is_null() {
            let reasons = self::changes(&state.choice_of_data, data).into_iter();
            changes.extend(reasons.map(|reason| format!("perhaps since {reason}")));
        }
        let changes = if changes.is_empty() {
            String::new()
        } else {
            format!(" ({})", changes.join("; "))
        };
        bail!(Exit::Usage(format!(
            "the settings or the data have changed since {}{}: undo that to go on with it, or start over with \
             --fresh",
            path.display(),
            changes
        )));
    }
    check_files(path, &state.files).map_err(|error| damaged(path, &error))?;
    let mut restore = || -> Result<()> {
        let vars = &parts.student.vars;
        weights::with_safetensors(&path.join(MODEL), |file| student::restore(vars, file))?;
        if let Some(ema) = &parts.ema {
            weights::with_safetensors(&path.join(EMA), |file| ema.restore(file))?;
        }
        let optimizer = &mut parts.optimizer;
        weights::with_safetensors(&path.join(OPTIMIZER), |file| {
            optimizer.restore(file, state.step)
        })?;
        if let Some((teacher, optimizer)) = parts.trained_teacher() {
            weights::with_safetensors(&path.join(TEACHER), |file| {
                student::restore(&teacher.vars, file)
            })?;
            weights::with_safetensors(&path.join(TEACHER_OPTIMIZER), |file| {
                optimizer.restore(file, state.step)
            })?;
        }
        Ok(())
    };
    restore().map_err(|error| damaged(path, &error))?;
    Ok(state)
}

/// Everything that the trained weights depend on, checkpoints and the names of files aside. `data` is the
/// hash of the examples, `parts` are those before the first step; device and number type are settled.
///
/// # Errors
/// Where the settings do not serialise, or a device fails.
pub fn basis(config: &Config, data: &str, parts: &Parts, total: u64) -> Result<Value> {
    let settings = TrainConfig {
        // These do not change the numbers.
        eval_every: 0,
        checkpoint_every: 0,
        keep_checkpoints: 0,
        patience: 0,
        steps: Some(total),
        epochs: 0.0,
        threads: 0,
        activation_checkpointing: false,
        ..config.train.clone()
    };
    let teacher = &config.teacher;
    let is_asked = config.train.on_policy && config.on_policy.judge != ScoredBy::Local;
    let judge = is_asked.then_some((&teacher.base_url, &teacher.model));
    // What is in the files is in the hashes, wherever they are.
    let student = config::StudentConfig {
        path: PathBuf::new(),
        ..config.student.clone()
    };
    let on_policy = config::OnPolicyConfig {
        tokenizer: None,
        ..config.on_policy.clone()
    };
    Ok(json!({
        "train": settings,
        "loss": &config.loss,
        "lora": &config.lora,
        "student": student,
        "teacher": { "cotrain": teacher.cotrain, "cotrain_rate": teacher.cotrain_rate },
        "on_policy": on_policy,
        "judge": judge,
        "data": data,
        "frozen weights": parts.student.hash_of_frozen()?,
        "local teacher": parts.teacher.as_ref().map_or("", Teacher::hash),
    }))
}

/// The settings that may choose other examples, by which a difference of their hash is explained; names of files
/// aside.
pub fn choice_of_data(config: &Config) -> Value {
    let teacher = &config.teacher;
    let mut choice = json!({
        "data": &config.data,
        "prompts": &config.prompts,
        "sampling": &config.sampling,
        "teacher": { "base_url": &teacher.base_url, "model": &teacher.model, "name": &teacher.name },
    });
    for (section, file) in [
        ("data", "source"),
        ("data", "cache"),
        ("data", "teacher_tokenizer"),
        ("prompts", "source"),
    ] {
        choice[section][file] = Value::Null;
    }
    choice
}

/// The hash of a basis.
pub fn fingerprint(basis: &Value) -> String {
    blake3::hash(basis.to_string().as_bytes())
        .to_hex()
        .to_string()
}

/// Description of the differences between two of them.
fn changes(before: &Value, now: &Value) -> Vec<String> {
    let mut changes = Vec::new();
    for (section, value) in now.as_object().into_iter().flatten() {
        let old = before.get(section).unwrap_or(&Value::Null);
        match (old.as_object(), value.as_object()) {
            _ if old == value => {}
            (Some(old), Some(new)) => changes.extend(new.iter().filter_map(|(key, value)| {
                let old = old.get(key).unwrap_or(&Value::Null);
                (old != value).then(|| format!("{section}.{key} was {old} and is {value}"))
            })),
            _ => changes.push(format!("the {section}")),
        }
    }
    changes
}

/// The checkpoint to start from.
///
/// # Errors
/// [`Exit::Usage`] where `start` does not fit what is there.
pub fn find(dir: &Path, start: Start) -> Result<Option<PathBuf>> {
    let found = latest(dir)?;
    match (start, &found) {
        (Start::Ask, Some(path)) => bail!(Exit::Usage(format!(
            "{} is there: give --resume to go on from it, or --fresh to start over",
            path.display()
        ))),
        (Start::Resume, None) => bail!(Exit::Usage(format!(
            "there is no checkpoint in {} to resume from",
            dir.display()
        ))),
        (Start::Fresh, Some(_)) => {
            fs::remove_dir_all(dir)?;
            Ok(None)
        }
        _ => Ok(found),
    }
}

/// Hashes of the files in a folder.
fn hashes(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        hashes.insert(name, hash(&entry.path())?);
    }
    Ok(hashes)
}

fn hash(path: &Path) -> Result<String> {
    let read = || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(path)?)?;
        Ok::<_, std::io::Error>(hasher.finalize().to_hex().to_string())
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// Checks that the files are those that were written.
fn check_files(folder: &Path, hashes: &BTreeMap<String, String>) -> Result<()> {
    for (name, expected) in hashes {
        if hash(&folder.join(name))? != *expected {
            bail!("{name} is not what was written: its checksum differs");
        }
    }
    Ok(())
}

fn read_state(path: &Path) -> Result<State> {
    let text = fs::read_to_string(&path.join(STATE))?;
    let state: State =
        serde_json::from_str(&text).with_context(|| format!("{STATE} is not what was written"))?;
    if state.version != VERSION {
        bail!(
            "the version of {STATE} is {}, and this program reads {VERSION}",
            state.version
        );
    }
    // Checkpoints of earlier versions have none.
    if !state.files.is_empty() && state.checksum != state.hash()? {
        bail!("{STATE} is not what was written: its checksum differs");
    }
    Ok(state)
}

fn damaged(path: &Path, error: &anyhow::Error) -> anyhow::Error {
    Exit::Damaged(format!(
        "the checkpoint {} cannot be used: {error:#}; move it away to go on from the one before, \
         or start over with --fresh",
        path.display()
    ))
    .into()
}

/// Checkpoints by step, oldest first.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-"));
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
