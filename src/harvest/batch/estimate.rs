//! Estimates the batches of a plan, for a dry run.

use std::collections::HashSet;

use anyhow::Result;

use crate::harvest::batch::journal::BatchJournal;
use crate::harvest::batch::parts::{self, PartLimits};
use crate::plan::estimate::BatchEstimate;
use crate::plan::run_settings::RunSettings;
use crate::plan::{Plan, PlannedRow};

/// Estimates the batches of a plan.
///
/// # Errors
/// If the journal of an earlier run is damaged.
pub(crate) fn estimate_batches(settings: &RunSettings, plan: &Plan) -> Result<BatchEstimate> {
    let journal = BatchJournal::load(&settings.run_dir)?;
    let mut estimate = BatchEstimate::default();
    let mut submitted_keys = HashSet::new();
    for part in journal.parts.iter().filter(|part| !part.is_done()) {
        estimate.under_way += 1;
        let members = journal.members(&part.nonce)?;
        submitted_keys.extend(members.into_iter().map(|member| member.key));
    }
    let limits = PartLimits::new(&settings.batch, None, f64::INFINITY);
    for (upstream, rows) in plan.rows_by_endpoint.iter().enumerate() {
        let mut sizes = Vec::new();
        for row in rows.clone() {
            let PlannedRow { key, old_key, .. } = &plan.rows[row];
            let has_old_key = || {
                old_key
                    .as_deref()
                    .is_some_and(|key| submitted_keys.contains(key))
            };
            if submitted_keys.contains(key) || has_old_key() {
                estimate.rows_under_way += 1
            } else {
                sizes.push(parts::size(plan, upstream, row, 0.0))
            }
        }
        let tokens: u64 = sizes.iter().map(|size| size.tokens).sum();
        let limit = settings.batch.enqueued_tokens.unwrap_or(u64::MAX).max(1);
        estimate.rounds = estimate.rounds.max(tokens.div_ceil(limit));
        let mut remaining = &sizes[..];
        while !remaining.is_empty() {
            let (count, ..) = limits.fit(remaining.iter().copied());
            // A row larger than the maximum file size fails and needs no batch.
            estimate.batches += u64::from(count > 0);
            remaining = &remaining[count.max(1)..];
        }
    }
    Ok(estimate)
}
