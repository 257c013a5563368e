//! The account of a run folder while a process has it. Pure, but for its store.

use anyhow::Result;

use crate::budget::dollars::Dollars;
use crate::budget::ledger::{InFlight, Ledger, LedgerStore, Spent, UnpricedTokens};
use crate::budget::price;
use crate::budget::price::TokenBound;
use crate::cache::usage::Usage;
use crate::config::Price;
use crate::exit::Exit;

/// The written-ahead reservation grows by this factor, so that it is written rarely.
const STEP: f64 = 2.0;

/// Upper bound of a request's cost: dollars, or tokens if no price is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Reservation {
    pub usd: Dollars,
    /// The same before [`Ledger::excess`] raised it.
    pub unraised: Dollars,
    pub tokens: UnpricedTokens,
}

/// Outcome of a reservation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Charge {
    /// The endpoint said how many tokens.
    Measured(Usage),
    /// An answer came, with these tokens at the most.
    Answered(TokenBound),
    /// It may have been billed in full: a time-out, a connection lost, a body that makes no sense.
    Possible,
    /// Refused, or never sent.
    Nothing,
}

#[derive(Debug, Clone)]
pub struct Account<S> {
    cap: Option<Dollars>,
    /// As it would be written now.
    ledger: Ledger,
    reserved: Reservation,
    /// Reserved for batches. Their own journal brings it over a kill, which they survive: it is no part of
    /// what a kill may lose.
    in_batches: Dollars,
    /// Spent, and not in the log yet: the reservations in the ledger still cover it.
    pending: Spent,
    /// Spent by this process.
    now: Spent,
    /// The ledger has changed in a way that the log does not tell.
    is_dirty: bool,
    /// Something could not be written that must be before anything else is sent.
    is_overdue: bool,
    store: S,
}

impl<S: LedgerStore> Account<S> {
    /// Takes over the account as it was left, and counts what a killed run left in flight as spent, which is
    /// returned. `price` is that of tokens which were spent while none was set; `floor` what is known to
    /// have been spent from elsewhere.
    ///
    /// # Errors
    /// Where the ledger cannot be written.
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

    /// The most that a request can cost.
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

    /// Reserves the amount, if it fits, and durably so before anything may be billed.
    ///
    /// # Errors
    /// Where the ledger cannot be written: then nothing is reserved.
    pub fn reserve(&mut self, amount: &Reservation) -> Result<bool> {
        if self
            .cap
            .is_some_and(|cap| self.committed().plus(amount.usd) > cap)
        {
            return Ok(false);
        }
        // What is pending is covered by the reservations that it came from, and not by others.
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

    /// Takes a reservation back on which nothing was sent.
    pub fn release(&mut self, amount: &Reservation) {
        let tokens = &mut self.reserved.tokens;
        tokens.prompt = tokens.prompt.saturating_sub(amount.tokens.prompt);
        tokens.completion = tokens.completion.saturating_sub(amount.tokens.completion);
        self.reserved.usd = self.reserved.usd.minus(amount.usd);
    }

    /// Requests are to be sent one by one from here on, so many at once.
    ///
    /// # Errors
    /// Where the ledger cannot be written.
    pub fn expect_in_flight(&mut self, requests: u64) -> Result<()> {
        self.ledger.in_flight.requests = requests;
        self.ledger.in_flight.budget_usd = self.cap;
        self.save()
    }

    /// Reserves what a batch may cost, whether it fits or not: it may have been spent already. The batches'
    /// journal has the amount before anything may be billed.
    pub fn hold_for_batch(&mut self, usd: Dollars) {
        self.reserved.usd = self.reserved.usd.plus(usd);
        self.in_batches = self.in_batches.plus(usd);
    }

    /// Settles the amount held for a number of rows of a batch; `unraised` is their cost before the excess
    /// factor. The amount spent is in the log when this returns.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn settle_batch(
        &mut self,
        held: Dollars,
        unraised: Dollars,
        rows: u64,
        bill: Charge,
        price: &Price,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        self.in_batches = self.in_batches.minus(held);
        if bill == Charge::Possible {
            // One is counted below.
            self.ledger.attempts_lost += rows - 1;
        }
        let amount = Reservation {
            usd: held,
            unraised,
            tokens: UnpricedTokens::default(),
        };
        self.settle(&amount, bill, price);
        self.flush()
    }

    /// Turns a reservation into what was spent. [`Account::flush`] writes it.
    pub fn settle(&mut self, reserved: &Reservation, bill: Charge, price: &Price) {
        self.release(reserved);
        let mut spent = Spent::default();
        match bill {
            Charge::Measured(usage) => match price::cost(&usage, price) {
                Some(usd) => spent.measured_usd = Dollars::at_least(usd),
                None => spent.measured_tokens = usage.into(),
            },
            Charge::Answered(bound) => {
                let at_most = self.bound(&bound, price);
                // What was reserved is a bound, too, unless the endpoint itself reports more.
                spent.estimated_usd = at_most.usd.min(reserved.usd).max(at_most.unraised);
                spent.estimated_tokens = at_most.tokens;
            }
            Charge::Possible => {
                spent.estimated_usd = reserved.usd;
                spent.estimated_tokens = reserved.tokens;
            }
            Charge::Nothing => {}
        }
        let known = match bill {
            Charge::Answered(bound) => self.bound(&bound, price).unraised,
            _ => spent.measured_usd,
        };
        if !reserved.unraised.is_zero() && known > reserved.unraised {
            // Not times the factor so far: many requests that were reserved at the same one may exceed it.
            let excess = known.usd() / reserved.unraised.usd();
            if excess > self.ledger.excess {
                self.ledger.excess = excess;
                self.is_dirty = true;
            }
        }
        if bill == Charge::Possible {
            self.ledger.attempts_lost = self.ledger.attempts_lost.saturating_add(1);
            self.is_dirty = true;
        }
        self.pending.add(&spent);
        self.now.add(&spent);
        self.ledger.spent.add(&spent);
    }

    /// Writes what was spent to the log.
    ///
    /// # Errors
    /// Where it cannot be written: it stays pending, and the reservations in the ledger cover it.
    pub fn flush(&mut self) -> Result<()> {
        if self.pending.is_nothing() {
            return Ok(());
        }
        if self.is_overdue {
            // The log may end with part of a line, behind which nothing may follow.
            return self.save();
        }
        let appended = self.store.append(&self.pending);
        self.is_overdue |= appended.is_err();
        appended?;
        self.pending = Spent::default();
        Ok(())
    }

    /// Counts what was spent elsewhere: in a cache that is merged into this one.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn add_spent(&mut self, spent: &Spent) -> Result<()> {
        self.ledger.spent.add(spent);
        self.pending.add(spent);
        self.flush()
    }

    /// Makes what was spent durable, and writes what else has changed; about once a second.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn tick(&mut self) -> Result<()> {
        // Files that somebody has removed are written anew: this process has all that they held.
        if self.is_dirty || !self.store.is_in_place() {
            return self.save();
        }
        self.flush()?;
        self.store.sync()
    }

    /// Writes the ledger, also an unchanged one.
    ///
    /// # Errors
    /// Where it cannot be written: nothing may be sent before it was.
    pub fn save(&mut self) -> Result<()> {
        // It has what is pending.
        let saved = self.store.save(&self.ledger);
        self.is_overdue = saved.is_err();
        saved?;
        (self.pending, self.is_dirty) = (Spent::default(), false);
        Ok(())
    }

    /// Closes the account: what is still in flight, after a second signal, counts as possibly billed.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn close(&mut self, still_in_flight: u64) -> Result<()> {
        let left = Spent {
            estimated_usd: self.reserved.usd.minus(self.in_batches),
            estimated_tokens: self.reserved.tokens,
            ..Spent::default()
        };
        self.now.add(&left);
        self.ledger.spent.add(&left);
        self.ledger.attempts_lost = self.ledger.attempts_lost.saturating_add(still_in_flight);
        self.ledger.in_flight = InFlight::default();
        self.save()
    }

    /// The slots of requests that earlier runs sent, by endpoint; to be changed before a save.
    pub fn day(&mut self) -> &mut std::collections::BTreeMap<String, Vec<(jiff::Timestamp, u64)>> {
        self.is_dirty = true;
        &mut self.ledger.day
    }

    /// Spent and reserved dollars.
    fn committed(&self) -> Dollars {
        self.spent().total().plus(self.reserved.usd)
    }

    /// Everything that was ever spent.
    pub fn spent(&self) -> Spent {
        self.ledger.spent
    }

    /// Spent by this process.
    pub fn spent_now(&self) -> Spent {
        self.now
    }

    /// Dollars that are neither spent nor reserved.
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

/// Turns tokens into dollars, once there is a price.
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

/// The next request may cost more than the rest of the budget.
pub fn out_of_money<S: LedgerStore>(account: &Account<S>) -> anyhow::Error {
    let message = format!(
        "the budget is used up: {} of {} are spent, and the next request may cost more than the \
         rest; raise `budget.usd` and run the same command to go on",
        account.spent().total(),
        account.cap().unwrap_or_default()
    );
    Exit::Resumable(message).into()
}

#[cfg(test)]
mod tests;
