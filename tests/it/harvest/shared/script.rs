//! The Redis rate-limit script against a reference model.
//!
//! The script reads the time of the server; these tests replace that in its text by a given time.

use proptest::prelude::*;
use redis::{Connection, Script};

use super::server::Redis;

const SCRIPT: &str = include_str!("../../../../src/rate_limit/redis/admit.lua");
const MINUTE: u64 = 60_000_000_000_000;
const SLOT: u64 = 300_000_000;
const DAY: u64 = 86_400_000_000;

/// The script, run at times that the test chooses.
fn at_given_times() -> Script {
    let clock = "redis.call('TIME')";
    assert_eq!(SCRIPT.matches(clock).count(), 1);
    Script::new(&SCRIPT.replace(clock, "{ ARGV[12], ARGV[13] }"))
}

/// One call, with the arguments of `Rules::arguments`.
#[derive(Debug, Clone, Copy)]
struct Question {
    wanted: u64,
    each: u64,
    held: [u64; 2],
    limits: Limits,
}

/// Limits of a process; 0 for none.
#[derive(Debug, Clone, Copy)]
struct Limits {
    per_minute: [u64; 2],
    largest: u64,
    per_day: u64,
}

impl Limits {
    /// Interval, burst and largest request in picoseconds.
    fn bucket(&self, index: usize) -> [u64; 3] {
        match self.per_minute[index] {
            0 => [0; 3],
            limit => {
                let interval = MINUTE.div_ceil(limit);
                let largest = [1, self.largest][index];
                [interval, limit / 80 * interval, largest * interval]
            }
        }
    }
}

fn ask(
    redis: &mut Connection,
    script: &Script,
    run: &str,
    microseconds: u64,
    question: &Question,
) -> [u64; 3] {
    let mut invocation = script.prepare_invoke();
    for name in ["requests", "tokens", "day"] {
        invocation.key(format!("{run}:{name}"));
    }
    let Question {
        wanted,
        each,
        held,
        limits,
    } = question;
    invocation.arg(&[*wanted, *each, held[0], held[1]]);
    for index in [0, 1] {
        invocation.arg(&limits.bucket(index));
    }
    invocation.arg(limits.per_day);
    invocation.arg(&[microseconds / 1_000_000, microseconds % 1_000_000]);
    invocation.invoke(redis).unwrap()
}

/// Reference model: GCRA by theoretical arrival time, one request at a time, and the day as a list of all admitted
/// requests.
#[derive(Default)]
struct Model {
    buckets: [Option<TheoreticalArrival>; 2],
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
    fn ask(&mut self, microseconds: u64, question: &Question) -> [u64; 3] {
        let now = i128::from(microseconds) * 1_000_000;
        let Question { each, limits, .. } = *question;
        let amounts = [1, i128::from(each)];
        let held = question.held.map(i128::from);
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
            // Waits from before the clock was set back still apply.
            arrival.at -= (arrival.written - now).max(0);
            arrival.at = arrival.at.max(now);
            buckets[index] = Some((interval, (burst - arrival.largest).max(0), arrival));
        }
        let newest = self.day.iter().map(|(slot, _)| *slot).max().unwrap_or(0);
        let slot = newest.max(microseconds / SLOT);
        let of_today: Vec<_> = self
            .day
            .iter()
            .filter(|(earlier, count)| earlier + 288 >= slot && *count > 0)
            .collect();
        let today: u64 = of_today.iter().map(|(_, count)| count).sum();

        let (mut admitted, mut wait) = (0, 0);
        while admitted < question.wanted {
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
            if limits.per_day > 0 && today + admitted >= limits.per_day + question.held[0] {
                let oldest = of_today.iter().map(|(slot, _)| *slot).min().unwrap_or(slot);
                waits.push((oldest + 1) * SLOT + DAY - microseconds);
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
            admitted.saturating_sub(question.held[0]),
            (admitted * each).saturating_sub(question.held[1]),
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

fn limit(most: u64) -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..100u64.min(most), 1..most]
}

/// Two processes with prompts of different lengths.
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

/// One call of the script: index of the process, microseconds since the last call (negative if the clock was set back),
/// number of requests, their size in percent of the largest, and the permits that the process holds.
type Step = (usize, i64, u64, u64, [u64; 2]);

fn step() -> impl Strategy<Value = Step> {
    let gap = prop_oneof![
        0..2_000i64,
        0..2_000_000i64,
        0..90_000_000i64,
        0..7_200_000_000i64,
        0..180_000_000_000i64,
        -2_000_000..0i64,
    ];
    let held = prop_oneof![Just([0, 0]), [0..5u64, 0..3_000u64]];
    (0..2usize, gap, 1..65u64, 0..=100u64, held)
}

#[test]
fn redis_script_matches_reference_model() {
    let redis = Redis::start();
    let script = at_given_times();
    let cases = ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let connection = std::cell::RefCell::new((redis.connect(), 0));
    proptest!(cases, |(processes in processes(), steps in prop::collection::vec(step(), 1..60))| {
        let (redis, case) = &mut *connection.borrow_mut();
        *case += 1;
        let mut model = Model::default();
        let mut now = 1_800_000_000_000_000u64;
        for (index, gap, wanted, share, held) in steps {
            now = now.saturating_add_signed(gap);
            let limits = processes[index];
            let each = limits.largest * share / 100;
            let question = Question { wanted, each, held, limits };
            let answer = ask(redis, &script, &format!("{{{case}}}"), now, &question);
            prop_assert_eq!(answer, model.ask(now, &question), "{:?} at {}", question, now);
        }
    });
}

/// Send times in microseconds if every request is sent as soon as it is admitted.
fn departures(redis: &Redis, limits: Limits, each: u64, count: usize) -> Vec<u64> {
    let (mut connection, script) = (redis.connect(), at_given_times());
    let mut now = 1_800_000_000_000_000u64;
    let mut times = Vec::new();
    while times.len() < count {
        let question = Question {
            wanted: 64,
            each,
            held: [0, 0],
            limits,
        };
        let [requests, tokens, wait] = ask(&mut connection, &script, "{x}", now, &question);
        assert_eq!(tokens, requests * each);
        times.extend(std::iter::repeat_n(now, requests as usize));
        now += wait;
    }
    times
}

fn busiest(times: &[u64], window: u64) -> usize {
    let within = times.iter().enumerate().map(|(first, start)| {
        let next = times.partition_point(|time| *time < start + window);
        next - first
    });
    within.max().unwrap()
}

#[test]
fn redis_script_respects_and_exhausts_minute_limit() {
    for (per_minute, each, largest, limit, burst) in [
        ([1, 0], 10, 10, 1, 1),
        ([159, 0], 10, 10, 159, 1),
        ([700, 0], 10, 10, 700, 8),
        // Tokens of 600 requests.
        ([7_001, 60_000], 100, 100, 600, 7),
        ([0, 60_000], 100, 7_000, 600, 70),
    ] {
        let redis = Redis::start();
        let limits = Limits {
            per_minute,
            largest,
            per_day: 0,
        };
        let times = departures(&redis, limits, each, 3 * limit);
        let most = busiest(&times, 60_000_000);
        assert!(most <= limit + burst, "{most} of {limit}");
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
    let times = departures(&redis, limits, 1, 1_200);
    assert_eq!(busiest(&times, DAY), 300);
    let days = (times[1_199] - times[0]) as f64 / DAY as f64;
    assert!((3.0..3.1).contains(&days), "{days}");
    // The key expires on the server even if the client dies.
    for name in ["requests", "day"] {
        let seconds: i64 = redis.ask(&format!("TTL {{x}}:{name}"));
        assert!((60..=2 * 86_400).contains(&seconds), "{name}: {seconds}");
    }
}
