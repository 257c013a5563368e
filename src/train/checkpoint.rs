//! Checkpoints: `checkpoints/step-000500/{model.safetensors, optimizer.safetensors, state.json}`, with
//! `ema.safetensors` if there is a moving average, and with `teacher.safetensors` and
//! `teacher_optimizer.safetensors` if a teacher is co-trained. Frozen weights are not saved; their hash is part of the
//! fingerprint.
//!
//! A checkpoint is written atomically, by renaming its folder. The newest checkpoint is found by listing the
//! parent folder.
//!
//! The fingerprint hashes the JSON of [`Config::checkpoint_inputs`] together with hashes of the data and the weights.
//! The order and the names of the fields of settings such as `config::TrainConfig` affect it: changing them makes old
//! checkpoints unusable.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ema::Ema;
use super::objective::ModelPair;
use super::optimizer::Optimizer;
use super::trainable::{self, TrainableModel};
use crate::config::{Config, KdMode};
use crate::data::batch::Cursor;
use crate::exit::Exit;
use crate::fs;
use crate::model::Model;
use crate::model::weights::{self, Tensors};
use crate::tokenizer::Tokenizer;
use crate::train::early_stopping::EarlyStopping;
use crate::train::local_teacher::LocalTeacher;
use crate::train::summary::StartMode;

const MODEL: &str = "model.safetensors";
const EMA: &str = "ema.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const TEACHER: &str = "teacher.safetensors";
const TEACHER_OPTIMIZER: &str = "teacher_optimizer.safetensors";

/// Models and optimizers of a run.
pub struct TrainingState {
    pub student: TrainableModel,
    pub optimizer: Optimizer,
    pub ema: Option<Ema>,
    /// The local teacher.
    pub teacher: Option<LocalTeacher>,
}

impl TrainingState {
    /// Creates the state before the first step.
    ///
    /// # Errors
    /// If a model does not load, or a pattern is not valid.
    pub fn initial(config: &Config, tokenizer: &Tokenizer) -> Result<Self> {
        let train = &config.train;
        let student = TrainableModel::student(&config.student, &config.lora, train, tokenizer)?;
        let has_ema = train.ema_decay > 0.0;
        Ok(Self {
            optimizer: Optimizer::new(&student, &train.no_decay)?,
            ema: has_ema
                .then(|| Ema::new(&student, train.ema_decay))
                .transpose()?,
            teacher: match config.loss.kd {
                KdMode::None if !config.teacher.cotrain => None,
                _ => LocalTeacher::from_config(&config.teacher, train, &config.loss, tokenizer)?,
            },
            student,
        })
    }

    /// Returns the model to evaluate: the moving average if there is one, else the student.
    pub(crate) fn eval_model(&self) -> &Model {
        let average = self.ema.as_ref().map(|ema| &ema.model);
        average.unwrap_or(&self.student.model)
    }

    /// Returns the student and the local teacher.
    pub fn models(&self) -> ModelPair<'_> {
        ModelPair {
            student: &self.student.model,
            teacher: self.teacher_model(),
        }
    }

    /// Returns the model of the local teacher.
    pub fn teacher_model(&self) -> Option<&Model> {
        let teacher = self.teacher.as_ref()?;
        Some(&teacher.trainable.model)
    }

    /// Returns the weights and the optimizer of a co-trained teacher.
    fn cotrained_teacher(&mut self) -> Option<(&TrainableModel, &mut Optimizer)> {
        let teacher = self.teacher.as_mut()?;
        let training = teacher.training.as_mut()?;
        Some((&teacher.trainable, &mut training.optimizer))
    }
}

/// `state.json`: progress and fingerprint of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// Format version.
    pub version: u32,
    /// Number of completed steps.
    pub step: u64,
    /// Position of the first example of the next step.
    pub cursor: Cursor,
    /// Number of tokens in the completed steps.
    pub tokens: u64,
    #[serde(rename = "best")]
    pub early_stopping: EarlyStopping,
    /// Hash of `fingerprint_inputs`.
    pub fingerprint: String,
    /// See `fingerprint_inputs`; kept to report changes. Null in checkpoints of earlier versions.
    #[serde(rename = "basis", default)]
    pub fingerprint_inputs: Value,
    /// See [`Config::example_settings`]; kept to report changes.
    #[serde(
        rename = "choice_of_data",
        default,
        skip_serializing_if = "Value::is_null"
    )]
    pub data_settings: Value,
    /// Hashes of the other files by name, set by [`save`]. Empty in checkpoints of earlier versions.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Hash of all other fields, set by [`save`].
    #[serde(default)]
    pub checksum: String,
}

impl CheckpointState {
    fn hash(&self) -> Result<String> {
        let state = CheckpointState {
            checksum: String::new(),
            ..self.clone()
        };
        let hash = blake3::hash(serde_json::to_string(&state)?.as_bytes());
        Ok(hash.to_hex().to_string())
    }
}

/// Version of the checkpoint format.
pub(crate) const VERSION: u32 = 2;

/// Writes a checkpoint, then removes all but the newest `keep` checkpoints and the best one.
///
/// # Errors
/// If the checkpoint cannot be written (earlier checkpoints are then unchanged), or an old one cannot be removed.
pub fn save(
    dir: &Path,
    training: &mut TrainingState,
    state: &CheckpointState,
    keep: usize,
) -> Result<()> {
    fs::write_dir_with(&folder(dir, state.step), |folder| {
        let write = |name, tensors: &Tensors| {
            weights::write(&folder.join(name), weights::entries(tensors, DType::F32)?)
        };
        write(MODEL, &training.student.trained()?)?;
        if let Some(ema) = &training.ema {
            write(EMA, &ema.tensors()?)?;
        }
        weights::write(&folder.join(OPTIMIZER), training.optimizer.state()?)?;
        if let Some((teacher, optimizer)) = training.cotrained_teacher() {
            write(TEACHER, &teacher.trained()?)?;
            weights::write(&folder.join(TEACHER_OPTIMIZER), optimizer.state()?)?;
        }
        let mut state = CheckpointState {
            files: hashes(folder)?,
            ..state.clone()
        };
        state.checksum = state.hash()?;
        fs::write_in(folder, STATE, &serde_json::to_vec_pretty(&state)?)
    })?;
    let best = state.early_stopping.best.map(|(step, _)| step);
    // An older folder without a state was being removed when the process was killed.
    let (incomplete, complete): (Vec<_>, Vec<_>) = list(dir)?
        .into_iter()
        .partition(|(step, path)| *step < state.step && !path.join(STATE).exists());
    let old_count = complete.len().saturating_sub(keep.max(1));
    let old = complete[..old_count].iter().chain(&incomplete);
    for (_, path) in old.filter(|(step, _)| Some(*step) != best) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

fn folder(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:06}"))
}

/// Loads the trained weights of the checkpoint after `step`: the moving average if there is one.
///
/// # Errors
/// [`Exit::Damaged`] if the checkpoint is missing or damaged; [`Exit::Usage`] if it has another format version.
pub fn load_weights(dir: &Path, step: u64) -> Result<Tensors> {
    let folder = folder(dir, step);
    check_version(&folder)?;
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
    // Later checkpoints name this one as the best, so a resumed run would need it as well.
    let advice = "restore it from a backup, or start over with --fresh";
    load().map_err(|error| damaged(&folder, &error, advice))
}

/// Returns the path of the newest checkpoint in `dir`; None if there is no checkpoint.
///
/// # Errors
/// If the folder cannot be read.
pub(crate) fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(dir)?.pop().map(|(_, path)| path))
}

/// Restores `training` from the checkpoint at `path`.
///
/// # Errors
/// [`Exit::Damaged`] if a file is damaged. [`Exit::Usage`] if the checkpoint has another format version, was written
/// before checkpoints stored their inputs, or has other `inputs` (see `fingerprint_inputs`).
/// If the data differ, the error lists changes of `data_settings` as possible reasons.
pub fn load(
    path: &Path,
    training: &mut TrainingState,
    inputs: &Value,
    data_settings: &Value,
) -> Result<CheckpointState> {
    check_version(path)?;
    let state = read_state(path).map_err(|error| damaged(path, &error, MOVE_AWAY))?;
    if state.fingerprint_inputs.is_null() {
        return Err(other_version(path, "an earlier"));
    }
    if state.fingerprint != fingerprint(inputs) {
        let saved = &state.fingerprint_inputs;
        let mut changes = describe_changes(saved, inputs);
        if saved["data"] != inputs["data"] && !state.data_settings.is_null() {
            let reasons = describe_changes(&state.data_settings, data_settings);
            changes.extend(
                reasons
                    .into_iter()
                    .map(|reason| format!("possibly because {reason}")),
            );
        }
        let changes = if changes.is_empty() {
            String::new()
        } else {
            format!(" ({})", changes.join("; "))
        };
        bail!(Exit::Usage(format!(
            "the settings or the data have changed since {}{}: revert the change to resume, or start over with \
             --fresh",
            path.display(),
            changes
        )));
    }
    check_files(path, &state.files).map_err(|error| damaged(path, &error, MOVE_AWAY))?;
    let mut restore = || -> Result<()> {
        let vars = &training.student.vars;
        weights::with_safetensors(&path.join(MODEL), |file| trainable::restore(vars, file))?;
        if let Some(ema) = &training.ema {
            weights::with_safetensors(&path.join(EMA), |file| ema.restore(file))?;
        }
        let optimizer = &mut training.optimizer;
        weights::with_safetensors(&path.join(OPTIMIZER), |file| {
            optimizer.restore(file, state.step)
        })?;
        if let Some((teacher, optimizer)) = training.cotrained_teacher() {
            weights::with_safetensors(&path.join(TEACHER), |file| {
                trainable::restore(&teacher.vars, file)
            })?;
            weights::with_safetensors(&path.join(TEACHER_OPTIMIZER), |file| {
                optimizer.restore(file, state.step)
            })?;
        }
        Ok(())
    };
    restore().map_err(|error| damaged(path, &error, MOVE_AWAY))?;
    Ok(state)
}

/// Adds hashes of data and weights to `settings`, which come from [`Config::checkpoint_inputs`]. The result contains
/// all inputs of the trained weights.
///
/// `data` is the hash of the examples, `training` the state before the first step. The fingerprint depends on the order
/// of the fields.
///
/// # Errors
/// If a device fails.
pub(crate) fn fingerprint_inputs(
    mut settings: Value,
    data: &str,
    training: &TrainingState,
) -> Result<Value> {
    settings["data"] = data.into();
    settings["frozen weights"] = training.student.hash_of_frozen()?.into();
    let teacher = training.teacher.as_ref();
    settings["local teacher"] = teacher.map_or("", LocalTeacher::hash).into();
    Ok(settings)
}

/// Returns the hash of `fingerprint_inputs`.
pub fn fingerprint(inputs: &Value) -> String {
    blake3::hash(inputs.to_string().as_bytes())
        .to_hex()
        .to_string()
}

/// Describes the differences between two values of [`fingerprint_inputs`] or [`Config::example_settings`].
fn describe_changes(old_inputs: &Value, new_inputs: &Value) -> Vec<String> {
    let mut changes = Vec::new();
    for (section, new) in new_inputs.as_object().into_iter().flatten() {
        let old = old_inputs.get(section).unwrap_or(&Value::Null);
        match (old.as_object(), new.as_object()) {
            _ if old == new => {}
            (Some(old), Some(new)) => changes.extend(new.iter().filter_map(|(key, new)| {
                let old = old.get(key).unwrap_or(&Value::Null);
                (old != new).then(|| format!("{section}.{key} was {old} and is {new}"))
            })),
            _ => changes.push(format!("the {section}")),
        }
    }
    changes
}

/// Returns the path of the checkpoint to resume from; None for a new run. Removes all checkpoints if `start` is
/// [`StartMode::Fresh`].
///
/// # Errors
/// [`Exit::Usage`] if `start` is [`StartMode::New`] and a checkpoint exists, or [`StartMode::Resume`] and none exists.
pub fn find(dir: &Path, start: StartMode) -> Result<Option<PathBuf>> {
    let newest = latest(dir)?;
    match (start, &newest) {
        (StartMode::New, Some(path)) => bail!(Exit::Usage(format!(
            "{} exists: pass --resume to resume from it, or --fresh to start over",
            path.display()
        ))),
        (StartMode::Resume, None) => bail!(Exit::Usage(format!(
            "there is no checkpoint in {} to resume from: run the command without --resume",
            dir.display()
        ))),
        (StartMode::Fresh, Some(_)) => {
            fs::remove_dir_all(dir)?;
            Ok(None)
        }
        _ => Ok(newest),
    }
}

/// Returns the hashes of the files in a folder, by name.
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

/// Checks the files against their hashes.
fn check_files(folder: &Path, hashes: &BTreeMap<String, String>) -> Result<()> {
    for (name, expected) in hashes {
        if hash(&folder.join(name))? != *expected {
            bail!("{name} is damaged: its checksum differs");
        }
    }
    Ok(())
}

/// The field of `state.json` that every version of the format has.
#[derive(Deserialize)]
struct FormatVersion {
    version: u32,
}

/// Checks the format version of the checkpoint at `path`. [`read_state`] reports a `state.json` without a version.
///
/// # Errors
/// [`Exit::Usage`] if it is not [`VERSION`].
fn check_version(path: &Path) -> Result<()> {
    let text = fs::read_to_string(&path.join(STATE)).unwrap_or_default();
    let Ok(FormatVersion { version }) = serde_json::from_str(&text) else {
        return Ok(());
    };
    match version.cmp(&VERSION) {
        Ordering::Less => Err(other_version(path, "an earlier")),
        Ordering::Equal => Ok(()),
        Ordering::Greater => Err(other_version(path, "a later")),
    }
}

fn read_state(path: &Path) -> Result<CheckpointState> {
    let text = fs::read_to_string(&path.join(STATE))?;
    let state: CheckpointState =
        serde_json::from_str(&text).with_context(|| format!("{STATE} is damaged"))?;
    // Checkpoints of earlier versions have no checksum.
    if !state.files.is_empty() && state.checksum != state.hash()? {
        bail!("{STATE} is damaged: its checksum differs");
    }
    Ok(state)
}

/// Returns the error for a checkpoint that an earlier or a later version of the program has written.
fn other_version(path: &Path, version: &str) -> anyhow::Error {
    Exit::Usage(format!(
        "{} was written by {version} version of distill and cannot be resumed: start over with --fresh",
        path.display()
    ))
    .into()
}

/// Advice for a damaged checkpoint that is the newest one.
const MOVE_AWAY: &str = "move it away to resume from the previous one, or start over with --fresh";

fn damaged(path: &Path, error: &anyhow::Error, advice: &str) -> anyhow::Error {
    Exit::Damaged(format!(
        "the checkpoint {} cannot be used: {error:#}; {advice}",
        path.display()
    ))
    .into()
}

/// Returns the steps and paths of the checkpoints, oldest first.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut checkpoints = Vec::new();
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-"));
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            checkpoints.push((step, entry.path()));
        }
    }
    checkpoints.sort();
    Ok(checkpoints)
}
