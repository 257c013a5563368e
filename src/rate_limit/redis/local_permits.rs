//! Permits that the server has granted and this process has not used yet. Pure.
//!
//! Requests and tokens are counted separately: a permit may be granted for one row and used by another.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Maximum age of a permit. Older ones are dropped: used late, they would add to the permits granted by then.
pub(crate) const HELD: Duration = Duration::from_millis(250);

/// Maximum number of permits per call.
const LARGEST_BATCH: u64 = 64;

/// Unused permits of one endpoint.
#[derive(Debug)]
pub(crate) struct LocalPermits {
    /// Oldest first.
    grants: VecDeque<Grant>,
    /// Number of permits to request per call. It doubles while permits are used immediately, and halves while
    /// something else delays the requests.
    batch: u64,
    /// Time of the last grant, if there was no call since.
    granted: Option<Instant>,
}

/// Unused part of one grant.
#[derive(Debug)]
struct Grant {
    at: Instant,
    requests: u64,
    tokens: u64,
}

impl Default for LocalPermits {
    fn default() -> Self {
        Self {
            grants: VecDeque::new(),
            batch: 1,
            granted: None,
        }
    }
}

impl LocalPermits {
    /// Adds a grant of the server.
    pub(crate) fn add(&mut self, requests: u64, tokens: u64, at: Instant) {
        if requests + tokens > 0 {
            self.granted = Some(at);
            self.grants.push_back(Grant {
                at,
                requests,
                tokens,
            });
        }
    }

    /// Takes a permit for a request of `tokens` tokens. Returns false if there is none.
    pub(crate) fn take(&mut self, tokens: u64, now: Instant) -> bool {
        while let Some(oldest) = self.grants.front()
            && now.saturating_duration_since(oldest.at) > HELD
        {
            if oldest.requests > 0 {
                self.batch = 1;
            }
            self.grants.pop_front();
        }
        let (held_requests, held_tokens) = self.held();
        if held_requests < 1 || held_tokens < tokens {
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

    /// Number of unused requests and tokens.
    pub(crate) fn held(&self) -> (u64, u64) {
        let sum = |amount: fn(&Grant) -> u64| self.grants.iter().map(amount).sum();
        (sum(|grant| grant.requests), sum(|grant| grant.tokens))
    }

    /// Number of permits to request, at most `slots`.
    pub(crate) fn wanted(&mut self, slots: usize, now: Instant) -> u64 {
        if let Some(granted) = self.granted.take() {
            self.batch = if now.saturating_duration_since(granted) < HELD / 4 {
                (self.batch * 2).min(LARGEST_BATCH)
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
        assert_eq!(permits.held(), (2, 100));
        // The rest of the first grant and a part of the second.
        assert!(!permits.take(101, now));
        assert!(permits.take(60, now));
        assert_eq!(permits.held(), (1, 40));
        assert!(!permits.take(41, after(now, 251)), "the first one expired");
        assert_eq!(permits.held(), (1, 40));
        assert!(!permits.take(1, after(now, 351)));
        assert_eq!(permits.held(), (0, 0));
    }

    #[test]
    fn wanted_doubles_while_permits_are_used_immediately() {
        let now = Instant::now();
        let mut permits = LocalPermits::default();
        assert_eq!(permits.wanted(1_000, now), 1);
        for expected in [2, 4, 8, 16, 32, 64, 64] {
            permits.add(1, 1, now);
            assert!(permits.take(1, now));
            assert_eq!(permits.wanted(1_000, after(now, 1)), expected);
        }
        assert_eq!(permits.wanted(5, now), 5);
        assert_eq!(permits.wanted(0, now), 1);
        permits.add(1, 1, now);
        assert_eq!(permits.wanted(1_000, after(now, 100)), 32, "used late");
        permits.add(1, 1, now);
        assert!(!permits.take(1, after(now, 300)));
        assert_eq!(permits.wanted(1_000, after(now, 300)), 1, "one expired");
    }
}
