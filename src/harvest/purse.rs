//! The budget together with the ledger that makes it survive a kill.

use std::path::{Path, PathBuf};

use anyhow::Result;
use jiff::Timestamp;
use tokio::time::Instant;

use super::budget::{Bill, Budget, Spent};
use super::clock::WallClock;
use super::lane::Lane;
use super::ledger::{InFlight, Ledger};
use super::limiter::day::Day;
use super::plan::Plan;
use super::room;
use super::summary::Summary;
use super::unanswered::Unanswered;
use crate::config::{self, Price};
use crate::exit::Exit;
use crate::terminal::format_dollars;

/// The reservation in the ledger is raised in steps of this factor, so that it is written rarely.
const STEP: f64 = 2.0;

/// What a run writes beside the cache.
pub struct Books {
    pub purse: Purse,
    pub unanswered: Unanswered,
}

pub struct Purse {
    pub budget: Budget,
    ledger: Ledger,
    run_dir: PathBuf,
    clock: WallClock,
    /// Of what is set aside, that for batches. Their own journal brings it over a kill, which they
    /// survive: it is no part of what a kill may lose.
    in_batches: f64,
    /// Spent by this run.
    now: Spent,
    is_dirty: bool,
    /// Something could not be written that must be before anything else leaves.
    is_overdue: bool,
}

impl Purse {
    /// Opens the books of the run folder, and settles what a killed run left in flight, which is
    /// returned. `measured` is what the records of the cache cost.
    pub fn open(
        run_dir: &Path,
        cap: Option<f64>,
        measured: f64,
        clock: WallClock,
    ) -> Result<(Purse, InFlight)> {
        let mut ledger = Ledger::load(run_dir)?;
        let lost = ledger.settle_kill(measured);
        let before = Spent {
            measured,
            estimated: ledger.estimated_usd,
        };
        ledger.save(run_dir)?;
        let purse = Purse {
            budget: Budget::new(cap, before),
            ledger,
            run_dir: run_dir.to_owned(),
            clock,
            in_batches: 0.0,
            now: Spent::default(),
            is_dirty: false,
            is_overdue: false,
        };
        Ok((purse, lost))
    }

    /// The requests that earlier runs sent to this endpoint within a day.
    pub fn day(&self, lane: &config::Lane) -> Day {
        let now = self.clock.now();
        let slots = self.ledger.day.get(lane.teacher.label());
        let slots: Vec<_> = slots
            .into_iter()
            .flatten()
            .map(|&(time, count)| ((now - time).get_seconds(), count))
            .filter(|(age, _)| *age < 86_400)
            .collect();
        Day::new(lane.limits.own().requests_per_day, &slots, Instant::now())
    }

    /// Refuses a budget that the most expensive request does not fit into.
    pub fn check_largest(&self, plan: &Plan, lane: usize) -> Result<()> {
        let Some(cap) = self.budget.cap() else {
            return Ok(());
        };
        let settings = &plan.askings[lane].lane;
        let bounds = plan.lanes[lane].clone().map(|row| {
            let bound = plan.bound(lane, row);
            self.budget.bound(&bound, &settings.price)
        });
        let most = bounds.fold(0.0, f64::max);
        if most > cap {
            return Err(Exit::Usage(format!(
                "one request to {} may cost {}, more than `budget.usd` = {cap}: lower \
                 `sampling.max_tokens` or raise the budget",
                settings.teacher.label(),
                format_dollars(most)
            ))
            .into());
        }
        Ok(())
    }

    /// Sets the amount aside, if it fits, and durably so before anything may be billed.
    pub fn reserve(&mut self, amount: f64) -> Result<bool> {
        if !self.budget.reserve(amount) {
            return Ok(false);
        }
        let reserved = self.budget.reserved() - self.in_batches;
        let is_raised = reserved > self.ledger.in_flight.usd;
        if self.budget.cap().is_some() && (is_raised || self.is_overdue) {
            let before = self.ledger.in_flight.usd;
            if is_raised {
                self.ledger.in_flight.usd = reserved * STEP;
            }
            if let Err(error) = self.save() {
                // Nothing may leave on it.
                self.ledger.in_flight.usd = before;
                self.budget.release(amount);
                return Err(error);
            }
        }
        Ok(true)
    }

    /// Requests are to leave one by one from here on, so many at once.
    pub fn expect_in_flight(&mut self, requests: u64) -> Result<()> {
        self.ledger.in_flight.requests = requests;
        self.ledger.in_flight.budget_usd = self.budget.cap();
        self.save()
    }

    /// Sets aside what a batch may cost. Its journal has the amount already, or will have it before
    /// anything may be billed.
    pub fn hold_for_batch(&mut self, amount: f64) {
        self.budget.hold(amount);
        self.in_batches += amount;
    }

    /// Settles what was held for so many rows of a batch.
    pub fn settle_of_batch(
        &mut self,
        held: f64,
        rows: u64,
        bill: Bill,
        price: &Price,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        self.in_batches = (self.in_batches - held).max(0.0);
        if bill == Bill::Possible {
            // One is counted below.
            self.ledger.attempts_lost += rows - 1;
        }
        self.settle(held, bill, price)
    }

    pub fn settle(&mut self, reserved: f64, bill: Bill, price: &Price) -> Result<()> {
        let spent = self.budget.settle(reserved, bill, price);
        self.now.measured += spent.measured;
        self.now.estimated += spent.estimated;
        self.ledger.estimated_usd += spent.estimated;
        self.ledger.attempts_lost += u64::from(bill == Bill::Possible);
        self.is_dirty |= spent.estimated > 0.0 || bill == Bill::Possible;
        // Until it is written, the upper bound of what is in flight still covers it ...
        if spent.estimated > 0.0 && self.budget.cap().is_some() {
            // ... and no longer than that.
            self.save_if_there_is_room()?;
        }
        Ok(())
    }

    /// As [`Purse::reserve`], for a request that is to leave now: writes the day's requests ahead,
    /// where the limit asks for it. After an error nothing is set aside.
    pub fn set_aside(&mut self, amount: f64, lane: &mut Lane) -> Result<bool> {
        if !self.reserve(amount)? {
            return Ok(false);
        }
        if lane.limiter.day.must_be_written() {
            self.note_day(lane, false);
            if let Err(error) = self.save() {
                self.budget.release(amount);
                return Err(error);
            }
        }
        Ok(true)
    }

    fn note_day(&mut self, lane: &mut Lane, last: bool) {
        let now = self.clock.now();
        let slots = lane.limiter.day.written(Instant::now(), last);
        if slots.is_empty() {
            return;
        }
        let at = |age: i64| Timestamp::from_second(now.as_second() - age).unwrap_or(now);
        let slots = slots.into_iter().map(|(age, count)| (at(age), count));
        self.ledger
            .day
            .insert(lane.settings.teacher.label().into(), slots.collect());
        self.is_dirty = true;
    }

    /// Writes what has changed; about once a second.
    pub fn tick(&mut self) -> Result<()> {
        match self.is_dirty {
            true => self.save_if_there_is_room(),
            false => Ok(()),
        }
    }

    /// Writes the books, also unchanged ones: is there room on the disk?
    pub fn save(&mut self) -> Result<()> {
        self.ledger.save(&self.run_dir)?;
        (self.is_dirty, self.is_overdue) = (false, false);
        Ok(())
    }

    /// A full disk is met again by the next request, which must not leave then. Until then the bound
    /// that was written before is on the safe side.
    fn save_if_there_is_room(&mut self) -> Result<()> {
        match self.save() {
            Err(error) if room::is_full(&error) => {
                (self.is_dirty, self.is_overdue) = (true, true);
                Ok(())
            }
            other => other,
        }
    }

    /// Closes the books: what is still in flight, after a second signal, counts as possibly billed.
    pub fn close(&mut self, lanes: &mut [Lane], still_in_flight: u64) -> Result<()> {
        for lane in lanes {
            self.note_day(lane, true);
        }
        let reserved = (self.budget.reserved() - self.in_batches).max(0.0);
        self.now.estimated += reserved;
        self.ledger.estimated_usd += reserved;
        self.ledger.attempts_lost += still_in_flight;
        self.ledger.in_flight = InFlight::default();
        self.save()
    }

    /// Notes the dollars, if there are prices.
    pub fn tell(&self, is_priced: bool, summary: &mut Summary) {
        if is_priced {
            summary.cost_usd = Some(self.now.measured);
            summary.estimated_usd = Some(self.now.estimated);
            summary.run_folder_usd = Some(self.budget.spent().total());
        }
        summary.budget_usd = self.budget.cap();
    }
}
