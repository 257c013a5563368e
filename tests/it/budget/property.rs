//! Property test of the invariant over random events in a run folder: processes that harvest, score or probe, batches,
//! kills, changes of prices and of the cap, and caches that are repaired, deleted or merged.

use distill::budget::account::{Account, Charge, Reservation};
use distill::budget::dollars::Dollars;
use distill::budget::ledger::{Spent, UnpricedTokens};
use distill::budget::price;
use distill::budget::price::TokenBound;
use distill::cache::usage::Usage;
use distill::config::Price;
use proptest::prelude::*;

use super::{Disk, Fault, FaultyStore, after_a_kill};

#[derive(Debug, Clone)]
enum Event {
    /// A process opens the account.
    Open,
    /// The process sends a request with these bounds of input and output tokens.
    Send(u64, u64),
    /// A request in flight gets its reply; its cost is written immediately (if true) or later.
    Reply(usize, Reply, bool),
    /// The process submits a batch with this number of rows and of tokens per row.
    Batch(u64, u64),
    /// A row of the batch gets its reply.
    Row(Reply),
    Tick,
    Close,
    /// Sets or clears the fault of the next writes.
    Fault(Option<Fault>),
    Price(u8),
    Cap(u8),
    /// The cache loses a share of its records, by a repair or a deletion.
    Forget(f64),
    Merge(u64),
}

#[derive(Debug, Clone, Copy)]
enum Reply {
    /// Billed to this share of its bound, with usage.
    Measured(f64),
    /// Billed to this share of its bound, without usage.
    WithoutUsage(f64),
    Lost(f64),
    Refused,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    bound: TokenBound,
    amount: Reservation,
    price: usize,
}

/// A row of a batch under way, with the amount held for it.
#[derive(Debug, Clone, Copy)]
struct Row {
    bound: TokenBound,
    held: Dollars,
    price: usize,
    /// Charge of the reply; `None` before it. The amount is held until the reply is recorded.
    bill: Option<Charge>,
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

struct World {
    disk: Disk,
    process: Option<Account<FaultyStore>>,
    price: usize,
    cap: usize,
    in_flight: Vec<Sent>,
    batch: Vec<Row>,
    /// Billed dollars, and billed tokens of requests that had no price when sent.
    billed: Dollars,
    unpriced: UnpricedTokens,
    /// Sum of the costs in the cache's records.
    cached: Dollars,
    fault: Option<Fault>,
}

impl World {
    fn new() -> World {
        World {
            disk: Disk::default(),
            process: None,
            price: 0,
            cap: 0,
            in_flight: Vec::new(),
            batch: Vec::new(),
            billed: Dollars::ZERO,
            unpriced: UnpricedTokens::default(),
            cached: Dollars::ZERO,
            fault: None,
        }
    }

    /// Billed and possibly billed dollars, at today's price for unpriced requests.
    fn may_be_billed(&self) -> Dollars {
        let unpriced = self.unpriced_at(&PRICES[self.price]);
        let mut all = self.billed.plus(unpriced.unwrap_or_default());
        for sent in &self.in_flight {
            all = all.plus(self.worth(&sent.bound, sent.price));
        }
        for row in self.batch.iter().filter(|row| row.bill.is_none()) {
            all = all.plus(self.worth(&row.bound, row.price));
        }
        all
    }

    fn unpriced_at(&self, price: &Price) -> Option<Dollars> {
        let usage = Usage {
            prompt_tokens: self.unpriced.prompt,
            completion_tokens: self.unpriced.completion,
            ..Usage::default()
        };
        price::cost(&usage, price).map(Dollars::at_most)
    }

    /// The most that a request can cost which was sent at that price.
    fn worth(&self, bound: &TokenBound, sent_at: usize) -> Dollars {
        let price = match PRICES[sent_at].output {
            Some(_) => &PRICES[sent_at],
            None => &PRICES[self.price],
        };
        bound.cost(price).map_or(Dollars::ZERO, Dollars::at_most)
    }

    /// The endpoint bills a share of a bound.
    fn bill(&mut self, bound: &TokenBound, sent_at: usize, share: f64) -> Usage {
        let part = |tokens: u64| (tokens as f64 * share) as u64;
        let usage = Usage {
            prompt_tokens: part(bound.input_tokens),
            completion_tokens: part(bound.output_tokens),
            ..Usage::default()
        };
        match price::cost(&usage, &PRICES[sent_at]) {
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

    /// Lets the process use its account. False if that failed, of which it may die.
    fn run(&mut self, what: impl FnOnce(&mut Account<FaultyStore>) -> anyhow::Result<()>) -> bool {
        let Some(account) = &mut self.process else {
            return false;
        };
        let store = account.store();
        (store.disk, store.fault) = (std::mem::take(&mut self.disk), self.fault);
        let result = what(account);
        let store = account.store();
        (self.disk, self.fault) = (std::mem::take(&mut store.disk), store.fault);
        if result.is_err() && !self.survives() {
            self.die();
        }
        result.is_ok()
    }

    /// Writes fail, and the process lives.
    fn survives(&self) -> bool {
        matches!(self.fault, Some(Fault::Error(_)))
    }

    fn die(&mut self) {
        self.process = None;
        self.fault = None;
        self.abandon();
    }

    /// Nobody waits any more for what was in flight: the endpoint bills all of it.
    fn abandon(&mut self) {
        for sent in std::mem::take(&mut self.in_flight) {
            self.bill(&sent.bound, sent.price, 1.0);
        }
    }

    fn step(&mut self, event: &Event) {
        match event {
            Event::Open if self.process.is_none() => self.open(),
            Event::Send(input, output) => self.send(*input, *output),
            Event::Reply(which, reply, at_once) if !self.in_flight.is_empty() => {
                let which = which % self.in_flight.len();
                self.reply(which, *reply, *at_once);
            }
            Event::Batch(rows, tokens) => self.make_batch(*rows, *tokens),
            Event::Row(reply) => self.row(*reply),
            Event::Tick => drop(self.run(Account::tick)),
            Event::Close => {
                let left = self.in_flight.len() as u64;
                self.run(|account| account.close(left));
                if self.process.is_some() {
                    self.die();
                }
            }
            Event::Fault(fault) => self.fault = *fault,
            // A config is read when a process begins.
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
            assert!(self.survives());
            return;
        };
        // The journal of the batches brings what is held for them.
        for row in &self.batch {
            account.hold_for_batch(row.held);
        }
        self.disk = std::mem::take(&mut account.store().disk);
        self.process = Some(account);
        self.price_the_unpriced();
        self.run(|account| account.expect_in_flight(8));
    }

    /// Opening does not die: what a process does then is like the first thing that another one does.
    fn store(&self) -> FaultyStore {
        FaultyStore {
            fault: self.fault.filter(|_| self.survives()),
            ..self.disk.open()
        }
    }

    /// The first price that an account is opened with holds for what had none.
    fn price_the_unpriced(&mut self) {
        if let Some(usd) = self.unpriced_at(&PRICES[self.price]) {
            self.billed = self.billed.plus(usd);
            self.unpriced = UnpricedTokens::default();
        }
    }

    /// A budget needs a price: without one the run is refused.
    fn cap(&self) -> Option<f64> {
        CAPS[self.cap].filter(|_| PRICES[self.price].output.is_some())
    }

    fn send(&mut self, input_tokens: u64, output_tokens: u64) {
        let bound = TokenBound {
            input_tokens,
            output_tokens,
        };
        let price = self.price;
        let (mut is_sent, mut amount) = (false, Reservation::default());
        let lives = self.run(|account| {
            amount = account.bound(&bound, &PRICES[price]);
            is_sent = account.reserve(&amount)?;
            Ok(())
        });
        if is_sent && lives {
            self.in_flight.push(Sent {
                bound,
                amount,
                price,
            });
            if let Some(cap) = self.cap() {
                let most = self.may_be_billed();
                assert!(
                    most <= Dollars::at_most(cap),
                    "{most} may be billed of {cap}"
                );
            }
        }
    }

    fn reply(&mut self, which: usize, reply: Reply, at_once: bool) {
        let Sent {
            bound,
            amount,
            price,
        } = self.in_flight.remove(which);
        let bill = self.bill_of(&bound, price, reply);
        let lives = self.run(|account| {
            account.settle(&amount, bill, &PRICES[price]);
            if at_once { account.flush() } else { Ok(()) }
        });
        if lives && let Charge::Measured(usage) = bill {
            let usd = price::cost(&usage, &PRICES[price]).unwrap_or(0.0);
            self.cached = self.cached.plus(Dollars::at_most(usd));
        }
    }

    fn bill_of(&mut self, bound: &TokenBound, price: usize, reply: Reply) -> Charge {
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
        // The journal of a batch is written before the batch is submitted.
        if PRICES[self.price].output.is_none() || self.survives() {
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
        let all = (0..rows).fold(Dollars::ZERO, |sum, _| sum.plus(held));
        if all > account.remaining() {
            return;
        }
        account.hold_for_batch(all);
        self.batch.extend((0..rows).map(|_| Row {
            bound,
            held,
            price,
            bill: None,
        }));
    }

    fn row(&mut self, reply: Reply) {
        if self.process.is_none() {
            return;
        }
        let Some(row) = self.batch.pop() else {
            return;
        };
        let bill = match row.bill {
            Some(bill) => bill,
            None => self.bill_of(&row.bound, row.price, reply),
        };
        let price = &PRICES[row.price];
        if !self.run(|account| account.settle_batch(row.held, row.held, 1, bill, price)) {
            self.die();
            // The row has no record: the next process holds its amount, and gets the same reply.
            self.batch.push(Row {
                bill: Some(bill),
                ..row
            });
        }
    }

    fn merge(&mut self, cents: u64) {
        if self.process.is_some() || self.survives() {
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

    /// What is reserved is what is in flight, no more.
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
            let free = cap.minus(account.spent().total().plus(reserved));
            assert_eq!(account.remaining(), free);
        }
    }

    /// What the files say after a kill covers all that may be billed; the batches' journal has its own.
    fn check(&self) {
        let held = self
            .batch
            .iter()
            .fold(Dollars::ZERO, |sum, row| sum.plus(row.held));
        let price = &PRICES[self.price];
        let floor = self.floor();
        let known = after_a_kill(
            &self.disk,
            CAPS[self.cap].unwrap_or(f64::MAX),
            price,
            &floor,
        );
        let known = known.total().plus(held);
        let most = self.may_be_billed();
        // Each amount is rounded once on its way.
        let slack = Dollars::at_least(1e-9);
        assert!(
            most <= known.plus(slack),
            "{most:?} may be billed, {known:?} is on the disk"
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
        (0usize..4, any::<bool>()).prop_map(|(writes, is_made)| Fault::Crash(writes, is_made)),
        any::<bool>().prop_map(Fault::Error),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Open),
        8 => (0u64..100_000, 1u64..200_000).prop_map(|(input, output)| Event::Send(input, output)),
        8 => (any::<usize>(), reply(), any::<bool>())
            .prop_map(|(which, reply, at_once)| Event::Reply(which, reply, at_once)),
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
        let mut world = World::new();
        for event in &events {
            world.step(event);
            world.check_process();
            world.check();
        }
    }
}
