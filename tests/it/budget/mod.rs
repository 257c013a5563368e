//! The invariant of the budget (see `distill::budget`): the amount that may have been billed never exceeds the cap.

mod folders;
mod interleavings;
mod property;

use anyhow::{Result, bail};
use distill::budget::account::Account;
use distill::budget::dollars::Dollars;
use distill::budget::ledger::{Ledger, LedgerStore, Spent};
use distill::config::Price;

/// One dollar per million tokens of either kind, so that sums of whole millions are easy to read.
pub const PRICE: Price = Price {
    input: Some(1.0),
    cached_input: None,
    output: Some(1.0),
    as_of: None,
};

/// State that survives a kill: the files of the account.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    pub ledger: Ledger,
    /// Number of the log that the ledger names.
    number: u64,
    /// Sum of the entries of that log.
    pub logged: Spent,
}

impl Disk {
    /// The ledger as the next process reads it.
    pub fn read(&self) -> Ledger {
        let mut ledger = self.ledger.clone();
        ledger.spent.add(&self.logged);
        ledger
    }

    /// The store of a process that opens these files.
    pub fn open(&self) -> FaultyStore {
        FaultyStore {
            number: self.number,
            disk: self.clone(),
            fault: None,
        }
    }
}

/// Faults of the next writes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The process dies after this number of writes, before or (if true) after the next one reaches the disk.
    Crash(usize, bool),
    /// Each write returns an error, and (if true) still reaches the disk; the process survives.
    Error(bool),
}

/// A store whose writes can go wrong.
#[derive(Debug, Clone, Default)]
pub struct FaultyStore {
    pub disk: Disk,
    /// Number of the log that it appends to.
    number: u64,
    pub fault: Option<Fault>,
}

impl FaultyStore {
    /// Applies a write to the disk, or the next fault.
    fn write(&mut self, write: impl FnOnce(&mut Disk)) -> Result<()> {
        match &mut self.fault {
            Some(Fault::Crash(0, is_made) | Fault::Error(is_made)) => {
                if *is_made {
                    write(&mut self.disk);
                }
                bail!("a fault");
            }
            Some(Fault::Crash(left, _)) => *left -= 1,
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
            number: self.number + 1,
            logged: Spent::default(),
        };
        self.write(|disk| *disk = next)?;
        self.number += 1;
        Ok(())
    }

    fn append(&mut self, spent: &Spent) -> Result<()> {
        let number = self.number;
        self.write(|disk| {
            // Only the log that the ledger names is read.
            if disk.number == number {
                disk.logged.add(spent);
            }
        })
    }

    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Dollars that the next process would count as spent after a kill now.
pub fn after_a_kill(disk: &Disk, cap: f64, price: &Price, floor: &Spent) -> Spent {
    let opened = Account::open(disk.open(), disk.read(), Some(cap), price, floor);
    opened.unwrap().0.spent()
}

pub fn dollars(whole: u64) -> Dollars {
    Dollars::at_least(whole as f64)
}
