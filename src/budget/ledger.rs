//! The account on disk: `ledger.json` and its log in the run folder.
//!
//! The ledger contains the amount spent, and an upper bound of the cost of the requests in flight. Amounts spent after
//! the ledger was written are appended to `spent.N.log`, where N is its field `log`. The next ledger includes these
//! amounts, and its own log has the number N + 1. A clean end of a run leaves an upper bound of zero. A kill leaves the
//! last upper bound, which the next run counts as spent.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::budget::dollars::Dollars;
use crate::cache::usage::Usage;
use crate::exit::Exit;
use crate::fs::FileLock;
use crate::fs::LogFile;

/// Version of `ledger.json`. Version 1 did not contain the measured cost.
const VERSION: u32 = 2;

/// Tokens of answers that were requested while no price was set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct UnpricedTokens {
    pub prompt: u64,
    /// Part of `prompt` from the provider's prompt cache.
    pub cached: u64,
    pub completion: u64,
}

impl UnpricedTokens {
    pub fn add(&mut self, other: UnpricedTokens) {
        self.prompt = self.prompt.saturating_add(other.prompt);
        self.cached = self.cached.saturating_add(other.cached);
        self.completion = self.completion.saturating_add(other.completion);
    }

    pub fn is_none(&self) -> bool {
        *self == UnpricedTokens::default()
    }
}

impl From<Usage> for UnpricedTokens {
    fn from(usage: Usage) -> UnpricedTokens {
        UnpricedTokens {
            prompt: usage.prompt_tokens,
            cached: usage.cached_tokens,
            completion: usage.completion_tokens,
        }
    }
}

/// Dollars spent, and tokens used while no price was set. A line of the log has the same fields. The dollars are required:
/// without them a damaged file would read as zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(expecting = "an amount of the budget")]
pub struct Spent {
    /// Cost of the usage that endpoints reported.
    pub measured_usd: Dollars,
    /// Upper bounds of the cost of attempts that may have been billed, of answers without usage, and of requests in
    /// flight at a kill.
    pub estimated_usd: Dollars,
    #[serde(default, skip_serializing_if = "UnpricedTokens::is_none")]
    pub measured_tokens: UnpricedTokens,
    #[serde(default, skip_serializing_if = "UnpricedTokens::is_none")]
    pub estimated_tokens: UnpricedTokens,
}

impl Spent {
    pub fn add(&mut self, other: &Spent) {
        self.measured_usd = self.measured_usd.plus(other.measured_usd);
        self.estimated_usd = self.estimated_usd.plus(other.estimated_usd);
        self.measured_tokens.add(other.measured_tokens);
        self.estimated_tokens.add(other.estimated_tokens);
    }

    /// Returns the sum of the measured and the estimated dollars.
    pub fn total(&self) -> Dollars {
        self.measured_usd.plus(self.estimated_usd)
    }

    pub(crate) fn is_zero(&self) -> bool {
        *self == Spent::default()
    }
}

/// Content of `ledger.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    version: u32,
    #[serde(flatten)]
    pub spent: Spent,
    /// Upper bound for the requests in flight; zero after a clean end of a run.
    pub in_flight: InFlight,
    /// Number of attempts that may have been billed without an answer, including the requests in flight at a kill.
    #[serde(default)]
    pub attempts_lost: u64,
    /// Largest ratio of the cost of an answer to its upper bound, or 0 if no answer has cost more than its bound.
    #[serde(default)]
    pub excess: f64,
    /// Numbers of requests of the last day by endpoint, as pairs of the start of a time slot and the number of requests
    /// in it.
    #[serde(default)]
    pub day: BTreeMap<String, Vec<(Timestamp, u64)>>,
    /// Number of the log with the amounts spent after this ledger was written.
    #[serde(default)]
    pub log: u64,
}

/// Upper bound of the number and the cost of the requests in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct InFlight {
    /// Maximum number of requests in flight.
    pub requests: u64,
    pub usd: Dollars,
    /// Cap that the sum of the amount spent and the cost in flight did not exceed; `None` without a budget.
    pub budget_usd: Option<Dollars>,
    /// Upper bound of the tokens of the requests in flight while no price is set.
    #[serde(skip_serializing_if = "UnpricedTokens::is_none")]
    pub tokens: UnpricedTokens,
}

impl InFlight {
    /// Warns about requests that a killed run left in flight.
    pub(crate) fn warn(self) {
        let requests = match self.requests {
            0 => return,
            1 => "1 request was".to_owned(),
            count => format!("{count} requests were"),
        };
        tracing::warn!(
            "the last run was killed: up to {requests} in flight and may have been billed without an answer"
        );
    }
}

/// Storage of an account: files, no storage for a read-only account, or a store of a test that fails on purpose.
pub trait LedgerStore {
    /// Replaces the ledger and starts a new log. The ledger is durable when this returns.
    fn save(&mut self, ledger: &Ledger) -> Result<()>;

    /// Appends to the log. The entry survives a kill of the process when this returns.
    fn append(&mut self, spent: &Spent) -> Result<()>;

    /// Returns false if the ledger was removed, or the log removed or replaced; the caller then saves the ledger again.
    fn is_in_place(&self) -> bool {
        true
    }

    /// Makes the appended entries durable.
    fn sync(&mut self) -> Result<()>;
}

impl Ledger {
    /// Counts the requests in flight at a kill as spent, and returns them.
    pub(crate) fn settle_kill(&mut self) -> InFlight {
        let mut in_flight = std::mem::take(&mut self.in_flight);
        if let Some(cap) = in_flight.budget_usd {
            // The bound was written ahead and exceeds the amount reserved, but the sum of the amounts spent and
            // reserved never exceeded the cap.
            in_flight.usd = in_flight.usd.min(cap.minus(self.spent.total()));
        }
        self.spent.add(&Spent {
            estimated_usd: in_flight.usd,
            estimated_tokens: in_flight.tokens,
            ..Spent::default()
        });
        self.attempts_lost = self.attempts_lost.saturating_add(in_flight.requests);
        in_flight
    }
}

/// Files of the account in a run folder, locked by one process at a time.
pub struct LedgerFiles {
    run_dir: PathBuf,
    /// Open log; `None` until the first entry after the ledger was written.
    log: Option<LogFile>,
    log_number: u64,
    _lock: FileLock,
}

/// Returns the path of the ledger of a run folder.
pub(crate) fn ledger_path(run_dir: &Path) -> PathBuf {
    run_dir.join("ledger.json")
}

fn log_path(run_dir: &Path, number: u64) -> PathBuf {
    run_dir.join(format!("spent.{number}.log"))
}

/// Reads the account of the run folder as it was last written, without the lock. The flag is true if the ledger
/// includes the measured cost. If it is false, the caller computes that cost from the cache.
///
/// # Errors
/// [`Exit::Damaged`] if a file is damaged or newer than this version.
pub(crate) fn read_only(run_dir: &Path) -> Result<(Ledger, bool)> {
    let (mut ledger, has_measured_cost) = load(run_dir)?;
    for spent in read_log(run_dir, ledger.log)? {
        ledger.spent.add(&spent);
    }
    Ok((ledger, has_measured_cost))
}

impl LedgerFiles {
    /// Opens and locks the account of the run folder. The flag has the same meaning as in `read_only`.
    ///
    /// # Errors
    /// If another process has the lock; [`Exit::Damaged`] if a file is damaged or newer than this version.
    pub fn open(run_dir: &Path) -> Result<(LedgerFiles, Ledger, bool)> {
        crate::fs::create_dir_all(run_dir)?;
        let activity =
            "is using the budget of this run folder: wait until it ends, or set another `run_dir`";
        let lock = FileLock::acquire(&run_dir.join("ledger.lock"), activity)?;
        let (ledger, has_measured_cost) = read_only(run_dir)?;
        let files = LedgerFiles {
            run_dir: run_dir.to_owned(),
            log: None,
            log_number: ledger.log,
            _lock: lock,
        };
        Ok((files, ledger, has_measured_cost))
    }
}

/// Reads `ledger.json` without the log. The flag is true if it includes the measured cost.
fn load(run_dir: &Path) -> Result<(Ledger, bool)> {
    let path = ledger_path(run_dir);
    if !path.exists() {
        return Ok((Ledger::default(), false));
    }
    let text = crate::fs::read_to_string(&path)?;
    let damaged = |problem: &dyn Display| {
        Exit::Damaged(format!(
            "{} is damaged ({problem}): restore it from a backup, or delete it if only the answers in the cache \
             need to count against the budget and the daily limit",
            path.display()
        ))
    };
    let mut fields: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| damaged(&error))?;
    let version = fields.get("version").and_then(Value::as_u64);
    let version = version.ok_or_else(|| damaged(&"it has no version"))?;
    if version > u64::from(VERSION) {
        return Err(Exit::Damaged(format!(
            "{} has version {version}, which a newer distill wrote: update distill",
            path.display()
        ))
        .into());
    }
    let has_measured_cost = version == u64::from(VERSION);
    if !has_measured_cost {
        fields.insert("measured_usd".into(), 0.into());
    }
    let ledger = serde_json::from_value(Value::Object(fields)).map_err(|error| damaged(&error))?;
    Ok((ledger, has_measured_cost))
}

/// Reads the entries of a log. Skips an incomplete last line, which a kill during `append` leaves.
fn read_log(run_dir: &Path, number: u64) -> Result<Vec<Spent>> {
    let path = log_path(run_dir, number);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = crate::fs::read(&path)?;
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    let complete_lines = lines.filter(|line| line.ends_with(b"\n"));
    let entries: Result<Vec<Spent>, _> = complete_lines.map(serde_json::from_slice).collect();
    entries.map_err(|error| {
        let message = format!(
            "{} is damaged ({error}): restore it from a backup, or delete it if its amounts need not count against \
             the budget",
            path.display()
        );
        Exit::Damaged(message).into()
    })
}

/// Store for an account that is only read: discards all writes.
#[derive(Debug)]
pub(crate) struct ReadOnlyLedger;

impl LedgerStore for ReadOnlyLedger {
    fn save(&mut self, _ledger: &Ledger) -> Result<()> {
        Ok(())
    }

    fn append(&mut self, _spent: &Spent) -> Result<()> {
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
}

impl LedgerStore for LedgerFiles {
    fn save(&mut self, ledger: &Ledger) -> Result<()> {
        let next = Ledger {
            version: VERSION,
            log: self.log_number + 1,
            ..ledger.clone()
        };
        // A log with this number belongs to a ledger that was deleted.
        let stale = log_path(&self.run_dir, next.log);
        if stale.exists() {
            crate::fs::remove_file(&stale)?;
        }
        crate::fs::write_atomic(
            &ledger_path(&self.run_dir),
            &serde_json::to_vec_pretty(&next)?,
        )?;
        let old = log_path(&self.run_dir, self.log_number);
        self.log = None;
        self.log_number += 1;
        // The new ledger includes the old log.
        if old.exists() {
            crate::fs::remove_file(&old)?;
        }
        Ok(())
    }

    fn append(&mut self, spent: &Spent) -> Result<()> {
        let line = serde_json::to_string(spent)?;
        if self.log.is_none() {
            let path = log_path(&self.run_dir, self.log_number);
            self.log = Some(LogFile::open(&path, |_| true)?);
        }
        let log = self
            .log
            .as_mut()
            .context("internal error: the log of the budget is not open")?;
        log.write(&line)
    }

    fn is_in_place(&self) -> bool {
        self.log.as_ref().is_none_or(LogFile::is_in_place) && ledger_path(&self.run_dir).exists()
    }

    fn sync(&mut self) -> Result<()> {
        self.log.as_ref().map_or(Ok(()), LogFile::sync)
    }
}

#[cfg(test)]
mod tests;
