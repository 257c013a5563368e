//! [`LocalPermits`]: permits that the Redis server has granted and this process has not used yet. Pure.
//!
//! Requests and tokens are counted separately, because a permit that was granted for one row may be used by another.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Maximum age of a permit. Older permits are dropped: used together with newer ones, they could exceed the limit.
pub(crate) const MAX_PERMIT_AGE: Duration = Duration::from_millis(250);

/// Maximum number of permits to request per call of the script.
const MAX_BATCH: u64 = 64;

/// Unused permits of one endpoint.
#[derive(Debug)]
pub(crate) struct LocalPermits {
    /// Unused grants, oldest first.
    grants: VecDeque<Grant>,
    /// Number of permits to request per call. At each call after a grant, it doubles if the grant was used up within a
    /// quarter of [`MAX_PERMIT_AGE`], and halves otherwise. It is reset to 1 when a grant with unused requests expires.
    batch: u64,
    /// Time of the latest grant since the last call of the script; None if there was no grant.
    last_grant: Option<Instant>,
}

/// Unused part of one grant.
#[derive(Debug)]
struct Grant {
    granted_at: Instant,
    requests: u64,
    tokens: u64,
}

impl Default for LocalPermits {
    fn default() -> Self {
        Self {
            grants: VecDeque::new(),
            batch: 1,
            last_grant: None,
        }
    }
}

impl LocalPermits {
    /// Adds a grant of the server.
    pub(crate) fn add(&mut self, requests: u64, tokens: u64, granted_at: Instant) {
        if requests + tokens > 0 {
            self.last_grant = Some(granted_at);
            self.grants.push_back(Grant {
                granted_at,
                requests,
                tokens,
            });
        }
    }

    /// Takes a permit for a request of `tokens` tokens. Returns false if the unused permits do not cover the request.
    pub(crate) fn take(&mut self, tokens: u64, now: Instant) -> bool {
        while let Some(oldest) = self.grants.front()
            && now.saturating_duration_since(oldest.granted_at) > MAX_PERMIT_AGE
        {
            if oldest.requests > 0 {
                self.batch = 1;
            }
            self.grants.pop_front();
        }
        let (unused_requests, unused_tokens) = self.unused();
        if unused_requests < 1 || unused_tokens < tokens {
            return false;
        }
        let mut missing_requests = 1;
        let mut missing_tokens = tokens;
        for grant in &mut self.grants {
            let requests = grant.requests.min(missing_requests);
            let tokens = grant.tokens.min(missing_tokens);
            grant.requests -= requests;
            grant.tokens -= tokens;
            missing_requests -= requests;
            missing_tokens -= tokens;
        }
        true
    }

    /// Returns the numbers of unused requests and tokens.
    pub(crate) fn unused(&self) -> (u64, u64) {
        let sum = |amount: fn(&Grant) -> u64| self.grants.iter().map(amount).sum();
        (sum(|grant| grant.requests), sum(|grant| grant.tokens))
    }

    /// Returns the number of permits to request in the next call: at least 1, and otherwise at most `slots`, the number
    /// of requests that could be sent now without rate limits.
    pub(crate) fn next_batch(&mut self, slots: usize, now: Instant) -> u64 {
        if let Some(last_grant) = self.last_grant.take() {
            self.batch = if now.saturating_duration_since(last_grant) < MAX_PERMIT_AGE / 4 {
                (self.batch * 2).min(MAX_BATCH)
            } else {
                (self.batch / 2).max(1)
            };
        }
        self.batch.min(slots.max(1) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    #[test]
    fn permit_covers_any_row_that_fits_and_expires() {
        let now = Instant::now();
        let mut permits = LocalPermits::default();
        assert!(!permits.take(0, now));
        permits.add(2, 200, now);
        permits.add(1, 50, after(now, 100));
        assert!(permits.take(150, now));
        assert_eq!(permits.unused(), (2, 100));
        assert!(!permits.take(101, now));
        // The second request uses up the first grant and a part of the second one.
        assert!(permits.take(60, now));
        assert_eq!(permits.unused(), (1, 40));
        assert!(
            !permits.take(41, after(now, 251)),
            "only 40 tokens are left"
        );
        assert_eq!(permits.unused(), (1, 40));
        assert!(!permits.take(1, after(now, 351)));
        assert_eq!(permits.unused(), (0, 0));
    }

    #[test]
    fn next_batch_doubles_while_permits_are_used_immediately() {
        let now = Instant::now();
        let mut permits = LocalPermits::default();
        assert_eq!(permits.next_batch(1_000, now), 1);
        for expected in [2, 4, 8, 16, 32, 64, 64] {
            permits.add(1, 1, now);
            assert!(permits.take(1, now));
            assert_eq!(permits.next_batch(1_000, after(now, 1)), expected);
        }
        assert_eq!(permits.next_batch(5, now), 5);
        assert_eq!(permits.next_batch(0, now), 1);
        permits.add(1, 1, now);
        assert_eq!(
            permits.next_batch(1_000, after(now, 100)),
            32,
            "the grant was used late"
        );
        permits.add(1, 1, now);
        assert!(!permits.take(1, after(now, 300)));
        assert_eq!(
            permits.next_batch(1_000, after(now, 300)),
            1,
            "a grant has expired"
        );
    }
}
