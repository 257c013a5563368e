//! TODO

use crate::train::metrics::Means;
use crate::train::on_policy::Count;
use serde::Serialize;
use std::path::PathBuf;

/// What a finished run reports.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub student: PathBuf,
    pub parameters: usize,
    /// Those that were trained, adapters among them.
    pub trained_parameters: usize,
    /// Steps taken, over all sessions.
    pub steps: u64,
    /// The step whose weights became the student, where these are not the last.
    pub best_step: Option<u64>,
    pub tokens: u64,
    pub seconds: f64,
    pub tokens_per_s: f64,
    /// Means over the last step.
    pub last_loss: f64,
    pub validation: Means,
    /// The loss in words, with the weights that were used.
    pub loss: String,
    /// Differences between files of the student's folder and those that they come from.
    pub changes: Vec<String>,
    /// With `train.on_policy`.
    pub own_answers: Option<Count>,
    pub data: crate::data::report::DataReport,
}

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
