//! `ledger.json` and its log in the run folder: the account on disk, whose guarantees survive a kill.
//!
//! The ledger has the amount spent, and an upper bound for the requests in flight. Amounts spent after it was written
//! are appended to `spent.N.log`, where N is in the ledger. The next ledger includes the log, and starts log N + 1. A
//! clean end of a run leaves nothing in flight. A kill leaves the upper bound, which the next run counts as spent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::budget::dollars::Dollars;
use crate::cache::usage::Usage;
use crate::exit::Exit;
use crate::fs::LogFile;
use crate::fs::lock::FileLock;

const VERSION: u32 = 2;

/// Tokens of answers without a price.
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

/// Dollars spent, and tokens of answers that were received without a price.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Spent {
    /// Cost by the usage that endpoints reported.
    pub measured_usd: Dollars,
    /// Upper bounds for attempts that may have been billed, answers without usage, and requests in flight at a kill.
    pub estimated_usd: Dollars,
    #[serde(skip_serializing_if = "UnpricedTokens::is_none")]
    pub measured_tokens: UnpricedTokens,
    #[serde(skip_serializing_if = "UnpricedTokens::is_none")]
    pub estimated_tokens: UnpricedTokens,
}

impl Spent {
    pub fn add(&mut self, other: &Spent) {
        self.measured_usd = self.measured_usd.plus(other.measured_usd);
        self.estimated_usd = self.estimated_usd.plus(other.estimated_usd);
        self.measured_tokens.add(other.measured_tokens);
        self.estimated_tokens.add(other.estimated_tokens);
    }

    pub fn total(&self) -> Dollars {
        self.measured_usd.plus(self.estimated_usd)
    }

    pub fn is_nothing(&self) -> bool {
        *self == Spent::default()
    }
}

/// Content of `ledger.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ledger {
    version: u32,
    #[serde(flatten)]
    pub spent: Spent,
    /// Upper bound; empty after a clean end of a run.
    pub in_flight: InFlight,
    /// Number of attempts that may have been billed without an answer, kills included.
    pub attempts_lost: u64,
    /// Largest ratio of the cost of an answer to its bound, if above 1; otherwise 0.
    pub excess: f64,
    /// Daily request counts by endpoint, as (slot, number of requests).
    pub day: BTreeMap<String, Vec<(Timestamp, u64)>>,
    /// Number of the log that follows this ledger.
    pub log: u64,
}

/// Upper bound for the requests in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct InFlight {
    pub requests: u64,
    pub usd: Dollars,
    /// Budget that held for this bound and the amount spent together.
    pub budget_usd: Option<Dollars>,
    /// Tokens of requests without a price.
    #[serde(skip_serializing_if = "UnpricedTokens::is_none")]
    pub tokens: UnpricedTokens,
}

impl InFlight {
    /// Warns about requests that a killed run left in flight.
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

/// Storage of an account: files, or a crashing store in tests.
pub trait LedgerStore {
    /// Replaces the ledger and starts a new log. Durable once this returns.
    fn save(&mut self, ledger: &Ledger) -> Result<()>;

    /// Appends to the log. The entry survives a kill once this returns.
    fn append(&mut self, spent: &Spent) -> Result<()>;

    /// Returns false if the files were removed or replaced; the caller then saves the ledger again.
    fn is_in_place(&self) -> bool {
        true
    }

    /// Makes the appended entries durable.
    fn sync(&mut self) -> Result<()>;
}

impl Ledger {
    /// Counts the requests in flight at a kill as spent, and returns them.
    pub fn settle_kill(&mut self) -> InFlight {
        let mut lost = std::mem::take(&mut self.in_flight);
        if let Some(cap) = lost.budget_usd {
            // The bound was raised in steps, but spent and reserved together never exceeded the cap.
            lost.usd = lost.usd.min(cap.minus(self.spent.total()));
        }
        self.spent.add(&Spent {
            estimated_usd: lost.usd,
            estimated_tokens: lost.tokens,
            ..Spent::default()
        });
        self.attempts_lost = self.attempts_lost.saturating_add(lost.requests);
        lost
    }
}

/// Files of the account in a run folder, locked by one process at a time.
pub struct LedgerFiles {
    run_dir: PathBuf,
    log: Option<LogFile>,
    number: u64,
    _lock: FileLock,
}

pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("ledger.json")
}

fn log_file(run_dir: &Path, number: u64) -> PathBuf {
    run_dir.join(format!("spent.{number}.log"))
}

/// Reads the account of the run folder as it was last written, without the lock. The flag is that of
/// [`LedgerFiles::open`].
///
/// # Errors
/// [`Exit::Damaged`] if a file is damaged or newer than this version.
pub fn read_only(run_dir: &Path) -> Result<(Ledger, bool)> {
    let (mut ledger, is_complete) = load(run_dir)?;
    for spent in read_log(run_dir, ledger.log)? {
        ledger.spent.add(&spent);
    }
    Ok((ledger, is_complete))
}

/// Version of a ledger; version 1 had no sum of the measured cost.
#[derive(Deserialize)]
struct Version {
    #[serde(default)]
    version: u32,
}

impl LedgerFiles {
    /// Opens and locks the account of the run folder. The flag is true if the ledger has the measured cost; for an
    /// older ledger, the caller computes it from the cache.
    ///
    /// # Errors
    /// If another process has the lock; [`Exit::Damaged`] if a file is damaged or newer than this version.
    pub fn open(run_dir: &Path) -> Result<(LedgerFiles, Ledger, bool)> {
        crate::fs::create_dir_all(run_dir)?;
        let holds =
            "spends from the budget of this run folder: wait for it, or set another `run_dir`";
        let lock = FileLock::acquire(&run_dir.join("ledger.lock"), holds)?;
        let (ledger, is_complete) = read_only(run_dir)?;
        let files = LedgerFiles {
            run_dir: run_dir.to_owned(),
            log: None,
            number: ledger.log,
            _lock: lock,
        };
        Ok((files, ledger, is_complete))
    }
}

fn load(run_dir: &Path) -> Result<(Ledger, bool)> {
    let path = file(run_dir);
    if !path.exists() {
        return Ok((Ledger::default(), false));
    }
    let text = crate::fs::read_to_string(&path)?;
    let damaged = |error: serde_json::Error| {
        Exit::Damaged(format!(
            "{} is damaged ({error}): restore it, or delete it if only the answers in the cache need to count \
             against the budget and the daily limit",
            path.display()
        ))
    };
    let Version { version } = serde_json::from_str(&text).map_err(damaged)?;
    if version > VERSION {
        return Err(Exit::Damaged(format!(
            "a newer distill wrote {} (version {version}): update distill",
            path.display()
        ))
        .into());
    }
    let ledger: Ledger = serde_json::from_str(&text).map_err(damaged)?;
    Ok((ledger, version == VERSION))
}

/// Reads the entries of a log. Skips a torn last line, which a kill may leave: it was not acknowledged.
fn read_log(run_dir: &Path, number: u64) -> Result<Vec<Spent>> {
    let path = log_file(run_dir, number);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = crate::fs::read(&path)?;
    let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
    let whole = lines.iter().filter(|line| line.ends_with(b"\n"));
    let spent = whole.map(|line| serde_json::from_slice(line));
    let spent: Result<Vec<Spent>, _> = spent.collect();
    spent.map_err(|error| {
        let message = format!(
            "{} is damaged ({error}): restore it, or delete it if its amounts need not count against the budget",
            path.display()
        );
        Exit::Damaged(message).into()
    })
}

/// Store for an account that is only read: discards all writes.
#[derive(Debug)]
pub struct ReadOnlyLedger;

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
            log: self.number + 1,
            ..ledger.clone()
        };
        // A log with this number is left over from a deleted account.
        let stale = log_file(&self.run_dir, next.log);
        if stale.exists() {
            crate::fs::remove_file(&stale)?;
        }
        crate::fs::write_atomic(&file(&self.run_dir), &serde_json::to_vec_pretty(&next)?)?;
        let old = log_file(&self.run_dir, self.number);
        self.log = None;
        self.number += 1;
        // The new ledger includes the old log.
        if old.exists() {
            crate::fs::remove_file(&old)?;
        }
        Ok(())
    }

    fn append(&mut self, spent: &Spent) -> Result<()> {
        let line = serde_json::to_string(spent)?;
        if self.log.is_none() {
            let path = log_file(&self.run_dir, self.number);
            self.log = Some(LogFile::open(&path, |_| true)?);
        }
        let log = self
            .log
            .as_mut()
            .context("internal error: the log of the budget is closed")?;
        log.write(&line)
    }

    fn is_in_place(&self) -> bool {
        self.log.as_ref().is_none_or(LogFile::is_in_place) && file(&self.run_dir).exists()
    }

    fn sync(&mut self) -> Result<()> {
        self.log.as_ref().map_or(Ok(()), LogFile::sync)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::account::Account;
    use crate::config::Price;

    fn usd(usd: f64) -> Dollars {
        Dollars::at_least(usd)
    }

    fn measured(amount: f64) -> Spent {
        Spent {
            measured_usd: usd(amount),
            ..Spent::default()
        }
    }

    #[test]
    fn log_entries_count_once_after_a_kill_at_any_point() {
        let dir = tempfile::tempdir().unwrap();
        let open = || LedgerFiles::open(dir.path()).unwrap();
        let (mut files, ledger, is_complete) = open();
        assert_eq!((ledger.spent, is_complete), (Spent::default(), false));
        files.append(&measured(0.25)).unwrap();
        files.append(&measured(0.5)).unwrap();
        drop(files);

        let (mut files, mut ledger, _) = open();
        assert_eq!(ledger.spent.measured_usd, usd(0.75));
        files.save(&ledger).unwrap();
        files.append(&measured(1.0)).unwrap();
        ledger.spent.add(&measured(1.0));
        drop(files);
        // A torn line was never acknowledged.
        crate::fs::append(&log_file(dir.path(), 1), b"{\"measured_usd\":0.").unwrap();
        let (_files, again, is_complete) = open();
        assert_eq!((again.spent, is_complete), (ledger.spent, true));
        assert!(!log_file(dir.path(), 0).exists());
    }

    #[test]
    fn removed_or_replaced_ledger_files_are_written_again() {
        type Tamper = fn(&Path);
        let cases: [Tamper; 3] = [
            |dir| std::fs::remove_file(log_file(dir, 1)).unwrap(),
            |dir| std::fs::remove_file(file(dir)).unwrap(),
            |dir| {
                let path = log_file(dir, 1);
                std::fs::rename(&path, dir.join("mine")).unwrap();
                std::fs::write(&path, "").unwrap();
            },
        ];
        for tamper in cases {
            let dir = tempfile::tempdir().unwrap();
            let (files, ledger, _) = LedgerFiles::open(dir.path()).unwrap();
            let none = Spent::default();
            let opened = Account::open(files, ledger, None, &Price::default(), &none);
            let mut account = opened.unwrap().0;
            account.add_spent(&measured(0.5)).unwrap();
            assert!(account.store().is_in_place());
            tamper(dir.path());
            assert!(!account.store().is_in_place());
            account.tick().unwrap();
            account.add_spent(&measured(0.25)).unwrap();
            drop(account);
            let (_files, ledger, _) = LedgerFiles::open(dir.path()).unwrap();
            assert_eq!(ledger.spent.measured_usd, usd(0.75));
        }
    }

    #[test]
    fn log_of_a_deleted_ledger_is_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (mut files, ledger, _) = LedgerFiles::open(dir.path()).unwrap();
        files.save(&ledger).unwrap();
        files.append(&measured(5.0)).unwrap();
        drop(files);
        std::fs::remove_file(file(dir.path())).unwrap();
        let (mut files, ledger, _) = LedgerFiles::open(dir.path()).unwrap();
        files.save(&ledger).unwrap();
        files.append(&measured(0.5)).unwrap();
        drop(files);
        let (_files, ledger, _) = LedgerFiles::open(dir.path()).unwrap();
        assert_eq!(ledger.spent.measured_usd, usd(0.5));
    }

    #[test]
    fn ledger_lock_admits_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let first = LedgerFiles::open(dir.path()).unwrap();
        let error = LedgerFiles::open(dir.path()).err().unwrap();
        assert!(error.to_string().contains("another process"), "{error}");
        drop(first);
        assert!(LedgerFiles::open(dir.path()).is_ok());
    }

    #[test]
    fn settle_kill_counts_the_bound_in_flight_up_to_the_budget() {
        let mut ledger = Ledger {
            in_flight: InFlight {
                requests: 32,
                usd: usd(0.5),
                budget_usd: Some(usd(2.0)),
                ..InFlight::default()
            },
            spent: measured(1.0),
            ..Ledger::default()
        };
        let mut near_cap = ledger.clone();
        assert_eq!(ledger.settle_kill().requests, 32);
        assert_eq!(
            (ledger.spent.estimated_usd, ledger.attempts_lost),
            (usd(0.5), 32)
        );
        assert_eq!(ledger.settle_kill(), InFlight::default());
        near_cap.spent = measured(1.7);
        assert_eq!(near_cap.settle_kill().usd, usd(2.0).minus(usd(1.7)));
    }

    #[test]
    fn older_ledger_is_read_and_damaged_or_newer_ledger_refused() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(file(dir.path()), text).unwrap();
        write(
            r#"{"version":1,"in_flight":{"requests":3,"usd":0.5,"budget_usd":null},"estimated_usd":0.25,"attempts_lost":4,"day":{}}"#,
        );
        let (files, ledger, is_complete) = LedgerFiles::open(dir.path()).unwrap();
        assert_eq!(
            (
                ledger.spent.estimated_usd,
                ledger.in_flight.requests,
                is_complete
            ),
            (usd(0.25), 3, false)
        );
        drop(files);
        for (text, part) in [
            ("{\"version\":", "damaged"),
            (r#"{"version":2,"estimated_usd":-5.0}"#, "negative"),
            (r#"{"version":2,"in_flight":{"usd":-5.0}}"#, "negative"),
            (
                r#"{"version":2,"in_flight":{"budget_usd":-5.0}}"#,
                "negative",
            ),
            ("[]", "damaged"),
            ("", "damaged"),
            (r#"{"version":9}"#, "update distill"),
        ] {
            write(text);
            let error = LedgerFiles::open(dir.path()).err().unwrap();
            assert_eq!(Exit::code_of(&error), 5, "{text}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
