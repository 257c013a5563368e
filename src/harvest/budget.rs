//! The budget as a promise: no request leaves unless its highest possible cost still fits. Pure.
//!
//! Before a request leaves, the most that it can cost is reserved; when its reply is in, the
//! reservation is settled: to what the usage says, to an upper bound where an attempt may have been
//! billed without telling, to nothing where it was refused. So
//! `measured + estimated + reserved <= cap` at every moment, retries included.

use super::cost::Bound;
use crate::cache::record::Usage;
use crate::config::Price;

/// Dollars, by how we know of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spent {
    /// By the usage that the endpoint reported.
    pub measured: f64,
    /// Upper bounds: attempts that may have been billed, answers without usage.
    pub estimated: f64,
}

impl Spent {
    pub fn total(&self) -> f64 {
        self.measured + self.estimated
    }
}

/// What became of a reservation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bill {
    /// The endpoint said how many tokens.
    Measured(Usage),
    /// An answer came, with at most so many tokens.
    Answered(Bound),
    /// It may have been billed in full: a time-out, a connection lost, a body that makes no sense.
    Possible,
    /// Refused, or never sent.
    Nothing,
}

#[derive(Debug)]
pub struct Budget {
    cap: Option<f64>,
    spent: Spent,
    reserved: f64,
    /// The endpoint billed more than was reserved, by so much at most: a model that does not keep
    /// to `max_tokens`. Later reservations allow for it.
    excess: f64,
}

impl Budget {
    /// `before` is what earlier runs in this run folder spent.
    pub fn new(cap: Option<f64>, before: Spent) -> Self {
        Self {
            cap,
            spent: before,
            reserved: 0.0,
            excess: 1.0,
        }
    }

    /// The most that a request can cost; 0 without prices.
    pub fn bound(&self, bound: &Bound, price: &Price) -> f64 {
        bound.cost(price).unwrap_or(0.0) * self.excess
    }

    /// Sets the amount aside, if it fits.
    pub fn reserve(&mut self, amount: f64) -> bool {
        let fits = self
            .cap
            .is_none_or(|cap| self.spent.total() + self.reserved + amount <= cap);
        if fits {
            self.reserved += amount;
        }
        fits
    }

    /// Takes a reservation back, on which nothing has left.
    pub fn release(&mut self, amount: f64) {
        self.reserved = (self.reserved - amount).max(0.0);
    }

    /// Sets the amount aside, whether it fits or not: it may have been spent already.
    pub fn hold(&mut self, amount: f64) {
        self.reserved += amount;
    }

    /// What is neither spent nor set aside.
    pub fn room(&self) -> f64 {
        self.cap.map_or(f64::INFINITY, |cap| {
            cap - self.spent.total() - self.reserved
        })
    }

    /// Turns a reservation into what was spent. Returns the dollars, as they were measured or
    /// estimated.
    pub fn settle(&mut self, reserved: f64, bill: Bill, price: &Price) -> Spent {
        self.reserved = (self.reserved - reserved).max(0.0);
        let mut spent = Spent::default();
        match bill {
            Bill::Measured(usage) => {
                spent.measured = super::cost::cost(&usage, price).unwrap_or(0.0);
                if reserved > 0.0 && spent.measured > reserved {
                    self.excess *= spent.measured / reserved;
                }
            }
            Bill::Answered(bound) => {
                spent.estimated = bound.cost(price).unwrap_or(0.0).min(reserved);
            }
            Bill::Possible => spent.estimated = reserved,
            Bill::Nothing => {}
        }
        self.spent.measured += spent.measured;
        self.spent.estimated += spent.estimated;
        spent
    }

    pub fn spent(&self) -> Spent {
        self.spent
    }

    /// Set aside for what is in flight.
    pub fn reserved(&self) -> f64 {
        self.reserved
    }

    pub fn cap(&self) -> Option<f64> {
        self.cap
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PRICE: Price = Price {
        input: Some(1.0),
        cached_input: None,
        output: Some(10.0),
        as_of: None,
    };

    fn usage(prompt_tokens: u64, completion_tokens: u64) -> Usage {
        Usage {
            prompt_tokens,
            completion_tokens,
            ..Usage::default()
        }
    }

    #[test]
    fn a_reservation_is_settled_by_what_is_known() {
        let bound = Bound {
            input_tokens: 1_000,
            output_tokens: 900,
        };
        let mut budget = Budget::new(Some(0.025), Spent::default());
        let amount = budget.bound(&bound, &PRICE);
        assert!((amount - 0.01).abs() < 1e-12);
        assert!(budget.reserve(amount) && budget.reserve(amount));
        assert!(!budget.reserve(amount), "a third one does not fit");
        budget.settle(amount, Bill::Nothing, &PRICE);
        assert!(budget.reserve(amount));
        let spent = budget.settle(amount, Bill::Measured(usage(500, 100)), &PRICE);
        assert!((spent.measured - 0.0015).abs() < 1e-12);
        let spent = budget.settle(amount, Bill::Possible, &PRICE);
        assert_eq!((spent.measured, spent.estimated), (0.0, amount));
        assert_eq!(budget.reserved(), 0.0);
    }

    #[test]
    fn a_model_that_exceeds_its_bound_is_reserved_more_for() {
        let bound = Bound {
            input_tokens: 0,
            output_tokens: 100,
        };
        let mut budget = Budget::new(Some(1.0), Spent::default());
        let first = budget.bound(&bound, &PRICE);
        assert!(budget.reserve(first));
        budget.settle(first, Bill::Measured(usage(0, 150)), &PRICE);
        assert!((budget.bound(&bound, &PRICE) / first - 1.5).abs() < 1e-9);
    }

    proptest! {
        /// Whatever is sent and however it ends, the cap holds at every moment.
        #[test]
        fn the_cap_holds(cap in 0.001f64..0.1, steps in proptest::collection::vec((1u64..3_000, 1u64..1_000, 0u8..6, 0usize..8), 1..200)) {
            let mut budget = Budget::new(Some(cap), Spent::default());
            let mut in_flight: Vec<(f64, u64, u64)> = Vec::new();
            for (input_tokens, output_tokens, kind, which) in steps {
                let bound = Bound { input_tokens, output_tokens };
                let amount = budget.bound(&bound, &PRICE);
                if kind < 3 {
                    if budget.reserve(amount) {
                        in_flight.push((amount, input_tokens, output_tokens));
                    }
                } else if !in_flight.is_empty() {
                    let (amount, input, output) = in_flight.swap_remove(which % in_flight.len());
                    let bill = match kind {
                        3 => Bill::Measured(usage(input / 2, output)),
                        4 => Bill::Possible,
                        _ => Bill::Nothing,
                    };
                    budget.settle(amount, bill, &PRICE);
                }
                prop_assert!(budget.spent().total() + budget.reserved() <= cap + 1e-9);
            }
        }
    }
}
