//! Exhaustive search over the interleavings of two processes with four requests, with a crash or a lost reply at every
//! step. The account is the real one; its files and the endpoint are simulated.

use std::collections::HashSet;

use distill::budget::account::{Account, Charge};
use distill::budget::dollars::Dollars;
use distill::budget::ledger::Spent;
use distill::budget::price::TokenBound;
use distill::cache::usage::Usage;

use super::{Disk, Fault, FaultyStore, PRICE, dollars, spent_after_kill};

/// Upper bounds of the costs of the requests, in dollars. Their sum exceeds the cap.
const BOUNDS: [u64; 4] = [3, 3, 2, 2];
const CAP: u64 = 7;

/// Maximum number of attempts of each request.
const MAX_ATTEMPTS: u8 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Request {
    Waiting,
    /// Sent by the process of this index.
    InFlight {
        process: usize,
        is_billed: bool,
    },
    Answered,
}

#[derive(Debug, Clone)]
struct World {
    disk: Disk,
    /// Accounts of the processes. At most one is open at a time, because of the lock.
    processes: [Option<Account<FaultyStore>>; 2],
    requests: [Request; 4],
    /// Number of attempts of each request.
    attempts: [u8; 4],
    /// Number of attempts of each request whose reply was lost and that may be billed later.
    lost: [u8; 4],
    billed: Dollars,
}

/// The part of a world on which all later steps depend. Worlds with equal keys are searched once.
type Key = (
    (Spent, Spent, Dollars),
    [Option<(Spent, Dollars)>; 2],
    [Request; 4],
    ([u8; 4], [u8; 4]),
    Dollars,
);

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The process of this index opens the account.
    Open(usize),
    /// A process (first index) sends a request (second index).
    Send(usize, usize),
    /// The endpoint bills the request: its full bound (if true), or one dollar.
    Bill(usize, bool),
    /// The endpoint bills an attempt whose reply was lost.
    BillLost(usize),
    /// The endpoint replies to a billed request, with usage (if true) or without. It refuses a request that is not
    /// billed.
    Answer(usize, bool),
    /// The reply is lost.
    Lose(usize),
    /// The process closes the account and ends.
    Close(usize),
    /// The process ends without closing the account.
    Kill(usize),
}

impl World {
    fn new() -> World {
        World {
            disk: Disk::default(),
            processes: [None, None],
            requests: [Request::Waiting; 4],
            attempts: [0; 4],
            lost: [0; 4],
            billed: Dollars::ZERO,
        }
    }

    /// Returns the steps that can follow.
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
                        self.requests[request] == Request::Waiting
                            && self.attempts[request] < MAX_ATTEMPTS
                    });
                    // Requests with equal bounds are sent in their order, because another order leads to the same
                    // states.
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

    /// Returns every world that a step can lead to: the step succeeds, or the process crashes at one of its writes.
    fn successors(&self, step: Step) -> Vec<World> {
        let crashes =
            (0..2).flat_map(|write| [Fault::Crash(write, false), Fault::Crash(write, true)]);
        let crashes = std::iter::once(None).chain(crashes.map(Some));
        let mut worlds = Vec::new();
        for crash in crashes {
            let mut world = self.clone();
            let has_crashed = world.take(step, crash);
            if crash.is_none() || has_crashed {
                worlds.push(world);
            }
        }
        worlds
    }

    /// Takes a step. Returns true if a process crashed or was killed.
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
                        // `Account::open` has consumed the store, so a write that reached the disk is made again.
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
                let has_crashed = self.run(process, crash, |account| {
                    let amount = account.bound(&bound(request), &PRICE);
                    is_sent = account.reserve(&amount)?;
                    Ok(())
                });
                if is_sent && !has_crashed {
                    self.requests[request] = Request::InFlight {
                        process,
                        is_billed: false,
                    };
                    self.attempts[request] += 1;
                }
                has_crashed
            }
            Step::Bill(request, is_full) => {
                let amount = if is_full { BOUNDS[request] } else { 1 };
                self.billed = self.billed.plus(dollars(amount));
                if let Request::InFlight { is_billed, .. } = &mut self.requests[request] {
                    *is_billed = true;
                }
                // The reported usage must equal the billed amount, so a request that is billed in part is answered in
                // the same step.
                if !is_full {
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
                let (charge, next) = match (is_billed, has_usage) {
                    (true, true) => (Charge::Measured(usage(BOUNDS[request])), Request::Answered),
                    (true, false) => (Charge::Answered(bound(request)), Request::Answered),
                    (false, _) => (Charge::Nothing, Request::Waiting),
                };
                self.settle(request, charge, crash, next)
            }
            Step::Lose(request) => {
                let Request::InFlight { is_billed, .. } = self.requests[request] else {
                    unreachable!()
                };
                self.lost[request] += u8::from(!is_billed);
                self.settle(request, Charge::Possible, crash, Request::Waiting)
            }
            Step::Close(process) => {
                let in_flight = self.abandon_requests(process);
                let has_crashed = self.run(process, crash, |account| account.close(in_flight));
                self.processes[process] = None;
                has_crashed
            }
            Step::Kill(process) => {
                self.abandon_requests(process);
                self.processes[process] = None;
                true
            }
        }
    }

    /// Settles a request and writes the amount to the log, as the dispatcher does. Returns true if the process crashed.
    fn settle(
        &mut self,
        request: usize,
        charge: Charge,
        crash: Option<Fault>,
        next: Request,
    ) -> bool {
        let Request::InFlight { process, .. } = self.requests[request] else {
            unreachable!()
        };
        self.requests[request] = next;
        self.run(process, crash, |account| {
            let amount = account.bound(&bound(request), &PRICE);
            account.settle(&amount, charge, &PRICE);
            account.flush()
        })
    }

    /// Calls `operation` with the account of a process. Returns true if the process crashed.
    fn run(
        &mut self,
        process: usize,
        crash: Option<Fault>,
        operation: impl FnOnce(&mut Account<FaultyStore>) -> anyhow::Result<()>,
    ) -> bool {
        let account = self.processes[process].as_mut().unwrap();
        let store = account.store();
        (store.disk, store.fault) = (std::mem::take(&mut self.disk), crash);
        let has_crashed = operation(account).is_err();
        self.disk = std::mem::take(&mut account.store().disk);
        if has_crashed {
            self.abandon_requests(process);
            self.processes[process] = None;
        }
        has_crashed
    }

    /// Counts the replies that a process waits for as lost. Returns their number.
    fn abandon_requests(&mut self, process: usize) -> u64 {
        let mut abandoned = 0;
        for request in 0..4 {
            if let Request::InFlight {
                process: sender,
                is_billed,
            } = self.requests[request]
                && sender == process
            {
                self.requests[request] = Request::Waiting;
                self.lost[request] += u8::from(!is_billed);
                abandoned += 1;
            }
        }
        abandoned
    }

    /// Returns the billed dollars, plus the upper bound of the dollars that may be billed later.
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

    /// Checks that the amount that may be billed is within the cap, within the account, and within the files.
    fn check(&self) {
        let billable = self.may_be_billed();
        assert!(
            billable <= dollars(CAP),
            "{billable} may be billed of {CAP}: {self:#?}"
        );
        for account in self.processes.iter().flatten() {
            let covered = dollars(CAP).minus(account.remaining());
            assert!(
                billable <= covered,
                "{billable} may be billed, {covered} is spent and reserved: {self:#?}"
            );
        }
        let on_disk = spent_after_kill(&self.disk, CAP as f64, &PRICE, &Spent::default()).total();
        assert!(
            billable <= on_disk,
            "{billable} may be billed, {on_disk} is on the disk: {self:#?}"
        );
        assert!(on_disk <= dollars(CAP), "{self:#?}");
    }

    /// Returns the part of the world on which all later steps depend.
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
            (self.attempts, self.lost),
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
    let mut visited = HashSet::new();
    let mut pending = vec![World::new()];
    visited.insert(pending[0].key());
    let mut transitions = 0u64;
    while let Some(world) = pending.pop() {
        world.check();
        for step in world.steps() {
            for next in world.successors(step) {
                transitions += 1;
                if visited.insert(next.key()) {
                    pending.push(next);
                }
            }
        }
    }
    println!("{} states, {transitions} transitions", visited.len());
    assert!(visited.len() > 10_000, "{} states", visited.len());
}
