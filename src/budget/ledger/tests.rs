//! Tests of [`super`]: the ledger's files.

use super::*;
use crate::budget::account::Account;
use crate::config::Price;

fn usd(usd: f64) -> Dollars {
    Dollars::at_least(usd)
}

fn open(dir: &tempfile::TempDir) -> (LedgerFiles, Ledger) {
    let (files, ledger, _) = LedgerFiles::open(dir.path()).unwrap();
    (files, ledger)
}

fn measured(amount: f64) -> Spent {
    Spent {
        measured_usd: usd(amount),
        ..Spent::default()
    }
}

#[test]
fn log_entries_count_once_after_a_kill_at_any_point() {
    let dir = tempfile::tempdir().unwrap();
    let open = || LedgerFiles::open(dir.path()).unwrap();
    let (mut files, ledger, has_measured_cost) = open();
    assert_eq!((ledger.spent, has_measured_cost), (Spent::default(), false));
    files.append(&measured(0.25)).unwrap();
    files.append(&measured(0.5)).unwrap();
    drop(files);

    let (mut files, mut ledger, _) = open();
    assert_eq!(ledger.spent.measured_usd, usd(0.75));
    files.save(&ledger).unwrap();
    files.append(&measured(1.0)).unwrap();
    ledger.spent.add(&measured(1.0));
    drop(files);
    // A kill during `append` leaves an incomplete line.
    crate::fs::append(&log_path(dir.path(), 1), b"{\"measured_usd\":0.").unwrap();
    let (_files, reopened, has_measured_cost) = open();
    assert_eq!((reopened.spent, has_measured_cost), (ledger.spent, true));
    assert!(!log_path(dir.path(), 0).exists());
}

#[test]
fn removed_or_replaced_ledger_files_are_written_again() {
    type Tamper = fn(&Path);
    let cases: [Tamper; 3] = [
        |dir| std::fs::remove_file(log_path(dir, 1)).unwrap(),
        |dir| std::fs::remove_file(ledger_path(dir)).unwrap(),
        |dir| {
            let path = log_path(dir, 1);
            std::fs::rename(&path, dir.join("mine")).unwrap();
            std::fs::write(&path, "").unwrap();
        },
    ];
    for tamper in cases {
        let dir = tempfile::tempdir().unwrap();
        let (files, ledger) = open(&dir);
        let floor = Spent::default();
        let opened = Account::open(files, ledger, None, &Price::default(), &floor);
        let mut account = opened.unwrap().0;
        account.add_spent(&measured(0.5)).unwrap();
        assert!(account.store().is_in_place());
        tamper(dir.path());
        assert!(!account.store().is_in_place());
        account.tick().unwrap();
        account.add_spent(&measured(0.25)).unwrap();
        drop(account);
        let (_files, ledger) = open(&dir);
        assert_eq!(ledger.spent.measured_usd, usd(0.75));
    }
}

#[test]
fn log_of_a_deleted_ledger_is_not_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut files, ledger) = open(&dir);
    files.save(&ledger).unwrap();
    files.append(&measured(5.0)).unwrap();
    drop(files);
    std::fs::remove_file(ledger_path(dir.path())).unwrap();
    let (mut files, ledger) = open(&dir);
    files.save(&ledger).unwrap();
    files.append(&measured(0.5)).unwrap();
    drop(files);
    let (_files, ledger) = open(&dir);
    assert_eq!(ledger.spent.measured_usd, usd(0.5));
}

#[test]
fn ledger_lock_admits_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let first = LedgerFiles::open(dir.path()).unwrap();
    let error = LedgerFiles::open(dir.path()).err().unwrap();
    assert!(error.to_string().contains("another process"), "{error}");
    drop(first);
    assert!(LedgerFiles::open(dir.path()).is_ok());
}

#[test]
fn settle_kill_counts_the_bound_in_flight_up_to_the_budget() {
    let mut ledger = Ledger {
        in_flight: InFlight {
            requests: 32,
            usd: usd(0.5),
            budget_usd: Some(usd(2.0)),
            ..InFlight::default()
        },
        spent: measured(1.0),
        ..Ledger::default()
    };
    let mut near_cap = ledger.clone();
    assert_eq!(ledger.settle_kill().requests, 32);
    assert_eq!(
        (ledger.spent.estimated_usd, ledger.attempts_lost),
        (usd(0.5), 32)
    );
    assert_eq!(ledger.settle_kill(), InFlight::default());
    near_cap.spent = measured(1.7);
    assert_eq!(near_cap.settle_kill().usd, usd(2.0).minus(usd(1.7)));
}

#[test]
fn older_ledger_is_read_and_damaged_or_newer_ledger_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(ledger_path(dir.path()), text).unwrap();
    write(
        r#"{"version":1,"in_flight":{"requests":3,"usd":0.5,"budget_usd":null},"estimated_usd":0.25,"attempts_lost":4,"day":{}}"#,
    );
    let (files, ledger, has_measured_cost) = LedgerFiles::open(dir.path()).unwrap();
    assert_eq!(
        (
            ledger.spent.estimated_usd,
            ledger.in_flight.requests,
            has_measured_cost
        ),
        (usd(0.25), 3, false)
    );
    drop(files);
    for (text, part) in [
        ("{\"version\":", "damaged"),
        (
            r#"{"version":2,"measured_usd":1.0,"estimated_usd":-5.0,"in_flight":{}}"#,
            "negative",
        ),
        (
            r#"{"version":2,"measured_usd":1.0,"estimated_usd":0.0,"in_flight":{"usd":-5.0}}"#,
            "negative",
        ),
        (
            r#"{"version":2,"measured_usd":1.0,"estimated_usd":0.0,"in_flight":{"budget_usd":-5.0}}"#,
            "negative",
        ),
        ("{}", "it has no version"),
        (r#"{"version":2}"#, "missing field"),
        (
            r#"{"version":2,"measured_usd":1.0,"in_flight":{}}"#,
            "missing field `estimated_usd`",
        ),
        (
            r#"{"version":2,"estimated_usd":0.0,"in_flight":{}}"#,
            "missing field `measured_usd`",
        ),
        (
            r#"{"version":2,"measured_usd":1.0,"estimated_usd":0.0}"#,
            "missing field `in_flight`",
        ),
        ("[]", "damaged"),
        ("", "damaged"),
        (r#"{"version":9}"#, "update distill"),
    ] {
        write(text);
        let error = LedgerFiles::open(dir.path()).err().unwrap();
        assert_eq!(Exit::code_of(&error), 5, "{text}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn log_line_without_amounts_is_damage() {
    for line in ["{}", "[]", r#"{"measured_usd":1.0}"#] {
        let dir = tempfile::tempdir().unwrap();
        let (mut files, ledger) = open(&dir);
        files.save(&ledger).unwrap();
        files.append(&measured(0.5)).unwrap();
        drop(files);
        crate::fs::append(&log_path(dir.path(), 1), format!("{line}\n").as_bytes()).unwrap();
        let error = LedgerFiles::open(dir.path()).err().unwrap();
        assert_eq!(Exit::code_of(&error), 5, "{line}: {error}");
    }
}
