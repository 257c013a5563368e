use crate::harvest::health::*;

#[test]
fn outage_needs_several_failing_rows_and_ends_with_a_success() {
    let now = Instant::now();
    let mut health = EndpointHealth::new(now);
    for _ in 0..10 {
        health.failure(0, false, 2, Instant::now());
    }
    assert!(!health.is_outage());
    health.failure(1, true, 2, Instant::now());
    health.failure(2, true, 2, Instant::now());
    assert!(health.is_outage() && !health.never_replied());
    assert_eq!(health.probes(), 1);
    let later = now + Duration::from_secs(9);
    assert_eq!(health.time_without_success(later), Duration::from_secs(9));
    health.exclude_wait(Duration::from_secs(5));
    assert_eq!(health.time_without_success(later), Duration::from_secs(4));
    health.success(later, later);
    assert!(!health.is_outage() && health.probes() == 0);
    assert_eq!(health.time_without_success(later), Duration::ZERO);
}

#[test]
fn time_in_which_the_run_sent_nothing_is_not_an_outage() {
    let start = Instant::now();
    let at = |hours: u64| start + Duration::from_secs(3_600 * hours);
    let mut health = EndpointHealth::new(start);
    health.exclude_held_back(at(50) - start);
    assert_eq!(health.time_without_success(at(51)), at(1) - start);
    health.success(at(51), at(51));
    assert_eq!(health.time_without_success(at(53)), at(2) - start);
}

#[test]
fn next_plan_starts_without_the_failures_of_the_last_one() {
    let now = Instant::now();
    let mut health = EndpointHealth::new(now);
    for row in 0..4 {
        health.failure(row, false, 1, now);
        health.request_forbidden(row, now);
        health.endpoint_refused_before_answer(row);
    }
    assert!(health.is_outage() && health.suspects().count() > 0);
    let later = now + Duration::from_secs(9);
    health.begin_plan(later);
    assert_eq!(health.suspects().count(), 0);
    assert!(!health.is_outage() && !health.is_failing(0) && health.failures() == 0);
    assert_eq!(health.time_without_success(later), Duration::ZERO);
    // Only the fifth forbidden row of this plan reaches the threshold.
    assert!((0..4).all(|row| !health.request_forbidden(row, later)));
    assert!(!health.never_replied());
}

#[test]
fn row_fails_only_if_others_succeed_or_all_rows_have_failed() {
    let mut health = EndpointHealth::new(Instant::now());
    for _ in 0..6 {
        health.failure(0, false, 1, Instant::now());
    }
    assert!(health.may_be_endpoint_fault(6, 2));
    assert!(!health.may_be_endpoint_fault(6, 1), "all rows have failed");
    health.success(Instant::now(), Instant::now());
    health.failure(0, false, 1, Instant::now());
    assert!(!health.may_be_endpoint_fault(7, 2), "another row succeeded");
}

#[test]
fn answer_to_request_sent_before_outage_does_not_end_it() {
    let early = Instant::now();
    let mut health = EndpointHealth::new(early);
    for row in 0..5 {
        health.failure(row, false, 3, Instant::now());
    }
    health.success(early, Instant::now());
    assert!(health.is_outage());
    let later = Instant::now() + Duration::from_millis(1);
    health.success(later, later);
    assert!(!health.is_outage());
}

#[test]
fn outage_needs_all_requests_in_flight_to_fail() {
    let mut health = EndpointHealth::new(Instant::now());
    for row in 0..31 {
        health.failure(row, false, 32 - row, Instant::now());
    }
    assert!(!health.is_outage());
    health.failure(31, false, 1, Instant::now());
    assert!(health.is_outage());
}

#[test]
fn identical_first_refusals_stop_the_endpoint() {
    let mut health = EndpointHealth::new(Instant::now());
    for _ in 1..SAME_REFUSALS {
        assert!(!health.refused("no logprobs"));
    }
    assert!(health.refused("no logprobs"));
    assert!(!health.refused("too long"));
    health.success(Instant::now(), Instant::now());
    for _ in 0..10 {
        assert!(!health.refused("too long"));
    }
}

#[test]
fn concurrent_throttles_count_as_one_round() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut health = EndpointHealth::new(start);
    let rounds: Vec<u32> = (0..32).map(|_| health.throttled(start, at(1))).collect();
    assert_eq!(rounds, [1; 32]);
    assert_eq!(
        (
            health.throttled(at(2), at(3)),
            health.throttled(at(2), at(4))
        ),
        (2, 2)
    );
    // The answer to a request sent before the last round does not reset the count.
    health.success(at(1), at(5));
    assert_eq!(health.throttled(at(6), at(7)), 3);
    health.success(at(8), at(9));
    assert_eq!(health.throttled(at(10), at(11)), 1);
}

#[test]
fn identical_errors_stop_only_before_first_success() {
    let mut health = EndpointHealth::new(Instant::now());
    assert!((1..SAME_ERRORS).all(|_| !health.server_failed("500: no schema")));
    assert!(health.server_failed("500: no schema"));
    assert!(!health.server_failed("500: another"));
    health.success(Instant::now(), Instant::now());
    assert!((0..10).all(|_| !health.server_failed("500: no schema")));
    let forbade = |health: &mut EndpointHealth, row| health.request_forbidden(row, Instant::now());
    assert!((1..5).all(|row| !forbade(&mut health, row)) && !forbade(&mut health, 4));
    assert!(forbade(&mut health, 5));
    // An answer shows that only some rows are forbidden: the threshold doubles.
    health.success(Instant::now(), Instant::now());
    assert_eq!(health.contradictions(), 1);
    assert!((6..15).all(|row| !forbade(&mut health, row)));
    assert!(forbade(&mut health, 15));
}
