//! Exponential backoff with jitter. Pure.

use std::time::Duration;

use crate::config;

/// Maximum number of doublings, which keeps the power of two finite.
const MAX_DOUBLINGS: u32 = 32;

/// Returns the pause before the next attempt after `failures` failed attempts (0 counts as 1):
/// `min(base * 2^(failures - 1), max) * random`. With a `random` uniform between 0 and 1 this is exponential backoff
/// with full jitter; a narrower range has less jitter, and 1 none.
///
/// See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
pub(crate) fn backoff(failures: u32, retry: &config::RetryConfig, random: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(MAX_DOUBLINGS);
    let max_pause_s = retry.base.as_secs_f64() * 2f64.powi(doublings as i32);
    Duration::from_secs_f64(max_pause_s.min(retry.max.as_secs_f64()) * random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_the_maximum() {
        let retry = config::RetryConfig {
            base: Duration::from_millis(500),
            max: Duration::from_secs(60),
            ..config::RetryConfig::default()
        };
        let max_pauses =
            [1, 2, 3, 7, 8, 1000].map(|failures| backoff(failures, &retry, 1.0).as_secs_f64());
        assert_eq!(max_pauses, [0.5, 1.0, 2.0, 32.0, 60.0, 60.0]);
        assert_eq!(backoff(5, &retry, 0.0), Duration::ZERO);
    }
}
