//! Tests of reservations, charges and the excess factor.

use crate::budget::account::*;
use crate::budget::ledger::ReadOnlyLedger;

const PRICE: Price = Price {
    input: Some(1.0),
    cached_input: None,
    output: Some(10.0),
    as_of: None,
};

fn account(cap: f64, ledger: Ledger, price: &Price) -> Account<ReadOnlyLedger> {
    let opened = Account::open(ReadOnlyLedger, ledger, Some(cap), price, &Spent::default());
    opened.unwrap().0
}

fn usage(prompt_tokens: u64, completion_tokens: u64) -> Usage {
    Usage {
        prompt_tokens,
        completion_tokens,
        ..Usage::default()
    }
}

#[test]
fn reservation_is_settled_by_the_charge() {
    let bound = TokenBound {
        input_tokens: 1_000,
        output_tokens: 900,
    };
    let mut account = account(0.025, Ledger::default(), &PRICE);
    let amount = account.bound(&bound, &PRICE);
    assert_eq!(amount.usd, Dollars::at_least(0.01));
    assert!(account.reserve(&amount).unwrap() && account.reserve(&amount).unwrap());
    assert!(
        !account.reserve(&amount).unwrap(),
        "a third reservation would exceed the cap"
    );
    account.settle(&amount, Charge::Nothing, &PRICE);
    assert!(account.reserve(&amount).unwrap());
    account.settle(&amount, Charge::Measured(usage(500, 100)), &PRICE);
    assert_eq!(account.spent().measured_usd, Dollars::at_least(0.0015));
    account.settle(&amount, Charge::Possible, &PRICE);
    assert_eq!(account.spent().estimated_usd, amount.usd);
    assert_eq!(account.remaining(), Dollars::at_most(0.0135));
    let half = TokenBound {
        input_tokens: 500,
        output_tokens: 10,
    };
    assert!(account.reserve(&amount).unwrap());
    account.settle(&amount, Charge::Answered(half), &PRICE);
    assert_eq!(account.spent().estimated_usd, Dollars::at_least(0.0106));
}

#[test]
fn excess_over_the_bound_raises_later_reservations_across_runs() {
    let bound = TokenBound {
        input_tokens: 0,
        output_tokens: 100,
    };
    let mut first = account(1.0, Ledger::default(), &PRICE);
    let amount = first.bound(&bound, &PRICE);
    assert!(first.reserve(&amount).unwrap());
    first.settle(&amount, Charge::Measured(usage(0, 150)), &PRICE);
    assert_eq!(first.bound(&bound, &PRICE).usd, amount.usd.times(1.5));
    let next = account(1.0, first.ledger.clone(), &PRICE);
    assert_eq!(next.bound(&bound, &PRICE).usd, amount.usd.times(1.5));
}

#[test]
fn equal_excess_of_many_requests_raises_the_factor_once() {
    let bound = TokenBound {
        input_tokens: 0,
        output_tokens: 100,
    };
    let mut account = account(1.0, Ledger::default(), &PRICE);
    let amount = account.bound(&bound, &PRICE);
    for _ in 0..32 {
        assert!(account.reserve(&amount).unwrap());
    }
    for _ in 0..32 {
        account.settle(&amount, Charge::Measured(usage(0, 150)), &PRICE);
    }
    assert_eq!(account.ledger.excess, 1.5);
    let raised = account.bound(&bound, &PRICE);
    assert!(account.reserve(&raised).unwrap());
    account.settle(&raised, Charge::Measured(usage(0, 150)), &PRICE);
    assert_eq!(
        account.ledger.excess, 1.5,
        "the raised reservation covers the cost"
    );
    let held = amount.usd.times(3.0);
    account.hold_for_batch(held);
    let charge = Charge::Measured(usage(0, 200));
    account
        .settle_batch(held, amount.usd, 1, charge, &PRICE)
        .unwrap();
    assert_eq!(account.ledger.excess, 2.0);
}

#[test]
fn tokens_spent_without_a_price_are_charged_at_the_first_price() {
    let bound = TokenBound {
        input_tokens: 1_000,
        output_tokens: 1_000,
    };
    let free = Price::default();
    let mut first = account(1.0, Ledger::default(), &free);
    let amount = first.bound(&bound, &free);
    assert!(first.reserve(&amount).unwrap() && first.reserve(&amount).unwrap());
    first.settle(&amount, Charge::Measured(usage(1_000, 100)), &free);
    assert_eq!(first.spent().total(), Dollars::ZERO);
    // The other request is in flight when the process is killed.
    let next = account(1.0, first.ledger.clone(), &PRICE);
    assert_eq!(next.spent().measured_usd, Dollars::at_least(0.002));
    // The first reservation was written ahead, with an upper bound that covers two requests.
    assert_eq!(next.spent().estimated_usd, Dollars::at_least(0.022));
    assert!(next.spent().measured_tokens.is_none() && next.spent().estimated_tokens.is_none());
}
