//! Start and result of a training run.

use std::path::PathBuf;

use serde::Serialize;

use crate::train::metrics::MetricMeans;
use crate::train::on_policy::OnPolicyCounts;

/// Result of a finished run.
#[derive(Debug, Clone, Serialize)]
pub struct TrainSummary {
    /// Folder of the student.
    pub student: PathBuf,
    /// Number of parameters.
    pub parameters: usize,
    /// Number of trained parameters, including adapters.
    pub trained_parameters: usize,
    /// Number of steps over all sessions.
    pub steps: u64,
    /// Step whose weights became the student, if it is not the last one.
    pub best_step: Option<u64>,
    /// Number of tokens over all sessions.
    pub tokens: u64,
    /// Duration of the training loop in this session, in seconds.
    pub seconds: f64,
    /// Speed of this session.
    pub tokens_per_s: f64,
    /// Loss of the last step with supervised positions; 0 if this session ran none.
    pub last_loss: f64,
    /// Metrics of the student on the held-out examples.
    pub validation: MetricMeans,
    /// Description of the loss with its weights.
    pub loss: String,
    /// Differences between the student's files and their sources.
    pub changes: Vec<String>,
    /// Counts of the answers that the student generated; None without `train.on_policy`.
    pub own_answers: Option<OnPolicyCounts>,
    pub data: crate::data::report::DataReport,
}

/// Treatment of existing checkpoints at the start of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// Start a new run; fail if a checkpoint exists.
    New,
    /// Resume from the newest checkpoint; fail if there is none.
    Resume,
    /// Remove all checkpoints and start over.
    Fresh,
}
