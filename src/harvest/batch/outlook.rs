//! Estimates the batches of a plan before anything is asked.

use std::collections::HashSet;

use anyhow::Result;

use crate::config::Config;
use crate::harvest::batch::journal::BatchJournal;
use crate::harvest::batch::parts::{self, PartLimits};
use crate::plan::estimate::BatchEstimate;
use crate::plan::{Plan, PlannedRow};

/// Estimates the batches of a plan.
///
/// # Errors
/// Where the journal of an earlier run is damaged.
pub(crate) fn outlook(config: &Config, plan: &Plan) -> Result<BatchEstimate> {
    let journal = BatchJournal::load(&config.run_dir)?;
    let mut outlook = BatchEstimate::default();
    let mut asked = HashSet::new();
    for part in journal.parts.iter().filter(|part| !part.is_done()) {
        outlook.under_way += 1;
        let members = journal.members(&part.nonce)?;
        asked.extend(members.into_iter().map(|member| member.key));
    }
    let room = PartLimits::new(&config.batch, None, f64::INFINITY);
    for (upstream, rows) in plan.rows_by_endpoint.iter().enumerate() {
        let mut sizes = Vec::new();
        for row in rows.clone() {
            let PlannedRow { key, old_key, .. } = &plan.rows[row];
            let of_old = || old_key.as_deref().is_some_and(|key| asked.contains(key));
            match asked.contains(key) || of_old() {
                true => outlook.rows_under_way += 1,
                false => sizes.push(parts::size(plan, upstream, row, 0.0)),
            }
        }
        let tokens: u64 = sizes.iter().map(|size| size.tokens).sum();
        let limit = config.batch.enqueued_tokens.unwrap_or(u64::MAX).max(1);
        outlook.rounds = outlook.rounds.max(tokens.div_ceil(limit));
        let mut rest = &sizes[..];
        while !rest.is_empty() {
            let (count, ..) = room.take(rest.iter().copied());
            // A row that fits into no batch fails by itself.
            outlook.batches += u64::from(count > 0);
            rest = &rest[count.max(1)..];
        }
    }
    Ok(outlook)
}
