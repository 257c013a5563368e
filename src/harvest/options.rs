//! Options of a harvest, as given on the command line.

use crate::plan::shard::RequestShard;

/// Options of a harvest.
#[derive(Debug, Clone, Default)]
pub struct HarvestOptions {
    /// Estimate only: send nothing, write nothing.
    pub dry_run: bool,
    /// Maximum number of prompts; the first prompts of the source are used.
    pub limit: Option<usize>,
    /// Kinds of rows to request again: `length`, `quarantined`, `failed`, a quarantine reason or a finish reason. If
    /// set, no other rows are requested; ignored while batches are under way.
    pub again: Vec<String>,
    /// Share of the requests that this process sends.
    pub shard: Option<RequestShard>,
    /// Suppress progress output.
    pub quiet: bool,
}
