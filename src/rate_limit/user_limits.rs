//! [`UserLimits`]: the user's limits of requests and tokens per minute.
//!
//! The algorithm is GCRA (generic cell rate algorithm), from the crate `governor`, on tokio's clock, which tests can
//! pause. Only the dispatcher calls it, for one request at a time in the order of the queue: governor does not serve
//! waiting callers in order, and a grant cannot be returned.

use std::num::NonZeroU32;
use std::time::Duration;

use anyhow::Result;
use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::time::Instant;

use crate::config::LimitsConfig;
use crate::exit::Exit;

/// Clock of a limiter: the time since its creation, on tokio's clock.
#[derive(Clone)]
struct TokioClock {
    start: Instant,
}

impl Clock for TokioClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

type Gcra = RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<Duration>>;

/// Limiters for requests and tokens per minute.
pub(crate) struct UserLimits {
    clock: TokioClock,
    requests: Option<Gcra>,
    tokens: Option<Gcra>,
    /// Tokens granted to the first request of the queue while it still waits for the request limit. A grant cannot be
    /// returned, so it is kept for the next call.
    granted_tokens: u32,
    limits: LimitsConfig,
    /// Tokens of the largest request, which are the minimum burst.
    largest: u64,
}

impl UserLimits {
    /// Creates limiters whose burst is less than one second of the limit, but at least the largest request. In any
    /// minute they admit at most the limit plus one burst. `largest` is the estimated number of tokens of the largest
    /// request.
    ///
    /// # Errors
    /// If the largest request can never be sent.
    pub(crate) fn new(limits: &LimitsConfig, largest: u64) -> Result<UserLimits> {
        check_largest(limits, largest)?;
        let clock = TokioClock {
            start: Instant::now(),
        };
        let gcra = |per_minute, min_burst| gcra(per_minute, min_burst, clock.clone());
        Ok(UserLimits {
            requests: limits
                .requests_per_minute
                .map(|limit| gcra(limit, 1))
                .transpose()?,
            tokens: limits
                .tokens_per_minute
                .map(|limit| gcra(limit, largest as u32))
                .transpose()?,
            clock,
            granted_tokens: 0,
            limits: limits.clone(),
            largest,
        })
    }

    /// Raises the burst to the tokens of a larger request. The new limiter starts with its burst used up, so that the
    /// change admits no additional tokens.
    ///
    /// # Errors
    /// Those of [`UserLimits::new`].
    pub(crate) fn allow_request_of(&mut self, largest: u64) -> Result<()> {
        let Some(limit) = self
            .limits
            .tokens_per_minute
            .filter(|_| largest > self.largest)
        else {
            return Ok(());
        };
        check_largest(&self.limits, largest)?;
        let tokens = gcra(limit, largest as u32, self.clock.clone())?;
        if let Some(full_burst) = NonZeroU32::new(burst(limit).max(largest as u32)) {
            // A new limiter admits a full burst at once: use it up.
            let _ = tokens.check_n(full_burst);
        }
        self.tokens = Some(tokens);
        self.largest = largest;
        self.granted_tokens = 0;
        Ok(())
    }

    /// Admits a request of about `tokens` tokens.
    ///
    /// # Errors
    /// The instant at which to try again.
    pub(crate) fn admit(&mut self, tokens: u64) -> Result<(), Instant> {
        if let Some(limiter) = &self.tokens {
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            if let Some(missing) = NonZeroU32::new(tokens.saturating_sub(self.granted_tokens)) {
                match limiter.check_n(missing) {
                    Ok(Ok(())) => self.granted_tokens += missing.get(),
                    Ok(Err(not_until)) => return Err(self.instant(not_until.earliest_possible())),
                    // Unreachable: the burst is at least the largest request.
                    Err(_) => return Err(Instant::now() + Duration::from_secs(60)),
                }
            }
        }
        if let Some(limiter) = &self.requests
            && let Err(not_until) = limiter.check()
        {
            return Err(self.instant(not_until.earliest_possible()));
        }
        self.granted_tokens = 0;
        Ok(())
    }

    /// Converts a time of governor, which is counted from the start of the clock.
    fn instant(&self, since_start: Duration) -> Instant {
        // tokio's timers round to milliseconds, so a timer may fire before governor admits the request.
        self.clock.start + since_start + Duration::from_millis(1)
    }
}

/// Checks that the token limit admits the largest request, of about `largest` tokens.
pub(crate) fn check_largest(limits: &LimitsConfig, largest: u64) -> Result<()> {
    if let Some(limit) = limits.tokens_per_minute
        && largest > u64::from(limit)
    {
        return Err(Exit::Usage(format!(
            "a request may use about {largest} tokens (prompt and `sampling.max_tokens`), which exceeds \
             `limits.tokens_per_minute` = {limit}: lower `sampling.max_tokens` or raise the limit"
        ))
        .into());
    }
    Ok(())
}

/// Returns the burst of a limit: three quarters of one second's amount. A server whose bucket has the capacity of one
/// second then refuses no request, even if its clock runs at a slightly different speed.
pub(crate) fn burst(per_minute: u32) -> u32 {
    // 3/4 of 1/60.
    per_minute / 80
}

/// Creates a limiter of `per_minute` units with a burst of at least `min_burst` units.
fn gcra(per_minute: u32, min_burst: u32, clock: TokioClock) -> Result<Gcra> {
    // Rounded up, because a shorter period would admit more than the limit.
    let period = Duration::from_nanos(60_000_000_000u64.div_ceil(u64::from(per_minute.max(1))));
    let quota = Quota::with_period(period)
        .filter(|_| per_minute > 0)
        .ok_or_else(|| {
            Exit::Usage("a limit of 0 per minute blocks every request: remove it".into())
        })?;
    let burst = NonZeroU32::new(burst(per_minute).max(min_burst)).unwrap_or(NonZeroU32::MIN);
    Ok(RateLimiter::direct_with_clock(
        quota.allow_burst(burst),
        clock,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests: Option<u32>, tokens: Option<u32>) -> LimitsConfig {
        LimitsConfig {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            ..LimitsConfig::default()
        }
    }

    /// Sends requests of these sizes as fast as the limiter admits them. Returns the send times in seconds.
    async fn send_times(
        limiter: &mut UserLimits,
        sizes: impl IntoIterator<Item = u64>,
    ) -> Vec<f64> {
        let start = Instant::now();
        let mut times = Vec::new();
        for tokens in sizes {
            while let Err(retry_at) = limiter.admit(tokens) {
                tokio::time::sleep_until(retry_at).await;
            }
            times.push(start.elapsed().as_secs_f64());
        }
        times
    }

    /// Returns the maximum total size of the requests in any minute.
    fn busiest_minute(times: &[f64], sizes: &[u64]) -> u64 {
        let size_of_minute = |start: f64| -> u64 {
            let inside = times
                .iter()
                .map(|time| (start..start + 60.0).contains(time));
            inside
                .zip(sizes)
                .filter(|(inside, _)| *inside)
                .map(|(_, size)| size)
                .sum()
        };
        times
            .iter()
            .map(|&start| size_of_minute(start))
            .max()
            .unwrap_or(0)
    }

    #[tokio::test(start_paused = true)]
    async fn requests_in_any_minute_stay_within_limit_and_burst() {
        for limit in [1, 7, 60, 500, 6_000] {
            let mut limiter = UserLimits::new(&limits(Some(limit), None), 1).unwrap();
            let count = 3 * limit as usize;
            let times = send_times(&mut limiter, vec![1; count]).await;
            let burst = u64::from((limit / 60).max(1));
            let busiest = busiest_minute(&times, &vec![1; count]);
            assert!(busiest <= u64::from(limit) + burst, "{busiest} of {limit}");
            // The limit is used: three times the limit takes about three minutes.
            assert!(
                (110.0..190.0).contains(times.last().unwrap()),
                "{limit}: {times:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_in_any_minute_stay_within_limit_and_burst() {
        let sizes: Vec<u64> = (0..600).map(|index| 50 + index * 37 % 400).collect();
        let mut limiter = UserLimits::new(&limits(Some(600), Some(40_000)), 449).unwrap();
        let times = send_times(&mut limiter, sizes.iter().copied()).await;
        let busiest = busiest_minute(&times, &sizes);
        assert!(busiest <= 40_000 + 666, "{busiest}");
        assert!(busiest >= 39_000, "{busiest}");
    }

    #[tokio::test(start_paused = true)]
    async fn raising_the_largest_request_does_not_exceed_the_limit() {
        let mut limiter = UserLimits::new(&limits(None, Some(6_000)), 100).unwrap();
        let start = Instant::now();
        let mut times = Vec::new();
        let mut sizes = Vec::new();
        for round in 1..=20 {
            let largest = 100 * round;
            limiter.allow_request_of(largest).unwrap();
            let before = start.elapsed().as_secs_f64();
            let round_sizes = [largest, 50, 100, 50];
            let sent = send_times(&mut limiter, round_sizes).await;
            times.extend(sent.into_iter().map(|time| before + time));
            sizes.extend(round_sizes);
        }
        let busiest = busiest_minute(&times, &sizes);
        assert!(busiest <= 6_000 + 2_000, "{busiest}");
        assert!(busiest >= 5_000, "{busiest}");
        assert!(limiter.allow_request_of(6_001).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_granted_to_a_waiting_request_are_not_lost() {
        let mut limiter = UserLimits::new(&limits(Some(60), Some(6_000)), 6_000).unwrap();
        assert_eq!(send_times(&mut limiter, [100]).await, [0.0]);
        // Tokens are available, but the next request permit comes after a second.
        for _ in 0..50 {
            assert!(limiter.admit(5_000).is_err());
        }
        let times = send_times(&mut limiter, [5_000, 900]).await;
        assert!(times[1] < 2.1, "{times:?}");
    }

    #[test]
    fn request_above_the_token_limit_is_an_error() {
        let error = UserLimits::new(&limits(None, Some(1_000)), 1_500)
            .err()
            .unwrap();
        for part in ["1500", "`limits.tokens_per_minute` = 1000"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(UserLimits::new(&limits(Some(0), None), 1).is_err());
    }
}
