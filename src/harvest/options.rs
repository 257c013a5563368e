//! Options of a harvest, as given on the command line.

use crate::plan::shard::RequestShard;

/// Options of a harvest.
#[derive(Debug, Clone, Default)]
pub struct HarvestOptions {
    /// Estimate only: send nothing, write nothing.
    pub dry_run: bool,
    /// Maximum number of prompts, from the first one.
    pub limit: Option<usize>,
    /// Rows to ask again, and no others: `length`, `quarantined`, `failed`, or a quarantine reason.
    pub again: Vec<String>,
    /// Share of the requests that this process sends.
    pub shard: Option<RequestShard>,
    /// Suppress progress output.
    pub quiet: bool,
}
