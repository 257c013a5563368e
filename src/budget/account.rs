//! [`Account`]: the spending and the reservations of a run folder, in memory. Pure, except for its store.

use anyhow::Result;

use crate::budget::dollars::Dollars;
use crate::budget::ledger::{InFlight, Ledger, LedgerStore, Spent, UnpricedTokens};
use crate::budget::price;
use crate::budget::price::TokenBound;
use crate::cache::usage::Usage;
use crate::config::Price;
use crate::exit::Exit;

/// Ratio of the upper bound in the ledger to the amount reserved, when the ledger is written. A larger ratio needs
/// fewer writes.
const WRITE_AHEAD: u64 = 2;

/// Upper bound of the cost of one or more requests: dollars, or tokens if no price is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Reservation {
    /// Dollars, raised by the factor [`Ledger::excess`].
    pub usd: Dollars,
    /// Dollars without that factor.
    pub unraised: Dollars,
    pub tokens: UnpricedTokens,
}

/// Cost that settles a reservation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Charge {
    /// An answer with reported usage.
    Measured(Usage),
    /// An answer without usage, with an upper bound of its tokens.
    Answered(TokenBound),
    /// No answer, but possibly billed in full: a timeout, a lost connection, an unreadable body.
    Possible,
    /// Not billed: the request was refused, or not sent.
    Nothing,
}

/// Spending and reservations of a run folder.
#[derive(Debug, Clone)]
pub struct Account<S> {
    cap: Option<Dollars>,
    /// Content of the next `ledger.json`.
    ledger: Ledger,
    /// Sum of the reservations that are not settled.
    reserved: Reservation,
    /// Part of `reserved` for batches. The journal of the batches keeps this amount across a kill, so the ledger's
    /// upper bound excludes it.
    reserved_for_batches: Dollars,
    /// Spent, but not in the log yet. The ledger's upper bound covers it.
    unlogged: Spent,
    spent_by_process: Spent,
    /// True if the ledger has changed in a field that the log does not have.
    is_dirty: bool,
    /// True if the last write failed: the ledger must be saved before the next request.
    is_save_overdue: bool,
    store: S,
}

impl<S: LedgerStore> Account<S> {
    /// Opens the account. Counts the requests that a killed run left in flight as spent, and returns them. `cap` is the
    /// budget in US dollars. `price` applies to tokens that were spent while no price was set. `floor` is the measured
    /// cost according to other records, such as the cache: the larger amount of dollars counts, and the floor's tokens
    /// count if the ledger has none.
    ///
    /// # Errors
    /// If the ledger cannot be written.
    pub fn open(
        store: S,
        mut ledger: Ledger,
        cap: Option<f64>,
        price: &Price,
        floor: &Spent,
    ) -> Result<(Self, InFlight)> {
        let in_flight_at_kill = ledger.settle_kill();
        let spent = ledger.spent;
        ledger.spent = Spent {
            measured_usd: spent.measured_usd.max(floor.measured_usd),
            measured_tokens: if spent.measured_tokens.is_none() {
                floor.measured_tokens
            } else {
                spent.measured_tokens
            },
            ..spent
        };
        price_tokens(&mut ledger.spent, price);
        let mut account = Account {
            cap: cap.map(Dollars::at_most),
            ledger,
            reserved: Reservation::default(),
            reserved_for_batches: Dollars::ZERO,
            unlogged: Spent::default(),
            spent_by_process: Spent::default(),
            is_dirty: false,
            is_save_overdue: false,
            store,
        };
        account.save()?;
        Ok((account, in_flight_at_kill))
    }

    /// Returns the upper bound of the cost of a request with these tokens.
    pub fn bound(&self, bound: &TokenBound, price: &Price) -> Reservation {
        match bound.cost(price) {
            Some(usd) => Reservation {
                usd: Dollars::at_least(usd).times(self.ledger.excess.max(1.0)),
                unraised: Dollars::at_least(usd),
                tokens: UnpricedTokens::default(),
            },
            None => Reservation {
                usd: Dollars::ZERO,
                unraised: Dollars::ZERO,
                tokens: UnpricedTokens {
                    prompt: bound.input_tokens,
                    cached: 0,
                    completion: bound.output_tokens,
                },
            },
        }
    }

    /// Reserves the amount, durably. Returns false if the amounts spent and reserved would then exceed the cap.
    ///
    /// # Errors
    /// If the ledger or the log cannot be written; then nothing is reserved.
    pub fn reserve(&mut self, amount: &Reservation) -> Result<bool> {
        if self
            .cap
            .is_some_and(|cap| self.committed().plus(amount.usd) > cap)
        {
            return Ok(false);
        }
        // Logged first, because the new reservation may use up the part of the ledger's upper bound that covers the
        // unlogged amounts.
        self.flush()?;
        self.add(amount);
        let usd = self.reserved.usd.minus(self.reserved_for_batches);
        let tokens = self.reserved.tokens;
        let written = self.ledger.in_flight;
        let exceeds_written = usd > written.usd
            || tokens.prompt > written.tokens.prompt
            || tokens.completion > written.tokens.completion;
        if !exceeds_written && !self.is_save_overdue {
            return Ok(true);
        }
        let bound = &mut self.ledger.in_flight;
        bound.usd = bound.usd.max(usd.times(WRITE_AHEAD as f64));
        let prompt = tokens.prompt.saturating_mul(WRITE_AHEAD);
        let completion = tokens.completion.saturating_mul(WRITE_AHEAD);
        bound.tokens.prompt = bound.tokens.prompt.max(prompt);
        bound.tokens.completion = bound.tokens.completion.max(completion);
        if let Err(error) = self.save() {
            self.release(amount);
            return Err(error);
        }
        Ok(true)
    }

    /// Adds to the reservations, in memory.
    fn add(&mut self, amount: &Reservation) {
        self.reserved.usd = self.reserved.usd.plus(amount.usd);
        self.reserved.tokens.add(amount.tokens);
    }

    /// Releases a reservation whose request was not sent.
    pub fn release(&mut self, amount: &Reservation) {
        let tokens = &mut self.reserved.tokens;
        tokens.prompt = tokens.prompt.saturating_sub(amount.tokens.prompt);
        tokens.completion = tokens.completion.saturating_sub(amount.tokens.completion);
        self.reserved.usd = self.reserved.usd.minus(amount.usd);
    }

    /// Records the maximum number of requests in flight from now on, and the cap.
    ///
    /// # Errors
    /// If the ledger cannot be written.
    pub fn expect_in_flight(&mut self, requests: u64) -> Result<()> {
        self.ledger.in_flight.requests = requests;
        self.ledger.in_flight.budget_usd = self.cap;
        self.save()
    }

    /// Reserves the maximum cost of a batch, even above the cap: a resumed batch may have been billed already. The
    /// caller must have written the amount to the journal of the batches.
    pub fn hold_for_batch(&mut self, usd: Dollars) {
        self.reserved.usd = self.reserved.usd.plus(usd);
        self.reserved_for_batches = self.reserved_for_batches.plus(usd);
    }

    /// Settles `held`, the amount reserved for `rows` rows of a batch; `unraised` is the same amount without the factor
    /// [`Ledger::excess`]. When this returns, the amount spent is in the log.
    ///
    /// # Errors
    /// If the log cannot be written.
    pub fn settle_batch(
        &mut self,
        held: Dollars,
        unraised: Dollars,
        rows: u64,
        charge: Charge,
        price: &Price,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        self.reserved_for_batches = self.reserved_for_batches.minus(held);
        if charge == Charge::Possible {
            // `settle` counts one attempt.
            self.ledger.attempts_lost += rows - 1;
        }
        let amount = Reservation {
            usd: held,
            unraised,
            tokens: UnpricedTokens::default(),
        };
        self.settle(&amount, charge, price);
        self.flush()
    }

    /// Settles a reservation by the outcome of its request. The amount spent stays in memory until [`Account::flush`].
    pub fn settle(&mut self, reserved: &Reservation, charge: Charge, price: &Price) {
        self.release(reserved);
        let mut spent = Spent::default();
        match charge {
            Charge::Measured(usage) => match price::cost(&usage, price) {
                Some(usd) => spent.measured_usd = Dollars::at_least(usd),
                None => spent.measured_tokens = usage.into(),
            },
            Charge::Answered(bound) => {
                let answer = self.bound(&bound, price);
                // The reservation is also an upper bound, unless the answer has more tokens than were reserved.
                spent.estimated_usd = answer.usd.min(reserved.usd).max(answer.unraised);
                spent.estimated_tokens = answer.tokens;
            }
            Charge::Possible => {
                spent.estimated_usd = reserved.usd;
                spent.estimated_tokens = reserved.tokens;
            }
            Charge::Nothing => {}
        }
        let cost = match charge {
            Charge::Answered(bound) => self.bound(&bound, price).unraised,
            _ => spent.measured_usd,
        };
        if !reserved.unraised.is_zero() && cost > reserved.unraised {
            // The factor is replaced, not multiplied: many requests reserved at the same factor may exceed it equally.
            let excess = cost.usd() / reserved.unraised.usd();
            if excess > self.ledger.excess {
                self.ledger.excess = excess;
                self.is_dirty = true;
            }
        }
        if charge == Charge::Possible {
            self.ledger.attempts_lost = self.ledger.attempts_lost.saturating_add(1);
            self.is_dirty = true;
        }
        self.unlogged.add(&spent);
        self.spent_by_process.add(&spent);
        self.ledger.spent.add(&spent);
    }

    /// Appends unlogged amounts to the log.
    ///
    /// # Errors
    /// If the log cannot be written; the amounts stay unlogged, covered by the ledger's upper bound.
    pub fn flush(&mut self) -> Result<()> {
        if self.unlogged.is_zero() {
            return Ok(());
        }
        if self.is_save_overdue {
            // After a failed write the log may end with an incomplete line, so a new ledger and log are started.
            return self.save();
        }
        let appended = self.store.append(&self.unlogged);
        self.is_save_overdue |= appended.is_err();
        appended?;
        self.unlogged = Spent::default();
        Ok(())
    }

    /// Adds an amount that another account has spent, such as the cost of a merged cache, and logs it.
    ///
    /// # Errors
    /// If the log cannot be written.
    pub fn add_spent(&mut self, spent: &Spent) -> Result<()> {
        self.ledger.spent.add(spent);
        self.unlogged.add(spent);
        self.flush()
    }

    /// Makes the amounts spent durable, and writes the ledger if it has changed. Call it about once a second.
    ///
    /// # Errors
    /// If the ledger or the log cannot be written.
    pub fn tick(&mut self) -> Result<()> {
        // Files that are not in place are written again from memory.
        if self.is_dirty || !self.store.is_in_place() {
            return self.save();
        }
        self.flush()?;
        self.store.sync()
    }

    /// Writes the ledger, even if it is unchanged.
    ///
    /// # Errors
    /// If it cannot be written; then no request is sent before a later write succeeds.
    pub fn save(&mut self) -> Result<()> {
        let saved = self.store.save(&self.ledger);
        self.is_save_overdue = saved.is_err();
        saved?;
        // The ledger includes the unlogged amounts.
        self.unlogged = Spent::default();
        self.is_dirty = false;
        Ok(())
    }

    /// Closes the account. Requests that are still in flight, as after a second Ctrl-C, count as possibly billed.
    ///
    /// # Errors
    /// If the ledger cannot be written.
    pub fn close(&mut self, still_in_flight: u64) -> Result<()> {
        let unsettled = Spent {
            estimated_usd: self.reserved.usd.minus(self.reserved_for_batches),
            estimated_tokens: self.reserved.tokens,
            ..Spent::default()
        };
        self.spent_by_process.add(&unsettled);
        self.ledger.spent.add(&unsettled);
        self.ledger.attempts_lost = self.ledger.attempts_lost.saturating_add(still_in_flight);
        self.ledger.in_flight = InFlight::default();
        self.save()
    }

    /// Returns the numbers of requests of the last day by endpoint, see [`Ledger::day`], and marks the ledger as
    /// changed.
    pub(crate) fn daily_requests(
        &mut self,
    ) -> &mut std::collections::BTreeMap<String, Vec<(jiff::Timestamp, u64)>> {
        self.is_dirty = true;
        &mut self.ledger.day
    }

    /// Sum of the dollars spent and reserved.
    fn committed(&self) -> Dollars {
        self.spent().total().plus(self.reserved.usd)
    }

    /// Amount spent by all runs of the folder.
    pub fn spent(&self) -> Spent {
        self.ledger.spent
    }

    /// Amount spent by this process.
    pub(crate) fn spent_by_process(&self) -> Spent {
        self.spent_by_process
    }

    /// Dollars of the cap that are neither spent nor reserved.
    pub fn remaining(&self) -> Dollars {
        self.cap
            .map_or(Dollars::MAX, |cap| cap.minus(self.committed()))
    }

    /// The budget; `None` without a limit.
    pub fn cap(&self) -> Option<Dollars> {
        self.cap
    }

    /// Returns the storage of the account.
    pub fn store(&mut self) -> &mut S {
        &mut self.store
    }
}

/// Converts unpriced tokens to dollars, if the prices are set.
fn price_tokens(spent: &mut Spent, price: &Price) {
    let cost = |tokens: &mut UnpricedTokens| {
        let usage = Usage {
            prompt_tokens: tokens.prompt,
            cached_tokens: tokens.cached,
            completion_tokens: tokens.completion,
            reasoning_tokens: 0,
        };
        match price::cost(&usage, price) {
            Some(usd) => {
                *tokens = UnpricedTokens::default();
                Dollars::at_least(usd)
            }
            None => Dollars::ZERO,
        }
    };
    spent.measured_usd = spent.measured_usd.plus(cost(&mut spent.measured_tokens));
    spent.estimated_usd = spent.estimated_usd.plus(cost(&mut spent.estimated_tokens));
}

/// Returns the error for a request whose maximum cost exceeds the remaining budget.
pub(crate) fn budget_exhausted<S: LedgerStore>(account: &Account<S>) -> anyhow::Error {
    let message = format!(
        "the budget is used up: {} of {} spent, and the next request may cost more than the remaining amount; raise \
         `budget.usd` and rerun the command to resume",
        account.spent().total(),
        account.cap().unwrap_or_default()
    );
    Exit::Resumable(message).into()
}

#[cfg(test)]
mod tests;
