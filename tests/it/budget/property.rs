//! Property test of the invariant over random events in a run folder: processes that harvest, score or probe, batches,
//! kills, changes of prices and of the cap, and caches that are repaired, deleted or merged.

use distill::budget::account::{Account, Charge, Reservation};
use distill::budget::dollars::Dollars;
use distill::budget::ledger::{Spent, UnpricedTokens};
use distill::budget::price::{self, TokenBound};
use distill::cache::usage::Usage;
use distill::config::Price;
use proptest::prelude::*;

use super::{Disk, Fault, FaultyStore, spent_after_kill};

#[derive(Debug, Clone)]
enum Event {
    /// A process opens the account.
    Open,
    /// The process sends a request with these bounds of input and output tokens.
    Send(u64, u64),
    /// A request in flight gets its reply; its cost is written immediately (if true) or later.
    Reply(usize, Reply, bool),
    /// The process submits a batch with this number of rows, and this number of input and of output tokens per row.
    Batch(u64, u64),
    /// A row of the batch gets its reply.
    Row(Reply),
    /// The process calls [`Account::tick`].
    Tick,
    /// The process closes the account and ends.
    Close,
    /// Sets or clears the fault of the next writes.
    Fault(Option<Fault>),
    /// The config gets the price with this index.
    Price(u8),
    /// The config gets the cap with this index.
    Cap(u8),
    /// The cache loses a share of its records, by a repair or a deletion.
    Forget(f64),
    /// A cache is merged whose answers cost this number of cents.
    Merge(u64),
}

#[derive(Debug, Clone, Copy)]
enum Reply {
    /// Billed to this share of its bound, with usage.
    Measured(f64),
    /// Billed to this share of its bound, without usage.
    WithoutUsage(f64),
    /// Billed to this share of its bound, but the reply is lost.
    Lost(f64),
    Refused,
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct Sent {
    bound: TokenBound,
    amount: Reservation,
    /// Index in [`PRICES`] of the price at which the request was sent.
    price: usize,
}

/// A row of a submitted batch, with the amount reserved for it.
#[derive(Debug, Clone, Copy)]
struct Row {
    bound: TokenBound,
    held: Dollars,
    price: usize,
    /// Charge of the reply, or None before the reply. The amount stays reserved until the reply is recorded.
    charge: Option<Charge>,
}

const PRICES: [Price; 4] = [
    price(None, None),
    price(Some(1.0), Some(2.0)),
    price(Some(0.3), Some(4.0)),
    price(Some(5.0), None),
];

const CAPS: [Option<f64>; 4] = [None, Some(0.5), Some(2.0), Some(8.0)];

const fn price(input: Option<f64>, output: Option<f64>) -> Price {
    Price {
        input,
        cached_input: None,
        output,
        as_of: None,
    }
}

#[derive(Default)]
struct World {
    disk: Disk,
    process: Option<Account<FaultyStore>>,
    /// Index in [`PRICES`].
    price: usize,
    /// Index in [`CAPS`].
    cap: usize,
    in_flight: Vec<Sent>,
    batch: Vec<Row>,
    billed: Dollars,
    /// Billed tokens of requests that were sent without a price.
    unpriced: UnpricedTokens,
    /// Sum of the costs in the cache's records.
    cached: Dollars,
    fault: Option<Fault>,
}

impl World {
    /// Returns the dollars that are billed or may be billed. Requests without a price count at the current price.
    fn may_be_billed(&self) -> Dollars {
        let unpriced = self.unpriced_at(&PRICES[self.price]);
        let mut sum = self.billed.plus(unpriced.unwrap_or_default());
        for sent in &self.in_flight {
            sum = sum.plus(self.max_cost(&sent.bound, sent.price));
        }
        for row in self.batch.iter().filter(|row| row.charge.is_none()) {
            sum = sum.plus(self.max_cost(&row.bound, row.price));
        }
        sum
    }

    fn unpriced_at(&self, price: &Price) -> Option<Dollars> {
        let usage = Usage {
            prompt_tokens: self.unpriced.prompt,
            completion_tokens: self.unpriced.completion,
            ..Usage::default()
        };
        price::cost(&usage, price).map(Dollars::at_most)
    }

    /// Returns the maximum cost of a request that was sent at the price with the index `price`.
    fn max_cost(&self, bound: &TokenBound, price: usize) -> Dollars {
        let price = match PRICES[price].output {
            Some(_) => &PRICES[price],
            None => &PRICES[self.price],
        };
        bound.cost(price).map_or(Dollars::ZERO, Dollars::at_most)
    }

    /// Bills a share of a bound at the price with the index `price`, as the endpoint. Returns the billed tokens.
    fn bill(&mut self, bound: &TokenBound, price: usize, share: f64) -> Usage {
        let part = |tokens: u64| (tokens as f64 * share) as u64;
        let usage = Usage {
            prompt_tokens: part(bound.input_tokens),
            completion_tokens: part(bound.output_tokens),
            ..Usage::default()
        };
        match price::cost(&usage, &PRICES[price]) {
            Some(usd) => self.billed = self.billed.plus(Dollars::at_most(usd)),
            None => self.unpriced.add(usage.into()),
        }
        usage
    }

    fn floor(&self) -> Spent {
        Spent {
            measured_usd: self.cached,
            ..Spent::default()
        }
    }

    /// Calls `operation` with the account of the process. Returns false without a process, or if the operation fails;
    /// the process then ends, unless the fault is [`Fault::Error`].
    fn run(
        &mut self,
        operation: impl FnOnce(&mut Account<FaultyStore>) -> anyhow::Result<()>,
    ) -> bool {
        let Some(account) = &mut self.process else {
            return false;
        };
        let store = account.store();
        (store.disk, store.fault) = (std::mem::take(&mut self.disk), self.fault);
        let result = operation(account);
        let store = account.store();
        (self.disk, self.fault) = (std::mem::take(&mut store.disk), store.fault);
        if result.is_err() && !self.survives_faults() {
            self.crash();
        }
        result.is_ok()
    }

    /// Returns true if a failed write does not end the process.
    fn survives_faults(&self) -> bool {
        matches!(self.fault, Some(Fault::Error(_)))
    }

    /// Ends the process without closing its account.
    fn crash(&mut self) {
        self.process = None;
        self.fault = None;
        self.abandon_requests();
    }

    /// Loses the replies in flight: the endpoint bills their requests in full.
    fn abandon_requests(&mut self) {
        for sent in std::mem::take(&mut self.in_flight) {
            self.bill(&sent.bound, sent.price, 1.0);
        }
    }

    fn step(&mut self, event: &Event) {
        match event {
            Event::Open if self.process.is_none() => self.open(),
            Event::Send(input, output) => self.send(*input, *output),
            Event::Reply(which, reply, is_written) if !self.in_flight.is_empty() => {
                let which = which % self.in_flight.len();
                self.reply(which, *reply, *is_written);
            }
            Event::Batch(rows, tokens) => self.make_batch(*rows, *tokens),
            Event::Row(reply) => self.row(*reply),
            Event::Tick => drop(self.run(Account::tick)),
            Event::Close => {
                let in_flight = self.in_flight.len() as u64;
                self.run(|account| account.close(in_flight));
                if self.process.is_some() {
                    self.crash();
                }
            }
            Event::Fault(fault) => self.fault = *fault,
            // The config is read only when a process starts.
            Event::Price(price) if self.process.is_none() => self.price = usize::from(*price) % 4,
            Event::Cap(cap) if self.process.is_none() => self.cap = usize::from(*cap) % 4,
            Event::Forget(share) => self.cached = self.cached.times(1.0 - share),
            Event::Merge(cents) => self.merge(*cents),
            _ => {}
        }
    }

    fn open(&mut self) {
        let opened = Account::open(
            self.store(),
            self.disk.read(),
            self.cap(),
            &PRICES[self.price],
            &self.floor(),
        );
        let Ok((mut account, _)) = opened else {
            assert!(self.survives_faults());
            return;
        };
        // The journal of the batches contains the amounts reserved for them.
        for row in &self.batch {
            account.hold_for_batch(row.held);
        }
        self.disk = std::mem::take(&mut account.store().disk);
        self.process = Some(account);
        self.price_the_unpriced();
        self.run(|account| account.expect_in_flight(8));
    }

    /// Returns the store of a new process. It does not crash while it opens the account; a crash at the first operation
    /// after that has the same effect.
    fn store(&self) -> FaultyStore {
        FaultyStore {
            fault: self.fault.filter(|_| self.survives_faults()),
            ..self.disk.open()
        }
    }

    /// Prices the requests that were sent without a price, at the first price with which the account is opened.
    fn price_the_unpriced(&mut self) {
        if let Some(usd) = self.unpriced_at(&PRICES[self.price]) {
            self.billed = self.billed.plus(usd);
            self.unpriced = UnpricedTokens::default();
        }
    }

    /// Returns the current cap, or None without a price, because a run with a budget and no price is refused.
    fn cap(&self) -> Option<f64> {
        CAPS[self.cap].filter(|_| PRICES[self.price].output.is_some())
    }

    fn send(&mut self, input_tokens: u64, output_tokens: u64) {
        let bound = TokenBound {
            input_tokens,
            output_tokens,
        };
        let price = self.price;
        let mut is_sent = false;
        let mut amount = Reservation::default();
        let is_alive = self.run(|account| {
            amount = account.bound(&bound, &PRICES[price]);
            is_sent = account.reserve(&amount)?;
            Ok(())
        });
        if is_sent && is_alive {
            self.in_flight.push(Sent {
                bound,
                amount,
                price,
            });
            if let Some(cap) = self.cap() {
                let billable = self.may_be_billed();
                assert!(
                    billable <= Dollars::at_most(cap),
                    "{billable} may be billed of {cap}"
                );
            }
        }
    }

    fn reply(&mut self, which: usize, reply: Reply, is_written: bool) {
        let Sent {
            bound,
            amount,
            price,
        } = self.in_flight.remove(which);
        let charge = self.charge_of(&bound, price, reply);
        let is_alive = self.run(|account| {
            account.settle(&amount, charge, &PRICES[price]);
            if is_written { account.flush() } else { Ok(()) }
        });
        if is_alive && let Charge::Measured(usage) = charge {
            let usd = price::cost(&usage, &PRICES[price]).unwrap_or(0.0);
            self.cached = self.cached.plus(Dollars::at_most(usd));
        }
    }

    fn charge_of(&mut self, bound: &TokenBound, price: usize, reply: Reply) -> Charge {
        match reply {
            Reply::Measured(share) => Charge::Measured(self.bill(bound, price, share)),
            Reply::WithoutUsage(share) => {
                self.bill(bound, price, share);
                Charge::Answered(*bound)
            }
            Reply::Lost(share) => {
                self.bill(bound, price, share);
                Charge::Possible
            }
            Reply::Refused => Charge::Nothing,
        }
    }

    fn make_batch(&mut self, rows: u64, tokens: u64) {
        // A batch needs a price, and its journal must be written before it is submitted.
        if PRICES[self.price].output.is_none() || self.survives_faults() {
            return;
        }
        let bound = TokenBound {
            input_tokens: tokens,
            output_tokens: tokens,
        };
        let price = self.price;
        let Some(account) = &mut self.process else {
            return;
        };
        let held = account.bound(&bound, &PRICES[price]).usd;
        let total = (0..rows).fold(Dollars::ZERO, |sum, _| sum.plus(held));
        if total > account.remaining() {
            return;
        }
        account.hold_for_batch(total);
        self.batch.extend((0..rows).map(|_| Row {
            bound,
            held,
            price,
            charge: None,
        }));
    }

    fn row(&mut self, reply: Reply) {
        if self.process.is_none() {
            return;
        }
        let Some(row) = self.batch.pop() else {
            return;
        };
        let charge = match row.charge {
            Some(charge) => charge,
            None => self.charge_of(&row.bound, row.price, reply),
        };
        let price = &PRICES[row.price];
        if !self.run(|account| account.settle_batch(row.held, row.held, 1, charge, price)) {
            self.crash();
            // The row is not recorded, so the next process reserves its amount and gets the same reply.
            self.batch.push(Row {
                charge: Some(charge),
                ..row
            });
        }
    }

    fn merge(&mut self, cents: u64) {
        if self.process.is_some() || self.survives_faults() {
            return;
        }
        let usd = Dollars::at_least(cents as f64 / 100.0);
        let opened = Account::open(
            self.store(),
            self.disk.read(),
            None,
            &PRICES[self.price],
            &Spent::default(),
        );
        let mut account = opened.unwrap().0;
        let spent = Spent {
            measured_usd: usd,
            ..Spent::default()
        };
        account.add_spent(&spent).unwrap();
        account.close(0).unwrap();
        self.disk = std::mem::take(&mut account.store().disk);
        self.price_the_unpriced();
        self.billed = self.billed.plus(usd);
        self.cached = self.cached.plus(usd);
    }

    /// Checks that the account reserves exactly the bounds of the requests in flight and of the batch rows.
    fn check_process(&self) {
        let Some(account) = &self.process else {
            return;
        };
        let in_flight = self.in_flight.iter().map(|sent| sent.amount.usd);
        let in_batches = self.batch.iter().map(|row| row.held);
        let reserved = in_flight
            .chain(in_batches)
            .fold(Dollars::ZERO, Dollars::plus);
        if let Some(cap) = account.cap() {
            let remaining = cap.minus(account.spent().total().plus(reserved));
            assert_eq!(account.remaining(), remaining);
        }
    }

    /// Checks that after a kill, the files and the journal of the batches would cover all that may be billed.
    fn check(&self) {
        let held = self
            .batch
            .iter()
            .fold(Dollars::ZERO, |sum, row| sum.plus(row.held));
        let price = &PRICES[self.price];
        let floor = self.floor();
        let on_disk = spent_after_kill(
            &self.disk,
            CAPS[self.cap].unwrap_or(f64::MAX),
            price,
            &floor,
        );
        let on_disk = on_disk.total().plus(held);
        let billable = self.may_be_billed();
        // Each amount is rounded once.
        let rounding = Dollars::at_least(1e-9);
        assert!(
            billable <= on_disk.plus(rounding),
            "{billable:?} may be billed, {on_disk:?} is on the disk"
        );
    }
}

fn reply() -> impl Strategy<Value = Reply> {
    let share = 0.0..=1.0;
    prop_oneof![
        share.clone().prop_map(Reply::Measured),
        share.clone().prop_map(Reply::WithoutUsage),
        share.prop_map(Reply::Lost),
        Just(Reply::Refused),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0usize..4, any::<bool>()).prop_map(|(n, reaches_disk)| Fault::Crash(n, reaches_disk)),
        any::<bool>().prop_map(Fault::Error),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Open),
        8 => (0u64..100_000, 1u64..200_000).prop_map(|(input, output)| Event::Send(input, output)),
        8 => (any::<usize>(), reply(), any::<bool>())
            .prop_map(|(which, reply, is_written)| Event::Reply(which, reply, is_written)),
        1 => (1u64..5, 1u64..50_000).prop_map(|(rows, tokens)| Event::Batch(rows, tokens)),
        2 => reply().prop_map(Event::Row),
        1 => proptest::option::of(fault()).prop_map(Event::Fault),
        1 => Just(Event::Tick),
        1 => Just(Event::Close),
        1 => any::<u8>().prop_map(Event::Price),
        1 => any::<u8>().prop_map(Event::Cap),
        1 => (0.0..=1.0).prop_map(Event::Forget),
        1 => (0u64..60).prop_map(Event::Merge),
    ]
}

fn cases() -> u32 {
    if crate::nightly() { 1_000_000 } else { 50_000 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn event_sequences_never_exceed_the_cap(events in proptest::collection::vec(event(), 1..80)) {
        let mut world = World::default();
        for event in &events {
            world.step(event);
            world.check_process();
            world.check();
        }
    }
}
