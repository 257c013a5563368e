//! The account of a run folder in a running process. Pure, except for its store.

use anyhow::Result;

use crate::budget::dollars::Dollars;
use crate::budget::ledger::{InFlight, Ledger, LedgerStore, Spent, UnpricedTokens};
use crate::budget::price;
use crate::budget::price::TokenBound;
use crate::cache::usage::Usage;
use crate::config::Price;
use crate::exit::Exit;

/// Growth factor of the reservation written ahead, so that it is written rarely.
const STEP: f64 = 2.0;

/// Upper bound of the cost of a request: dollars, or tokens if no price is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Reservation {
    pub usd: Dollars,
    /// The bound before [`Ledger::excess`] raised it.
    pub unraised: Dollars,
    pub tokens: UnpricedTokens,
}

/// Outcome of a reservation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Charge {
    /// An answer with reported usage.
    Measured(Usage),
    /// An answer without usage, with an upper bound of its tokens.
    Answered(TokenBound),
    /// Possibly billed in full: a timeout, a lost connection, an unreadable body.
    Possible,
    /// Refused, or never sent.
    Nothing,
}

/// Spending and reservations of a run folder.
#[derive(Debug, Clone)]
pub struct Account<S> {
    cap: Option<Dollars>,
    /// Content of the next ledger.
    ledger: Ledger,
    reserved: Reservation,
    /// Part of `reserved` for batches. Batches survive a kill, and so does this amount, in their own journal: the
    /// ledger does not write it ahead.
    in_batches: Dollars,
    /// Spent and not in the log yet; the reservations in the ledger cover it.
    pending: Spent,
    /// Spent by this process.
    now: Spent,
    /// True if the ledger has changed in a field that the log does not have.
    is_dirty: bool,
    /// True if a write has failed that must succeed before the next request.
    is_overdue: bool,
    store: S,
}

impl<S: LedgerStore> Account<S> {
    /// Opens the account. Requests that a killed run left in flight count as spent; they are returned. `price` applies
    /// to tokens that were spent without a price; `floor` is the amount that other records, such as the cache, show as
    /// spent.
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
        let lost = ledger.settle_kill();
        let known = ledger.spent;
        ledger.spent = Spent {
            measured_usd: known.measured_usd.max(floor.measured_usd),
            measured_tokens: if known.measured_tokens.is_none() {
                floor.measured_tokens
            } else {
                known.measured_tokens
            },
            ..known
        };
        price_tokens(&mut ledger.spent, price);
        let mut account = Account {
            cap: cap.map(Dollars::at_most),
            ledger,
            reserved: Reservation::default(),
            in_batches: Dollars::ZERO,
            pending: Spent::default(),
            now: Spent::default(),
            is_dirty: false,
            is_overdue: false,
            store,
        };
        account.save()?;
        Ok((account, lost))
    }

    /// Upper bound of the cost of a request.
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

    /// Reserves the amount, durably. Returns false if it exceeds the cap.
    ///
    /// # Errors
    /// If the ledger cannot be written; then nothing is reserved.
    pub fn reserve(&mut self, amount: &Reservation) -> Result<bool> {
        if self
            .cap
            .is_some_and(|cap| self.committed().plus(amount.usd) > cap)
        {
            return Ok(false);
        }
        // Pending amounts are covered only by the reservations that they came from.
        self.flush()?;
        self.add(amount);
        let usd = self.reserved.usd.minus(self.in_batches);
        let tokens = self.reserved.tokens;
        let ahead = self.ledger.in_flight;
        let is_raised = usd > ahead.usd
            || tokens.prompt > ahead.tokens.prompt
            || tokens.completion > ahead.tokens.completion;
        if !is_raised && !self.is_overdue {
            return Ok(true);
        }
        let raised = &mut self.ledger.in_flight;
        raised.usd = raised.usd.max(usd.times(STEP));
        raised.tokens.prompt = raised.tokens.prompt.max(tokens.prompt.saturating_mul(2));
        raised.tokens.completion = raised
            .tokens
            .completion
            .max(tokens.completion.saturating_mul(2));
        if let Err(error) = self.save() {
            self.release(amount);
            return Err(error);
        }
        Ok(true)
    }

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

    /// Records the maximum number of requests in flight from now on.
    ///
    /// # Errors
    /// If the ledger cannot be written.
    pub fn expect_in_flight(&mut self, requests: u64) -> Result<()> {
        self.ledger.in_flight.requests = requests;
        self.ledger.in_flight.budget_usd = self.cap;
        self.save()
    }

    /// Reserves the maximum cost of a batch, even above the cap: a resumed batch may have been billed already. The
    /// journal of the batches has the amount before the batch may be billed.
    pub fn hold_for_batch(&mut self, usd: Dollars) {
        self.reserved.usd = self.reserved.usd.plus(usd);
        self.in_batches = self.in_batches.plus(usd);
    }

    /// Settles the amount held for `rows` rows of a batch; `unraised` is their cost before the excess factor. The
    /// amount spent is in the log when this returns.
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
        self.in_batches = self.in_batches.minus(held);
        if charge == Charge::Possible {
            // `settle` counts one of them.
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

    /// Settles a reservation by the outcome of its request. [`Account::flush`] writes the amount spent.
    pub fn settle(&mut self, reserved: &Reservation, charge: Charge, price: &Price) {
        self.release(reserved);
        let mut spent = Spent::default();
        match charge {
            Charge::Measured(usage) => match price::cost(&usage, price) {
                Some(usd) => spent.measured_usd = Dollars::at_least(usd),
                None => spent.measured_tokens = usage.into(),
            },
            Charge::Answered(bound) => {
                let at_most = self.bound(&bound, price);
                // The reservation is a bound, too, unless the endpoint itself reports more tokens.
                spent.estimated_usd = at_most.usd.min(reserved.usd).max(at_most.unraised);
                spent.estimated_tokens = at_most.tokens;
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
            // Not multiplied by the current factor: many requests reserved at the same factor may exceed it.
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
        self.pending.add(&spent);
        self.now.add(&spent);
        self.ledger.spent.add(&spent);
    }

    /// Appends pending amounts to the log.
    ///
    /// # Errors
    /// If the log cannot be written; the amounts stay pending, covered by the reservations in the ledger.
    pub fn flush(&mut self) -> Result<()> {
        if self.pending.is_nothing() {
            return Ok(());
        }
        if self.is_overdue {
            // After a failed write the log may end with a torn line: nothing may be appended to it.
            return self.save();
        }
        let appended = self.store.append(&self.pending);
        self.is_overdue |= appended.is_err();
        appended?;
        self.pending = Spent::default();
        Ok(())
    }

    /// Adds the spending of a merged cache.
    ///
    /// # Errors
    /// If the log cannot be written.
    pub fn add_spent(&mut self, spent: &Spent) -> Result<()> {
        self.ledger.spent.add(spent);
        self.pending.add(spent);
        self.flush()
    }

    /// Makes the amounts spent durable, and writes the ledger if it has changed; called about once a second.
    ///
    /// # Errors
    /// If the ledger or the log cannot be written.
    pub fn tick(&mut self) -> Result<()> {
        // Removed or replaced files are written again: this process has their content.
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
        self.is_overdue = saved.is_err();
        saved?;
        // The ledger includes the pending amounts.
        self.pending = Spent::default();
        self.is_dirty = false;
        Ok(())
    }

    /// Closes the account. Requests still in flight, after a second signal, count as possibly billed.
    ///
    /// # Errors
    /// If the ledger cannot be written.
    pub fn close(&mut self, still_in_flight: u64) -> Result<()> {
        let unsettled = Spent {
            estimated_usd: self.reserved.usd.minus(self.in_batches),
            estimated_tokens: self.reserved.tokens,
            ..Spent::default()
        };
        self.now.add(&unsettled);
        self.ledger.spent.add(&unsettled);
        self.ledger.attempts_lost = self.ledger.attempts_lost.saturating_add(still_in_flight);
        self.ledger.in_flight = InFlight::default();
        self.save()
    }

    /// Slots of the daily request count, by endpoint. Marks the ledger as changed.
    pub fn day(&mut self) -> &mut std::collections::BTreeMap<String, Vec<(jiff::Timestamp, u64)>> {
        self.is_dirty = true;
        &mut self.ledger.day
    }

    /// Spent and reserved dollars.
    fn committed(&self) -> Dollars {
        self.spent().total().plus(self.reserved.usd)
    }

    /// Spent by all runs of the folder.
    pub fn spent(&self) -> Spent {
        self.ledger.spent
    }

    /// Spent by this process.
    pub fn spent_now(&self) -> Spent {
        self.now
    }

    /// Dollars below the cap that are neither spent nor reserved.
    pub fn remaining(&self) -> Dollars {
        self.cap
            .map_or(Dollars::MAX, |cap| cap.minus(self.committed()))
    }

    pub fn cap(&self) -> Option<Dollars> {
        self.cap
    }

    /// Storage of the account.
    pub fn store(&mut self) -> &mut S {
        &mut self.store
    }
}

/// Converts unpriced tokens to dollars, if there is a price.
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

/// Error for a request whose maximum cost exceeds the rest of the budget.
pub fn out_of_money<S: LedgerStore>(account: &Account<S>) -> anyhow::Error {
    let message = format!(
        "the budget is used up: {} of {} are spent, and the next request may cost more than the \
         rest; raise `budget.usd` and run the same command to resume",
        account.spent().total(),
        account.cap().unwrap_or_default()
    );
    Exit::Resumable(message).into()
}

#[cfg(test)]
mod tests;
