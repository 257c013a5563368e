//! `ledger.json` in the run folder: what the cache cannot know, written ahead so that a kill cannot
//! make a promise untrue.
//!
//! The cache holds what was answered and billed. The ledger holds the most that may be billed for
//! what is in flight (raised before more is sent), what failed attempts may have cost, and the
//! requests of the last day. A run that ends in good order leaves nothing in flight; one that is
//! killed leaves its upper bound, which the next run counts as spent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::exit::Exit;

const VERSION: u32 = 1;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    version: u32,
    /// At most; 0 after a run that ended in good order.
    pub in_flight: InFlight,
    /// Dollars that are in no record: upper bounds for attempts that may have been billed, and for
    /// answers without usage.
    pub estimated_usd: f64,
    /// Attempts that may have been billed and brought no answer, kills included.
    pub attempts_lost: u64,
    /// By endpoint: requests as (slot, count).
    pub day: BTreeMap<String, Vec<(Timestamp, u64)>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct InFlight {
    pub requests: u64,
    pub usd: f64,
    /// The budget that it was within, together with all that was spent.
    pub budget_usd: Option<f64>,
}

impl InFlight {
    /// Says so, where a killed run left something.
    pub fn warn(self) {
        if self.requests > 0 {
            tracing::warn!(
                "the last run was killed: at most {} requests were in flight, and may be billed \
                 without an answer",
                self.requests
            );
        }
    }
}

pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("ledger.json")
}

impl Ledger {
    /// The ledger of the run folder, or an empty one.
    ///
    /// # Errors
    /// [`Exit::Damaged`] where the file is none: what it held cannot be guessed.
    pub fn load(run_dir: &Path) -> Result<Ledger> {
        let path = file(run_dir);
        if !path.exists() {
            return Ok(Ledger::default());
        }
        let ledger: Ledger =
            serde_json::from_str(&crate::fs::read_to_string(&path)?).map_err(|error| {
                Exit::Damaged(format!(
                    "{} is damaged ({error}): restore it, or delete it if no request of earlier \
                     runs need count against the budget and the day's limit beyond what the cache \
                     holds",
                    path.display()
                ))
            })?;
        if ledger.version > VERSION {
            return Err(Exit::Damaged(format!(
                "a newer distill wrote {} (version {}): update distill",
                path.display(),
                ledger.version
            ))
            .into());
        }
        Ok(ledger)
    }

    /// Counts what a killed run left in flight as spent, next to the `measured` dollars of the
    /// records. Returns it.
    pub fn settle_kill(&mut self, measured: f64) -> InFlight {
        let mut lost = std::mem::take(&mut self.in_flight);
        if let Some(cap) = lost.budget_usd {
            // The bound was raised in steps; spent and reserved were never more than the cap.
            let rest = cap - measured - self.estimated_usd;
            lost.usd = lost.usd.min(rest).max(0.0);
        }
        self.estimated_usd += lost.usd;
        self.attempts_lost += lost.requests;
        lost
    }

    /// Durable once this returns.
    pub fn save(&mut self, run_dir: &Path) -> Result<()> {
        self.version = VERSION;
        crate::fs::write_atomic(&file(run_dir), &serde_json::to_vec_pretty(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_run_leaves_its_upper_bound() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::load(dir.path()).unwrap();
        assert_eq!(ledger, Ledger::default());
        ledger.in_flight = InFlight {
            requests: 32,
            usd: 0.5,
            budget_usd: Some(2.0),
        };
        ledger.estimated_usd = 0.25;
        ledger.save(dir.path()).unwrap();

        let mut next = Ledger::load(dir.path()).unwrap();
        assert_eq!(next, ledger);
        assert_eq!(next.settle_kill(1.0).requests, 32);
        assert_eq!((next.estimated_usd, next.attempts_lost), (0.75, 32));
        assert_eq!(next.settle_kill(1.0), InFlight::default());

        let mut spent = Ledger::load(dir.path()).unwrap();
        assert!((spent.settle_kill(1.7).usd - 0.05).abs() < 1e-9);

        std::fs::write(file(dir.path()), "{\"version\":").unwrap();
        let error = Ledger::load(dir.path()).unwrap_err();
        assert_eq!(Exit::code_of(&error), 5);
        std::fs::write(
            file(dir.path()),
            serde_json::to_string(&ledger)
                .unwrap()
                .replace("\"version\":1", "\"version\":9"),
        )
        .unwrap();
        let error = Ledger::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("update distill"), "{error}");
    }
}
