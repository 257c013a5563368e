//! The invariant of the budget (see `distill::budget`): what may have been billed never exceeds the cap.

mod folders;
mod interleavings;
mod property;

use anyhow::{Result, bail};
use distill::budget::account::Account;
use distill::budget::dollars::Dollars;
use distill::budget::ledger::{Ledger, LedgerStore, Spent};
use distill::config::Price;

/// A dollar a million tokens of either kind: with whole millions, sums are easy to read.
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
    /// The number of the log that the ledger names, and what that holds.
    number: u64,
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
    pub fn open(&self) -> Mortal {
        Mortal {
            number: self.number,
            disk: self.clone(),
            fault: None,
        }
    }
}

/// Faults of the next writes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The process dies after so many of them: before the next one is made, or before it can say so.
    Dies(usize, bool),
    /// Each of them fails, made or not, and the process lives.
    Fails(bool),
}

/// A store whose writes can go wrong.
#[derive(Debug, Clone, Default)]
pub struct Mortal {
    pub disk: Disk,
    /// The number of the log that it appends to.
    number: u64,
    pub fault: Option<Fault>,
}

impl Mortal {
    /// Lets the write go well or wrong.
    fn write(&mut self, write: impl FnOnce(&mut Disk)) -> Result<()> {
        match &mut self.fault {
            Some(Fault::Dies(0, is_made) | Fault::Fails(is_made)) => {
                if *is_made {
                    write(&mut self.disk);
                }
                bail!("a fault");
            }
            Some(Fault::Dies(left, _)) => *left -= 1,
            None => {}
        }
        write(&mut self.disk);
        Ok(())
    }
}

impl LedgerStore for Mortal {
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
            // Another log than the one that the ledger names is not read.
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
