//! Checkpoints: `checkpoints/step-000500/{model.safetensors, optimizer.safetensors, state.json}`.
//!
//! A checkpoint appears whole, by the rename of its folder, or not at all. The newest one is found
//! by looking, so no pointer can be stale.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::Start;
use super::optimizer::Optimizer;
use super::student::Student;
use crate::config::{Config, Train};
use crate::data::batch::Cursor;
use crate::exit::Exit;
use crate::fs;
use crate::model::weights;

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
    /// Hash of the settings and data that the numbers depend on.
    pub fingerprint: String,
}

pub const VERSION: u32 = 1;

/// Writes a checkpoint, then removes the oldest beyond `keep`.
///
/// # Errors
/// Where it cannot be written; earlier checkpoints are untouched then.
pub fn save(
    dir: &Path,
    student: &Student,
    optimizer: &Optimizer,
    state: &State,
    keep: usize,
) -> Result<()> {
    let model = weights::serialize(&student.tensors(), DType::F32, BTreeMap::new())?;
    let moments = weights::serialize(&optimizer.state()?, DType::F32, BTreeMap::new())?;
    let text = serde_json::to_vec_pretty(state)?;
    let path = dir.join(format!("step-{:06}", state.step));
    fs::write_dir(
        &path,
        &[
            ("model.safetensors", &model),
            ("optimizer.safetensors", &moments),
            ("state.json", &text),
        ],
    )?;
    let steps = list(dir)?;
    for (_, old) in steps.iter().take(steps.len().saturating_sub(keep.max(1))) {
        fs::remove_dir_all(old)?;
    }
    Ok(())
}

/// The newest checkpoint in `dir`, if there is one.
///
/// # Errors
/// Where the folder cannot be read.
pub fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(dir)?.pop().map(|(_, path)| path))
}

/// Brings student and optimizer to the state of the checkpoint at `path`.
///
/// # Errors
/// Where a file is damaged ([`Exit::Damaged`]), or `fingerprint` is another ([`Exit::Usage`]).
pub fn load(
    path: &Path,
    student: &Student,
    optimizer: &mut Optimizer,
    fingerprint: &str,
) -> Result<State> {
    let state = read_state(path).map_err(|error| damaged(path, &error))?;
    if state.fingerprint != fingerprint {
        bail!(Exit::Usage(format!(
            "the settings or the data have changed since {}: undo the change to go on with it, or \
             start over with --fresh",
            path.display()
        )));
    }
    let mut restore = || -> Result<()> {
        student.restore(&weights::load_file(&path.join("model.safetensors"))?)?;
        let moments = weights::load_file(&path.join("optimizer.safetensors"))?;
        optimizer.restore(&moments, state.step)
    };
    restore().map_err(|error| damaged(path, &error))?;
    Ok(state)
}

/// A hash of everything that the trained weights depend on, checkpoints and paths aside. `data` is
/// that of the examples.
///
/// # Errors
/// Where the settings do not serialise.
pub fn fingerprint(config: &Config, data: &str, total: u64) -> Result<String> {
    let settings = Train {
        // These do not change the numbers.
        eval_every: 0,
        checkpoint_every: 0,
        keep_checkpoints: 0,
        steps: Some(total),
        epochs: 0.0,
        ..config.train.clone()
    };
    let mut hash = blake3::Hasher::new();
    hash.update(&serde_json::to_vec(&(
        &settings,
        &config.loss,
        &config.student,
        data,
    ))?);
    Ok(hash.finalize().to_hex().to_string())
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

fn read_state(path: &Path) -> Result<State> {
    let state: State = serde_json::from_str(&fs::read_to_string(&path.join("state.json"))?)?;
    if state.version != VERSION {
        bail!(
            "its version is {}, and this program reads {VERSION}",
            state.version
        );
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
