//! The budget as a promise: no request is sent unless its highest possible cost still fits.
//!
//! **The invariant.** Everything in a run folder is one account, for ever: harvests, judging, probes and
//! batches, in whatever order, killed or not; what was merged in; what was answered before a price was set;
//! and what the cache no longer holds, because it was repaired or deleted. At every moment
//!
//! ```text
//! what may have been billed  <=  spent + reserved  <=  cap            (1)
//! spent + reserved           <=  what the files say after a kill      (2)
//! ```
//!
//! at the prices in the config, as long as an answer costs no more than its bound: the bytes of the request
//! as prompt tokens, `sampling.max_tokens` as completion tokens. An answer that costs more is counted as it
//! is, and later bounds are raised by its ratio.
//!
//! (1) `account`: before a request is sent its bound is reserved; when its reply is in, the reservation is
//! settled: to what the usage says, to an upper bound where an attempt may have been billed without telling
//! or the usage is missing, half or impossible, to nothing where it was refused.
//!
//! (2) `ledger`: what is spent is appended to a log, and what is reserved is written ahead, in steps, before
//! it is sent. Both only grow while a run goes on. One process at a time has the account (a lock).
//!
//! `tests/it/budget/` holds the invariant by a property test over all of these, and by a search over every
//! interleaving of two processes with four requests, a crash or a lost reply at every step.

pub mod account;
pub mod dollars;
pub mod ledger;
pub mod price;

pub use crate::budget::account::{Account, Charge, Reservation};
pub use crate::budget::dollars::Dollars;
pub use crate::budget::ledger::{
    InFlight, Ledger, LedgerFiles, LedgerStore, Spent, UnpricedTokens,
};
