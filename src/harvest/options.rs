//! TODO

use crate::plan::shard::Shard;

#[derive(Debug, Clone, Default)]
pub struct HarvestOptions {
    /// Plan only: send nothing, write nothing.
    pub dry_run: bool,
    /// Use only the first so many prompts.
    pub limit: Option<usize>,
    /// Ask again, and these alone: `length`, `quarantined`, `failed`, or a reason.
    pub again: Vec<String>,
    /// Only this part of the requests.
    pub shard: Option<Shard>,
    /// Show no progress.
    pub quiet: bool,
}
