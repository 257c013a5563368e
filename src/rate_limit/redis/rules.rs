//! [`SharedRules`]: the arguments of `admit.lua`; [`SharedCharge`]: its reply. Pure.

use std::time::Duration;

use crate::config::teacher::identity;
use crate::config::{LimitsConfig, TeacherConfig};
use crate::rate_limit::user_limits::burst;

/// Number of keys of the script.
pub(crate) const KEY_COUNT: usize = 3;

/// Number of integers in the reply of the script.
pub(crate) const REPLY_LENGTH: usize = 3;

/// Arguments of the script, in the order of `ARGV`.
pub(crate) type Arguments = [u64; 11];

/// A minute in picoseconds. In this unit, the interval of every limit is an integer that a double of Lua represents
/// exactly.
const MINUTE_PS: u64 = 60_000_000_000_000;

/// Largest integer up to which a double represents every integer.
const MAX_EXACT: u64 = 1 << 53;

/// Returns the names of the script's keys. The part in braces is the same in all of them, so that a cluster keeps
/// them on one node.
pub(crate) fn keys(teacher: &TeacherConfig) -> [String; KEY_COUNT] {
    let endpoint = format!("{}\n{}", identity(teacher), teacher.model);
    let hash = blake3::hash(endpoint.as_bytes()).to_hex();
    ["requests", "tokens", "day"].map(|name| format!("distill:limit:{{{}}}:{name}", &hash[..32]))
}

/// The user's limits in the units of the script.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedRules {
    requests: Bucket,
    tokens: Bucket,
    /// 0 if there is no limit.
    requests_per_day: u64,
}

/// A limit per minute, in picoseconds. All fields are 0 if there is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Bucket {
    /// Time in which one unit drains at the limit.
    interval: u64,
    /// Time in which the burst drains. The script raises it to the largest request.
    burst: u64,
    /// Time in which the largest request drains.
    largest: u64,
}

impl Bucket {
    fn new(per_minute: Option<u32>, largest: u64) -> Bucket {
        let Some(per_minute) = per_minute else {
            return Bucket::default();
        };
        // Rounded up, because a shorter interval would admit more than the limit.
        let interval = MINUTE_PS.div_ceil(u64::from(per_minute.max(1)));
        Bucket {
            interval,
            burst: interval * u64::from(burst(per_minute)),
            largest: interval * largest.min(per_minute.into()),
        }
    }
}

impl SharedRules {
    /// Converts the limits. `largest` is the estimated number of tokens of the largest request.
    pub(crate) fn new(limits: &LimitsConfig, largest: u64) -> SharedRules {
        let requests_per_day = limits.requests_per_day.unwrap_or(0);
        SharedRules {
            requests: Bucket::new(limits.requests_per_minute, 1),
            tokens: Bucket::new(limits.tokens_per_minute, largest),
            requests_per_day: requests_per_day.min(MAX_EXACT),
        }
    }

    /// Returns the arguments for up to `count` requests of `tokens` tokens each. `unused` are the numbers of requests
    /// and tokens in local permits.
    pub(crate) fn arguments(&self, count: u64, tokens: u64, unused: (u64, u64)) -> Arguments {
        [
            count,
            tokens,
            unused.0,
            unused.1,
            self.requests.interval,
            self.requests.burst,
            self.requests.largest,
            self.tokens.interval,
            self.tokens.burst,
            self.tokens.largest,
            self.requests_per_day,
        ]
    }
}

/// Reply of the script: the amounts that it has charged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SharedCharge {
    pub requests: u64,
    pub tokens: u64,
    /// Time until the limits admit one request, if nothing was charged.
    pub wait: Duration,
}

impl SharedCharge {
    /// Converts the reply.
    pub(crate) fn new([requests, tokens, microseconds]: [u64; REPLY_LENGTH]) -> SharedCharge {
        SharedCharge {
            requests,
            tokens,
            wait: Duration::from_micros(microseconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_bucket_intervals_are_rounded_up_and_exact_in_doubles() {
        for per_minute in [1, 7, 60, 159, 6_000, 2_000_000, u32::MAX] {
            for largest in [1, 1_000, u64::from(per_minute)] {
                let bucket = Bucket::new(Some(per_minute), largest);
                let minute = bucket.interval * u64::from(per_minute);
                assert!(minute >= MINUTE_PS && minute - MINUTE_PS < u64::from(per_minute));
                // The highest level, plus the two minutes after which the script assumes that a bucket has drained.
                assert!(bucket.burst + 2 * bucket.largest + 2 * MINUTE_PS < MAX_EXACT);
            }
        }
        assert_eq!(Bucket::new(None, 9), Bucket::default());
    }

    #[test]
    fn redis_keys_depend_on_endpoint_and_model_and_share_a_hash_tag() {
        let keys_of = |base_url: &str, model: &str| {
            keys(&TeacherConfig {
                base_url: base_url.into(),
                model: model.into(),
                ..TeacherConfig::default()
            })
        };
        let keys = keys_of("https://a/v1", "m");
        assert_eq!(keys, keys_of("https://a/v1/", "m"));
        assert_ne!(keys[0], keys_of("https://a/v1", "n")[0]);
        assert_ne!(keys[0], keys_of("https://b/v1", "m")[0]);
        let tag = |key: &str| key.split(['{', '}']).nth(1).unwrap().to_string();
        assert!(keys.iter().all(|key| tag(key) == tag(&keys[0])));
        assert!(keys[0].starts_with("distill:limit:{") && keys[0].ends_with("}:requests"));
    }
}
