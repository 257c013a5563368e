//! The invariant of the budget (see `distill::budget`): the amount that may have been billed never exceeds the cap.

mod folders;
mod interleavings;
mod property;

use anyhow::{Result, bail};
use distill::budget::account::Account;
use distill::budget::dollars::Dollars;
use distill::budget::ledger::{Ledger, LedgerStore, Spent};
use distill::config::Price;

/// One dollar per million input tokens, and the same per million output tokens.
pub const PRICE: Price = Price {
    input: Some(1.0),
    cached_input: None,
    output: Some(1.0),
    as_of: None,
};

/// The files of the account, which survive a kill.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    pub ledger: Ledger,
    /// Number of the ledger's log.
    log_number: u64,
    /// Sum of the entries of the ledger's log.
    pub logged: Spent,
}

impl Disk {
    /// Returns the ledger as the next process reads it.
    pub fn read(&self) -> Ledger {
        let mut ledger = self.ledger.clone();
        ledger.spent.add(&self.logged);
        ledger
    }

    /// Returns the store of a process that opens these files.
    pub fn open(&self) -> FaultyStore {
        FaultyStore {
            log_number: self.log_number,
            disk: self.clone(),
            fault: None,
        }
    }
}

/// A fault of the next writes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The process crashes at the write after this number of writes: before that write reaches the disk, or (if true)
    /// after it.
    Crash(usize, bool),
    /// Each write returns an error, and (if true) nevertheless reaches the disk. The process continues.
    Error(bool),
}

/// A store whose writes can fail.
#[derive(Debug, Clone, Default)]
pub struct FaultyStore {
    pub disk: Disk,
    /// Number of the log to which entries are appended.
    log_number: u64,
    pub fault: Option<Fault>,
}

impl FaultyStore {
    /// Applies a write to the disk, or the fault that is set.
    fn write(&mut self, write: impl FnOnce(&mut Disk)) -> Result<()> {
        match &mut self.fault {
            Some(Fault::Crash(0, reaches_disk) | Fault::Error(reaches_disk)) => {
                if *reaches_disk {
                    write(&mut self.disk);
                }
                bail!("simulated fault");
            }
            Some(Fault::Crash(writes, _)) => *writes -= 1,
            None => {}
        }
        write(&mut self.disk);
        Ok(())
    }
}

impl LedgerStore for FaultyStore {
    fn save(&mut self, ledger: &Ledger) -> Result<()> {
        let next = Disk {
            ledger: ledger.clone(),
            log_number: self.log_number + 1,
            logged: Spent::default(),
        };
        self.write(|disk| *disk = next)?;
        self.log_number += 1;
        Ok(())
    }

    fn append(&mut self, spent: &Spent) -> Result<()> {
        let number = self.log_number;
        self.write(|disk| {
            // Only the log with the number in the ledger is read.
            if disk.log_number == number {
                disk.logged.add(spent);
            }
        })
    }

    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Returns the amount that the next process would count as spent if this one were killed now.
pub fn spent_after_kill(disk: &Disk, cap: f64, price: &Price, floor: &Spent) -> Spent {
    let opened = Account::open(disk.open(), disk.read(), Some(cap), price, floor);
    opened.unwrap().0.spent()
}

pub fn dollars(amount: u64) -> Dollars {
    Dollars::at_least(amount as f64)
}
