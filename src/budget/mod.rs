//! The budget: a request is sent only if its maximum cost fits into the part of `budget.usd` that is neither spent nor
//! reserved.
//!
//! | file | content |
//! |---|---|
//! | `account` | spending and reservations of a run folder, in memory |
//! | `ledger` | `ledger.json` and its log on disk, and the lock |
//! | `price` | cost of a usage, and upper bounds of the tokens of a request |
//! | `dollars` | amounts of US dollars |
//!
//! **The invariant.** A run folder has one account over its whole life. The account covers harvests, scoring, probes
//! and batches in any order, killed or not; merged caches; answers from before a price was set; and answers that a
//! repair or a deletion removed from the cache. At every moment
//!
//! ```text
//! amount that may have been billed  <=  spent + reserved  <=  cap     (1)
//! spent + reserved                  <=  amount that the next run counts after a kill   (2)
//! ```
//!
//! at the prices in the config, as long as an answer costs no more than its bound: one prompt token for each
//! byte of the request and 8 for each message, and `sampling.max_tokens` completion tokens. An answer that costs more
//! is counted in full, and later bounds are raised by its ratio.
//!
//! (1) `account`: the bound of a request is reserved before it is sent. Its reply replaces the reservation by the cost
//! of the reported usage; by an upper bound if the attempt may have been billed without an answer, or the usage is
//! missing, incomplete or impossible; or by zero if the request was refused.
//!
//! (2) `ledger`: spending is appended to a log. An upper bound of the reservations is written before the request is
//! sent, with a margin, so that it is written rarely. The logged amount and the bound only grow during a run. A lock
//! admits one process at a time.
//!
//! `tests/it/budget/` checks the invariant by a property test over sequences of these events, and by a search over
//! every interleaving of two processes with four requests and a crash or a lost reply at every step.

pub mod account;
pub mod dollars;
pub mod ledger;
pub mod price;

pub use crate::budget::account::{Account, Charge, Reservation};
pub use crate::budget::dollars::Dollars;
pub use crate::budget::ledger::{
    InFlight, Ledger, LedgerFiles, LedgerStore, Spent, UnpricedTokens,
};
