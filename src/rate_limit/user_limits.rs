//! The user's own ceilings: requests and tokens a minute.
//!
//! governor's GCRA does the pacing on tokio's clock, so that tests can pause it. It is asked by the
//! dispatcher alone, one request at a time in the order of the queue: it is not fair among waiters
//! and cannot give back what it granted.

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

/// The time since the limiter was made, on tokio's clock.
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

pub(crate) struct UserLimits {
    clock: TokioClock,
    requests: Option<Gcra>,
    tokens: Option<Gcra>,
    /// What has been granted to the head of the queue, which still waits for the rest; a grant
    /// cannot be returned, so it is kept for whoever is asked about next.
    granted_tokens: u32,
    limits: LimitsConfig,
    /// Tokens that may leave at once at least.
    largest: u64,
}

impl UserLimits {
    /// `largest` is the estimate of tokens of the largest request to come.
    ///
    /// A burst is less than a second's worth, but at least one request. In any minute no more leaves than the
    /// limit and one burst. A request that could never leave is an error.
    pub(crate) fn new(limits: &LimitsConfig, largest: u64) -> Result<UserLimits> {
        check_largest(limits, largest)?;
        let clock = TokioClock {
            start: Instant::now(),
        };
        let gcra = |per_minute, least| gcra(per_minute, least, clock.clone());
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

    /// Makes room for a request that is larger than was known. What it is let out by must first come in:
    /// no minute sees more for it.
    ///
    /// # Errors
    /// As [`Ceilings::new`].
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
        if let Some(all) = NonZeroU32::new(burst(limit).max(largest as u32)) {
            // A new one begins full.
            let _ = tokens.check_n(all);
        }
        (self.tokens, self.largest) = (Some(tokens), largest);
        self.granted_tokens = 0;
        Ok(())
    }

    /// May a request of about so many tokens leave now? If not, when to ask again.
    pub(crate) fn admit(&mut self, tokens: u64) -> Result<(), Instant> {
        if let Some(limiter) = &self.tokens {
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            if let Some(missing) = NonZeroU32::new(tokens.saturating_sub(self.granted_tokens)) {
                match limiter.check_n(missing) {
                    Ok(Ok(())) => self.granted_tokens += missing.get(),
                    Ok(Err(not_until)) => return Err(self.instant(not_until.earliest_possible())),
                    // The burst holds the largest request, so no request is larger than it.
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

    fn instant(&self, reference: Duration) -> Instant {
        // A timer may fire a little early by governor's nanoseconds.
        self.clock.start + reference + Duration::from_millis(1)
    }
}

/// Refuses a limit that the largest request, of about so many tokens, never fits into.
pub(crate) fn check_largest(limits: &LimitsConfig, largest: u64) -> Result<()> {
    if let Some(limit) = limits.tokens_per_minute
        && largest > u64::from(limit)
    {
        return Err(Exit::Usage(format!(
            "a request may use about {largest} tokens (prompt and `sampling.max_tokens`), more \
             than `limits.tokens_per_minute` = {limit} ever allows: lower \
             `sampling.max_tokens` or raise the limit"
        ))
        .into());
    }
    Ok(())
}

/// What may leave at once: three quarters of a second's worth. A server whose bucket holds a second's
/// worth, and whose clock differs a little, then never has to refuse.
pub(crate) fn burst(per_minute: u32) -> u32 {
    per_minute / 80
}

/// A limiter of so many cells a minute with a burst of `least` at least.
fn gcra(per_minute: u32, least: u32, clock: TokioClock) -> Result<Gcra> {
    // Rounded up: rounding down would let out a little more than the limit.
    let period = Duration::from_nanos(60_000_000_000u64.div_ceil(u64::from(per_minute.max(1))));
    let quota = Quota::with_period(period)
        .filter(|_| per_minute > 0)
        .ok_or_else(|| Exit::Usage("a limit of 0 a minute lets nothing out: remove it".into()))?;
    let burst = NonZeroU32::new(burst(per_minute).max(least)).unwrap_or(NonZeroU32::MIN);
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

    /// Lets requests of these sizes out as fast as they may, and returns when each left, in seconds.
    async fn departures(
        limiter: &mut UserLimits,
        sizes: impl IntoIterator<Item = u64>,
    ) -> Vec<f64> {
        let start = Instant::now();
        let mut times = Vec::new();
        for tokens in sizes {
            while let Err(until) = limiter.admit(tokens) {
                tokio::time::sleep_until(until).await;
            }
            times.push(start.elapsed().as_secs_f64());
        }
        times
    }

    /// The most that leaves in any minute, each departure weighing its size.
    fn busiest_minute(times: &[f64], sizes: &[u64]) -> u64 {
        let weight = |start: f64| -> u64 {
            let inside = times
                .iter()
                .map(|time| (start..start + 60.0).contains(time));
            inside
                .zip(sizes)
                .filter(|(inside, _)| *inside)
                .map(|(_, size)| size)
                .sum()
        };
        times.iter().map(|&start| weight(start)).max().unwrap_or(0)
    }

    #[tokio::test(start_paused = true)]
    async fn no_minute_sees_more_requests_than_the_limit_and_a_burst() {
        for limit in [1, 7, 60, 500, 6_000] {
            let mut limiter = UserLimits::new(&limits(Some(limit), None), 1).unwrap();
            let count = 3 * limit as usize;
            let times = departures(&mut limiter, vec![1; count]).await;
            let burst = u64::from((limit / 60).max(1));
            let busiest = busiest_minute(&times, &vec![1; count]);
            assert!(busiest <= u64::from(limit) + burst, "{busiest} of {limit}");
            // And the limit is used: three minutes' worth takes about three minutes.
            assert!(
                (110.0..190.0).contains(times.last().unwrap()),
                "{limit}: {times:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_minute_sees_more_tokens_than_the_limit_and_a_burst() {
        let sizes: Vec<u64> = (0..600).map(|index| 50 + index * 37 % 400).collect();
        let mut limiter = UserLimits::new(&limits(Some(600), Some(40_000)), 449).unwrap();
        let times = departures(&mut limiter, sizes.iter().copied()).await;
        let busiest = busiest_minute(&times, &sizes);
        assert!(busiest <= 40_000 + 666, "{busiest}");
        assert!(busiest >= 39_000, "{busiest}");
    }

    #[tokio::test(start_paused = true)]
    async fn room_for_a_larger_request_lets_no_more_out() {
        let mut limiter = UserLimits::new(&limits(None, Some(6_000)), 100).unwrap();
        let start = Instant::now();
        let (mut times, mut sizes) = (Vec::new(), Vec::new());
        for round in 1..=20 {
            let largest = 100 * round;
            limiter.allow_request_of(largest).unwrap();
            let before = start.elapsed().as_secs_f64();
            let more = [largest, 50, 100, 50];
            let left = departures(&mut limiter, more).await;
            times.extend(left.into_iter().map(|time| before + time));
            sizes.extend(more);
        }
        let busiest = busiest_minute(&times, &sizes);
        assert!(busiest <= 6_000 + 2_000, "{busiest}");
        assert!(busiest >= 5_000, "{busiest}");
        assert!(limiter.allow_request_of(6_001).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_granted_to_a_waiting_request_are_not_lost() {
        let mut limiter = UserLimits::new(&limits(Some(60), Some(6_000)), 6_000).unwrap();
        assert_eq!(departures(&mut limiter, [100]).await, [0.0]);
        // Tokens are there, but the next request has to wait a second for its turn.
        for _ in 0..50 {
            assert!(limiter.admit(5_000).is_err());
        }
        let times = departures(&mut limiter, [5_000, 900]).await;
        assert!(times[1] < 2.1, "{times:?}");
    }

    #[test]
    fn a_request_that_can_never_leave_is_an_error() {
        let error = UserLimits::new(&limits(None, Some(1_000)), 1_500)
            .err()
            .unwrap();
        for part in ["1500", "`limits.tokens_per_minute` = 1000"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(UserLimits::new(&limits(Some(0), None), 1).is_err());
    }
}
