//! Permits that have been granted and not used yet. Pure.
//!
//! Requests and tokens are counted apart: a permit may have been asked for on behalf of another row
//! than the one whose turn it is when it comes.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// A permit that is older is lost: what leaves long after it was admitted would leave together with
/// what is admitted then.
pub(crate) const HELD: Duration = Duration::from_millis(250);

/// Permits asked for at once, at most.
const LARGEST_BATCH: u64 = 64;

#[derive(Debug)]
pub(crate) struct LocalPermits {
    /// Oldest first.
    grants: VecDeque<Grant>,
    /// Permits to ask for at once: more of them where they leave at once, fewer where something else
    /// holds them up.
    batch: u64,
    /// When the last grant came, if nothing has been asked for since.
    granted: Option<Instant>,
}

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

    /// Takes a permit for a request of so many tokens, if there is one.
    pub(crate) fn take(&mut self, tokens: u64, now: Instant) -> bool {
        while let Some(oldest) = self.grants.front()
            && now.saturating_duration_since(oldest.at) > HELD
        {
            if oldest.requests > 0 {
                self.batch = 1;
            }
            self.grants.pop_front();
        }
        let held = self.held();
        if held.0 < 1 || held.1 < tokens {
            return false;
        }
        let mut missing = (1, tokens);
        for grant in &mut self.grants {
            let part = (grant.requests.min(missing.0), grant.tokens.min(missing.1));
            grant.requests -= part.0;
            grant.tokens -= part.1;
            missing = (missing.0 - part.0, missing.1 - part.1);
        }
        true
    }

    /// Requests and tokens that are there.
    pub(crate) fn held(&self) -> (u64, u64) {
        let sum = |of: fn(&Grant) -> u64| self.grants.iter().map(of).sum();
        (sum(|grant| grant.requests), sum(|grant| grant.tokens))
    }

    /// How many to ask for, where there is room for so many.
    pub(crate) fn wanted(&mut self, room: usize, now: Instant) -> u64 {
        if let Some(granted) = self.granted.take() {
            self.batch = match now.saturating_duration_since(granted) < HELD / 4 {
                true => (self.batch * 2).min(LARGEST_BATCH),
                false => (self.batch / 2).max(1),
            };
        }
        self.batch.min(room.max(1) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, milliseconds: u64) -> Instant {
        start + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_permit_covers_any_row_that_is_no_larger_and_is_lost_when_it_is_old() {
        let now = Instant::now();
        let mut hand = LocalPermits::default();
        assert!(!hand.take(0, now));
        hand.add(2, 200, now);
        hand.add(1, 50, after(now, 100));
        assert!(hand.take(150, now));
        assert_eq!(hand.held(), (2, 100));
        // The rest of the first grant and a part of the second.
        assert!(!hand.take(101, now));
        assert!(hand.take(60, now));
        assert_eq!(hand.held(), (1, 40));
        assert!(!hand.take(41, after(now, 251)), "the first one is lost");
        assert_eq!(hand.held(), (1, 40));
        assert!(!hand.take(1, after(now, 351)));
        assert_eq!(hand.held(), (0, 0));
    }

    #[test]
    fn as_many_are_asked_for_as_leave_at_once() {
        let now = Instant::now();
        let mut hand = LocalPermits::default();
        assert_eq!(hand.wanted(1_000, now), 1);
        for expected in [2, 4, 8, 16, 32, 64, 64] {
            hand.add(1, 1, now);
            assert!(hand.take(1, now));
            assert_eq!(hand.wanted(1_000, after(now, 1)), expected);
        }
        assert_eq!(hand.wanted(5, now), 5);
        assert_eq!(hand.wanted(0, now), 1);
        hand.add(1, 1, now);
        assert_eq!(hand.wanted(1_000, after(now, 100)), 32, "they were held up");
        hand.add(1, 1, now);
        assert!(!hand.take(1, after(now, 300)));
        assert_eq!(hand.wanted(1_000, after(now, 300)), 1, "one was lost");
    }
}
