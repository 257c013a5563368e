//! The rate-limit script that runs in Redis, compared with a reference model.
//!
//! The script reads the clock of the server. The tests replace this call in its source, and pass the time as arguments.

use proptest::prelude::*;
use redis::{Connection, Script};

use super::server::Redis;

const SCRIPT: &str = include_str!("../../../../src/rate_limit/redis/admit.lua");
/// A minute in picoseconds.
const MINUTE_PS: u64 = 60_000_000_000_000;
/// Resolution of the daily limit: five minutes in microseconds.
const SLOT_US: u64 = 300_000_000;
/// A day in microseconds.
const DAY_US: u64 = 86_400_000_000;

/// Bursts per minute: a burst has three quarters of one second's amount.
const BURSTS_PER_MINUTE: u64 = 80;

/// Wall-clock time at which the tests start, in microseconds since 1970.
const START_US: u64 = 1_800_000_000_000_000;

/// Returns the script with its clock replaced by two arguments: seconds, and microseconds of the second.
fn script_with_given_time() -> Script {
    let clock = "redis.call('TIME')";
    assert_eq!(SCRIPT.matches(clock).count(), 1);
    Script::new(&SCRIPT.replace(clock, "{ ARGV[12], ARGV[13] }"))
}

/// Arguments of a call of the script.
#[derive(Debug, Clone, Copy)]
struct Call {
    /// Number of requests for which permits are wanted.
    wanted: u64,
    /// Tokens of each request.
    each: u64,
    /// Permits that the process holds: requests and tokens.
    held: [u64; 2],
    limits: Limits,
}

/// Limits of a process; 0 for none.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Requests and tokens per minute.
    per_minute: [u64; 2],
    /// Tokens of the largest request.
    largest: u64,
    /// Requests per day.
    per_day: u64,
}

impl Limits {
    /// Returns the interval, the burst and the largest request of a bucket (0: requests, 1: tokens) in picoseconds.
    fn bucket(&self, index: usize) -> [u64; 3] {
        match self.per_minute[index] {
            0 => [0; 3],
            limit => {
                let interval = MINUTE_PS.div_ceil(limit);
                let largest = [1, self.largest][index];
                [
                    interval,
                    limit / BURSTS_PER_MINUTE * interval,
                    largest * interval,
                ]
            }
        }
    }
}

/// Calls the script with keys that begin with `prefix`. Returns the charged requests and tokens, and the wait in
/// microseconds.
fn call_script(
    redis: &mut Connection,
    script: &Script,
    prefix: &str,
    microseconds: u64,
    call: &Call,
) -> [u64; 3] {
    let mut invocation = script.prepare_invoke();
    for name in ["requests", "tokens", "day"] {
        invocation.key(format!("{prefix}:{name}"));
    }
    let Call {
        wanted,
        each,
        held,
        limits,
    } = call;
    invocation.arg(&[*wanted, *each, held[0], held[1]]);
    for index in [0, 1] {
        invocation.arg(&limits.bucket(index));
    }
    invocation.arg(limits.per_day);
    invocation.arg(&[microseconds / 1_000_000, microseconds % 1_000_000]);
    invocation.invoke(redis).unwrap()
}

/// Reference model. Limits per minute: GCRA (generic cell rate algorithm) with theoretical arrival times, one request
/// at a time. Daily limit: a list of all admitting calls.
#[derive(Default)]
struct Model {
    buckets: [Option<TheoreticalArrival>; 2],
    /// Slot of each admitting call, and the number of requests that it charged.
    day: Vec<(u64, u64)>,
}

/// Times in picoseconds.
#[derive(Clone, Copy)]
struct TheoreticalArrival {
    at: i128,
    written: i128,
    largest: i128,
}

impl Model {
    /// Returns the same values as [`call_script`].
    fn call(&mut self, microseconds: u64, call: &Call) -> [u64; 3] {
        let now = i128::from(microseconds) * 1_000_000;
        let Call { each, limits, .. } = *call;
        let amounts = [1, i128::from(each)];
        let held = call.held.map(i128::from);
        // Interval, tolerance, and the current theoretical arrival time.
        let mut buckets = [None; 2];
        for index in [0, 1] {
            let [interval, burst, largest] = limits.bucket(index).map(i128::from);
            if interval == 0 || amounts[index] == 0 {
                continue;
            }
            let mut arrival = self.buckets[index].unwrap_or(TheoreticalArrival {
                at: now,
                written: now,
                largest,
            });
            arrival.largest = arrival.largest.max(largest);
            // A wait that was computed before the clock was set back keeps its length.
            arrival.at -= (arrival.written - now).max(0);
            arrival.at = arrival.at.max(now);
            buckets[index] = Some((interval, (burst - arrival.largest).max(0), arrival));
        }
        let newest = self.day.iter().map(|(slot, _)| *slot).max().unwrap_or(0);
        let slot = newest.max(microseconds / SLOT_US);
        let within_a_day: Vec<_> = self
            .day
            .iter()
            .filter(|(earlier, count)| earlier + DAY_US / SLOT_US >= slot && *count > 0)
            .collect();
        let admitted_today: u64 = within_a_day.iter().map(|(_, count)| count).sum();

        let (mut admitted, mut wait) = (0, 0);
        while admitted < call.wanted {
            let mut waits = Vec::new();
            for index in [0, 1] {
                let Some((interval, tolerance, arrival)) = buckets[index] else {
                    continue;
                };
                let before = i128::from(admitted) * amounts[index] - held[index];
                let early = arrival.at + before * interval - tolerance - now;
                if early > 0 {
                    waits.push((early as u128).div_ceil(1_000_000) as u64);
                }
            }
            if limits.per_day > 0 && admitted_today + admitted >= limits.per_day + call.held[0] {
                let slots = within_a_day.iter().map(|(slot, _)| *slot);
                let oldest = slots.min().unwrap_or(slot);
                waits.push((oldest + 1) * SLOT_US + DAY_US - microseconds);
            }
            if let Some(longest) = waits.into_iter().max() {
                wait = longest;
                break;
            }
            admitted += 1;
        }
        if admitted == 0 {
            return [0, 0, wait];
        }
        let charged = [
            admitted.saturating_sub(call.held[0]),
            (admitted * each).saturating_sub(call.held[1]),
        ];
        for index in [0, 1] {
            if let Some((interval, _, mut arrival)) = buckets[index] {
                arrival.at += i128::from(charged[index]) * interval;
                arrival.written = now;
                self.buckets[index] = Some(arrival);
            }
        }
        if limits.per_day > 0 {
            self.day.push((slot, charged[0]));
        }
        [charged[0], charged[1], 0]
    }
}

/// Generates no limit (0), a small one, or any below `end`.
fn limit(end: u64) -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..100u64.min(end), 1..end]
}

/// Generates two processes with equal limits and prompts of different lengths.
fn processes() -> impl Strategy<Value = [Limits; 2]> {
    (
        limit(100_000),
        limit(4_000_000_000),
        limit(500),
        1..2_000u64,
        1..2_000u64,
    )
        .prop_map(|(requests, tokens, per_day, first, second)| {
            [first, second].map(|largest| Limits {
                per_minute: [requests, tokens],
                largest: match tokens {
                    0 => largest,
                    _ => largest.min(tokens),
                },
                per_day,
            })
        })
}

/// A random call of the script.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// Index of the process.
    process: usize,
    /// Microseconds since the last call; negative if the clock was set back.
    elapsed: i64,
    /// Number of requests.
    wanted: u64,
    /// Tokens of each request, in percent of the largest one.
    size_percent: u64,
    /// Permits that the process holds.
    held: [u64; 2],
}

fn step() -> impl Strategy<Value = Step> {
    let elapsed = prop_oneof![
        0..2_000i64,
        0..2_000_000i64,
        0..90_000_000i64,
        0..7_200_000_000i64,
        0..180_000_000_000i64,
        -2_000_000..0i64,
    ];
    let held = prop_oneof![Just([0, 0]), [0..5u64, 0..3_000u64]];
    (0..2usize, elapsed, 1..65u64, 0..=100u64, held).prop_map(
        |(process, elapsed, wanted, size_percent, held)| Step {
            process,
            elapsed,
            wanted,
            size_percent,
            held,
        },
    )
}

#[test]
fn redis_script_matches_reference_model() {
    let redis = Redis::start();
    let script = script_with_given_time();
    let config = ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let connection = std::cell::RefCell::new((redis.connect(), 0));
    proptest!(config, |(processes in processes(), steps in prop::collection::vec(step(), 1..60))| {
        let (redis, case) = &mut *connection.borrow_mut();
        *case += 1;
        let mut model = Model::default();
        let mut now = START_US;
        for Step { process, elapsed, wanted, size_percent, held } in steps {
            now = now.saturating_add_signed(elapsed);
            let limits = processes[process];
            let each = limits.largest * size_percent / 100;
            let call = Call { wanted, each, held, limits };
            let result = call_script(redis, &script, &format!("{{{case}}}"), now, &call);
            prop_assert_eq!(result, model.call(now, &call), "{:?} at {}", call, now);
        }
    });
}

/// Returns the send times of at least `count` requests in microseconds, if each one is sent as soon as it is admitted.
fn send_times(redis: &Redis, limits: Limits, each: u64, count: usize) -> Vec<u64> {
    let (mut connection, script) = (redis.connect(), script_with_given_time());
    let mut now = START_US;
    let mut times = Vec::new();
    while times.len() < count {
        let call = Call {
            wanted: 64,
            each,
            held: [0, 0],
            limits,
        };
        let [requests, tokens, wait] = call_script(&mut connection, &script, "{x}", now, &call);
        assert_eq!(tokens, requests * each);
        times.extend(std::iter::repeat_n(now, requests as usize));
        now += wait;
    }
    times
}

/// Returns the largest number of times within any window of this length.
fn busiest_window(times: &[u64], length: u64) -> usize {
    let counts = times.iter().enumerate().map(|(first, start)| {
        let end = times.partition_point(|time| *time < start + length);
        end - first
    });
    counts.max().unwrap()
}

#[test]
fn redis_script_respects_and_exhausts_minute_limit() {
    // Limits of requests and tokens, tokens of each request and of the largest one, and the resulting limit in
    // requests per minute with its burst in requests.
    for (per_minute, each, largest, limit, burst) in [
        ([1, 0], 10, 10, 1, 1),
        ([159, 0], 10, 10, 159, 1),
        ([700, 0], 10, 10, 700, 8),
        // 60,000 tokens are 600 requests.
        ([7_001, 60_000], 100, 100, 600, 7),
        ([0, 60_000], 100, 7_000, 600, 70),
    ] {
        let redis = Redis::start();
        let limits = Limits {
            per_minute,
            largest,
            per_day: 0,
        };
        let times = send_times(&redis, limits, each, 3 * limit);
        let requests = busiest_window(&times, 60_000_000);
        assert!(requests <= limit + burst, "{requests} of {limit}");
        let minutes = (times[times.len() - 1] - times[0]) as f64 / 60e6;
        assert!(minutes <= 3.0 && minutes > 1.9, "{limit}: {minutes}");
    }
}

#[test]
fn redis_script_respects_daily_limit() {
    let redis = Redis::start();
    let limits = Limits {
        per_minute: [10, 0],
        largest: 1,
        per_day: 300,
    };
    let times = send_times(&redis, limits, 1, 1_200);
    assert_eq!(busiest_window(&times, DAY_US), 300);
    let days = (times[1_199] - times[0]) as f64 / DAY_US as f64;
    assert!((3.0..3.1).contains(&days), "{days}");
    // The keys expire on the server.
    for name in ["requests", "day"] {
        let seconds: i64 = redis.command(&format!("TTL {{x}}:{name}"));
        assert!((60..=2 * 86_400).contains(&seconds), "{name}: {seconds}");
    }
}
