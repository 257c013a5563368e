//! Search over every interleaving of two processes with four requests, and a crash or a lost reply at every step.
//! The account is the real one; its files and the endpoint are simulated.

use std::collections::HashSet;

use distill::budget::account::{Account, Charge};
use distill::budget::dollars::Dollars;
use distill::budget::ledger::Spent;
use distill::budget::price::TokenBound;
use distill::cache::usage::Usage;

use super::{Disk, Fault, FaultyStore, PRICE, after_a_kill, dollars};

/// Bounds of the requests in dollars; together they exceed the cap.
const BOUNDS: [u64; 4] = [3, 3, 2, 2];
const CAP: u64 = 7;

/// Maximum number of times that a request is sent.
const SENDS: u8 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Request {
    Waiting,
    /// Sent by this process, and billed or not.
    InFlight {
        by: usize,
        is_billed: bool,
    },
    Answered,
}

#[derive(Debug, Clone)]
struct World {
    disk: Disk,
    /// At most one is open at a time, because of the lock.
    processes: [Option<Account<FaultyStore>>; 2],
    requests: [Request; 4],
    sends: [u8; 4],
    /// Number of attempts without a reply that may be billed later.
    lost: [u8; 4],
    billed: Dollars,
}

type Key = (
    (Spent, Spent, Dollars),
    [Option<(Spent, Dollars)>; 2],
    [Request; 4],
    ([u8; 4], [u8; 4]),
    Dollars,
);

#[derive(Debug, Clone, Copy)]
enum Step {
    Open(usize),
    Send(usize, usize),
    /// The endpoint bills the request: its full bound (if true), or one dollar.
    Bill(usize, bool),
    /// The endpoint bills an attempt whose reply was lost.
    BillLost(usize),
    /// The endpoint replies: with usage (if true) or without to a billed request, else with a refusal.
    Answer(usize, bool),
    /// The reply is lost.
    Lose(usize),
    Close(usize),
    Kill(usize),
}

impl World {
    fn new() -> World {
        World {
            disk: Disk::default(),
            processes: [None, None],
            requests: [Request::Waiting; 4],
            sends: [0; 4],
            lost: [0; 4],
            billed: Dollars::ZERO,
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for process in 0..2 {
            match &self.processes[process] {
                None if self.processes.iter().all(Option::is_none) => {
                    steps.push(Step::Open(process))
                }
                None => {}
                Some(_) => {
                    steps.extend([Step::Close(process), Step::Kill(process)]);
                    let waiting = (0..4).filter(|&request| {
                        self.requests[request] == Request::Waiting && self.sends[request] < SENDS
                    });
                    // Rows of the same kind leave in their order: the other order is the same state.
                    let is_next = |&request: &usize| {
                        (0..request).all(|other| {
                            BOUNDS[other] != BOUNDS[request]
                                || self.requests[other] != Request::Waiting
                        })
                    };
                    steps.extend(
                        waiting
                            .filter(is_next)
                            .map(|request| Step::Send(process, request)),
                    );
                }
            }
        }
        for request in 0..4 {
            match self.requests[request] {
                Request::InFlight {
                    is_billed: false, ..
                } => steps.extend([
                    Step::Bill(request, true),
                    Step::Bill(request, false),
                    Step::Answer(request, false),
                    Step::Lose(request),
                ]),
                Request::InFlight {
                    is_billed: true, ..
                } => steps.extend([
                    Step::Answer(request, true),
                    Step::Answer(request, false),
                    Step::Lose(request),
                ]),
                _ => {}
            }
            if self.lost[request] > 0 {
                steps.push(Step::BillLost(request));
            }
        }
        steps
    }

    /// Every world that a step can lead to: it goes well, or the process crash at one of its writes.
    fn after(&self, step: Step) -> Vec<World> {
        let deaths =
            (0..2).flat_map(|write| [Fault::Crash(write, false), Fault::Crash(write, true)]);
        let ways = std::iter::once(None).chain(deaths.map(Some));
        let mut worlds = Vec::new();
        for crash in ways {
            let mut world = self.clone();
            let has_died = world.take(step, crash);
            if crash.is_none() || has_died {
                worlds.push(world);
            }
        }
        worlds
    }

    /// Takes a step. True if a process died on the way.
    fn take(&mut self, step: Step, crash: Option<Fault>) -> bool {
        match step {
            Step::Open(process) => {
                let store = FaultyStore {
                    fault: crash,
                    ..self.disk.open()
                };
                let opened = Account::open(
                    store,
                    self.disk.read(),
                    Some(CAP as f64),
                    &PRICE,
                    &Spent::default(),
                );
                match opened {
                    Ok((account, _)) => {
                        self.processes[process] = Some(account);
                        self.run(process, None, |account| account.expect_in_flight(4))
                    }
                    Err(_) => {
                        // Whether the write was made can only be seen by making it.
                        if crash == Some(Fault::Crash(0, true)) {
                            let opened = Account::open(
                                self.disk.open(),
                                self.disk.read(),
                                Some(CAP as f64),
                                &PRICE,
                                &Spent::default(),
                            );
                            self.disk = std::mem::take(&mut opened.unwrap().0.store().disk);
                        }
                        true
                    }
                }
            }
            Step::Send(process, request) => {
                let mut is_sent = false;
                let died = self.run(process, crash, |account| {
                    let amount = account.bound(&bound(request), &PRICE);
                    is_sent = account.reserve(&amount)?;
                    Ok(())
                });
                if is_sent && !died {
                    self.requests[request] = Request::InFlight {
                        by: process,
                        is_billed: false,
                    };
                    self.sends[request] += 1;
                }
                died
            }
            Step::Bill(request, in_full) => {
                let amount = if in_full { BOUNDS[request] } else { 1 };
                self.billed = self.billed.plus(dollars(amount));
                if let Request::InFlight { is_billed, .. } = &mut self.requests[request] {
                    *is_billed = true;
                }
                // The usage that it will report must be what it billed: a bill in part is answered at once.
                if !in_full {
                    return self.settle(
                        request,
                        Charge::Measured(usage(1)),
                        crash,
                        Request::Answered,
                    );
                }
                false
            }
            Step::BillLost(request) => {
                self.lost[request] -= 1;
                self.billed = self.billed.plus(dollars(BOUNDS[request]));
                false
            }
            Step::Answer(request, has_usage) => {
                let Request::InFlight { is_billed, .. } = self.requests[request] else {
                    unreachable!()
                };
                let (bill, next) = match (is_billed, has_usage) {
                    (true, true) => (Charge::Measured(usage(BOUNDS[request])), Request::Answered),
                    (true, false) => (Charge::Answered(bound(request)), Request::Answered),
                    (false, _) => (Charge::Nothing, Request::Waiting),
                };
                self.settle(request, bill, crash, next)
            }
            Step::Lose(request) => {
                let Request::InFlight { is_billed, .. } = self.requests[request] else {
                    unreachable!()
                };
                self.lost[request] += u8::from(!is_billed);
                self.settle(request, Charge::Possible, crash, Request::Waiting)
            }
            Step::Close(process) => {
                let in_flight = self.leave(process);
                let died = self.run(process, crash, |account| account.close(in_flight));
                self.processes[process] = None;
                died
            }
            Step::Kill(process) => {
                self.leave(process);
                self.processes[process] = None;
                true
            }
        }
    }

    /// Settles a request, and writes it down, as the dispatcher does.
    fn settle(
        &mut self,
        request: usize,
        bill: Charge,
        crash: Option<Fault>,
        next: Request,
    ) -> bool {
        let Request::InFlight { by, .. } = self.requests[request] else {
            unreachable!()
        };
        self.requests[request] = next;
        self.run(by, crash, |account| {
            let amount = account.bound(&bound(request), &PRICE);
            account.settle(&amount, bill, &PRICE);
            account.flush()
        })
    }

    /// Lets a process do something to its account. True if it died of it.
    fn run(
        &mut self,
        process: usize,
        crash: Option<Fault>,
        what: impl FnOnce(&mut Account<FaultyStore>) -> anyhow::Result<()>,
    ) -> bool {
        let account = self.processes[process].as_mut().unwrap();
        let store = account.store();
        (store.disk, store.fault) = (std::mem::take(&mut self.disk), crash);
        let has_died = what(account).is_err();
        self.disk = std::mem::take(&mut account.store().disk);
        if has_died {
            self.leave(process);
            self.processes[process] = None;
        }
        has_died
    }

    /// Nobody waits any more for what a process has sent. Returns how much that is.
    fn leave(&mut self, process: usize) -> u64 {
        let mut left = 0;
        for request in 0..4 {
            if let Request::InFlight { by, is_billed } = self.requests[request]
                && by == process
            {
                self.requests[request] = Request::Waiting;
                self.lost[request] += u8::from(!is_billed);
                left += 1;
            }
        }
        left
    }

    /// Billed dollars, and the upper bound of those still in flight.
    fn may_be_billed(&self) -> Dollars {
        let in_flight = (0..4).filter(|&request| {
            matches!(
                self.requests[request],
                Request::InFlight {
                    is_billed: false,
                    ..
                }
            )
        });
        let in_flight = in_flight.map(|request| BOUNDS[request]);
        let lost = (0..4).map(|request| u64::from(self.lost[request]) * BOUNDS[request]);
        self.billed.plus(dollars(in_flight.chain(lost).sum()))
    }

    fn check(&self) {
        let most = self.may_be_billed();
        assert!(
            most <= dollars(CAP),
            "{most} may be billed of {CAP}: {self:#?}"
        );
        for account in self.processes.iter().flatten() {
            let covered = dollars(CAP).minus(account.remaining());
            assert!(
                most <= covered,
                "{most} may be billed, {covered} is spent and reserved: {self:#?}"
            );
        }
        let known = after_a_kill(&self.disk, CAP as f64, &PRICE, &Spent::default()).total();
        assert!(
            most <= known,
            "{most} may be billed, {known} is on the disk: {self:#?}"
        );
        assert!(known <= dollars(CAP), "{self:#?}");
    }

    /// All that what comes next depends on: not how many attempts were lost so far, say.
    fn key(&self) -> Key {
        let account = |account: &Account<FaultyStore>| (account.spent(), account.remaining());
        let processes = self
            .processes
            .each_ref()
            .map(|process| process.as_ref().map(account));
        (
            (
                self.disk.ledger.spent,
                self.disk.logged,
                self.disk.ledger.in_flight.usd,
            ),
            processes,
            self.requests,
            (self.sends, self.lost),
            self.billed,
        )
    }
}

fn bound(request: usize) -> TokenBound {
    TokenBound {
        input_tokens: 0,
        output_tokens: BOUNDS[request] * 1_000_000,
    }
}

fn usage(dollars: u64) -> Usage {
    Usage {
        completion_tokens: dollars * 1_000_000,
        ..Usage::default()
    }
}

#[test]
fn interleavings_of_two_processes_never_exceed_the_cap() {
    let mut seen = HashSet::new();
    let mut waiting = vec![World::new()];
    seen.insert(waiting[0].key());
    let mut transitions = 0u64;
    while let Some(world) = waiting.pop() {
        world.check();
        for step in world.steps() {
            for next in world.after(step) {
                transitions += 1;
                if seen.insert(next.key()) {
                    waiting.push(next);
                }
            }
        }
    }
    println!("{} states, {transitions} transitions", seen.len());
    assert!(seen.len() > 10_000, "{} states", seen.len());
}
